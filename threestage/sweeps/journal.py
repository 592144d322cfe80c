"""What a sweep has tried, tries and will try: every change is in its folder before anything follows from it."""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from threestage.data import storage
from threestage.sweeps.trials import State, Trial, ranked, run_folder, save

SETTLE_SECONDS = 60.0


class Journal:
    """The trials of a sweep by number. `kept`: runs of so many of the best are kept; `changed` is told of every change."""

    def __init__(
        self, out: str, trials: Iterable[Trial], seed: int, kept: int, changed: Callable[[Trial], None]
    ) -> None:
        self._out, self._seed, self._kept, self._changed = out, seed, kept, changed
        self._trials = {trial.number: trial for trial in trials}
        self._since: dict[int, float] = {}
        self._ended: dict[int, float] = {}
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

    def take(self, kind: str) -> Trial | None:
        """A trial that waits and that nobody has taken yet."""
        for trial in self.of(kind):
            if trial.state == "waiting" and trial.number not in self._taken:
                self._taken.add(trial.number)
                return trial
        return None

    def state(self, number: int) -> State:
        return self._trials[number].state

    def add(self, params: dict[str, Any], seed: int | None = None, repeats: int | None = None) -> None:
        trial = Trial(
            number=len(self._trials),
            params=params,
            seed=self._seed if seed is None else seed,
            kind="search" if repeats is None else "repeat",
            repeats=repeats,
        )
        self._write(trial)

    def begin(self, number: int) -> None:
        self._since[number] = time.monotonic()
        self._write(self._trials[number], state="running")

    def score(self, number: int, step: int, mean_iou: float, trained: Sequence[str], reused: Sequence[str]) -> None:
        """A step that the trial has reported before changes nothing."""
        trial = self._trials[number]
        if step in dict(trial.curve):
            return
        curve = tuple(sorted([*trial.curve, (step, mean_iou)]))
        seen = {*trial.trained, *trained}
        self._write(trial, curve=curve, trained=tuple(sorted(seen)), reused=tuple(reused), seconds=self._seconds(trial))

    def end(self, number: int, state: State, reason: str | None = None) -> None:
        trial = self._trials[number]
        seconds = self._seconds(trial)
        self._since.pop(number, None)
        self._ended[number] = time.monotonic()
        self._write(trial, state=state, reason=reason, seconds=seconds)

    def forget(self, settle_s: float = SETTLE_SECONDS, keep: Trial | None = None) -> None:
        """Delete the runs of trials that ended `settle_s` ago or earlier: their processes, which might still write there,
        are gone by then. The best of the search are kept, or only `keep`."""
        kept = ranked(self.of("search"))[: self._kept] if keep is None else [keep]
        for trial in self.trials:
            settled = time.monotonic() - self._ended.get(trial.number, 0.0) >= settle_s
            if trial.over and settled and trial not in kept and trial.number not in self._forgotten:
                storage.delete(run_folder(self._out, trial.number))
                self._forgotten.add(trial.number)

    def seconds(self) -> float:
        """Of all trials together, until now."""
        return sum(self._seconds(trial) for trial in self.trials)

    def _seconds(self, trial: Trial) -> float:
        """Of a trial's earlier tries, and of the present one until now."""
        now = time.monotonic()
        since = self._since.get(trial.number)
        if since is None:
            return trial.seconds
        self._since[trial.number] = now
        trial = trial.model_copy(update={"seconds": trial.seconds + now - since})
        self._trials[trial.number] = trial
        return trial.seconds

    def _write(self, trial: Trial, **changes: Any) -> None:
        changed = Trial.model_validate({**trial.model_dump(), **changes})
        save(self._out, changed)
        self._trials[changed.number] = changed
        self._changed(changed)
