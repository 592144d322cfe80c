"""What the commands of a run leave on a terminal."""

import io
import re

import pytest

from threestage.checks.result import CheckResult
from threestage.cli import options, runs
from threestage.cli.options import Terminal

PART = re.compile(r"\x1b\[(?P<number>\??[\d;]*)(?P<command>[A-Za-z])|(?P<text>[^\x1b\n\r]+)|(?P<end>[\n\r])")


def lines_of(output: str) -> list[str]:
    """What stands on a terminal that was written this; it knows to go up and to erase a line."""
    lines, row = [""], 0
    for part in PART.finditer(output):
        if part["text"]:
            lines[row] += part["text"]
        elif part["end"] == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif part["command"] == "A":
            row -= int(part["number"] or 1)
        elif part["command"] == "K":
            lines[row] = ""
    return lines


def test_a_spinner_leaves_no_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Terminal(file=screen, force_terminal=True, width=80, no_color=True)
    for module in (runs, options):
        monkeypatch.setattr(module, "console", console)
    monkeypatch.setattr(options.sys, "stderr", console.file)
    monkeypatch.setattr(console.file, "isatty", lambda: True)

    def results() -> list[CheckResult]:
        options.warn("something odd")
        return [CheckResult("input", "fits"), CheckResult("hub", "", warning="not there")]

    assert len(runs.shown_checks((line for line in results()), show=True)) == 2
    shown = [line for line in lines_of(screen.getvalue()) if line]
    assert [word in line for word, line in zip(("odd", "fits", "not there"), shown, strict=True)] == [True] * 3, shown
