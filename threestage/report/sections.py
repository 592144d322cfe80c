"""The sections of the report's page: overview, classes, learning curves, time and settings, pictures of validation images,
pseudo-masks and rejected images, uncertainty. Each takes what the run measured and returns markup."""

import datetime
import json
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from threestage.data.classes import Colour
from threestage.mlflow_sync.connection import redact
from threestage.report import charts
from threestage.report.charts import Bars, Frame, Html, Series, disclosure, figure, join_html, note, section, table, tag
from threestage.report.run_reader import Run, Stage, throughput
from threestage.report.validation_images import Example, ExampleGroup, StageMeasure
from threestage.training.metrics import MEAN_IOU_RULE

# ---- At a glance: the overview, and how figures are written

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


# ---- Classes


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


# ---- Learning curves


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


# ---- Time, and settings


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
        seconds_in_words(stage.result["seconds"]),
        *rates,
        memory or ABSENT,
        workers or ABSENT,
    ]


def seconds_in_words(seconds: float) -> str:
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


# ---- Pictures of validation images


GROUPS: dict[ExampleGroup, tuple[str, str]] = {
    "worst": ("The worst images", "▼ worst"),
    "middle": ("Images from the middle", "● middle"),
    "best": ("The best images", "▲ best"),
}
CHANGES = (
    (charts.STILL_RIGHT, "right before and after"),
    (charts.BECAME_RIGHT, "became right"),
    (charts.BECAME_WRONG, "became wrong (striped)"),
    (charts.STILL_WRONG, "wrong before and after"),
)


def image_section(
    stages: Sequence[Stage],
    examples: Iterable[Example],
    classes: Sequence[str],
    colours: Sequence[Colour],
    measured: str,
) -> Html:
    """Every chosen image as a grid: a column for the image and its truth, then a column a stage."""
    shown = charts.class_colours(colours)
    by_group: dict[ExampleGroup, list[Html]] = {group: [] for group in GROUPS}
    for example in examples:
        by_group[example.group].append(_article(example, stages, classes, shown))
    groups = [
        tag("div", tag("h3", GROUPS[group][0]), tag("div", *articles, class_="examples"))
        for group, articles in by_group.items()
        if articles
    ]
    last = stages[-1].title
    return section(
        "images",
        "Stages side by side",
        note(
            f"Validation images, picked by the mean IoU that {last} reaches on each of them: the worst, some around the "
            f"median, the best. {measured} The mean IoU of one image counts the classes that are in it or were predicted."
        ),
        _how_to_read_pictures(classes, shown),
        _choices(),
        *groups,
    )


def _how_to_read_pictures(classes: Sequence[str], colours: Sequence[Colour]) -> Html:
    swatches = [
        _swatch(colour, f"{number} {name}") for number, (name, colour) in enumerate(zip(classes, colours, strict=True))
    ]
    changed = [_swatch(charts.CHANGE_COLOURS[kind], name, kind == charts.BECAME_WRONG) for kind, name in CHANGES]
    scale = tag("li", tag("span", class_="scale"), "confidence 0 (dark) to 1 (bright)")
    return tag(
        "figure",
        tag("ul", *swatches, _swatch((0, 0, 0), "ignored"), class_="key", aria_label="Classes"),
        tag("ul", *changed, scale, class_="key", aria_label="Changes and confidence"),
        tag(
            "figcaption",
            tag("b", "How to read it. "),
            "The first column is the image and its truth. Each further column is a stage: what it predicts, how sure it is, "
            "and which pixels it changed against the stage before (for the first stage: which are right). The widest place of "
            "every class carries the class's number. Large images are shown reduced; counts are of all pixels.",
        ),
        class_="legend",
    )


def _swatch(colour: Colour, name: str, striped: bool = False) -> Html:
    style = f"background-color:rgb({colour[0]},{colour[1]},{colour[2]})"
    return tag("li", tag("span", class_="swatch striped" if striped else "swatch", style=style), name)


def _choices() -> Html:
    """Radio buttons and check boxes that the style sheet alone obeys."""
    sizes = [
        tag("label", tag("input", type="radio", name="size", id=f"size-{size}", checked=size == "medium"), size)
        for size in ("small", "medium", "large")
    ]
    rows = [
        tag("label", tag("input", type="checkbox", id=f"show-{row}", checked=True), name)
        for row, name in (("confidence", "confidence"), ("changes", "changes"))
    ]
    return tag(
        "div",
        tag("fieldset", tag("legend", "Picture size"), *sizes),
        tag("fieldset", tag("legend", "Rows"), *rows),
        class_="choices",
    )


def _article(example: Example, stages: Sequence[Stage], classes: Sequence[str], colours: Sequence[Colour]) -> Html:
    scores = " → ".join(f"{score:.3f}" for score in example.scores)
    columns = [_truth_column(example, classes, colours)]
    columns += [_stage_column(example, place, stages, classes, colours) for place in range(len(stages))]
    return tag(
        "article",
        tag("h4", example.image_id, tag("span", GROUPS[example.group][1], class_=f"mark {example.group}")),
        tag("p", f"mean IoU of this image, {stages[0].title} to {stages[-1].title}: {scores}", class_="score"),
        tag("div", *columns, class_="grid", style=f"--columns:{len(columns)}"),
        class_=example.group,
    )


def _truth_column(example: Example, classes: Sequence[str], colours: Sequence[Colour]) -> Html:
    truth = charts.class_picture(example.mask, colours)
    return tag(
        "div",
        _picture(charts.photo(example.image), f"Image {example.image_id}", "image", "image"),
        _picture(truth, f"Truth: {_shares(example.mask, classes)}", "truth", "image"),
        class_="column",
    )


def _stage_column(
    example: Example, place: int, stages: Sequence[Stage], classes: Sequence[str], colours: Sequence[Colour]
) -> Html:
    stage, class_ids, confidence = stages[place], example.class_ids[place], example.confidence[place]
    before = example.class_ids[max(0, place - 1)]
    found = charts.changes(example.mask, before, class_ids)
    sure = f"mean confidence {confidence.mean() / 255:.3f}"
    changed = _changed(found, place == 0)
    against = "right or wrong" if place == 0 else f"change from {stages[place - 1].title}"
    return tag(
        "div",
        _picture(
            charts.class_picture(class_ids, colours),
            f"Prediction of {stage.title}: {_shares(class_ids, classes)}",
            f"{stage.title}: prediction",
            "prediction",
        ),
        _picture(charts.confidence_map(confidence), f"Confidence of {stage.title}: {sure}", sure, "confidence"),
        _picture(charts.change_map(found), f"{stage.title}, {against}: {changed}", changed, "changes"),
        class_="column",
    )


def _picture(source: str, alternative: str, caption: str, kind: str) -> Html:
    image = tag("img", src=source, alt=alternative, loading="lazy", decoding="async")
    return tag("figure", image, tag("figcaption", caption), class_=f"picture {kind}")


def _shares(mask: np.ndarray, classes: Sequence[str]) -> str:
    """Which classes a mask shows, in words, the most frequent first."""
    counts = np.bincount(mask.ravel(), minlength=len(classes))[: len(classes)]
    order = [int(i) for i in np.argsort(-counts, kind="stable") if counts[i]]
    return ", ".join(f"{classes[i]} {counts[i] / mask.size:.0%}" for i in order) or "every pixel ignored"


def _changed(found: np.ndarray, first: bool) -> str:
    counts = np.bincount(found.ravel(), minlength=charts.STRIPE)
    counted = max(1, int(counts[: charts.IGNORED].sum()))
    if first:
        return f"{counts[charts.STILL_RIGHT] / counted:.1%} right"
    return (
        f"{counts[charts.BECAME_RIGHT] / counted:.1%} became right, {counts[charts.BECAME_WRONG] / counted:.1%} wrong"
    )


# ---- Pseudo-masks, and rejected images

LABELS_STYLE = 4


def pseudo_masks(run: Run, label_pixels: Sequence[int] | None) -> Html:
    with_masks = [stage for stage in run.stages if stage.statistics is not None]
    if not with_masks:
        return section("pseudo-masks", "Pseudo-masks", note("No stage has predicted the pool yet."))
    summaries = [stage.statistics.summary() for stage in with_masks if stage.statistics]
    above = [name for name in summaries[0] if name.startswith("share_above_")]
    header = [
        "",
        "images",
        "mean confidence",
        "mean entropy (nats)",
        *(f"above {n.rsplit('_', 1)[1]}" for n in above),
        "mean IoU",
    ]
    rows: list[list[object]] = []
    for stage, values in zip(with_masks, summaries, strict=True):
        assert stage.statistics is not None
        certain = [
            number(values["mean_confidence"]),
            number(values["mean_entropy"]),
            *(share(values[n]) for n in above),
        ]
        rows.append([stage.title, stage.statistics.images, *certain, number(values.get("pseudo_mask_mean_iou"))])
    return section(
        "pseudo-masks",
        "Pseudo-masks of the pool",
        note(
            "What each stage predicts for the unlabelled pool; the next stage learns from it. “Above” is the share of pixels "
            "with more than that confidence. The mean IoU is of pool images whose masks are known and were not trained on; a "
            "dash where there are none."
        ),
        table("Certainty and quality of the pseudo-masks", header, rows),
        tag("h3", "Balance of the classes"),
        _balance(with_masks, label_pixels),
    )


def _balance(stages: Sequence[Stage], label_pixels: Sequence[int] | None) -> Html:
    names = list(stages[0].result["per_class_iou"])
    found = (
        [] if not label_pixels or not sum(label_pixels) else [Bars("labels", LABELS_STYLE, _class_shares(label_pixels))]
    )
    found += [Bars(s.title, s.number, _class_shares(s.statistics.class_pixels)) for s in stages if s.statistics]
    rows = [[name, *(share(one.values[place]) for one in found)] for place, name in enumerate(names)]
    drawn = figure(
        "Which share of the pixels each class has, in the labels that the run may see and in the pseudo-masks. The pool need not "
        "be balanced like the labels; but a class whose bar dwindles from stage to stage is being forgotten.",
        charts.bars("Share of every class in the labels and in the pseudo-masks", names, found, share),
        key=charts.key([(one.name, one.style) for one in found], "bar"),
    )
    header = ["class", *(one.name for one in found)]
    absent = [] if len(found) > len(stages) else [note("The labels' shares are missing: the data set was not at hand.")]
    return tag("div", *absent, drawn, disclosure("The same as a table", table("Shares of the pixels", header, rows)))


def _class_shares(pixels: Sequence[int]) -> list[float | None]:
    return [count / max(1, sum(pixels)) for count in pixels]


def rejected(run: Run) -> Html:
    if not run.rejected:
        return section("rejected", "Rejected inputs", note("No image of the pool was refused."))
    where: dict[tuple[str, str], list[str]] = {}
    for place in run.rejected:
        for entry in place.first:
            where.setdefault(entry, []).append(place.where)
    counts = [[place.where, place.count] for place in run.rejected]
    rows = [[source, reason, ", ".join(places)] for (source, reason), places in where.items()]
    return section(
        "rejected",
        "Rejected inputs",
        note(
            "Images of the pool that could not be used: the run left them out and went on. All are in the rejects.parquet there."
        ),
        table("How many images were left out", ["where", "images"], counts),
        table("The first of them", ["image", "reason", "where"], rows),
    )


# ---- Uncertainty and calibration


def uncertainty(run: Run, found: Sequence[StageMeasure], measured: str) -> Html:
    """Whether confidence rises from stage to stage, and whether it is deserved."""
    top = charts.rounded_up(max(float((m.counts[:, 0] / m.pixels).max()) for m in found))
    pairs = list(zip(run.stages, found, strict=True))
    histograms = [
        charts.confidence_histogram(
            f"Confidence of {stage.title}: mean {m.mean_confidence:.3f}", m.counts, m.mean_confidence, stage.number, top
        )
        for stage, m in pairs
    ]
    diagrams = [
        charts.reliability(f"Reliability of {stage.title}: ECE {m.calibration_error:.3f}", m.counts, stage.number)
        for stage, m in pairs
    ]
    return section(
        "uncertainty",
        "Does the uncertainty fall?",
        tag("p", _verdict(found), class_="verdict"),
        note(f"{measured} Ignored pixels do not count."),
        table(
            "Certainty of every stage on validation images",
            ["", "mean confidence", "mean entropy (nats)", "right pixels", "confidence − right", "ECE"],
            [_certainty_row(stage, m) for stage, m in pairs],
        ),
        figure(
            "Each bar is the share of pixels that got this confidence (the probability of the predicted class); the dashed line "
            "is the mean. The more the bars lean to the right from stage to stage, the surer the model.",
            _panels([f"{s.title}: mean confidence {m.mean_confidence:.3f}" for s, m in pairs], histograms),
        ),
        figure(
            "Among the pixels of one confidence, the bar is the share that is right. On the dashed diagonal the two agree. Bars "
            "below it: the model is surer than it should be; above it: it could be surer. ECE, the expected calibration "
            f"error, is the mean distance from the diagonal over all pixels ({len(found[0].counts)} bins); 0 is perfect. "
            "Few pixels stand behind the bars where the histogram above is low.",
            _panels([f"{s.title}: ECE {m.calibration_error:.3f}" for s, m in pairs], diagrams),
        ),
        disclosure("Figures of the reliability diagrams", *(_bins_table(stage, m) for stage, m in pairs)),
    )


def _verdict(found: Sequence[StageMeasure]) -> str:
    entropies, errors = [m.mean_entropy for m in found], [m.calibration_error for m in found]
    listed = " → ".join(f"{value:.3f}" for value in entropies)
    if len(found) == 1:
        return f"Mean entropy on validation images: {listed} nats. There is no other stage to compare with."
    falls = [after < before for before, after in pairwise(entropies)]
    said = "falls with every stage" if all(falls) else "falls with some stages only" if any(falls) else "does not fall"
    text = f"Mean entropy on validation images: {listed} nats. The uncertainty {said}."
    return f"{text} {_deserved(errors)}"


def _deserved(errors: Sequence[float]) -> str:
    listed = " → ".join(f"{value:.3f}" for value in errors)
    better = errors[-1] <= errors[0]
    meaning = "certainty and correctness came closer together" if better else "certainty grew faster than correctness"
    return f"Calibration error: {listed}; from the first to the last stage, {meaning}."


def _certainty_row(stage: Stage, m: StageMeasure) -> list[object]:
    gap = m.mean_confidence - m.accuracy
    return [stage.title, f"{m.mean_confidence:.3f}", f"{m.mean_entropy:.3f}", f"{m.accuracy:.3f}", signed(gap),
            f"{m.calibration_error:.3f}"]  # fmt: skip


def _panels(titles: Sequence[str], drawn: Sequence[Html]) -> Html:
    panels = [tag("div", tag("h3", title), plot) for title, plot in zip(titles, drawn, strict=True)]
    return tag("div", join_html(panels), class_="panels")


def _bins_table(stage: Stage, m: StageMeasure) -> Html:
    width = 1 / len(m.counts)
    rows = [
        [
            f"{i * width:.2f} to {(i + 1) * width:.2f}",
            f"{pixels:.0f}",
            _ratio(confidence, pixels),
            _ratio(correct, pixels),
        ]
        for i, (pixels, confidence, correct) in enumerate(m.counts.tolist())
    ]
    return table(f"Reliability of {stage.title}", ["confidence", "pixels", "mean confidence", "right"], rows)


def _ratio(part: float, whole: float) -> str:
    return f"{part / whole:.3f}" if whole and not math.isnan(part) else "–"
