"""HTML from functions: text becomes markup only by being escaped, so nothing that data says can break out of the page."""

import html
from collections.abc import Iterable, Sequence

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


def joined(parts: Iterable[Html]) -> Html:
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
