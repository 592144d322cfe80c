"""Text from data, as a terminal and as Markdown: it stays text and cannot pass for commands or markup. Loads no library."""

import re
import unicodedata

KEPT = "\n\t"
INVISIBLE = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control and format characters, lone surrogates, other line ends
COLOUR = re.compile(r"\x1b\[[0-9;]{0,40}m")
MARKUP = re.compile(r"[\\`*\[\]<>&|~]|(?<!\w)_|_(?!\w)")


def escape_control_chars(text: str) -> str:
    """The text with every character that a terminal would obey, or not show, as its escape: \\x1b, \\u202e."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char.encode("unicode_escape").decode() if char not in KEPT and unicodedata.category(char) in INVISIBLE else char
        for char in text
    )


def visible_log(text: str) -> str:
    """A piece of a job's log as `visible`: colours are left out, and a carriage return ends a line."""
    return escape_control_chars(COLOUR.sub("", text).replace("\r\n", "\n").replace("\r", "\n"))


def one_line(text: object) -> str:
    """The text as `visible`, in one line."""
    return escape_control_chars(" ".join(str(text).split()))


def markdown(text: object) -> str:
    """The text in one line of Markdown, in which nothing is markup, HTML or a link."""
    return MARKUP.sub(lambda found: f"&#{ord(found[0])};", one_line(text))
