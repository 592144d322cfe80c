"""Charts as SVG. Colours come from the page's style sheet, so that they follow light and dark; every series also has its own
dash and marker, or pattern."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from threestage.report_page.markup import Html, joined, tag

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
            text(self.left + (self.width - self.left - self.right) / 2, self.height - 6.0, self.x_label, "middle"),
            tag("text", self.y_label, transform=f"translate(13 {middle:.0f}) rotate(-90)", text_anchor="middle"),
        ]
        return drawing(self.width, self.height, title, *self._grid(), *marks, *names)

    def _grid(self) -> list[Html]:
        parts = []
        for value in ticks(self.y):
            (x1, y), (x2, _) = self.at(self.x[0], value), self.at(self.x[1], value)
            parts += [line(x1, y, x2, y, "grid"), text(x1 - 6, y + 4, short(value), "end")]
        bottom = self.at(self.x[0], self.y[0])[1]
        for value in ticks(self.x):
            x = self.at(value, self.y[0])[0]
            parts += [line(x, bottom, x, bottom + 4, "axis"), text(x, bottom + 17, short(value), "middle")]
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


def text(x: float, y: float, content: str, anchor: str = "start", class_: str | None = None) -> Html:
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
            marks.append(text(left + length + 6, y + thick - 3, "–" if value is None else form(value), class_="value"))
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
    return joined([tag("rect", said, **box, class_=f"bar s{style}"), *over])


def histogram(title: str, counts: Tensor, mean: float, style: int, top: float) -> Html:
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
        inner = joined(
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
