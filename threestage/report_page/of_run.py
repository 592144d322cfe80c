"""The page's parts that need the run's folder only: scores, curves, time, settings."""

import datetime
import json
import math
from collections.abc import Sequence
from typing import Any

from threestage.report_page import charts
from threestage.report_page.charts import Bars, Frame, Series
from threestage.report_page.figures import Run, Stage, throughput
from threestage.report_page.markup import Html, disclosure, figure, note, section, table, tag
from threestage.tracking import redact
from threestage.training.metrics import MEAN_IOU_RULE

ABSENT = "–"
TERMS = {
    "supervised_loss": ("supervised", 5),
    "consistency_loss": ("consistency", 6),
    "pseudo_mask_loss": ("pseudo-mask", 7),
}


def overview(run: Run, missing: Sequence[str]) -> Html:
    """What is missing, the mean IoU of every stage, and what the run is."""
    kind = "carved off the labelled ones" if run.split.validation_split == "carved" else "of the data set's val split"
    warning = tag("p", tag("b", "Not everything is here. "), " ".join(missing), class_="missing") if missing else None
    tiles = [_tile(stage, run.stages[place - 1] if place else None) for place, stage in enumerate(run.stages)]
    return section(
        "overview",
        "At a glance",
        warning,
        tag("ul", *tiles, class_="tiles"),
        note(
            f"All scores are of {len(run.split.validation)} validation images ({kind}), whole images at a single scale, after "
            "each stage's last step. They are not of a test set: settings may have been chosen by these very images. "
            f"A mean IoU is {MEAN_IOU_RULE}."
        ),
        _last_and_best(run),
        table("The run", [], _facts(run)),
    )


def _tile(stage: Stage, before: Stage | None) -> Html:
    score = stage.result["mean_iou"]
    gain = "" if before is None else f"{signed(score - before.result['mean_iou'])} against {before.title}"
    reused = " (of another run)" if stage.reused else ""
    return tag(
        "li",
        tag("span", f"Stage {stage.number}{reused}", class_="name"),
        tag("strong", number(score)),
        tag("span", "validation mean IoU"),
        tag("span", gain, class_="gain"),
        class_=f"s{stage.number}",
    )


def _last_and_best(run: Run) -> Html | None:
    """None of a run that an older version has made."""
    rows = [_scores(stage) for stage in run.stages if "best" in stage.result]
    header = ["", "last step", "best evaluation", "at step", "student, last step"]
    return table("Validation mean IoU of every stage's model", header, rows) if rows else None


def _scores(stage: Stage) -> list[object]:
    last, best, student = (stage.result.get(key, {}) for key in ("last", "best", "student"))
    return [
        stage.title,
        number(last.get("mean_iou")),
        number(best["mean_iou"]),
        best["step"],
        number(student.get("mean_iou")),
    ]


def _facts(run: Run) -> list[list[object]]:
    last = max((stage.finished for stage in run.stages), default=None)
    when = None if last is None else datetime.datetime.fromtimestamp(last, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    encoder = next((stage.keys.get("network.encoder") for stage in run.stages), None)
    facts = {
        "run": redact(run.uri),
        "data set": run.data_root and redact(run.data_root),
        "labelled images": len(run.split.labelled),
        "images of the pool": run.pool_images,
        "encoder": encoder,
        "seed": run.seed,
        "last stage finished": when,
    }
    return [[name, value] for name, value in facts.items() if value is not None]


def number(value: float | None, digits: int = 3) -> str:
    return ABSENT if value is None or math.isnan(value) else f"{value:.{digits}f}"


def signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def share(value: float | None) -> str:
    return ABSENT if value is None or math.isnan(value) else f"{value:.1%}"


def classes(run: Run) -> Html:
    names = ["mean", *run.stages[0].result["per_class_iou"]]
    found = [
        Bars(stage.title, stage.number, [stage.result["mean_iou"], *stage.result["per_class_iou"].values()])
        for stage in run.stages
    ]
    rows = [[name, *(number(one.values[place]) for one in found)] for place, name in enumerate(names)]
    return section(
        "classes",
        "IoU of every class",
        figure(
            "Longer is better: 1 means that the predicted pixels of a class are exactly its true ones, 0 that none is. The first "
            "group is the mean over the classes. A dash: the class is neither in the validation images nor predicted.",
            charts.bars("IoU of every class and stage on validation images", names, found, number),
            key=_stage_key(run, "bar"),
        ),
        disclosure("The same as a table", table("IoU on validation images", ["class", *(s.name for s in found)], rows)),
    )


def _stage_key(run: Run, kind: str) -> Html:
    return charts.key([(stage.title, stage.number) for stage in run.stages], kind)


def curves(run: Run) -> Html:
    """Validation mIoU over the whole run; the losses of each stage."""
    losses = [_loss_panel(stage, _loss_top(run)) for stage in run.stages]
    known = [style for term, style in TERMS.items() if any(stage.curve(term) for stage in run.stages)]
    rows = [
        [stage.title, f"{step:g}", number(value)] for stage in run.stages for step, value in stage.curve("mean_iou")
    ]
    return section(
        "curves",
        "How the stages learned",
        tag("h3", "Mean IoU on validation images"),
        figure(
            "Each mark is an evaluation of the model that the stage would deliver at that step; the stages follow one another. "
            "A line that still rises at its end may gain from more steps, one that falls may have over-fitted.",
            _mean_iou_chart(run),
            key=_stage_key(run, "line"),
        ),
        disclosure("The same as a table", table("Validation mean IoU", ["stage", "step", "mean IoU"], rows)),
        tag("h3", "Losses on training images"),
        figure(
            "Mean cross-entropy (nats a pixel) of each term before its weight, over the steps since the mark before. The "
            "supervised term is of labelled images, the consistency term against the teacher, the pseudo-mask term against the "
            "masks of the stage before. A term counts the pixels that its threshold keeps, so its level depends on that too.",
            tag("div", *losses, class_="panels"),
            key=charts.key(known, "line"),
        ),
    )


def _mean_iou_chart(run: Run) -> Html:
    start, series, dividers, best = 0.0, list[Series](), [], 0.0
    for stage in run.stages:
        points = [(start + step, value) for step, value in stage.curve("mean_iou")]
        series.append(Series(stage.title, stage.number, points))
        best = max([best, *(value for _, value in points)])
        start += stage.result["steps"]
        dividers.append((start, 0.0))
    frame = Frame(
        (0.0, start), (0.0, charts.rounded_up(best)), "steps of the whole run", "mean IoU", width=1040, height=280
    )
    return charts.lines("Validation mean IoU over the steps of all stages", series, frame, dividers[:-1])


def _loss_top(run: Run) -> float:
    values = [value for stage in run.stages for name in TERMS for _, value in stage.curve(name)]
    return charts.rounded_up(max(values, default=1.0))


def _loss_panel(stage: Stage, top: float) -> Html:
    series = [Series(name, style, points) for term, (name, style) in TERMS.items() if (points := stage.curve(term))]
    frame = Frame((0.0, float(stage.result["steps"])), (0.0, top), "step", "loss (nats)")
    plot = charts.lines(f"Losses of {stage.title} over its steps", series, frame)
    return tag("div", tag("h3", stage.title), plot)


def times(run: Run) -> Html:
    rows = [_time_row(stage) for stage in run.stages]
    series = [Series(s.title, s.number, s.curve("images_per_second")) for s in run.stages]
    most = max((value for one in series for _, value in one.points), default=1.0)
    steps = max(float(stage.result["steps"]) for stage in run.stages)
    frame = Frame(
        (0.0, steps), (0.0, charts.rounded_up(most)), "step of the stage", "images per second", width=1040, height=240
    )
    return section(
        "time",
        "Time and throughput",
        table(
            "Time and throughput of every stage",
            ["", "steps", "time of the stage", "steps/s", "images/s", "waiting for data", "peak memory", "workers"],
            rows,
        ),
        figure(
            "Images that all workers together trained on in a second. Dips are slow steps. Where waiting for data takes more "
            "than a few per cent of the time, the input holds the training up.",
            charts.lines("Images per second over the steps of every stage", series, frame),
            key=_stage_key(run, "line"),
        ),
        note(
            "The time of a stage includes validation and checkpoints, not the prediction of the pool. Rates are of the training "
            "steps alone. Peak memory is of the device on a GPU, of the whole process on a CPU; of the worker that needed most."
        ),
    )


def _time_row(stage: Stage) -> list[object]:
    found = throughput(stage.history)
    memory = None if found.memory_bytes is None else f"{found.memory_bytes / 2**30:.2f} GiB"
    workers = None if found.workers is None else f"{found.workers:.0f}"
    rates = [number(found.steps_per_second, 2), number(found.images_per_second, 1), share(found.data_wait_share)]
    return [
        stage.title,
        stage.result["steps"],
        duration(stage.result["seconds"]),
        *rates,
        memory or ABSENT,
        workers or ABSENT,
    ]


def duration(seconds: float) -> str:
    if seconds < 180:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 180 else f"{minutes // 60} h {minutes % 60} min"


def settings(run: Run) -> Html:
    """What the stages were made with, as they wrote it down; what no stage's result depends on comes from the run's settings."""
    keys = sorted({key for stage in run.stages for key in stage.keys} | set(run.settings))
    rows = [[key, *_values(run, key)] for key in keys]
    partly = (
        [] if run.settings else [note("Only the settings that decide what a stage computes are known of this run.")]
    )
    whole = table(
        "Resolved settings", ["setting", "value"], [[tag("code", key), tag("code", value)] for key, value in rows]
    )
    return section("settings", "Settings", *partly, disclosure(f"All {len(rows)} settings", whole))


def _values(run: Run, key: str) -> list[str]:
    """One text: the value, or each stage's where they differ."""
    by_stage = {stage.title: _plain(stage.keys[key]) for stage in run.stages if key in stage.keys}
    if not by_stage:
        return [_plain(run.settings[key])]
    if len(set(by_stage.values())) == 1:
        return [next(iter(by_stage.values()))]
    return ["; ".join(f"{stage}: {value}" for stage, value in by_stage.items())]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
