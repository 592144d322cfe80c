"""What the page says in words and where its axes end: a wrong sentence on top is the only one that most people read."""

from dataclasses import replace
from typing import Any

import pytest

from threestage.data.rejects import Reject
from threestage.data.split import Split
from threestage.prediction.pseudo_masks import Statistics
from threestage.report.run_reader import Run, Stage
from threestage.report.sections import axis_end, in_sentences, ticks


def stage(number: int, mean_iou: float, per_class_iou: dict[str, float | None], **changes: Any) -> Stage:
    result = {"mean_iou": mean_iou, "per_class_iou": per_class_iou}
    made = Stage(
        number, "", reused=False, result=result, statistics=None, keys={}, validation_digest=None, finished=0.0
    )
    return replace(made, **changes)


def run_of(*stages: Stage, **rejected: list[Reject]) -> Run:
    return Run(
        uri="", name="", seed=0, stages=stages, split=Split(labelled=(), validation=(), validation_split="val"), data_root=None,
        pool_images=None, settings={}, rejected=rejected, missing=(), finished=True, verdict=None,
    )  # fmt: skip


CLASSES: dict[str, float | None] = {"road": 0.9, "bicyclist": 0.2, "pole": None, "sky": float("nan")}


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ((0.557, 0.5, 0.6), "Stage 3 is 4.3 points better than stage 1: mean IoU 0.600 against 0.557."),
        ((0.5, 0.4), "Stage 2 is 10.0 points worse than stage 1: mean IoU 0.400 against 0.500."),
        ((0.5, 0.5001), "Stage 2 is as good as stage 1: mean IoU 0.500 against 0.500."),
    ],
)
def test_the_summary_compares_the_last_stage_with_the_first(scores: tuple[float, ...], expected: str) -> None:
    stages = [stage(number, score, CLASSES) for number, score in enumerate(scores, 1)]
    assert next(in_sentences(run_of(*stages), None)) == expected


def test_the_summary_names_the_weakest_class_and_what_was_lost() -> None:
    statistics = Statistics(images=1, pixels=1000, class_pixels=(1000, 0, 0, 0))
    only = stage(1, 0.5, CLASSES, statistics=statistics)
    rejects = [Reject(image_id=name, source="photos.parquet", reason="") for name in ("a", "b", "c")]
    weakest, vanished, rejected = in_sentences(run_of(only, masks=rejects, training=rejects[:1]), [10, 10, 0, 0])
    assert weakest == "Weakest class of stage 1: bicyclist, with an IoU of 0.200."
    assert vanished.startswith("Classes that vanished from the pseudo-masks: bicyclist in stage 1: too few labels")
    assert rejected == "3 images were rejected."
    assert list(in_sentences(run_of(), None)) == [] and list(in_sentences(run_of(stage(1, 0.5, {})), None)) == []


@pytest.mark.parametrize(
    ("end", "expected"), [(1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0.7, [0, 0.2, 0.4, 0.6]), (0, [0]), (float("nan"), [0])]
)
def test_ticks_are_round(end: float, expected: list[float]) -> None:
    assert ticks(end) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("values", "expected"), [([0.1, 0.279, None], 0.3), ([1.0], 1.0), ([61.8], 80), ([0], 1), ([], 1), ([None], 1)]
)
def test_an_axis_ends_on_a_round_value_above(values: list[float | None], expected: float) -> None:
    assert axis_end(values) == pytest.approx(expected)
