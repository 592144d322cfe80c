"""A sweep from its start to best.yaml: what is shared is computed once, then the trials, then the best with other seeds."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from threestage.config import flatten
from threestage.data import storage
from threestage.errors import StageFailure
from threestage.mlflow_sync.client import open_registry
from threestage.mlflow_sync.connection import reserve_variables
from threestage.mlflow_sync.records import Status
from threestage.mlflow_sync.sweep_sync import SweepSync
from threestage.run import pipeline
from threestage.run.backend import RunCallbacks
from threestage.run_folder import lease
from threestage.sweeps import outcome, prepare
from threestage.sweeps.journal import Trial, TrialStore, load_trials, ranked, shared_folder
from threestage.sweeps.plan import SweepPlan
from threestage.sweeps.prepare import REPEATED, Sweep
from threestage.sweeps.proposals import number_of_trials, own_params, propose
from threestage.sweeps.space import base_config, trial_config

MAX_CONSECUTIVE_FAILURES = (
    4  # beside those that run at once: so many in a row that fail before they are evaluated end a sweep
)


class Show(Protocol):
    """Where a sweep's progress goes."""

    def plan(self, plan: SweepPlan) -> None: ...
    def phase(self, text: str) -> None: ...
    def on_metrics(self, stage: str, row: Mapping[str, float]) -> None: ...
    def on_progress(self, what: str, done: int, total: int) -> None: ...
    def trial(self, trial: Trial) -> None: ...
    def warn(self, text: str) -> None: ...


def plan(requested: Sweep, warn: Callable[[str], None]) -> SweepPlan:
    """What the sweep would do. Trains nothing, changes nothing."""
    from threestage.ray_backend.connect import connected

    requested = prepare.checked(requested)
    prepare.known(requested)
    with connected(requested.config.cluster, requested.space.max_concurrent):
        return prepare.plan_sweep(requested, load_trials(requested.out), warn)


def run(requested: Sweep, show: Show) -> dict[str, Any]:
    """Run the sweep or go on with it; returns what results.json holds.

    Raises InputError before anything is trained when the space, the configuration or the cluster does not allow it or another
    driver works on the folder, and StageFailure when no trial has finished.
    """
    requested = prepare.checked(requested)
    reserve_variables()
    with lease.held(requested.out, show.warn):
        return _run_alone(requested, show)


def _run_alone(requested: Sweep, show: Show) -> dict[str, Any]:
    from threestage.ray_backend.connect import connected
    from threestage.ray_backend.sweep import quieten
    from threestage.ray_backend.train import warn_of_traps

    key = prepare.known(requested)
    registry = (
        open_registry(requested.config.registry) if key is None else None
    )  # a sweep that has begun goes on without
    with connected(requested.config.cluster, requested.space.max_concurrent):
        warn_of_traps(requested.config, requested.out, show.warn)
        if left_to_search(requested, load_trials(requested.out)):
            show.plan(prepare.plan_sweep(requested, load_trials(requested.out), show.warn))
        key = key or prepare.record_sweep(requested)
        quieten()
        mirror = SweepSync(
            lambda: registry or open_registry(requested.config.registry),
            key,
            requested.config.name,
            flatten(requested.space.model_dump(mode="json")),
            show.warn,
        )
        found: dict[str, Any] = {"files": []}
        status: Status = "KILLED"
        try:
            found = _run(requested, show, mirror)
            status = "FINISHED"
        except Exception:
            status = "FAILED"
            raise
        finally:
            score = found["best"]["score"] if found.get("best") else None
            files = {name: storage.join(requested.out, name) for name in found["files"]}
            mirror.close(status, {} if score is None else {"mean_iou": score}, files)
    return found


def _run(requested: Sweep, show: Show, mirror: SweepSync) -> dict[str, Any]:
    def changed(trial: Trial) -> None:
        show.trial(trial)
        mirror.update(trial, {"space": ",".join(requested.space.search)})

    journal = TrialStore(requested.out, load_trials(requested.out), REPEATED if requested.repeat else 1, changed)
    for trial in journal.trials:
        changed(trial)
    running = _Running(requested, journal, show, time.monotonic())
    running.search()
    running.repeat()
    found = outcome.publish_results(requested, journal.trials)
    best = journal.trial(found["best"]["number"])
    if requested.promote:
        outcome.promote(requested, best, RunCallbacks(show.on_metrics, show.warn, show.on_progress))
    if all(trial.over for trial in journal.trials):
        journal.delete_losing_runs(0.0, keep=best)
    return found


def left_to_search(requested: Sweep, trials: Sequence[Trial]) -> int:
    """Trials of the search that are not over."""
    return number_of_trials(requested.space) - sum(trial.over for trial in trials if trial.kind == "search")


@dataclass(frozen=True)
class _Running:
    """A sweep that goes on since `begun` (seconds of the monotonic clock)."""

    requested: Sweep
    journal: TrialStore
    show: Show
    begun: float

    def search(self) -> None:
        left = left_to_search(self.requested, self.journal.trials)
        if left > 0:
            self._share(self.requested.config.seed)
            self.show.phase("trials")
            self._trials(self.requested, self._next_of_search, left)

    def _next_of_search(self) -> Trial | None:
        space, config, journal = self.requested.space, self.requested.config, self.journal
        if (waiting := journal.take("search", config.seed)) is not None:
            return waiting
        known = journal.of("search")
        own = own_params(space, config)
        params = own if not known and space.searcher != "grid" else None  # first, what there is to beat
        if params is None and len(known) < number_of_trials(space):
            params = propose(space, known, config.seed)
        if params is None:
            return None
        journal.add(params, config.seed, own=params == own)
        return journal.take("search", config.seed)

    def repeat(self) -> None:
        """Run the best trials, and the one that changes nothing, with other seeds; each seed has its own shared stages."""
        for seed in range(self.requested.config.seed + 1, self.requested.config.seed + 1 + self.requested.repeat):
            if self._spent():  # while some of the search may wait, nobody knows the best
                return
            self._add_repeats(seed)
            if not self._open_repeats(seed):
                continue
            self._share(seed)
            self.show.phase(f"the best trials with seed {seed}")
            to_the_end = replace(self.requested, space=self.requested.space.model_copy(update={"scheduler": None}))
            self._trials(to_the_end, lambda seed=seed: self.journal.take("repeat", seed), self._open_repeats(seed))  # type: ignore[misc]
            if not self._open_repeats(seed):
                storage.delete(shared_folder(self.requested.out, seed), self.requested.out)

    def _add_repeats(self, seed: int) -> None:
        searched, repeats = self.journal.of("search"), self.journal.of("repeat")
        there = {trial.repeats for trial in repeats if trial.seed == seed}
        best = ranked(searched)[:REPEATED]
        for trial in [*best, *(trial for trial in ranked(searched) if trial.own and trial not in best)]:
            if trial.number not in there:
                self.journal.add(trial.params, seed, repeats=trial.number)

    def _open_repeats(self, seed: int) -> int:
        return sum(trial.seed == seed and not trial.over for trial in self.journal.of("repeat"))

    def _share(self, seed: int) -> None:
        """Compute, unless that is done, what all trials with a seed begin with; once done it is not touched again."""
        from threestage.ray_backend.train import on_cluster

        space, folder = self.requested.space, shared_folder(self.requested.out, seed)
        last = storage.join(folder, f"pseudo_masks{space.shared_stages}", "done.json")
        if space.shared_stages and not storage.exists(last):
            self.show.phase(f"shared by all trials with seed {seed}: the stages before stage {space.first_stage}")
            config = base_config(space, self.requested.config, seed)
            on = RunCallbacks(self.show.on_metrics, self.show.warn, self.show.on_progress)
            with on_cluster(config, folder, on) as backend:
                pipeline.run(config, folder, backend, on)

    def _trials(self, requested: Sweep, next_trial: Callable[[], Trial | None], count: int) -> None:
        from threestage.ray_backend.sweep import run_trials

        journal = self.journal
        try:
            run_trials(
                requested.space, requested.config, requested.out, journal, next_trial, count, self._over, self.show.warn
            )
        finally:
            journal.delete_losing_runs(0.0)
        if self._in_vain():
            reason = next(trial.reason for trial in reversed(journal.trials) if trial.reason)
            raise StageFailure(
                f"{journal.in_vain} trials in a row have failed before their first evaluation, one of the last: {reason}; fix "
                "that, --resume continues",
                "sweep/trials-failed",
            )
        if self._spent():
            waiting = sum(not trial.over for trial in journal.trials)
            self.show.warn(
                f"the budget is spent; {waiting} trials wait: raise it in the space and give --resume to go on"
            )

    def _over(self) -> bool:
        return self._spent() or self._in_vain()

    def _in_vain(self) -> bool:
        return self.journal.in_vain >= self.requested.space.max_concurrent + MAX_CONSECUTIVE_FAILURES

    def _spent(self) -> bool:
        budget = self.requested.space.budget
        devices = trial_config(
            self.requested.space, self.requested.config, {}, self.requested.config.seed
        ).cluster.devices
        hours, device_hours = (time.monotonic() - self.begun) / 3600, self.journal.seconds() * devices / 3600
        return (budget.hours is not None and hours >= budget.hours) or (
            budget.device_hours is not None and device_hours >= budget.device_hours
        )
