"""Why: a file's name is text from strangers, and a terminal obeys text (it renames windows, clears the screen, hides letters)."""

import html
import io

import pytest
from rich.table import Table

from threestage.cli.app import main
from threestage.cli.options import Terminal
from threestage.plain_text import escape_control_chars, markdown, visible_log

EVIL = "a\x1b[2J\x1b]0;title\x07\x9b31m\u202egnp.\u200bé😀"


def test_every_string_is_shown_and_none_obeyed() -> None:
    assert escape_control_chars("plain é 😀 [red]\ttext\n") == "plain é 😀 [red]\ttext\n"
    file = io.StringIO()
    terminal = Terminal(file=file, width=200)
    table = Table("name", title=EVIL, caption=EVIL)
    table.add_row(EVIL)
    terminal.print(table)
    terminal.print(EVIL, markup=False)
    terminal.print(f"[bold]{EVIL}")
    shown = file.getvalue()
    assert not set(shown) & set("\x1b\x07\x9b\u202e\u200b")
    assert shown.count("\\x1b") == 10 and "\\u202e" in shown and "é😀" in shown


def test_an_error_of_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["threestage", "predict", EVIL, "images", "out"])
    with pytest.raises(SystemExit):
        main()
    error = capsys.readouterr().err
    assert "\\x1b" in error and "\x1b" not in error


def test_the_log_of_a_job_is_shown_without_colours_and_commands() -> None:
    assert visible_log("\x1b[36m(pid=1)\x1b[0m 10%\r20%\r\n\x1b]0;title\x07\x1b[2Jend") == (
        "(pid=1) 10%\n20%\n\\x1b]0;title\\x07\\x1b[2Jend"
    )


def test_names_are_text_in_markdown() -> None:
    shown = markdown("a|b\n# <script>x</script> ![p](http://h/t.png) `c` _d_ \x1b[2J")
    assert not any(char in shown for char in "|<>[]`\n\x1b") and "_d_" not in shown
    assert html.unescape(shown) == "a|b # <script>x</script> ![p](http://h/t.png) `c` _d_ \\x1b[2J"
    assert markdown("road_sign 2 (val)") == "road_sign 2 (val)"
