"""Why: annotators open the images at the head of the list, so planted faults must stand there and hard classes must not."""

from collections.abc import Callable

import numpy as np
import pytest

from tests.planted import FAULTS, Mask, average_precision, planted
from threestage.data.synthetic import CLASSES, SceneSettings, scene
from threestage.selection.contradictions import contradicted_only, contradiction_of, most_contradicted, usual_surprise
from threestage.selection.held_out import LEAST, HeldOut

SCENES = 30


def asked(number: int, truth: Mask, mask: Mask, doubt: float = 0.02) -> HeldOut:
    """What a good model says of a mask: the truth, less sure at random; the class 1 is hard for it."""
    random = np.random.default_rng(number)
    sure = np.clip(1 - random.exponential(doubt, truth.shape), 0.2, 1)
    sure[truth == 1] *= 0.5
    of_label = np.where(mask == truth, sure, (1 - sure) / (len(CLASSES) - 1))
    surprise = -np.log(np.maximum(of_label, LEAST)).astype(np.float32)
    return HeldOut(f"scene{number}", f"scene{number}.jpg", truth.shape, mask, truth, surprise)


@pytest.fixture(scope="module")
def truths() -> list[Mask]:
    return [scene(5, number, SceneSettings(size=32))[1] for number in range(SCENES)]


@pytest.mark.parametrize("kind", FAULTS)
def test_planted_faults_rank_first(kind: str, truths: list[Mask]) -> None:
    plant: Callable[[Mask, np.random.Generator], Mask] = FAULTS[kind]
    random = np.random.default_rng(1)
    masks = [plant(mask, random) if n < 6 else mask for n, mask in enumerate(truths)]
    changed = {n for n in range(6) if (masks[n] != truths[n]).any()}
    images = [asked(n, *pair) for n, pair in enumerate(zip(truths, masks, strict=True))]
    usual = usual_surprise(images, len(CLASSES))
    found = most_contradicted(contradiction_of(image, usual) for image in images)
    assert {one.image_id for one in found[: len(changed)]} == {f"scene{n}" for n in changed} != set()


def test_what_is_contradicted_is_named(truths: list[Mask]) -> None:
    truth = np.zeros((20, 20), np.uint8)
    truth[5:15, 5:15] = 3
    mask = np.zeros_like(truth)
    mask[0] = 255
    image = asked(0, truth, mask)
    found = contradiction_of(image, np.zeros(len(CLASSES)))
    assert (found.labelled, found.predicted) == (0, 3) and found.pair_share == pytest.approx(100 / 380)
    assert np.array_equal(contradicted_only(image) == 3, truth == 3)
    whole = asked(1, truth, np.full_like(truth, 255))
    nothing = contradiction_of(whole, np.ones(len(CLASSES)))
    assert nothing.labelled is None and nothing.score < 0, "nothing is labelled"


def test_faults_are_planted_as_asked(truths: list[Mask]) -> None:
    masks, faults = planted(truths, 0.2, seed=3)
    assert planted(truths, 0.2, seed=3)[1] == faults and 4 <= len(faults) <= 6
    assert {n for n in range(SCENES) if (masks[n] != truths[n]).any()} == set(faults)
    assert average_precision([0.9, 0.1, 0.5], {0, 1}) == pytest.approx((1 + 2 / 3) / 2)
