"""Why: a validation image that nearly equals a labelled one makes every score too high; with one class left, every prediction is
right, and a mean IoU of 1.000 says nothing."""

import numpy as np
import pytest
from PIL import Image

from tests.refusals import refused
from threestage.data import data_set_checks
from threestage.data.data_set_checks import (
    check_class_pixels,
    gradients,
    near_copies,
    note_near_copies,
    note_other_sizes,
    note_rare_classes,
)
from threestage.data.records import SizeStatistics


def photo(seed: int) -> np.ndarray:
    """Smooth shapes, as in a photo: noise of a few cells, enlarged."""
    cells = np.random.default_rng(seed).integers(0, 256, (5, 6, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(cells).resize((160, 120), Image.Resampling.BICUBIC))


def changed(image: np.ndarray) -> np.ndarray:
    """The next frame: two pixels further, darker, with noise."""
    moved = np.roll(image, 2, axis=1).astype(np.float32) * 0.8
    return np.clip(moved + np.random.default_rng(0).normal(0, 8, image.shape), 0, 255).astype(np.uint8)


def test_a_neighbouring_frame_is_found_and_another_image_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    labelled = [gradients(photo(seed)) for seed in range(30)]
    validation = [gradients(photo(seed)) for seed in range(100, 105)] + [gradients(changed(photo(7)))]
    for at_once in (1, 4, 256):
        monkeypatch.setattr(data_set_checks, "AT_ONCE", at_once)
        assert list(near_copies(validation, labelled)) == [(5, 7)]
    ids = [f"l{number}" for number in range(30)], [f"v{number}" for number in range(6)]
    said = note_near_copies(ids[0], labelled, ids[1], validation)
    assert said is not None and said.startswith(
        "1 of 6 validation images nearly equal a labelled one (v5 and l7 first)"
    )
    assert "data.group" in said
    assert note_near_copies(ids[0], labelled, ids[1][:5], validation[:5]) is None


def test_images_of_one_colour_and_no_images_are_no_copies() -> None:
    plain = [gradients(np.full((40, 40, 3), value, np.uint8)) for value in (0, 120)]
    assert note_near_copies(["a", "b"], plain, ["c", "d"], plain) is None
    assert note_near_copies([], [], ["c", "d"], plain) is None and note_near_copies(["a", "b"], plain, [], []) is None


def test_images_of_any_size_are_compared() -> None:
    image = photo(1)
    assert float(gradients(image) @ gradients(image.repeat(2, 0).repeat(2, 1))) > 0.99
    assert gradients(np.zeros((1, 1, 3), np.uint8)).shape == (2 * data_set_checks.SIDE**2,)


NAMES = ("ground", "thing", "other")


def test_every_class_without_a_pixel_is_named() -> None:
    assert check_class_pixels("ds", NAMES, [1, 2, 3], "3 masks") is None
    warning = check_class_pixels("ds", NAMES, [5, 9, 0], "3 masks")
    assert warning is not None and "of other in 3 masks" in warning and "thing" not in warning


@pytest.mark.parametrize(("pixels", "present"), [([7, 0, 0], "only class ground"), ([0, 0, 0], "no class")])
def test_fewer_than_two_classes_are_refused(pixels: list[int], present: str) -> None:
    with refused("data/one-class", present, "thing, other", "use this map"):
        check_class_pixels("ds", NAMES, pixels, "3 masks", fix="use this map")


def test_classes_that_are_hardly_there_are_named() -> None:
    shown = [("road", 99_000, 4), ("pole", 30, 3), ("bird", 900, 1), ("nothing", 0, 0)]
    once, tiny = note_rare_classes("data", shown, 4)
    assert once.startswith("data: one image only shows bird:") and "are pole 0.03%:" in tiny
    assert "nothing" not in once + tiny, "a class without a pixel has a line of its own"
    assert note_rare_classes("data", [("road", 10, 1), ("bird", 10, 1)], 1) == [], "with one mask every class is in one"


@pytest.mark.parametrize(
    ("labelled", "least", "most", "noted"),
    [
        (((360, 360), (480, 480)), (360, 480), (360, 480), False),
        (((360, 360), (480, 480)), (360, 480), (400, 500), False),
        (((360, 360), (480, 480)), (360, 480), (720, 960), True),
        (((360, 360), (480, 480)), (180, 240), (360, 480), True),
        (((360, 720), (480, 960)), (180, 240), (720, 960), False),
    ],
)
def test_labels_of_one_size_among_others(
    labelled: tuple[tuple[int, int], tuple[int, int]], least: tuple[int, int], most: tuple[int, int], noted: bool
) -> None:
    sizes = SizeStatistics(min_height=least[0], min_width=least[1], max_height=most[0], max_width=most[1])
    notes = note_other_sizes("data", labelled, sizes)
    assert [note.startswith("data: all labelled images are 480 wide and 360 high") for note in notes] == [True] * noted
