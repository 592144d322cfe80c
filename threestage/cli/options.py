"""What several commands share: their arguments and options, the terminal, JSON for programs.

The terminal is rich's console, on which text from data cannot pass for the terminal's own commands.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import rich.markup
import typer
from rich.console import Console
from rich.text import Text

from threestage.errors import InputError
from threestage.plain_text import escape_control_chars
from threestage.presets import preset_names
from threestage.redaction import redact

if TYPE_CHECKING:
    from threestage.data.pool import PoolFile
    from threestage.prediction.champion import PredictPool
    from threestage.prediction.pseudo_masks import FileReport, PoolTask
    from threestage.ray_settings import ClusterSettings


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
    typer.Argument(help="preset (threestage config lists them) or YAML file", autocompletion=complete_preset),
]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="a.b=c", help="change one setting; repeatable")]
OutOption = Annotated[
    str | None, typer.Option("--out", metavar="URI", help="folder of the run; the same folder resumes it")
]
SeedOption = Annotated[int | None, typer.Option("--seed", help="random seed")]
LocalOption = Annotated[
    bool, typer.Option("--local", help="run in this process, without Ray and MLflow; registers nothing")
]
ReuseOption = Annotated[
    str | None,
    typer.Option("--reuse", metavar="RUN", help="reuse the stages of RUN whose settings match"),
]
ContinueOption = Annotated[
    str | None,
    typer.Option(
        "--continue-from",
        metavar="RUN",
        help="start from the champion of RUN, a run with fewer labels, and keep its validation images",
    ),
]
BudgetOption = Annotated[
    str | None,
    typer.Option("--budget", metavar="60m", help="training time instead of steps: 60m, 4h, 2d or 8device-hours"),
]
WithoutRayOption = Annotated[bool, typer.Option("--local", help="run in this process, without Ray")]
AddressOption = Annotated[
    str | None, typer.Option("--address", help="address of a running Ray cluster; without it one starts here")
]
PredictorsOption = Annotated[int, typer.Option("--workers", min=1, help="processes that predict, with one CPU each")]
GpusOption = Annotated[
    float | None,
    typer.Option(
        "--gpus-per-worker", min=0, help="GPUs of each process; default: one of this machine's if Ray starts here"
    ),
]
StartTimeoutOption = Annotated[
    int, typer.Option("--start-timeout-s", min=1, help="seconds to wait for room on the cluster")
]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON for programs")]
ModelArgument = Annotated[str, typer.Argument(help="models:/NAME@champion, or the folder of a run, a stage or a model")]
RegisteredArgument = Annotated[str, typer.Argument(help="models:/NAME@champion (or another alias), or models:/NAME/3")]
TrackingOption = Annotated[
    str | None, typer.Option("--tracking-uri", help="address of MLflow; default: MLFLOW_TRACKING_URI")
]
WindowOption = Annotated[
    str | None, typer.Option("--window", metavar="H,W", help="size of windows; default: whole images")
]
StrideOption = Annotated[
    str | None, typer.Option("--stride", metavar="H,W", help="step between windows; default: two thirds of the window")
]
OverlapOption = Annotated[
    str, typer.Option("--overlap", help="average where windows overlap: mean, or hann (weighted)")
]
FlipOption = Annotated[bool, typer.Option("--flip", help="average with the mirrored image")]
ScalesOption = Annotated[
    str | None, typer.Option("--scales", metavar="S,S,…", help="average over these scales, e.g. 0.75,1,1.25")
]


def print_json(value: Any) -> None:
    """The result of a command for programs: one line on standard output, and nothing else is there."""
    print(json.dumps(value))


def warn(text: str) -> None:
    """On standard error; on a terminal by the console, which keeps the line apart from a spinner below it."""
    shown = console if console.is_terminal and sys.stderr.isatty() else Terminal(stderr=True)
    shown.print(f"[yellow]warning:[/] {escape(redact(text))}", highlight=False, soft_wrap=True)


def counter(status: Any, done: str) -> Callable[[int, int], None]:
    """Shows how many images of how many are done."""
    return lambda number, total: status.update(f"{done} {number:,} of {total:,} images")


def protocol_of(window: str | None, stride: str | None, flip: bool, scales: str | None, overlap: str = "mean") -> Any:
    """How images are given to the network, from the options' text."""
    from threestage.config import validated
    from threestage.prediction.tta import TTASettings

    lists = {"window": _sides("--window", window), "stride": _sides("--stride", stride), "scales": _numbers(scales)}
    given = {name: values for name, values in lists.items() if values is not None}
    return validated(TTASettings, {"flip": flip, "overlap": overlap, **given})


def cluster_of(
    address: str | None, workers: int, gpus_per_worker: float | None, start_timeout_s: int
) -> "ClusterSettings":
    """What a command that predicts asks of Ray."""
    from threestage.config import validated
    from threestage.ray_settings import ClusterSettings

    settings = {
        "address": address,
        "workers": workers,
        "gpus_per_worker": "auto" if gpus_per_worker is None else gpus_per_worker,
        "start_timeout_s": start_timeout_s,
    }
    return validated(ClusterSettings, settings)


def predict_pool_with(cluster: "ClusterSettings", local: bool) -> "PredictPool":
    """Where the champion's missing predictions are made: in this process, or on Ray, which starts only when some are missing."""
    if local:
        from threestage.prediction.pool_prediction import predict_pool_here

        return predict_pool_here

    def on_ray(model: str, task: "PoolTask", files: "Sequence[PoolFile]") -> "Iterator[FileReport]":
        from threestage.ray_backend.predict import predict_pool_connected

        return predict_pool_connected(model, task, files, cluster, warn)

    return on_ray


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
