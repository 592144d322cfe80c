"""Progress on a terminal: of a run's stages as bars with rate, loss and time left, and of a sweep's trials.
Where there is no terminal, plain lines."""

import time
from collections import Counter
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.status import Status
from rich.table import Column

from threestage.config import Config
from threestage.redaction import redact
from threestage.sweeps.plan import SweepPlan, rich_plan
from threestage.sweeps.trials import Trial, ranked

LINE_SECONDS = 10.0
BAR_WIDTH = 16


# ---- A run


class StageProgress:
    """A context: `on_metrics` takes the rows that the training loop reports, `on_progress` counts of images that are done."""

    def __init__(self, config: Config, console: Console) -> None:
        self._config = config
        self._console = console
        self._live = console.is_terminal or console.is_jupyter
        self._bars: dict[str, TaskID] = {}
        self._last_line = 0.0
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(BAR_WIDTH),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[figures]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
            console=console,
            expand=True,
            disable=not self._live,
        )
        self._starting: TaskID | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        if self._live:  # a bar that moves until there are figures
            self._starting = self._progress.add_task("starting", total=None, figures="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def on_metrics(self, stage: str, row: Mapping[str, float]) -> None:
        steps = self._config.stage(stage).steps  # type: ignore[arg-type]
        figures = _figures(row)
        if self._live:
            self._progress.update(self._bar(stage, steps), completed=int(row["step"]), figures=figures)
        elif time.monotonic() - self._last_line > LINE_SECONDS or "mean_iou" in row:
            self._last_line = time.monotonic()
            left = (steps - row["step"]) / max(row["steps_per_second"], 1e-9)
            self._console.print(
                f"{stage} {int(row['step'])}/{steps}  {figures}  {left:.0f} s left", highlight=False, soft_wrap=True
            )

    def on_progress(self, what: str, done: int, total: int) -> None:
        if self._live:
            self._progress.update(self._bar(what, total), completed=done, figures="images")
        elif time.monotonic() - self._last_line > LINE_SECONDS:
            self._last_line = time.monotonic()
            self._console.print(f"{what}: {done:,} of {total:,} images", highlight=False, soft_wrap=True)

    def _bar(self, what: str, total: int) -> TaskID:
        if self._starting is not None:
            self._progress.remove_task(self._starting)
            self._starting = None
        if what not in self._bars:
            self._bars[what] = self._progress.add_task(what, total=total, figures="")
        return self._bars[what]

    def warn(self, message: str) -> None:
        self._console.print(f"[yellow]warning:[/yellow] {escape(redact(message))}", highlight=False, soft_wrap=True)


def _figures(row: Mapping[str, float]) -> str:
    losses = "  ".join(
        f"{name.removesuffix('_loss')} {value:.3f}" for name, value in row.items() if name.endswith("_loss")
    )
    score = f"  mean IoU {row['mean_iou']:.3f}" if "mean_iou" in row else ""
    return f"{row['steps_per_second']:.1f} steps/s  {losses}{score}"


# ---- A sweep


class SweepProgress(StageProgress):
    """A context, and the Show of sweeps/sweep.py."""

    def __init__(self, config: Config, console: Console) -> None:
        super().__init__(config, console)
        self._status = Status("", console=console)
        self._trials: dict[int, Trial] = {}

    def __enter__(self) -> Self:
        return self  # without bars: the status of the trials is the one live display

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._status.stop()
        super().__exit__(kind, error, trace)

    def plan(self, plan: SweepPlan) -> None:
        self._console.print(rich_plan(plan))

    def phase(self, text: str) -> None:
        self._console.print(f"[bold]{escape(text)}[/]", highlight=False, soft_wrap=True)

    def trial(self, trial: Trial) -> None:
        before = self._trials.get(trial.number)
        self._trials[trial.number] = trial
        if (before is None or before.state != trial.state) and (line := _line(trial)):
            self._console.print(line, highlight=False, soft_wrap=True)
        if self._console.is_terminal:
            self._status.update(_summary(list(self._trials.values())))
            self._status.start()


def _line(trial: Trial) -> str:
    what = f"trial {trial.number}" + (
        "" if trial.repeats is None else f" (trial {trial.repeats} with seed {trial.seed})"
    )
    if trial.state == "running":
        return f"{what} begins: {escape(_settings(trial.params))}"
    if trial.state == "finished":
        return f"[green]{what} finished[/]: mean IoU {trial.score:.3f} in {trial.seconds:.0f} s"
    if trial.state == "stopped" and trial.curve:
        step, score = trial.curve[-1]
        return f"{what} stopped at step {step}: mean IoU {score:.3f}, others were better there"
    if trial.state == "waiting" and trial.reason is not None:
        return f"[yellow]{what} was interrupted[/]: {escape(trial.reason)}"
    if trial.state == "failed":
        return f"[red]{what} failed[/]: {escape(trial.reason or '')}"
    return ""


def _settings(params: Mapping[str, Any]) -> str:
    return "  ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in params.items()
    )


def _summary(trials: list[Trial]) -> str:
    states = Counter(trial.state for trial in trials)
    counts = ", ".join(f"{states[state]} {state}" for state in ("running", "finished", "stopped", "failed"))
    best = ranked([trial for trial in trials if trial.kind == "search"])[:1]
    return counts + "".join(f"; best: trial {trial.number}, mean IoU {trial.score:.3f}" for trial in best)
