"""Scores for people: of a run's stages, of `threestage evaluate`, and over several seeds, as tables and as a diagram."""

import io
import math
import statistics
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from threestage.data import storage
from threestage.data.outputs import SCORES, claim
from threestage.errors import InputError
from threestage.models.export import BEST_MODEL
from threestage.prediction.tta import TTASettings
from threestage.run_folder.records import Results, SavedScores
from threestage.run_folder.reuse import CONFIG_NAME

if TYPE_CHECKING:
    from rich.table import Table

ABSENT = "–"
SHOWN_CLASSES = 3

# ---- The stages of a run


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 180:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


_COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("mean IoU", "mean_iou", "{:.3f}".format),
    ("best", "best_mean_iou", "{:.3f}".format),
    ("student", "student_mean_iou", "{:.3f}".format),
    ("pseudo-mask mean IoU", "pseudo_mask_mean_iou", "{:.3f}".format),
    ("mean confidence", "mean_confidence", "{:.3f}".format),
    ("share above 0.9", "share_above_0.9", lambda share: f"{100 * share:.0f} %"),
    ("left out", "rejected", "{:.0f}".format),
    ("time", "seconds", _duration),
)


def _cells(results: Mapping[str, Any]) -> list[list[str]]:
    """The header, then one row a stage; what was left out is shown if anything was: without it a terminal of 80 columns
    holds the table."""
    some_left_out = any(values.get("rejected") for values in results["stages"].values())
    columns = [column for column in _COLUMNS if column[1] != "rejected" or some_left_out]
    rows = [["stage", *(title for title, _, _ in columns)]]
    for stage, values in results["stages"].items():
        rows.append([stage, *(_cell(values.get(key), form) for _, key, form in columns)])
    return rows


def _cell(value: float | None, form: Callable[[float], str] = "{:.3f}".format) -> str:
    return ABSENT if value is None or math.isnan(value) else form(value)


def results_table(results: Mapping[str, Any]) -> str:
    """The figures of every stage as aligned lines of text; a missing figure prints as "–".

    `results` is a run's record: {"stages": {"stage1": {"mean_iou": …, "seconds": …}, …}}; IoU and confidence in [0,1].
    "mean IoU" is that of the last step's model, "best" that of the best evaluation, "student" the last step's student's.
    """
    rows = _cells(results)
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(map(_aligned, row, widths, range(len(row)))) for row in rows)


def _aligned(cell: str, width: int, column: int) -> str:
    return cell.rjust(width) if column else cell.ljust(width)


def rich_table(results: Mapping[str, Any]) -> "Table":
    """The same as a table for a rich console."""
    from rich.table import Table

    header, *rows = _cells(results)
    table = Table()
    for i, title in enumerate(header):
        table.add_column(title.replace(" ", "\n"), justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    return table


def rounds_table(rounds: Sequence[Mapping[str, Any]]) -> "Table":
    """The rounds of labelling that results.json tells of, for a rich console. "changed": of the champion's pseudo-masks."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("round", "run", "data", "labels", "mean IoU", "pixels changed", "most changed")
    for number, one in enumerate(rounds, 1):
        corrected = one.get("corrected") or {"pixels_changed": None, "of_class": {}}
        shares = {name: share for name, share in corrected["of_class"].items() if share}
        most = sorted(shares, key=lambda name: -shares[name])[:SHOWN_CLASSES]
        changed = _cell(corrected["pixels_changed"], "{:.1%}".format)
        cells = (f"v{one['data_version']}", str(one["labelled"]), _cell(one["mean_iou"]), changed)
        classes = ", ".join(f"{name} {shares[name]:.0%}" for name in most)
        table.add_row(str(number), escape(one["run"].rsplit("/", 1)[-1]), *cells, escape(classes))
    return table


# ---- An evaluation

METRICS_NAME, DIAGRAM_NAME = "metrics.json", "reliability.png"
MOST_CLASSES = 20  # whose confusion matrix is printed
SIDE, MARGIN, HEADER, FONT_SIZE = 480, 60, 90, 15  # pixels
LINE_WIDTH = 70  # letters
BAR, LINE, INK = (86, 135, 190), (190, 60, 50), "black"


def write_scores(folder: str, scores: Mapping[str, Any]) -> None:
    """`metrics.json` and `reliability.png`, in a folder or below a prefix."""
    claim(folder, SCORES)
    stream = io.BytesIO()
    reliability_diagram(scores).save(stream, format="PNG")
    storage.write_json(storage.join(folder, METRICS_NAME), dict(scores))
    storage.write_bytes(storage.join(folder, DIAGRAM_NAME), stream.getvalue())


def reliability_diagram(scores: Mapping[str, Any]) -> Image.Image:
    """Accuracy against confidence: a bar for each bin that holds pixels, at its mean confidence a dot for its accuracy;
    the diagonal is a calibrated model's (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017)."""
    image = Image.new("RGB", (SIDE + 2 * MARGIN, SIDE + MARGIN + HEADER), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=FONT_SIZE)
    rows: Sequence[Mapping[str, Any]] = scores["reliability"]
    for number, row in enumerate(rows):
        if row["pixels"]:
            left, right = number / len(rows), (number + 1) / len(rows)
            draw.rectangle((*_point(left, row["accuracy"]), *_point(right, 0)), fill=BAR, outline="white")
    draw.line((*_point(0, 0), *_point(1, 1)), fill=LINE, width=2)
    for row in rows:
        if row["pixels"]:
            x, y = _point(row["confidence"], row["accuracy"])
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=INK)
    draw.rectangle((*_point(0, 1), *_point(1, 0)), outline=INK)
    for tick in range(0, 11, 2):
        draw.text(_offset(_point(tick / 10, 0), 0, 12), f"{tick / 10:g}", INK, font, anchor="mm")
        draw.text(_offset(_point(0, tick / 10), -16, 0), f"{tick / 10:g}", INK, font, anchor="mm")
    title = f"ECE {_cell(scores['expected_calibration_error'])} over {scores['images']} images; {scores['protocol']}"
    draw.multiline_text(
        (SIDE / 2 + MARGIN, HEADER / 2), textwrap.fill(title, LINE_WIDTH), INK, font, "mm", align="center"
    )
    draw.text(_offset(_point(0.5, 0), 0, 36), "confidence (bars: accuracy of each bin)", INK, font, anchor="mm")
    return image


def _point(x: float, y: float) -> tuple[float, float]:
    """Pixels of a point of the unit square, whose y goes up."""
    return MARGIN + x * SIDE, HEADER + (1 - y) * SIDE


def _offset(point: tuple[float, float], right: float, down: float) -> tuple[float, float]:
    return point[0] + right, point[1] + down


def score_tables(scores: Mapping[str, Any]) -> list["Table"]:
    """For a rich console: the figures of every class and of all, then the confusion matrix of at most MOST_CLASSES."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("class", "IoU", "boundary F")
    for name, iou in scores["per_class_iou"].items():
        table.add_row(escape(name), _cell(iou), _cell(scores["per_class_boundary_f"][name]))
    table.add_section()
    table.add_row("mean, of classes with true pixels", _cell(scores["mean_iou"]), _cell(scores["boundary_f"]))
    for name, share in scores.get("absent_classes", {}).items():
        table.add_row(f"predicted as {escape(name)}, which has no true pixel", f"{100 * share:.2g} %", "")
    table.add_row("pixel accuracy", _cell(scores["pixel_accuracy"]), "")
    table.add_row("calibration error (ECE)", _cell(scores["expected_calibration_error"]), "")
    return [table] if len(scores["classes"]) > MOST_CLASSES else [table, _confusion_table(scores)]


def _confusion_table(scores: Mapping[str, Any]) -> "Table":
    """Percent of each true class's pixels, which make a row."""
    from rich.markup import escape
    from rich.table import Table

    classes = scores["classes"]
    table = Table(
        "true \\ predicted",
        *(str(number) for number in range(len(classes))),
        title="confusion matrix, % of the true class",
        title_justify="left",
    )
    for number, (name, pixels) in enumerate(zip(classes, scores["confusion_matrix"], strict=True)):
        total = sum(pixels)
        table.add_row(f"{number} {escape(name)}", *(f"{100 * n / total:.1f}" if total else ABSENT for n in pixels))
    return table


# ---- Several seeds


class SeedScore(NamedTuple):
    """What a mean IoU is of. `images`: "validation" (a run's own), or the split of a data set that was evaluated."""

    stage: str
    model: str
    images: str
    protocol: str


class Figure(NamedTuple):
    """`source`: the seed of a run, or the model that was evaluated. `mean_iou`: in [0,1]."""

    measured: SeedScore
    source: str
    mean_iou: float


class SeedRow(NamedTuple):
    """`deviation`: of the sample, None of a single figure."""

    measured: SeedScore
    mean: float
    deviation: float | None
    seeds: int


def seeds_table(runs: Sequence[str], evaluated: Sequence[str] = ()) -> str:
    """The Markdown table of the folders of runs (results.json), one per seed, and of `threestage evaluate --out`
    (metrics.json). All are to be of one configuration and one data set: a table shows only what `SeedScore` says.

    Raises InputError where a seed, or a model under one protocol, is there twice.
    """
    figures = [
        figure for uri in runs for figure in figures_of_run(_json(uri, "results.json", Results), _validated_in(uri))
    ]
    figures += [figure for uri in evaluated for figure in figures_of_scores(_json(uri, "metrics.json", SavedScores))]
    return markdown_table(rows_over_seeds(figures))


def _json(folder: str, name: str, shape: Any) -> Any:
    uri = storage.join(storage.absolute(folder), name)
    if not storage.exists(uri):
        raise InputError(
            f"{uri}: is missing; give the --out of a finished run, or of an evaluation", "report/no-results"
        )
    return storage.read_json(uri, shape)


def _validated_in(run: str) -> str:
    """How a run's images were given to the network, in words."""
    uri = storage.join(storage.absolute(run), CONFIG_NAME)
    settings = storage.read_json(uri, dict[str, Any]) if storage.exists(uri) else {}
    return TTASettings.model_validate(settings.get("inference", {})).describe()


def figures_of_run(results: Mapping[str, Any], protocol: str = TTASettings().describe()) -> list[Figure]:
    """From results.json: of every stage the shipped network at the last step and at its best evaluation, and the student;
    of an older version's run the first alone."""
    figures = []
    for stage, values in results["stages"].items():
        shipped = "network" if stage == "stage1" else "teacher"
        names = {"mean_iou": f"{shipped}, last step", "best_mean_iou": f"{shipped}, best evaluation"}
        names["student_mean_iou"] = "student, last step"
        for key, name in names.items():
            if key in values:
                measured = SeedScore(stage, name, "validation", protocol)
                figures.append(Figure(measured, f"seed {results['seed']}", values[key]))
    return figures


def figures_of_scores(scores: Mapping[str, Any]) -> list[Figure]:
    """From what `threestage evaluate` says; none where no pixel had a class. A model that lies in `best_model` is named so."""
    shipped = "network" if scores["stage"] == "stage1" else "teacher"
    best = scores["model"].rstrip("/").rsplit("/", 1)[-1] == BEST_MODEL
    name = f"{shipped}, {'best evaluation' if best else 'last step'}"
    measured = SeedScore(scores["stage"], name, scores["split"], scores["protocol"])
    return [] if scores["mean_iou"] is None else [Figure(measured, scores["model"], scores["mean_iou"])]


def rows_over_seeds(figures: Iterable[Figure]) -> list[SeedRow]:
    """One row for all that was measured alike, in order of appearance. InputError where a source comes twice in one."""
    found: dict[SeedScore, dict[str, float]] = {}
    for measured, source, mean_iou in figures:
        values = found.setdefault(measured, {})
        if source in values:
            raise InputError(
                f"{source}: is given twice ({', '.join(measured)}); give each seed once", "report/same-seed"
            )
        values[source] = mean_iou
    return [
        SeedRow(measured, statistics.fmean(values.values()), deviation([*values.values()]), len(values))
        for measured, values in found.items()
    ]


def deviation(values: Sequence[float]) -> float | None:
    """Standard deviation of the sample (divided by n - 1), None of fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def plus_minus(mean: float, spread: float | None) -> str:
    return f"{mean:.3f}" if spread is None else f"{mean:.3f} ± {spread:.3f}"


def markdown_table(rows: Iterable[SeedRow]) -> str:
    """Lines of a Markdown table."""
    lines = ["| stage | model | images | protocol | mean IoU | seeds |", "|---|---|---|---|---|---|"]
    for measured, mean, spread, seeds in rows:
        lines.append(f"| {' | '.join(measured)} | {plus_minus(mean, spread)} | {seeds} |")
    return "\n".join(lines)
