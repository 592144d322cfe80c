"""The record of a sweep: `Trial` is one trial, a JSON file in the sweep's folder; `TrialStore` is all of them.
Every change is written before anything follows from it, so a killed sweep continues with `--resume`."""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from threestage.config import STAGES, Config, StageName
from threestage.data import storage
from threestage.run_folder.records import StageResult
from threestage.settings import Settings
from threestage.sweeps.space import with_current_keys

State = Literal["waiting", "running", "finished", "stopped", "failed"]
TRIALS, RUNS = "trials", "runs"


# ---- One trial: its record, its folder, its curve


class Trial(Settings):
    """`params`: value of each searched key that the trial has. `curve`: (step over all searched stages, mean IoU on the
    validation images), rising steps. `seconds`: of all its tries together.

    waiting: not begun, or begun and interrupted. stopped: given up by the scheduler. failed: `reason` says why.
    """

    number: int
    params: Annotated[dict[str, Any], BeforeValidator(with_current_keys)]
    seed: int
    state: State = "waiting"
    curve: tuple[tuple[int, float], ...] = ()
    seconds: float = 0.0
    reason: str | None = None
    trained: tuple[str, ...] = ()  # stages
    reused: tuple[str, ...] = ()  # parts that lie in the shared run
    own: bool = False  # it changes nothing of the configuration
    kind: Literal["search", "repeat"] = "search"
    repeats: int | None = None  # number of the trial that it repeats with another seed

    @property
    def over(self) -> bool:
        return self.state in ("finished", "stopped", "failed")

    @property
    def score(self) -> float | None:
        """The mean IoU that counts: at the end of the last searched stage."""
        score = self.curve[-1][1] if self.state == "finished" and self.curve else math.nan
        return score if math.isfinite(score) else None


def run_folder(out: str, number: int) -> str:
    return storage.join(out, RUNS, f"{number:04d}")


def shared_folder(out: str, seed: int) -> str:
    """The run of the stages that all trials with this seed begin with."""
    return storage.join(out, "shared", f"seed{seed}")


def steps_before(config: Config, stages: Sequence[int], stage: str | None = None) -> int:
    """Steps of the searched stages that come before one of them; without one, of all."""
    return sum(config.stage(name).steps for name in _names(stages) if stage is None or name < stage)


def curve_of(run: str, stages: Sequence[int], config: Config) -> list[tuple[int, float]]:
    """The curve of a finished run's searched stages, from its own files."""
    curve = []
    for name in _names(stages):
        history = storage.read_json(storage.join(run, name, "result.json"), StageResult)["history"]
        before = steps_before(config, stages, name)
        curve += [(before + int(row["step"]), float(row["mean_iou"])) for row in history if "mean_iou" in row]
    return curve


def _names(stages: Sequence[int]) -> list[StageName]:
    return [name for number, name in enumerate(STAGES, 1) if number in stages]


def save(out: str, trial: Trial) -> None:
    storage.write_json(storage.join(out, TRIALS, f"{trial.number:04d}.json"), trial.model_dump(mode="json"))


def load_trials(out: str) -> list[Trial]:
    """All trials of a sweep, by number."""
    records = storage.list_files(storage.join(out, TRIALS), recursive=False)
    return sorted((storage.read_json(uri, Trial) for uri in records), key=lambda trial: trial.number)


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """The finished trials, best first; of equals the one that came first."""
    finished = [trial for trial in trials if trial.score is not None]
    return sorted(finished, key=lambda trial: (-(trial.score or 0.0), trial.number))


# ---- All trials of a sweep

SETTLE_SECONDS = 60.0


class TrialStore:
    """The trials of a sweep by number.

    kept: the runs of so many of the best are kept, and that of the trial that changes nothing where it is more than one.
    changed: is told of every change.
    """

    def __init__(self, out: str, trials: Iterable[Trial], kept: int, changed: Callable[[Trial], None]) -> None:
        self._out, self._kept, self._changed = out, kept, changed
        self._trials = {trial.number: trial for trial in trials}
        self._since: dict[int, tuple[float, float]] = {}  # when its present try began, and the seconds before
        self._ended: dict[int, float] = {}
        self._in_vain = 0
        self._forgotten: set[int] = set()
        self._taken: set[int] = set()
        for trial in self.trials:
            if trial.state == "running":  # when the sweep was killed
                self._write(trial, state="waiting")

    @property
    def trials(self) -> list[Trial]:
        return [self._trials[number] for number in sorted(self._trials)]

    def of(self, kind: str) -> list[Trial]:
        return [trial for trial in self.trials if trial.kind == kind]

    def trial(self, number: int) -> Trial:
        return self._trials[number]

    def take(self, kind: str, seed: int) -> Trial | None:
        """A trial that waits and that this start has not had yet."""
        for trial in self.of(kind):
            if trial.state == "waiting" and trial.seed == seed and trial.number not in self._taken:
                self._taken.add(trial.number)
                return trial
        return None

    def add(self, params: dict[str, Any], seed: int, own: bool = False, repeats: int | None = None) -> None:
        kind = "search" if repeats is None else "repeat"
        number = max(self._trials, default=-1) + 1
        self._write(Trial(number=number, params=params, seed=seed, own=own, kind=kind, repeats=repeats))

    def begin(self, number: int) -> None:
        """Also of a trial whose process was lost and is started again."""
        trial = self._trials[number]
        if not trial.over:
            seconds = self._until_now(trial)
            self._since[number] = (time.monotonic(), seconds)
            self._write(trial, state="running", seconds=seconds)

    def score(self, number: int, step: int, mean_iou: float) -> None:
        """A step that the trial has reported before changes nothing."""
        trial = self._trials[number]
        if step not in dict(trial.curve):
            curve = tuple(sorted([*trial.curve, (step, mean_iou)]))
            self._write(trial, curve=curve, seconds=self._until_now(trial))

    def note(self, number: int, trained: Sequence[str], reused: Sequence[str]) -> None:
        """What a trial has computed and what it has not."""
        trial = self._trials[number]
        seen = tuple(sorted({*trial.trained, *trained}))
        if (seen, tuple(reused)) != (trial.trained, trial.reused):
            self._write(trial, trained=seen, reused=tuple(reused))

    def end(self, number: int, state: State, reason: str | None = None) -> None:
        """`waiting` is a trial that was interrupted and will go on."""
        trial = self._trials[number]
        seconds = self._until_now(trial)
        self._since.pop(number, None)
        self._ended[number] = time.monotonic()
        self._in_vain = self._in_vain + 1 if reason is not None and not trial.curve else 0
        self._write(trial, state=state, reason=reason, seconds=seconds)

    def interrupt(self) -> None:
        """What runs will go on with --resume."""
        for trial in self.trials:
            if trial.state == "running":
                self.end(trial.number, "waiting")

    @property
    def in_vain(self) -> int:
        """How many of the last trials, one after the other, have ended with an error before their first evaluation."""
        return self._in_vain

    def delete_losing_runs(self, settle_s: float = SETTLE_SECONDS, keep: Trial | None = None) -> None:
        """Delete the runs of trials that ended `settle_s` ago or earlier: their processes, which might still write there,
        are gone by then. The best of the search are kept, or only `keep`. What cannot be deleted is tried again."""
        searched = self.of("search")
        own = [trial for trial in searched if trial.own and self._kept > 1]
        kept = [*ranked(searched)[: self._kept], *own] if keep is None else [keep]
        for trial in self.trials:
            settled = time.monotonic() - self._ended.get(trial.number, 0.0) >= settle_s
            if trial.over and settled and trial not in kept and trial.number not in self._forgotten:
                with contextlib.suppress(OSError):
                    storage.delete(run_folder(self._out, trial.number), self._out)
                    self._forgotten.add(trial.number)

    def seconds(self) -> float:
        """Of all trials together, until now."""
        return sum(self._until_now(trial) for trial in self.trials)

    def _until_now(self, trial: Trial) -> float:
        """Seconds of a trial's earlier tries, and of the present one."""
        started, before = self._since.get(trial.number, (None, trial.seconds))
        return before if started is None else before + time.monotonic() - started

    def _write(self, trial: Trial, **changes: Any) -> None:
        changed = Trial.model_validate({**trial.model_dump(), **changes})
        save(self._out, changed)
        self._trials[changed.number] = changed
        self._changed(changed)
