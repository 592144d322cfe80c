"""Why: a file's name is text from strangers, and a terminal obeys text (it renames windows, clears the screen, hides letters)."""

import io

import pytest
from rich.table import Table

from threestage.cli import main
from threestage.plain_text import visible
from threestage.terminal import Terminal

EVIL = "a\x1b[2J\x1b]0;title\x07\x9b31m\u202egnp.\u200bé😀"


def test_every_string_is_shown_and_none_obeyed() -> None:
    assert visible("plain é 😀 [red]\ttext\n") == "plain é 😀 [red]\ttext\n"
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
