"""What the report's page is made of: HTML elements with escaped text, charts as SVG, masks and photos as embedded pictures.

Colours of charts come from style.css, so they follow light and dark; every series also has its own dash and marker, or
pattern.
"""

import base64
import html
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from threestage import IGNORE_INDEX
from threestage.data.classes import Colour

# ---- HTML: every string that is not Html is escaped

VOID_TAGS = ("img", "input", "meta", "link", "path", "line", "rect", "circle", "polyline", "use", "stop")


class Html(str):
    """Markup. Every other string is text, and is escaped where it is put into markup."""


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """An element. "class_" and "for_" lose their underscore, other underscores become hyphens; an attribute that is None
    or False is left out, True stands alone, and a float is rounded to a tenth (coordinates of SVG)."""
    inner = "".join(map(escaped, children))
    start = name + "".join(_attribute(key, value) for key, value in attributes.items())
    return Html(f"<{start}/>" if name in VOID_TAGS and not inner else f"<{start}>{inner}</{name}>")


def _attribute(key: str, value: object) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    if value is True:
        return f" {name}"
    return f' {name}="{html.escape(f"{value:.1f}" if isinstance(value, float) else str(value))}"'


def escaped(child: object) -> Html:
    """A child as markup: None is nothing, a list is its members, text is escaped."""
    if child is None:
        return Html()
    if isinstance(child, list | tuple):
        return Html("".join(map(escaped, child)))
    return child if isinstance(child, Html) else Html(html.escape(str(child)))


def join_html(parts: Iterable[Html]) -> Html:
    return Html("".join(parts))


def table(caption: str, header: Sequence[object], rows: Iterable[Sequence[object]]) -> Html:
    """A table whose first column names the rows, with or without a header; where it is too wide it scrolls by itself, by
    keyboard too."""
    head = tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in header))) if header else None
    body = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows]
    whole = tag("table", tag("caption", caption), head, tag("tbody", body))
    return tag("div", whole, class_="scroll", tabindex=0, role="region", aria_label=caption)


def disclosure(summary: str, *content: object) -> Html:
    """What is folded away until it is asked for; works without scripts and by keyboard."""
    return tag("details", tag("summary", summary), *content)


def section(identifier: str, title: str, *content: object) -> Html:
    heading = tag("h2", title, id=f"{identifier}-title")
    return tag("section", heading, *content, id=identifier, aria_labelledby=f"{identifier}-title")


def figure(how_to_read: str, *content: object, key: Html | None = None) -> Html:
    """Plots with their key above and, below, how to read them."""
    caption = tag("figcaption", tag("b", "How to read it. "), how_to_read)
    return tag("figure", key, *content, caption)


def note(*content: object) -> Html:
    return tag("p", *content, class_="note")


# ---- Charts as SVG

Point = tuple[float, float]
Range = tuple[float, float]
MOST_MARKERS = 40
NAME_LENGTH = 24
PATTERNS = {2: "M-1 7L7 -1M-1 1L1 -1M5 7L7 5", 3: "M2 2h2v2h-2z", 4: "M0 3h6"}  # style → path in a square of 6
MARKERS = ("circle", "square", "triangle")


@dataclass(frozen=True)
class Series:
    """A named line. `style` 1… chooses colour, dash and marker."""

    name: str
    style: int
    points: Sequence[Point]


@dataclass(frozen=True)
class Bars:
    """One bar a group; None where there is no figure. `style` 1… chooses colour and pattern."""

    name: str
    style: int
    values: Sequence[float | None]


@dataclass(frozen=True)
class Frame:
    """The axes of a plot; x and y are data ranges, width and height those of the whole drawing in pixels."""

    x: Range
    y: Range
    x_label: str
    y_label: str
    width: int = 340
    height: int = 240
    left: int = 52
    right: int = 12
    top: int = 14
    bottom: int = 44

    def at(self, x: float, y: float) -> Point:
        wide, high = self.width - self.left - self.right, self.height - self.top - self.bottom
        across = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1)
        up = (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1)
        return self.left + across * wide, self.top + (1 - up) * high

    def draw(self, title: str, *marks: Html) -> Html:
        """The whole SVG; `title` is what a screen reader says of it."""
        middle = (self.height - self.bottom + self.top) / 2
        names = [
            svg_text(self.left + (self.width - self.left - self.right) / 2, self.height - 6.0, self.x_label, "middle"),
            tag("text", self.y_label, transform=f"translate(13 {middle:.0f}) rotate(-90)", text_anchor="middle"),
        ]
        return drawing(self.width, self.height, title, *self._grid(), *marks, *names)

    def _grid(self) -> list[Html]:
        parts = []
        for value in ticks(self.y):
            (x1, y), (x2, _) = self.at(self.x[0], value), self.at(self.x[1], value)
            parts += [line(x1, y, x2, y, "grid"), svg_text(x1 - 6, y + 4, short(value), "end")]
        bottom = self.at(self.x[0], self.y[0])[1]
        for value in ticks(self.x):
            x = self.at(value, self.y[0])[0]
            parts += [line(x, bottom, x, bottom + 4, "axis"), svg_text(x, bottom + 17, short(value), "middle")]
        return [*parts, line(self.left, bottom, self.width - self.right, bottom, "axis")]


def drawing(width: int, height: int, title: str, *marks: Html) -> Html:
    return tag("svg", *marks, viewBox=f"0 0 {width} {height}", width=width, height=height, role="img", aria_label=title)


def ticks(of: Range, most: int = 5) -> list[float]:
    """Round values inside a range, at most `most` + 1 of them."""
    span = of[1] - of[0]
    if span <= 0 or not math.isfinite(span):
        return [of[0]]
    raw = span / most
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * (1 - 1e-9))
    first = math.ceil(of[0] / step - 1e-9)
    return [i * step for i in range(first, math.floor(of[1] / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A tick as text: 20000 → 20k."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{round(value, 10):g}"


def rounded_up(value: float) -> float:
    """The end of an axis that holds `value`."""
    steps = ticks((0.0, value)) if value > 0 else [0.0, 1.0]
    step = steps[1] - steps[0]
    return step * math.ceil(value / step - 1e-9) or step


def svg_text(x: float, y: float, content: str, anchor: str = "start", class_: str | None = None) -> Html:
    return tag("text", content, x=float(x), y=float(y), text_anchor=anchor, class_=class_)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Html:
    return tag("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=class_)


def lines(title: str, series: Sequence[Series], frame: Frame, dividers: Sequence[Point] = ()) -> Html:
    """Lines over a common frame. `dividers`: upright lines at x (the first value of each)."""
    marks = [line(*frame.at(x, frame.y[0]), *frame.at(x, frame.y[1]), "divider") for x, _ in dividers]
    for one in series:
        places = [frame.at(x, y) for x, y in one.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        marks.append(tag("polyline", points=path, class_=f"line s{one.style}"))
        if len(places) <= MOST_MARKERS:
            marks += [_marker(place, one, point) for place, point in zip(places, one.points, strict=True)]
    return frame.draw(title, *marks)


def _marker(place: Point, series: Series, point: Point) -> Html:
    said = tag("title", f"{series.name}, step {point[0]:g}: {point[1]:.4g}")
    return tag("path", said, d=marker_path(series.style, *place), class_=f"marker s{series.style}")


def marker_path(style: int, x: float, y: float) -> str:
    kind = MARKERS[(style - 1) % len(MARKERS)]
    if kind == "circle":
        return f"M{x - 3.5:.1f} {y:.1f}a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0"
    if kind == "square":
        return f"M{x - 3.2:.1f} {y - 3.2:.1f}h6.4v6.4h-6.4z"
    return f"M{x:.1f} {y - 4.3:.1f}l4.2 7.6h-8.4z"


def bars(title: str, groups: Sequence[str], series: Sequence[Bars], form: Callable[[float], str]) -> Html:
    """Lying bars: a group a line of text on the left, a bar a series, its value at its end."""
    width, left, right, thick, gap = 1040, 190, 64, 14, 12
    most = rounded_up(max((v for one in series for v in one.values if v is not None), default=1.0))
    marks, y = list[Html](), 4.0
    for row, name in enumerate(groups):
        marks.append(_name(left - 10, y + thick * len(series) / 2 + 4, name))
        for one in series:
            value = one.values[row]
            length = (width - left - right) * (value or 0.0) / most
            said = tag("title", f"{name}, {one.name}: {'no figure' if value is None else form(value)}")
            marks.append(_bar(said, left, y + 1, length, thick - 2, one.style))
            marks.append(
                svg_text(left + length + 6, y + thick - 3, "–" if value is None else form(value), class_="value")
            )
            y += thick
        y += gap
    marks.append(line(left, 0, left, y - gap + 4, "axis"))
    return drawing(width, math.ceil(y), title, *marks)


def _name(x: float, y: float, name: str) -> Html:
    cut = name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…"
    return tag("text", cut, tag("title", name), x=float(x), y=y, text_anchor="end")


def _bar(said: Html, x: float, y: float, width: float, height: float, style: int) -> Html:
    """A filled rectangle, under its pattern where the style has one."""
    box: dict[str, object] = {"x": float(x), "y": float(y), "width": float(width), "height": float(height)}
    over = [tag("rect", **box, fill=f"url(#pattern{style})")] if style in PATTERNS else []
    return join_html([tag("rect", said, **box, class_=f"bar s{style}"), *over])


def confidence_histogram(title: str, counts: Tensor, mean: float, style: int, top: float) -> Html:
    """Share of the pixels in each bin of confidence, and the mean confidence as an upright line."""
    frame = Frame((0.0, 1.0), (0.0, top), "confidence", "share of pixels")
    shares = (counts[:, 0] / counts[:, 0].sum()).tolist()
    marks = [
        _column(frame, i, len(shares), share, style, f"{share:.1%} of the pixels") for i, share in enumerate(shares)
    ]
    mark = line(*frame.at(mean, 0.0), *frame.at(mean, top), "mean")
    return frame.draw(title, *marks, mark)


def reliability(title: str, counts: Tensor, style: int) -> Html:
    """Share of right pixels in each bin of confidence against the diagonal, where it equals the confidence."""
    frame = Frame((0.0, 1.0), (0.0, 1.0), "confidence", "share of right pixels", height=290)
    marks = []
    for i, (pixels, confidence, correct) in enumerate(counts.tolist()):
        if pixels:
            said = f"{pixels:.0f} pixels, mean confidence {confidence / pixels:.3f}, right {correct / pixels:.3f}"
            marks.append(_column(frame, i, len(counts), correct / pixels, style, said))
    diagonal = line(*frame.at(0.0, 0.0), *frame.at(1.0, 1.0), "mean")
    return frame.draw(title, *marks, diagonal)


def _column(frame: Frame, place: int, number: int, value: float, style: int, said: str) -> Html:
    (left, top), (right, bottom) = frame.at(place / number, value), frame.at((place + 1) / number, 0.0)
    whole = f"confidence {place / number:.2f} to {(place + 1) / number:.2f}: {said}"
    return _bar(tag("title", whole), left + 0.5, top, right - left - 1, bottom - top, style)


def key(entries: Sequence[tuple[str, int]], kind: str) -> Html:
    """What each style stands for: `kind` is "line" or "bar"."""
    return tag("ul", *(tag("li", _sample(style, kind), name) for name, style in entries), class_="key")


def _sample(style: int, kind: str) -> Html:
    if kind == "bar":
        inner = _bar(Html(), 0, 2, 26, 12, style)
    else:
        inner = join_html(
            [
                tag("polyline", points="0,8 26,8", class_=f"line s{style}"),
                tag("path", d=marker_path(style, 13.0, 8.0), class_=f"marker s{style}"),
            ]
        )
    return tag("svg", inner, viewBox="0 0 26 16", width=26, height=16, aria_hidden="true")


def patterns() -> Html:
    """What tells bars apart without colour; once on a page, since the bars refer to it."""
    found = [
        tag("pattern", tag("path", d=path), id=f"pattern{n}", width=6, height=6, patternUnits="userSpaceOnUse")
        for n, path in PATTERNS.items()
    ]
    return tag("svg", tag("defs", *found), width=0, height=0, class_="patterns", aria_hidden="true")


# ---- Masks and photos as pictures in the page

Bytes = npt.NDArray[np.uint8]

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
    """(H,W,3) uint8 as it is, or reduced to MOST_SIDE."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    if max(picture.size) > MOST_SIDE:
        picture = picture.resize(_size(image.shape[:2]), Image.Resampling.BOX)
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


def _size(shape: tuple[int, ...]) -> tuple[int, int]:
    """Width and height that a map of this shape is shown with: a whole factor larger, or reduced."""
    longest = max(shape)
    factor = MOST_SIDE / longest if longest > MOST_SIDE else math.ceil(LEAST_SIDE / longest)
    return max(1, round(shape[1] * factor)), max(1, round(shape[0] * factor))


def _fit(indices: Bytes) -> Bytes:
    return np.array(
        Image.fromarray(np.ascontiguousarray(indices)).resize(_size(indices.shape), Image.Resampling.NEAREST)
    )


def _palette_png(indices: Bytes, colours: Sequence[Colour]) -> str:
    picture = Image.fromarray(np.ascontiguousarray(indices))
    picture.putpalette(np.asarray(colours, np.uint8).tobytes())
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return _data_uri("png", stream.getvalue())


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
