"""The terminal: rich's console, on which text from data cannot pass for the terminal's own commands."""

import unicodedata
from typing import Any

import rich.markup
from rich.console import Console
from rich.text import Text

KEPT = "\n\t"
INVISIBLE = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control and format characters, lone surrogates, other line ends


def visible(text: str) -> str:
    """The text with every character that a terminal would obey, or not show, as its escape: \\x1b, \\u202e."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char.encode("unicode_escape").decode() if char not in KEPT and unicodedata.category(char) in INVISIBLE else char
        for char in text
    )


def escape(text: str) -> str:
    """The text in one line, in which brackets are no markup."""
    return rich.markup.escape(" ".join(text.split()))


class Terminal(Console):
    """Shows every string through `visible`."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)
