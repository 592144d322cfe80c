"""What several commands share: their arguments and options, the terminal, JSON for programs.

The terminal is rich's console, on which text from data cannot pass for the terminal's own commands.
"""

import json
from collections.abc import Callable
from typing import Annotated, Any

import rich.markup
import typer
from rich.console import Console
from rich.text import Text

from threestage.errors import InputError
from threestage.plain_text import escape_control_chars
from threestage.presets import preset_names
from threestage.redaction import redact


class Terminal(Console):
    """Shows every string through `escape_control_chars`."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(escape_control_chars(text), **options)


console = Terminal()


def escape(text: str) -> str:
    """The text in one line, in which brackets are no markup."""
    return rich.markup.escape(" ".join(text.split()))


def complete_preset(incomplete: str) -> list[str]:
    """For the shell, which completes files by itself where this gives nothing."""
    return [name for name in preset_names() if name.startswith(incomplete)]


ConfigArgument = Annotated[
    str,
    typer.Argument(
        help="A preset's name (threestage config lists them) or a YAML file.", autocompletion=complete_preset
    ),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="a.b=c", help="Change one setting; repeat it for more.")
]
OutOption = Annotated[
    str | None, typer.Option("--out", metavar="URI", help="Folder of the run; the same one continues it.")
]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Of networks, batches and augmentation.")]
LocalOption = Annotated[
    bool, typer.Option("--local", help="Run in this process, without Ray and MLflow; nothing is registered.")
]
ReuseOption = Annotated[
    str | None,
    typer.Option("--reuse", metavar="URI", help="Another run: its stages serve as far as the settings are the same."),
]
BudgetOption = Annotated[
    str | None,
    typer.Option("--budget", metavar="60m", help="Time in place of steps: 60m, 4h, 2d or 8device-hours."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
ModelArgument = Annotated[
    str, typer.Argument(help="models:/NAME@champion, or the folder of a run, a stage or a model.")
]
RegisteredArgument = Annotated[str, typer.Argument(help="models:/NAME@champion (or another alias), or models:/NAME/3.")]
TrackingOption = Annotated[
    str | None, typer.Option("--tracking-uri", help="Of MLflow; MLFLOW_TRACKING_URI if not set.")
]
WindowOption = Annotated[
    str | None, typer.Option("--window", metavar="H,W", help="Look through windows of this size, not at whole images.")
]
StrideOption = Annotated[
    str | None, typer.Option("--stride", metavar="H,W", help="Between windows; two thirds of them by default.")
]
FlipOption = Annotated[bool, typer.Option("--flip", help="Average with the mirrored image.")]
ScalesOption = Annotated[
    str | None, typer.Option("--scales", metavar="S,S,…", help="Average over these sizes, e.g. 0.75,1,1.25.")
]


def print_json(value: Any) -> None:
    """The result of a command for programs: one line on standard output, and nothing else is there."""
    print(json.dumps(value))


def warn(text: str) -> None:
    Terminal(stderr=True, soft_wrap=True).print(f"[yellow]warning:[/] {escape(redact(text))}", highlight=False)


def counter(status: Any, done: str) -> Callable[[int, int], None]:
    """Shows how many images of how many are done."""
    return lambda number, total: status.update(f"{done} {number:,} of {total:,} images")


def protocol_of(window: str | None, stride: str | None, flip: bool, scales: str | None) -> Any:
    """How images are given to the network, from the options' text."""
    from threestage.config import validated
    from threestage.prediction.tta import TTASettings

    lists = {"window": _sides("--window", window), "stride": _sides("--stride", stride), "scales": _numbers(scales)}
    given = {name: values for name, values in lists.items() if values is not None}
    return validated(TTASettings, {"flip": flip, **given})


def _sides(option: str, text: str | None) -> list[int] | None:
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise InputError(f"{option} {text}: write height and width in pixels, e.g. {option} 256,512", "config/usage")
    return [int(part) for part in parts]


def _numbers(text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f"--scales {text}: write numbers with commas between them, e.g. --scales 0.75,1,1.25", "config/usage"
        ) from None
