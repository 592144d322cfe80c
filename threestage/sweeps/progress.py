"""Progress of a sweep on a terminal: a line for everything that ends, and one below them for what goes on."""

from collections import Counter
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.status import Status

from threestage.config import Config
from threestage.progress import StageProgress
from threestage.sweeps.plan import Plan
from threestage.sweeps.plan_table import rich_plan
from threestage.sweeps.trials import Trial, ranked


class SweepProgress:
    """A context, and the Show of sweeps/sweep.py."""

    def __init__(self, config: Config, console: Console) -> None:
        self._console = console
        self._stages = StageProgress(config, console)
        self._status = Status("", console=console)
        self._trials: dict[int, Trial] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._status.stop()
        self._stages.__exit__(kind, error, trace)

    def plan(self, plan: Plan) -> None:
        self._console.print(rich_plan(plan))

    def phase(self, text: str) -> None:
        self._console.print(f"[bold]{escape(text)}[/]", highlight=False, soft_wrap=True)

    def stage(self, stage: str, row: Mapping[str, float]) -> None:
        self._stages.show(stage, row)

    def watch(self, what: str, done: int, total: int) -> None:
        self._stages.watch(what, done, total)

    def warn(self, text: str) -> None:
        self._stages.warn(text)

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
