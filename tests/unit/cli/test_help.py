"""Why: who is at a terminal for the first time learns a command from its example, a program from exit codes and JSON."""

import json
import os
import pty
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer

from threestage.cli.app import app, main
from threestage.config import load
from threestage.run import local_main

DOCUMENT = Path(__file__).parents[3] / "docs" / "commands.md"
PROGRAM = "from threestage.cli.app import main; main()"


def _commands(group: Any, path: str = "") -> dict[str, Any]:
    """Every command that can be run, by its words."""
    found: dict[str, Any] = {}
    for name, command in group.commands.items():
        words = f"{path}{name}"
        found |= _commands(command, f"{words} ") if hasattr(command, "commands") else {words: command}
    return found


COMMANDS = _commands(typer.main.get_command(app))
WITHOUT_JSON = {"classes", "init"} | {name for name in COMMANDS if name.startswith("submit ")}


def ended(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("sys.argv", ["threestage", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def example_of(command: Any) -> str:
    """What stands after "Example:" in its help."""
    examples = [line for line in command.help.splitlines() if line.startswith("Example: ")]
    assert len(examples) == 1, command.help
    return str(examples[0]).removeprefix("Example: ")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_has_an_example_that_can_be_typed(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = example_of(COMMANDS[name])
    assert example.startswith(f"threestage {name} ") or example == f"threestage {name}"
    arguments = shlex.split(example)[1 + len(name.split()) :]
    COMMANDS[name].make_context(name, arguments)  # a wrong option or a missing argument raises
    assert example in DOCUMENT.read_text(), "docs/commands.md gives the same example"
    monkeypatch.setenv("COLUMNS", "200")
    assert ended([*name.split(), "--help"], monkeypatch) == 0
    shown = capsys.readouterr().out
    assert example in shown and "\x1b" not in shown


@pytest.mark.parametrize("name", ["run", "submit run"])
def test_the_example_of_a_run_names_its_weights(name: str) -> None:
    words = shlex.split(example_of(COMMANDS[name]).partition(f"{name} ")[2])
    network = load(words[0], [value for flag, value in pairwise(words) if flag == "--set"]).network
    assert network.weights is not None or network.pretrained or network.batch_norm == "live"


def test_the_help_of_the_program_without_a_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        local_main.main(["--help"])
    assert end.value.code == 0 and "Example:" in capsys.readouterr().out


def test_what_has_a_result_gives_it_as_json() -> None:
    assert {name for name, command in COMMANDS.items() if "--json" not in _options(command)} == WITHOUT_JSON


def _options(command: Any) -> set[str]:
    return {text for parameter in command.params for text in parameter.opts}


def test_json_is_all_that_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(["config", "demo", "--json"], monkeypatch) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "demo"


COMPLETED = {
    "run cam": "camvid", "config voc_2": "voc_212", "sweep thresholds cityscapes_1": "cityscapes_100", "re": "report"
}  # fmt: skip
COMPLETE = f"""
import os, sys
typed, sys.argv = sys.argv[1:], ["threestage"]
os.environ["_THREESTAGE_COMPLETE"] = "complete_bash"
for words in typed:
    os.environ |= {{"COMP_WORDS": f"threestage {{words}}", "COMP_CWORD": str(len(words.split()))}}
    try:
        {PROGRAM}
    except SystemExit:
        print("--")
print("torch" in sys.modules)
"""


def test_the_shell_completes_presets_and_commands() -> None:
    """In a process of its own, which loads no torch: a shell waits for the answer."""
    done = subprocess.run([sys.executable, "-c", COMPLETE, *COMPLETED], capture_output=True, text=True)
    *answers, torch_is_loaded = done.stdout.split("--\n")
    for expected, names in zip(COMPLETED.values(), answers, strict=True):
        assert expected in names.split(), done.stdout
    assert torch_is_loaded == "False\n", done.stderr


@pytest.mark.parametrize("no_colour", [False, True])
def test_colours_on_a_terminal_only(no_colour: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    environment |= {"TERM": "xterm"} | ({"NO_COLOR": "1"} if no_colour else {})
    command = [sys.executable, "-c", PROGRAM, "rnu"]
    if not no_colour:
        piped = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert piped.returncode == 2 and "\x1b" not in piped.stdout + piped.stderr
    outside, inside = pty.openpty()
    with subprocess.Popen(command, env=environment, stderr=inside, stdin=subprocess.DEVNULL) as process:
        process.wait()
    shown = os.read(outside, 10_000).decode()
    os.close(outside)
    os.close(inside)
    assert "No such command" in shown and ("\x1b[1;31m" in shown) != no_colour


def test_exit_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """0, 2; 1 of a stage that failed; 130 of Ctrl-C. docs/commands.md says the same."""
    from threestage.errors import StageFailure

    def end_with(error: BaseException) -> int:
        def fail(*arguments: Any) -> None:
            raise error

        monkeypatch.setattr("threestage.config.load", fail)
        return ended(["config", "demo"], monkeypatch)

    assert ended(["config"], monkeypatch) == 0 and ended(["config", "--no"], monkeypatch) == 2
    assert end_with(StageFailure("diverged")) == 1
    assert end_with(KeyboardInterrupt()) == 130
    assert end_with(PermissionError(13, "Permission denied", "/x")) == 2
    text = DOCUMENT.read_text()
    assert all(f"| {code} |" in text for code in (0, 1, 2, 130, 75, 143))
