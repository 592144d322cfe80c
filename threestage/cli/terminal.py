"""The terminal: rich's console, on which text from data cannot pass for the terminal's own commands."""

from typing import Any

import rich.markup
from rich.console import Console
from rich.text import Text

from threestage.plain_text import escape_control_chars


def escape(text: str) -> str:
    """The text in one line, in which brackets are no markup."""
    return rich.markup.escape(" ".join(text.split()))


class Terminal(Console):
    """Shows every string through `visible`."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(escape_control_chars(text), **options)
