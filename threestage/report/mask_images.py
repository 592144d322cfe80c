"""Masks, confidence and changes as images: in colour, over a photo, side by side, or embedded in the page of a run."""

import base64
import io
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from threestage import IGNORE_INDEX
from threestage.data.bands import shown_bands
from threestage.data.classes import Colour
from threestage.data.palette import palette

Bytes = npt.NDArray[np.uint8]
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

# ---- In colour, over a photo, and side by side

LEAST_WIDTH, MOST_WIDTH = 160, 480  # pixels of one image in a panel
GAP, FONT_SIZE, LEADING = 8, 15, 4
BAND_ROWS = 256


def colourise(mask: Bytes, colours: Sequence[Colour]) -> Bytes:
    """Class ids (H,W) → RGB (H,W,3) uint8; 255 and ids without a colour are black."""
    return palette(colours)[mask]


def overlay(image: Bytes, mask: Bytes, colours: Sequence[Colour], alpha: float = 0.5) -> Bytes:
    """Image (H,W,C) uint8, as `shown_bands` shows it, under the colours of its mask (H,W); `alpha` in [0,1] is the share of the
    colours."""
    image = shown_bands(image)
    mixed = np.empty_like(image)
    for top in range(0, len(image), BAND_ROWS):  # as floats a large image takes gigabytes
        rows = slice(top, top + BAND_ROWS)
        mixed[rows] = np.rint((1 - alpha) * image[rows].astype(np.float32) + alpha * colourise(mask[rows], colours))
    return mixed


def panel(
    columns: Sequence[tuple[str, Sequence[Bytes]]],
    classes: Sequence[str],
    colours: Sequence[Colour],
    captions: Sequence[Sequence[str]] = (),
) -> Image.Image:
    """Pictures side by side: one column per (title, arrays (H,W,C) uint8), one row per image, a legend below.

    Small pictures are enlarged by a whole factor with nearest neighbours, so that pixels stay pixels; wide ones are
    reduced. Columns may differ in length and pictures in size. captions: for each column a line below each picture.
    """
    font = ImageFont.load_default(size=FONT_SIZE)
    pictures = [[_enlarged_or_reduced(array) for array in arrays] for _, arrays in columns]
    lines = [title.split("\n") for title, _ in columns]
    widths = [_column_width(title, column, font) for title, column in zip(lines, pictures, strict=True)]
    rows = max((len(column) for column in pictures), default=0)
    below = (FONT_SIZE + GAP if captions else 0) + GAP
    heights = [max(column[row].height for column in pictures if row < len(column)) + below for row in range(rows)]
    width = sum(widths) + GAP * (len(widths) + 1)
    entries = [*zip(classes, colours, strict=True), ("ignored", (0, 0, 0))]
    positions, legend_height = _legend_positions([name for name, _ in entries], width, font)
    top = FONT_SIZE + 2 * GAP + (max(map(len, lines)) - 1) * (FONT_SIZE + LEADING)
    legend_top = top + sum(heights)

    canvas = Image.new("RGB", (width, legend_top + legend_height), "white")
    draw = ImageDraw.Draw(canvas)
    left = GAP
    for column, (title, shown, column_width) in enumerate(zip(lines, pictures, widths, strict=True)):
        middle = left + column_width / 2
        draw.text((middle, top / 2), "\n".join(title), "black", font, "mm", LEADING, "center")
        for row, picture in enumerate(shown):
            y = top + sum(heights[:row])
            canvas.paste(picture, (left + (column_width - picture.width) // 2, y))
            if captions:
                caption = _end_of(captions[column][row], column_width, font)
                draw.text((middle, y + picture.height + GAP / 2), caption, "dimgrey", font, "mt")
        left += column_width + GAP
    for (name, colour), (x, y) in zip(entries, positions, strict=True):
        _draw_swatch(draw, x, legend_top + y, name, colour, font)
    return canvas


def _column_width(title: Sequence[str], pictures: Sequence[Image.Image], font: Font) -> int:
    return max([*(math.ceil(font.getlength(line)) for line in title), *(picture.width for picture in pictures)])


def _draw_swatch(draw: ImageDraw.ImageDraw, x: int, y: int, name: str, colour: Colour, font: Font) -> None:
    draw.rectangle((x, y, x + FONT_SIZE, y + FONT_SIZE), tuple(colour), "black")
    draw.text((x + 1.5 * FONT_SIZE, y + FONT_SIZE / 2), name, "black", font, anchor="lm")


def _end_of(text: str, width: int, font: Font) -> str:
    """As much of its end as fits."""
    return next((end for i in range(len(text)) if font.getlength(end := "…"[: i and 1] + text[i:]) <= width), "")


def _enlarged_or_reduced(array: Bytes) -> Image.Image:
    picture = Image.fromarray(np.ascontiguousarray(shown_bands(array)))
    if picture.width < LEAST_WIDTH:
        factor = math.ceil(LEAST_WIDTH / picture.width)
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    if picture.width > MOST_WIDTH:
        height = max(1, round(picture.height * MOST_WIDTH / picture.width))
        return picture.resize((MOST_WIDTH, height), Image.Resampling.BOX)
    return picture


def _legend_positions(names: Sequence[str], width: int, font: Font) -> tuple[list[tuple[int, int]], int]:
    """Top left corners of the swatches, broken into lines of at most `width` pixels, and the height of them all."""
    positions, x, y = list[tuple[int, int]](), GAP, 0
    for name in names:
        needed = math.ceil(1.5 * FONT_SIZE + font.getlength(name)) + 2 * GAP
        if x > GAP and x + needed > width:
            x, y = GAP, y + FONT_SIZE + GAP
        positions.append((x, y))
        x += needed
    return positions, y + FONT_SIZE + GAP


# ---- Embedded in the page

LEAST_SIDE, MOST_SIDE = 256, 320  # of the longer side of a map, in pixels
NUMBER_SIZE = 20
LABEL_SIDES = (96, 64, 48, 32, 24, 18)  # squares that a class's number may stand in, widest first
CONFIDENCE_LEVELS = 32
# Okabe and Ito's colours, told apart with any colour vision; grey in place of black, which ignored pixels have.
SAFE_COLOURS: tuple[Colour, ...] = (
    (170, 170, 170), (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167),
)  # fmt: skip
CONFIDENCE_COLOURS: tuple[Colour, ...] = ((0, 32, 77), (66, 78, 108), (124, 123, 120), (187, 175, 113), (255, 234, 70))
STILL_RIGHT, BECAME_RIGHT, BECAME_WRONG, STILL_WRONG, IGNORED, STRIPE = range(6)
CHANGE_COLOURS: tuple[Colour, ...] = (
    (240, 240, 240), (0, 114, 178), (240, 160, 30), (140, 140, 140), (0, 0, 0), (90, 30, 0),
)  # fmt: skip


def class_colours(colours: Sequence[Colour]) -> Sequence[Colour]:
    """Colours told apart with any colour vision where there are enough of them, else the data set's own."""
    return SAFE_COLOURS[: len(colours)] if len(colours) <= len(SAFE_COLOURS) else colours


def photo(image: Bytes) -> str:
    """(H,W,C) uint8 as it is, or reduced to MOST_SIDE."""
    picture = Image.fromarray(np.ascontiguousarray(shown_bands(image)))
    if max(picture.size) > MOST_SIDE:
        picture = picture.resize(_shown_size(image.shape[:2]), Image.Resampling.BOX)
    stream = io.BytesIO()
    picture.save(stream, format="JPEG", quality=88, subsampling=0)
    return _data_uri("jpeg", stream.getvalue())


def class_picture(mask: Bytes, colours: Sequence[Colour]) -> str:
    """Class ids (H,W), 255 black, in their colours; the widest place of every class carries its number."""
    ignored, white = len(colours), len(colours) + 1
    if white > IGNORE_INDEX:
        return _palette_png(_fit(mask), [*colours, *[(0, 0, 0)] * (IGNORE_INDEX + 1 - len(colours))])
    indices = _fit(np.minimum(mask, ignored))
    for class_id, place in label_places(indices, len(colours)).items():
        for stroke, colour in ((2, ignored), (0, white)):
            rows, columns = _number(class_id, stroke)
            rows, columns = rows + place[0], columns + place[1]
            inside = (rows >= 0) & (rows < indices.shape[0]) & (columns >= 0) & (columns < indices.shape[1])
            indices[rows[inside], columns[inside]] = colour
    return _palette_png(indices, [*colours, (0, 0, 0), (255, 255, 255)])


@lru_cache
def _number(number: int, stroke: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pixels of a number around its middle."""
    side = 4 * NUMBER_SIZE
    stamp = Image.new("1", (side, side))  # of one bit: no blurred edge, whose values would be other classes
    font = ImageFont.load_default(size=NUMBER_SIZE)
    ImageDraw.Draw(stamp).text((side / 2, side / 2), str(number), 1, font, "mm", stroke_width=stroke)
    rows, columns = np.nonzero(np.asarray(stamp))
    return rows - side // 2, columns - side // 2


def label_places(indices: Bytes, num_classes: int) -> dict[int, tuple[int, int]]:
    """Row and column of a place inside each class that is wide enough for a number: the middle of its largest square."""
    places = {}
    for class_id in np.flatnonzero(np.bincount(indices.ravel(), minlength=num_classes)[:num_classes]):
        sums = np.pad((indices == class_id).cumsum(0, dtype=np.int32).cumsum(1, dtype=np.int32), ((1, 0), (1, 0)))
        for side in LABEL_SIDES:
            inside = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
            if inside.size and inside.max() == side * side:
                row, column = divmod(int(inside.argmax()), inside.shape[1])
                places[int(class_id)] = (row + side // 2, column + side // 2)
                break
    return places


def confidence_map(confidence: Bytes) -> str:
    """(H,W) uint8, 255 = 1: dark where the model is unsure, bright where it is sure."""
    return _palette_png(_fit(confidence // (256 // CONFIDENCE_LEVELS)), confidence_colours(CONFIDENCE_LEVELS))


def confidence_colours(number: int) -> list[Colour]:
    """From dark blue over grey to yellow: brightness rises evenly."""
    stops, wanted = np.linspace(0, 1, len(CONFIDENCE_COLOURS)), np.linspace(0, 1, number)
    channels = [np.interp(wanted, stops, channel) for channel in zip(*CONFIDENCE_COLOURS, strict=True)]
    return [(round(r), round(g), round(b)) for r, g, b in zip(*channels, strict=True)]


def changes(mask: Bytes, before: Bytes, after: Bytes) -> Bytes:
    """(H,W) of STILL_RIGHT … IGNORED: what an image's pixels were and are, against the truth."""
    was, now = before == mask, after == mask
    found = np.select([was & now, ~was & now, was & ~now], [STILL_RIGHT, BECAME_RIGHT, BECAME_WRONG], STILL_WRONG)
    found[mask == IGNORE_INDEX] = IGNORED
    return found.astype(np.uint8)


def change_map(found: Bytes) -> str:
    """What `changes` found, in colours; what became wrong is striped."""
    fitted = _fit(found)
    rows, columns = np.indices(fitted.shape)
    fitted[(fitted == BECAME_WRONG) & ((rows + columns) % 6 < 2)] = STRIPE
    return _palette_png(fitted, CHANGE_COLOURS)


def _shown_size(shape: tuple[int, ...]) -> tuple[int, int]:
    """Width and height that a map of this shape is shown with: a whole factor larger, or reduced."""
    longest = max(shape)
    factor = MOST_SIDE / longest if longest > MOST_SIDE else math.ceil(LEAST_SIDE / longest)
    return max(1, round(shape[1] * factor)), max(1, round(shape[0] * factor))


def _fit(indices: Bytes) -> Bytes:
    return np.array(
        Image.fromarray(np.ascontiguousarray(indices)).resize(_shown_size(indices.shape), Image.Resampling.NEAREST)
    )


def _palette_png(indices: Bytes, colours: Sequence[Colour]) -> str:
    picture = Image.fromarray(np.ascontiguousarray(indices))
    picture.putpalette(np.asarray(colours, np.uint8).tobytes())
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return _data_uri("png", stream.getvalue())


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
