"""What the commands of a run leave on a terminal."""

import io
import re
from typing import Any

import pytest

from threestage.checks.result import CheckResult
from threestage.cli import options, runs
from threestage.cli.options import Terminal
from threestage.config import load

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
    monkeypatch.setattr("sys.stderr", console.file)
    monkeypatch.setattr(console.file, "isatty", lambda: True)

    def results() -> list[CheckResult]:
        options.warn("something odd")
        return [CheckResult("input", "fits"), CheckResult("hub", "", warning="not there")]

    assert len(runs.shown_checks((line for line in results()), show=True)) == 2
    shown = [line for line in lines_of(screen.getvalue()) if line]
    assert [word in line for word, line in zip(("odd", "fits", "not there"), shown, strict=True)] == [True] * 3, shown


@pytest.mark.parametrize(
    ("registered", "local", "command"),
    [
        ([], True, "threestage predict runs/mine IMAGES OUT --local"),
        (
            [{"name": "mine", "version": "3", "alias": "champion"}],
            False,
            "threestage predict models:/mine@champion IMAGES OUT",
        ),
    ],
)
def test_a_run_ends_with_the_command_that_predicts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], registered: Any, local: bool, command: str
) -> None:
    monkeypatch.setattr("threestage.run.run.run_checked", lambda *_: {"registered": registered})
    monkeypatch.setattr("threestage.report.scores.rich_table", lambda _: "")
    monkeypatch.setattr("threestage.verdict.verdict_text", lambda _: None)
    monkeypatch.setattr(runs, "show_version", lambda _: None)
    runs.run_shown(load("own_images", ["data.root=x"]), "runs/mine", local, as_json=False)
    out = capsys.readouterr().out
    assert out.endswith(f"next:  {command}\n") and "runs/mine/report.html" in out
