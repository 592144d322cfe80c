"""What the page of a run shows, as plain data: template.html.j2 writes the texts and the markup, charts.svg.j2 the charts."""

import datetime
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from threestage.data.classes import Colour
from threestage.data.rejects import SHOWN
from threestage.format import duration
from threestage.mlflow_sync.connection import redact
from threestage.prediction.pseudo_masks import VANISHED_WHY, vanished_classes
from threestage.report import mask_images
from threestage.report.run_reader import Run, Stage, throughput
from threestage.report.scores import ABSENT
from threestage.report.validation_images import Example, StageMeasure

# ---- How figures are written


def number(value: float | None, digits: int = 3) -> str:
    return ABSENT if value is None or math.isnan(value) else f"{value:.{digits}f}"


def signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def share(value: float | None) -> str:
    return ABSENT if value is None or math.isnan(value) else f"{value:.1%}"


def memory(value: float | None) -> str:
    return ABSENT if value is None else f"{value / 2**30:.2f} GiB"


def percent(value: float, whole: float) -> str:
    """A place or a length in a chart."""
    return f"{100 * value / (whole or 1):.2f}"


def tick_text(value: float) -> str:
    """20000 → 20k."""
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{round(value, 10):g}"


def arrows(values: Iterable[float]) -> str:
    return " → ".join(f"{value:.3f}" for value in values)


# ---- Axes and series of charts


class Series(NamedTuple):
    """A line through points, or bars, one a group, None where there is no figure. `style` 1… chooses colour, dash and marker,
    or pattern."""

    name: str
    style: int
    points: Sequence[tuple[float, float]] = ()
    values: Sequence[float | None] = ()


def ticks(end: float, most: int = 5) -> list[float]:
    """Round values from 0 to `end`, at most `most` + 1 of them."""
    if end <= 0 or not math.isfinite(end):
        return [0.0]
    raw = end / most
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * (1 - 1e-9))
    return [i * step for i in range(math.floor(end / step + 1e-9) + 1)]


def axis_end(values: Iterable[float | None]) -> float:
    """A round value that is no less than the highest of the values; 1 without any."""
    highest = max((value for value in values if value is not None), default=0.0)
    if highest <= 0:
        return 1.0
    step = ticks(highest)[1]
    return step * math.ceil(highest / step - 1e-9)


def end_of_points(series: Iterable[Series]) -> float:
    return axis_end(value for one in series for _, value in one.points)


FORMS = (number, signed, share, memory, duration, arrows, percent, tick_text, ticks)
"""The filters of the templates."""

# ---- All of the page

Section = dict[str, Any]


@dataclass(frozen=True)
class Seen:
    """What the validation images and the labels gave. `examples`: as `example_of` makes them; `measured_on`: on how many images
    the stages were measured."""

    examples: Sequence[Mapping[str, Any]]
    measures: Sequence[StageMeasure]
    measured_on: str
    classes: Sequence[str]
    colours: Sequence[Colour]
    label_pixels: Sequence[int]


def all_sections(run: Run, seen: Seen | None) -> dict[str, Section | None]:
    """By their anchors in the page; None where there is nothing to show."""
    label_pixels = None if seen is None else seen.label_pixels
    started = bool(run.stages)
    return {
        "overview": overview(run, label_pixels),
        "images": None if seen is None else images(seen),
        "classes": classes(run) if started else None,
        "curves": curves(run) if started else None,
        "uncertainty": None if seen is None else uncertainty(run, seen),
        "pseudo-masks": pseudo_masks(run, label_pixels) if started else None,
        "rejected": rejected(run) if started else None,
        "time": times(run) if started else None,
        "settings": settings(run),
    }


# ---- At a glance


def overview(run: Run, label_pixels: Sequence[int] | None) -> Section:
    last = max((stage.finished for stage in run.stages), default=None)
    when = None if last is None else datetime.datetime.fromtimestamp(last, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    facts = {
        "run": redact(run.uri),
        "data set": run.data_root and redact(run.data_root),
        "labelled images": len(run.split.labelled),
        "images of the pool": run.pool_images,
        "encoder": next((stage.keys.get("network.encoder") for stage in run.stages), None),
        "seed": run.seed,
        "last stage finished": when,
    }
    return {
        "summary": list(in_sentences(run, label_pixels)),
        "validation_images": len(run.split.validation),
        "seen": "in windows" if run.settings.get("inference.window") else "whole images",
        "carved": run.split.validation_split == "carved",
        "facts": {name: value for name, value in facts.items() if value is not None},
        "rounds": [{**one, "run": redact(one["run"]), "corrected": one.get("corrected") or {}} for one in run.rounds],
    }


def in_sentences(run: Run, label_pixels: Sequence[int] | None) -> Iterator[str]:
    """The run in a few plain sentences."""
    if not run.stages:
        return
    first, last = run.stages[0], run.stages[-1]
    if first is not last:
        before, after = first.result["mean_iou"], last.result["mean_iou"]
        points = round(100 * (after - before), 1)
        differs = f"{abs(points):.1f} points {'better' if points > 0 else 'worse'} than" if points else "as good as"
        yield f"{last.title.capitalize()} is {differs} {first.title}: mean IoU {number(after)} against {number(before)}."
    known = {name: iou for name, iou in last.result["per_class_iou"].items() if number(iou) != ABSENT}
    if known:
        weakest = min(known, key=known.__getitem__)
        yield f"Weakest class of {last.title}: {weakest}, with an IoU of {number(known[weakest])}."
    gone = []
    for stage in run.stages if label_pixels else ():
        predicted, names = stage.statistics, list(stage.result["per_class_iou"])
        lost = vanished_classes(predicted, label_pixels or (), names) if predicted and predicted.pixels else []
        gone += [f"{', '.join(lost)} in {stage.title}"] if lost else []
    if gone:
        yield f"Classes that vanished from the pseudo-masks: {'; '.join(gone)}: {VANISHED_WHY}."
    if rejects := {(reject.source, reject.image_id) for found in run.rejected.values() for reject in found}:
        yield f"{len(rejects)} image{'s were' if len(rejects) > 1 else ' was'} rejected."


# ---- Pictures of validation images

CHANGES = {
    mask_images.STILL_RIGHT: "right before and after",
    mask_images.BECAME_RIGHT: "became right",
    mask_images.BECAME_WRONG: "became wrong (striped)",
    mask_images.STILL_WRONG: "wrong before and after",
}


def images(seen: Seen) -> Section:
    return {
        "measured_on": seen.measured_on,
        "classes": list(zip(seen.classes, mask_images.class_colours(seen.colours), strict=True)),
        "changes": [(name, mask_images.CHANGE_COLOURS[kind]) for kind, name in CHANGES.items()],
        "examples": seen.examples,
    }


def example_of(
    example: Example, stages: Sequence[Stage], classes: Sequence[str], colours: Sequence[Colour]
) -> Mapping[str, Any]:
    """An image as columns of pictures (kind, source, description, caption): itself and its truth, then a column a stage."""
    shown = mask_images.class_colours(colours)
    truth = mask_images.class_picture(example.mask, shown)
    first = [
        ("image", mask_images.photo(example.image), f"Image {example.image_id}", "image"),
        ("image", truth, f"Truth: {_class_shares_text(example.mask, classes)}", "truth"),
    ]
    height, width = example.mask.shape
    return {
        "id": example.image_id,
        "group": example.group,
        "scores": example.scores,
        "size": (width, height),
        "columns": [first, *(_stage_column(example, place, stages, classes, shown) for place in range(len(stages)))],
    }


def _stage_column(
    example: Example, place: int, stages: Sequence[Stage], classes: Sequence[str], colours: Sequence[Colour]
) -> list[tuple[str, str, str, str]]:
    title, class_ids, confidence = stages[place].title, example.class_ids[place], example.confidence[place]
    found = mask_images.changes(example.mask, example.class_ids[max(0, place - 1)], class_ids)
    against = f"change from {stages[place - 1].title}" if place else "right or wrong"
    sure, changed = f"mean confidence {confidence.mean() / 255:.3f}", _changed(found, place == 0)
    predicted = f"Prediction of {title}: {_class_shares_text(class_ids, classes)}"
    return [
        ("prediction", mask_images.class_picture(class_ids, colours), predicted, f"{title}: prediction"),
        ("confidence", mask_images.confidence_map(confidence), f"Confidence of {title}: {sure}", sure),
        ("changes", mask_images.change_map(found), f"{title}, {against}: {changed}", changed),
    ]


def _class_shares_text(mask: np.ndarray, classes: Sequence[str]) -> str:
    """Which classes a mask shows, in words, the most frequent first."""
    counts = np.bincount(mask.ravel(), minlength=len(classes))[: len(classes)]
    order = [int(i) for i in np.argsort(-counts, kind="stable") if counts[i]]
    return ", ".join(f"{classes[i]} {counts[i] / mask.size:.0%}" for i in order) or "every pixel ignored"


def _changed(found: np.ndarray, first: bool) -> str:
    counts = np.bincount(found.ravel(), minlength=mask_images.STRIPE)
    counted = max(1, int(counts[: mask_images.IGNORED].sum()))
    right, became_right, became_wrong = (f"{counts[kind] / counted:.1%}" for kind in list(CHANGES)[:3])
    return f"{right} right" if first else f"{became_right} became right, {became_wrong} wrong"


# ---- Classes, learning curves, and time

LOSSES = {
    "supervised_loss": ("supervised", 5),
    "consistency_loss": ("consistency", 6),
    "pseudo_mask_loss": ("pseudo-mask", 7),
}


def classes(run: Run) -> Section:
    """The first group is the mean over the classes."""
    values = [[stage.result["mean_iou"], *stage.result["per_class_iou"].values()] for stage in run.stages]
    return {
        "end": axis_end(value for row in values for value in row),
        "groups": ["mean", *run.stages[0].result["per_class_iou"]],
        "series": [Series(s.title, s.number, values=found) for s, found in zip(run.stages, values, strict=True)],
    }


def curves(run: Run) -> Section:
    """Validation mean IoU over the whole run; the losses of each stage."""
    ends, scores = [0.0], list[Series]()
    for stage in run.stages:
        points = [(ends[-1] + step, value) for step, value in stage.curve("mean_iou")]
        scores.append(Series(stage.title, stage.number, points))
        ends.append(ends[-1] + stage.result["steps"])
    losses = [
        (stage, [Series(*style, points) for term, style in LOSSES.items() if (points := stage.curve(term))])
        for stage in run.stages
    ]
    shown = {(one.name, one.style): one for _, series in losses for one in series}
    return {
        "scores": scores,
        "ends": ends[1:],
        "top": end_of_points(scores),
        "losses": losses,
        "losses_top": end_of_points(one for _, series in losses for one in series),
        "terms": [Series(*style) for style in LOSSES.values() if style in shown],
    }


def times(run: Run) -> Section:
    series = [Series(s.title, s.number, s.curve("images_per_second")) for s in run.stages]
    return {
        "speeds": [(stage, throughput(stage.history)) for stage in run.stages],
        "series": series,
        "steps": max(stage.result["steps"] for stage in run.stages),
        "top": end_of_points(series),
    }


# ---- Uncertainty and calibration


class Bin(NamedTuple):
    """Of confidence, from `low` on. `confidence`, `accuracy`: of its pixels, None without any."""

    low: float
    name: str
    pixels: float
    share: float
    confidence: float | None
    accuracy: float | None


def uncertainty(run: Run, seen: Seen) -> Section:
    """Whether confidence rises from stage to stage, and whether it is deserved."""
    bins = [list(_bins(m)) for m in seen.measures]
    return {
        "finding": _finding(seen.measures),
        "measured_on": seen.measured_on,
        "measures": list(zip(run.stages, seen.measures, bins, strict=True)),
        "top": axis_end(one.share for row in bins for one in row),
    }


def _bins(m: StageMeasure) -> Iterator[Bin]:
    width = 1 / len(m.counts)
    for i, (pixels, confidence, correct) in enumerate(m.counts.tolist()):
        means = (confidence / pixels, correct / pixels) if pixels else (None, None)
        yield Bin(i * width, f"{i * width:.2f} to {(i + 1) * width:.2f}", pixels, pixels / m.pixels, *means)


def _finding(measured: Sequence[StageMeasure]) -> str:
    entropies, errors = [m.mean_entropy for m in measured], [m.calibration_error for m in measured]
    text = f"Mean entropy on validation images: {arrows(entropies)} nats."
    if len(measured) == 1:
        return f"{text} There is no other stage to compare with."
    falls = [after < before for before, after in pairwise(entropies)]
    change = (
        "falls with every stage" if all(falls) else "falls with some stages only" if any(falls) else "does not fall"
    )
    better = errors[-1] <= errors[0]
    meaning = "certainty and correctness came closer together" if better else "certainty grew faster than correctness"
    calibration = f"Calibration error: {arrows(errors)}; from the first to the last stage, {meaning}."
    return f"{text} The uncertainty {change}. {calibration}"


# ---- Pseudo-masks, and rejected images

LABELS_STYLE = 4


def pseudo_masks(run: Run, label_pixels: Sequence[int] | None) -> Section:
    made = [(stage, stage.statistics) for stage in run.stages if stage.statistics is not None]
    series = [Series(s.title, s.number, values=_class_shares(statistics.class_pixels)) for s, statistics in made]
    if label_pixels and sum(label_pixels):
        series.insert(0, Series("labels", LABELS_STYLE, values=_class_shares(label_pixels)))
    figures = [(stage, statistics.images, statistics.summary()) for stage, statistics in made]
    above = [name for name in figures[0][2] if name.startswith("share_above_")] if figures else []
    return {
        "made": figures,
        "above": {name: f"above {name.rsplit('_', 1)[1]}" for name in above},
        "end": axis_end(value for one in series for value in one.values),
        "groups": list(run.stages[0].result["per_class_iou"]),
        "series": series,
    }


def _class_shares(pixels: Sequence[int]) -> list[float | None]:
    return [count / max(1, sum(pixels)) for count in pixels]


def rejected(run: Run) -> Section:
    """Each of the first is named once, with all places where it was rejected."""
    where: dict[tuple[str, str], list[str]] = {}
    for place, rejects in run.rejected.items():
        for reject in rejects[:SHOWN]:
            where.setdefault((redact(reject.source), redact(reject.reason)), []).append(place)
    return {
        "counts": {place: len(rejects) for place, rejects in run.rejected.items()},
        "first": [(*entry, ", ".join(dict.fromkeys(places))) for entry, places in where.items()],
    }


# ---- Settings


def settings(run: Run) -> Section:
    """What the stages were made with, as they wrote it down; what no stage's result depends on comes from the run's settings."""
    keys = sorted({key for stage in run.stages for key in stage.keys} | set(run.settings))
    return {"rows": [(key, _value(run, key)) for key in keys], "whole": bool(run.settings)}


def _value(run: Run, key: str) -> str:
    """The value, or each stage's where they differ."""
    by_stage = {stage.title: _plain(stage.keys[key]) for stage in run.stages if key in stage.keys}
    if len(set(by_stage.values())) > 1:
        return "; ".join(f"{stage}: {value}" for stage, value in by_stage.items())
    return next(iter(by_stage.values())) if by_stage else _plain(run.settings[key])


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
