"""The scores of `threestage evaluate` for people: tables on a console, a reliability diagram, a folder of both."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont

from threestage.data import storage
from threestage.data.outputs import SCORES, claim

if TYPE_CHECKING:
    from rich.table import Table

METRICS_NAME, DIAGRAM_NAME = "metrics.json", "reliability.png"
MOST_CLASSES = 20  # whose confusion matrix is printed
ABSENT = "–"
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
    title = f"ECE {_figure(scores['expected_calibration_error'])} over {scores['images']} images; {scores['protocol']}"
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
        table.add_row(escape(name), _figure(iou), _figure(scores["per_class_boundary_f"][name]))
    table.add_section()
    table.add_row("mean, of classes with true pixels", _figure(scores["mean_iou"]), _figure(scores["boundary_f"]))
    for name, share in scores.get("absent_classes", {}).items():
        table.add_row(f"predicted as {escape(name)}, which has no true pixel", f"{100 * share:.2g} %", "")
    table.add_row("pixel accuracy", _figure(scores["pixel_accuracy"]), "")
    table.add_row("calibration error (ECE)", _figure(scores["expected_calibration_error"]), "")
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


def _figure(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.3f}"
