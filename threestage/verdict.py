"""Whether the unlabelled images paid: a run's last stage against stage 1, which learns from the labels alone.

Both are scored on the same validation images. A paired bootstrap over these images gives the interval of the difference.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from threestage.config import StageName
from threestage.evaluation import read_image_counts
from threestage.seeds import derive_seed
from threestage.settings import Settings
from threestage.training.metrics import iou_of_counts

Outcome = Literal["pays", "does not pay", "cannot be told"]
RESAMPLES = 2000
LEVEL = 0.95
EARLIER_VERSION = "an earlier version of threestage trained some stage"
NO_CONTROL = (
    "stage 1 learnt from them too, so this run has no control; train one with stage1.unlabelled_batch=0 to compare"
)
FEWEST = 6  # draws that all agree are significant at LEVEL from so many on: 2 · 0.5⁶ < 0.05


class Verdict(Settings):
    """`results.json` holds it. `difference`: mean IoU of `stage` minus that of `against`, in [0,1]; `interval`: its 95 %
    interval; `outcome`: what the interval says. `choice`: the stage whose model the run delivers (`best_stage`).

    `images`, `groups`: of the validation, resampled by group where there are groups. `steps`: optimiser steps up to the end of
    each of the two stages; `strong_view`: whether `against` learnt strong views too.
    """

    difference: float
    interval: tuple[float, float]
    outcome: Outcome
    choice: StageName
    images: int
    groups: int | None
    stage: StageName
    against: StageName
    steps: dict[StageName, int]
    strong_view: bool
    resamples: int = RESAMPLES


def judge(
    first: str,
    last: str,
    stages: Mapping[StageName, Mapping[str, Any]],
    seed: int,
    strong_view: bool,
    groups: Mapping[str, str] = {},
) -> Verdict | None:
    """The verdict of a run; None where a stage has no counts per image (an earlier version trained it).

    first, last: folders of the first and the last stage. stages: `mean_iou` and `steps` of every stage, in order. groups: of
    each validation image, by its id, where images of a group are alike; else empty.
    """
    found, control = read_image_counts(last), read_image_counts(first)
    if found is None or control is None or found[0] != control[0] or found[1].shape != control[1].shape:
        return None
    units = torch.stack([found[1], control[1]], dim=1)
    if groups:
        units = _summed(units, [groups[image_id] for image_id in found[0]])
    against, *_, stage = stages
    low, high = interval(units, seed)
    return Verdict(
        difference=float(_differences(units.sum(0, keepdim=True))),
        interval=(low, high),
        outcome=outcome(low, high, len(units)),
        choice=best_stage(stages),
        images=len(found[0]),
        groups=len(units) if groups else None,
        stage=stage,
        against=against,
        steps={against: stages[against]["steps"], stage: sum(one["steps"] for one in stages.values())},
        strong_view=strong_view,
    )


def verdict_in(results: Any) -> Verdict | None:
    """The verdict that results.json holds; None where it holds none that this version reads."""
    try:
        return Verdict.model_validate(results["verdict"])
    except (KeyError, TypeError, ValidationError):
        return None


def best_stage(stages: Mapping[StageName, Mapping[str, Any]]) -> StageName:
    """The stage with the highest mean IoU on the validation images, of equals the earliest: the registry's champion follows the
    same rule. It holds whatever the verdict is, so an undecided one delivers what scored higher."""
    return max(stages, key=lambda name: np.nan_to_num(stages[name]["mean_iou"], nan=-1.0))


def interval(units: Tensor, seed: int) -> tuple[float, float]:
    """Percentile interval of the difference of mean IoU over resamples of the units with replacement.

    units: counts (N,2,3,C) of N images, or groups, of the last stage and of the control: both are resampled alike.
    """
    random = np.random.default_rng(derive_seed(seed, "verdict"))
    flat, number = units.double().flatten(1), len(units)
    sums = []
    for _ in range(RESAMPLES):
        times = np.bincount(random.integers(0, number, number), minlength=number)
        sums.append(torch.from_numpy(times).double() @ flat)
    differences = _differences(torch.stack(sums).unflatten(1, units.shape[1:]))
    low, high = np.nanpercentile(differences.numpy(), [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(low), float(high)


def outcome(low: float, high: float, units: int) -> Outcome:
    """What the interval of the difference says, of so many images (or groups)."""
    if units < FEWEST or low <= 0 < high:
        return "cannot be told"
    return "pays" if low > 0 else "does not pay"


def _differences(counts: Tensor) -> Tensor:
    """Mean IoU of the last stage minus that of the control (B,) from counts (B,2,3,C)."""
    scores = iou_of_counts(counts).nanmean(-1)
    return scores[:, 0] - scores[:, 1]


def _summed(counts: Tensor, groups: Sequence[str]) -> Tensor:
    """Counts of images (N,…) summed over each group."""
    _, places = np.unique(np.array(groups), return_inverse=True)
    sums = torch.zeros(int(places.max()) + 1, *counts.shape[1:], dtype=counts.dtype)
    return sums.index_add(0, torch.from_numpy(places), counts)


def verdict_text(results: Mapping[str, Any]) -> str | None:
    """What results.json says of the unlabelled images, for people; None of a run that used none."""
    verdict = verdict_in(results)
    if verdict is not None:
        return f"{_finding(verdict)} {_comparison(verdict)} {_delivered(verdict)}"
    reason = results.get("no_verdict") or (EARLIER_VERSION if len(results.get("stages", ())) > 1 else None)
    return None if reason is None else f"Whether the unlabelled images paid was not measured: {reason}."


def _finding(verdict: Verdict) -> str:
    low, high = map(_points, verdict.interval)
    changed = f"{'cost' if verdict.difference < 0 else 'added'} {_points(abs(verdict.difference))} points of mean IoU"
    images = f"{verdict.images:,} validation images" + (f" in {verdict.groups:,} groups" if verdict.groups else "")
    within = f"95 % interval {low} to {high}"
    if verdict.outcome == "cannot be told":
        return f"Whether the unlabelled images pay cannot be told with {images}: they {changed} ({within})."
    return f"The unlabelled images {changed} ({within}, {images}): training on them {verdict.outcome}."


def _comparison(verdict: Verdict) -> str:
    control, steps = _spoken(verdict.against), verdict.steps
    views = "" if verdict.strong_view else ", and in their weak views only"
    return (
        f"This compares {_spoken(verdict.stage)} with {control}, which learnt from the labels alone{views}. The steps are not "
        f"equal: {control} had {steps[verdict.against]:,} of the {steps[verdict.stage]:,}, and more might improve it too."
    )


def _delivered(verdict: Verdict) -> str:
    return f"The run's best model is that of {_spoken(verdict.choice)}, which scores highest on these images."


def _spoken(stage: StageName) -> str:
    return f"stage {stage[-1]}"


def _points(share: float) -> str:
    return f"{round(100 * share, 1) + 0.0:.1f}".replace("-", "−")  # + 0.0: no minus before a zero
