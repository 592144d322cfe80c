"""Progress of the stages on a terminal (a bar with rate, loss and time left), or as plain lines where there is none."""

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from threestage.config import Config
from threestage.redaction import redact

LINE_SECONDS = 10.0


class StageProgress:
    """A context: `show` takes the rows that the training loop reports, `watch` counts of images that are done."""

    def __init__(self, config: Config, console: Console) -> None:
        self._config = config
        self._console = console
        self._bars: dict[str, TaskID] = {}
        self._last_line = 0.0
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, stage: str, row: Mapping[str, float]) -> None:
        steps = self._config.stage(stage).steps  # type: ignore[arg-type]
        figures = _figures(row)
        if self._console.is_terminal:
            if stage not in self._bars:
                self._bars[stage] = self._progress.add_task(stage, total=steps, figures="")
            self._progress.update(self._bars[stage], completed=int(row["step"]), figures=figures)
        elif time.monotonic() - self._last_line > LINE_SECONDS or "mean_iou" in row:
            self._last_line = time.monotonic()
            left = (steps - row["step"]) / max(row["steps_per_second"], 1e-9)
            self._console.print(
                f"{stage} {int(row['step'])}/{steps}  {figures}  {left:.0f} s left", highlight=False, soft_wrap=True
            )

    def watch(self, what: str, done: int, total: int) -> None:
        if self._console.is_terminal:
            if what not in self._bars:
                self._bars[what] = self._progress.add_task(what, total=total, figures="images")
            self._progress.update(self._bars[what], completed=done)
        elif time.monotonic() - self._last_line > LINE_SECONDS:
            self._last_line = time.monotonic()
            self._console.print(f"{what}: {done:,} of {total:,} images", highlight=False, soft_wrap=True)

    def warn(self, message: str) -> None:
        self._console.print(f"[yellow]warning:[/yellow] {escape(redact(message))}", highlight=False, soft_wrap=True)


def _figures(row: Mapping[str, float]) -> str:
    losses = "  ".join(
        f"{name.removesuffix('_loss')} {value:.3f}" for name, value in row.items() if name.endswith("_loss")
    )
    score = f"  mean IoU {row['mean_iou']:.3f}" if "mean_iou" in row else ""
    return f"{row['steps_per_second']:.1f} steps/s  {losses}{score}"
