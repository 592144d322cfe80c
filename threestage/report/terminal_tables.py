"""Results as pictures and tables: masks in colour, panels that compare the stages, a table of their figures."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from threestage.data.classes import Colour
from threestage.data.palette import palette
from threestage.data.palette import palette_png as palette_png

if TYPE_CHECKING:
    from rich.table import Table

Bytes = npt.NDArray[np.uint8]

LEAST_WIDTH, MOST_WIDTH = 160, 480  # pixels of one picture in a panel
GAP, FONT_SIZE = 8, 15
BAND_ROWS = 256
IGNORED = "ignored"
ABSENT = "–"


def colourise(mask: Bytes, colours: Sequence[Colour]) -> Bytes:
    """Class ids (H,W) → RGB (H,W,3) uint8; 255 and ids without a colour are black."""
    return palette(colours)[mask]


def overlay(image: Bytes, mask: Bytes, colours: Sequence[Colour], alpha: float = 0.5) -> Bytes:
    """Image (H,W,3) uint8 under the colours of its mask (H,W); `alpha` in [0,1] is the share of the colours."""
    mixed = np.empty_like(image)
    for top in range(0, len(image), BAND_ROWS):  # as floats a large image takes gigabytes
        rows = slice(top, top + BAND_ROWS)
        mixed[rows] = np.rint((1 - alpha) * image[rows].astype(np.float32) + alpha * colourise(mask[rows], colours))
    return mixed


def panel(
    columns: Sequence[tuple[str, Sequence[Bytes]]], classes: Sequence[str], colours: Sequence[Colour]
) -> Image.Image:
    """Pictures side by side: one column per (title, RGB arrays (H,W,3) uint8), one row per image, a legend below.

    Small pictures are enlarged by a whole factor with nearest neighbours, so that pixels stay pixels; wide ones are
    reduced. Columns may differ in length and pictures in size.
    """
    font = ImageFont.load_default(size=FONT_SIZE)
    pictures = [[_fit(array) for array in arrays] for _, arrays in columns]
    widths = [
        max([math.ceil(font.getlength(title)), *(picture.width for picture in column)])
        for (title, _), column in zip(columns, pictures, strict=True)
    ]
    rows = max((len(column) for column in pictures), default=0)
    heights = [max(column[row].height for column in pictures if row < len(column)) for row in range(rows)]
    width = sum(widths) + GAP * (len(widths) + 1)
    entries = [*zip(classes, colours, strict=True), (IGNORED, (0, 0, 0))]
    positions, legend_height = _legend_positions([name for name, _ in entries], width, font)
    top = FONT_SIZE + 2 * GAP
    legend_top = top + sum(heights) + GAP * rows

    canvas = Image.new("RGB", (width, legend_top + legend_height), "white")
    draw = ImageDraw.Draw(canvas)
    left = GAP
    for (title, _), column, column_width in zip(columns, pictures, widths, strict=True):
        draw.text((left + column_width / 2, top / 2), title, "black", font, anchor="mm")
        for row, picture in enumerate(column):
            canvas.paste(picture, (left + (column_width - picture.width) // 2, top + sum(heights[:row]) + GAP * row))
        left += column_width + GAP
    for (name, colour), (x, y) in zip(entries, positions, strict=True):
        draw.rectangle((x, legend_top + y, x + FONT_SIZE, legend_top + y + FONT_SIZE), tuple(colour), "black")
        draw.text((x + 1.5 * FONT_SIZE, legend_top + y + FONT_SIZE / 2), name, "black", font, anchor="lm")
    return canvas


def _fit(array: Bytes) -> Image.Image:
    picture = Image.fromarray(np.ascontiguousarray(array))
    if picture.width < LEAST_WIDTH:
        factor = math.ceil(LEAST_WIDTH / picture.width)
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    if picture.width > MOST_WIDTH:
        height = max(1, round(picture.height * MOST_WIDTH / picture.width))
        return picture.resize((MOST_WIDTH, height), Image.Resampling.BOX)
    return picture


def _legend_positions(
    names: Sequence[str], width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont
) -> tuple[list[tuple[int, int]], int]:
    """Top left corners of the swatches, broken into lines of at most `width` pixels, and the height of them all."""
    positions, x, y = list[tuple[int, int]](), GAP, 0
    for name in names:
        needed = math.ceil(1.5 * FONT_SIZE + font.getlength(name)) + 2 * GAP
        if x > GAP and x + needed > width:
            x, y = GAP, y + FONT_SIZE + GAP
        positions.append((x, y))
        x += needed
    return positions, y + FONT_SIZE + GAP


def _fraction(value: float) -> str:
    return f"{value:.3f}"


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 180:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


_COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("mean IoU", "mean_iou", _fraction),
    ("best", "best_mean_iou", _fraction),
    ("student", "student_mean_iou", _fraction),
    ("pseudo-mask mean IoU", "pseudo_mask_mean_iou", _fraction),
    ("mean confidence", "mean_confidence", _fraction),
    ("share above 0.9", "share_above_0.9", _percent),
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


def _cell(value: float | None, form: Callable[[float], str]) -> str:
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
