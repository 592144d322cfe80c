"""A sweep from its start to best.yaml: what is shared is computed once, then the trials, then the best with other seeds."""

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from threestage.checks.store import check_store
from threestage.config import KEYS_ADDED_LATER, STAGES, Config, changed, flatten, recorded_key, refuse_unconfirmed_hosts
from threestage.data import storage
from threestage.data.outputs import SWEEP, claim
from threestage.data.pool import load_pool, rows_of
from threestage.data.records import Manifest, load_manifest, pool_files
from threestage.errors import InputError, StageFailure, Stopped, Warn
from threestage.mlflow_sync.client import open_registry
from threestage.mlflow_sync.connection import reserve_variables
from threestage.mlflow_sync.records import Status
from threestage.mlflow_sync.sweep_sync import SweepSync
from threestage.run import pipeline
from threestage.run import run as one_run
from threestage.run.backend import RunCallbacks
from threestage.run_folder import lease
from threestage.sweeps import results
from threestage.sweeps.plan import PoolSize, SweepPlan, SweepState, make_plan, mean_pixels
from threestage.sweeps.space import Space, base_config, check_space, trial_config
from threestage.sweeps.trials import (
    Trial,
    TrialStore,
    load_trials,
    number_of_trials,
    own_params,
    propose,
    ranked,
    run_folder,
    shared_folder,
)
from threestage.termination import sigterm_stops

MAX_CONSECUTIVE_FAILURES = 4
"""Beside those that run at once: so many in a row that fail before they are evaluated end a sweep."""
REPEATED = 3  # of the best trials, with --repeat
FREE_SECTIONS = {"cluster", "storage", "registry"}  # of the configuration: these may be others with --resume
FREE_SETTINGS = {"trials", "max_concurrent", "budget", "scheduler", "searcher", "fixed"}
"""Of the space. What is fixed is in the configuration."""


@dataclass(frozen=True)
class Sweep:
    """What the user asks for. `repeat`: other seeds that the best trials are run with; `promote`: register the best
    trial's models."""

    space: Space
    config: Config
    out: str
    resume: bool = False
    repeat: int = 0
    promote: bool = False

    @property
    def kept(self) -> int:
        """Runs of the best trials that stay."""
        return REPEATED if self.repeat else 1


class Show(Protocol):
    """Where a sweep's progress goes."""

    def plan(self, plan: SweepPlan) -> None: ...
    def phase(self, text: str) -> None: ...
    def on_metrics(self, stage: str, row: Mapping[str, float]) -> None: ...
    def on_progress(self, what: str, done: int, total: int) -> None: ...
    def trial(self, trial: Trial) -> None: ...
    def warn(self, text: str) -> None: ...


def plan(requested: Sweep, warn: Warn) -> SweepPlan:
    """What the sweep would do. Trains nothing, changes nothing."""
    from threestage.ray_backend.connect import connected

    requested = checked(requested)
    known(requested)
    with connected(requested.config.cluster, requested.space.max_concurrent):
        return plan_sweep(requested, load_trials(requested.out), warn)


def run(requested: Sweep, show: Show) -> dict[str, Any]:
    """Run the sweep or continue it; returns what results.json holds.

    Raises InputError before anything is trained when the space, the configuration or the cluster does not allow it or another
    driver works on the folder, and StageFailure when no trial has finished.
    """
    from threestage.ray_backend.connect import reserve_ray_variables
    from threestage.ray_backend.sweep import quieten

    requested = checked(requested)
    reserve_variables()
    reserve_ray_variables(requested.config.cluster)
    quieten()
    with sigterm_stops(), lease.held(requested.out, show.warn):
        return _run_alone(requested, show)


def _run_alone(requested: Sweep, show: Show) -> dict[str, Any]:
    from threestage.ray_backend.connect import connected
    from threestage.ray_backend.train import warn_of_traps

    key, settings = known(requested), requested.config.registry
    registry = open_registry(settings) if key is None else None  # a sweep that has begun continues without
    with connected(requested.config.cluster, requested.space.max_concurrent):
        warn_of_traps(requested.config, requested.out, show.warn)
        trials = load_trials(requested.out)
        if left_to_search(requested, trials):
            show.plan(plan_sweep(requested, trials, show.warn))
        key = key or record_sweep(requested)
        params = flatten(requested.space.model_dump(mode="json"))
        mirror = SweepSync(lambda: registry or open_registry(settings), key, requested.config.name, params, show.warn)
        found: dict[str, Any] = {"files": [], "best": None}
        status: Status = "KILLED"
        try:
            found = _run(requested, show, mirror)
            status = "FINISHED"
        except Stopped:
            raise
        except Exception:
            status = "FAILED"
            raise
        finally:
            files = {name: storage.join(requested.out, name) for name in found["files"]}
            mirror.close(status, {"mean_iou": found["best"]["score"]} if found["best"] else {}, files)
    return found


def _run(requested: Sweep, show: Show, mirror: SweepSync) -> dict[str, Any]:
    space, config, out = requested.space, requested.config, requested.out

    def on_change(trial: Trial) -> None:
        show.trial(trial)
        mirror.update(trial, {"space": ",".join(space.search)})

    store = TrialStore(out, space, requested.kept, on_change, show.warn)
    for trial in store.trials:
        on_change(trial)
    running = _Running(requested, store, show, time.monotonic())
    running.search()
    running.repeat()
    found = results.publish_results(space, config, out, store.trials)
    best = store.trial(found["best"]["number"])
    if requested.promote:
        promote(requested, best, running.on)
    if all(trial.over for trial in store.trials):
        store.delete_losing_runs(0.0, keep=best)
    return found


def promote(requested: Sweep, best: Trial, on: RunCallbacks) -> None:
    """Register the best trial's models: its run is finished, so running it again only records it.

    Raises InputError where its run was deleted, because another trial was the best before.
    """
    space, folder = requested.space, run_folder(requested.out, best.number)
    if not storage.exists(storage.join(folder, f"stage{space.last_stage}", "done.json")):
        raise InputError(
            f"--promote: the models of trial {best.number} were deleted when others were better; train them again with "
            f"threestage run {storage.join(requested.out, 'best.yaml')}",
            "sweep/models-deleted",
        )
    shared = shared_folder(requested.out, best.seed) if space.shared_stages else None
    one_run.run(trial_config(space, requested.config, best.params, best.seed), folder, False, on, shared)


# ---- What a sweep needs before it may begin: a space that fits, a folder of its own, a cluster with room


@with_config(ConfigDict(extra="allow"))
class _Record(TypedDict):
    """sweep.json."""

    sweep_key: str
    space: dict[str, Any]
    config: dict[str, Any]


def checked(requested: Sweep) -> Sweep:
    """The same with absolute paths and with the space's fixed settings in its configuration. Raises InputError where they do
    not fit each other, or a place cannot be reached."""
    from threestage.ray_backend.connect import with_gpus

    check_space(requested.space, requested.config)
    config = with_gpus(changed(requested.config, requested.space.fixed), requested.space.max_concurrent)
    refuse_unconfirmed_hosts(requested.config)
    check_store(config, requested.out, SWEEP)
    out = storage.absolute(requested.out)
    claim(out, SWEEP)  # a busy store passes the check above
    return replace(requested, config=config.with_absolute_paths(), out=out)


def known(requested: Sweep) -> str | None:
    """The name in MLflow of the sweep that the folder holds; None where it holds none.

    Raises InputError where that is another one, or --resume was not asked for.
    """
    uri = storage.join(requested.out, "sweep.json")
    if not storage.exists(uri):
        return None
    if not requested.resume:
        raise InputError(
            f"--out {requested.out}: holds a sweep; continue it with --resume, or give another --out", "sweep/exists"
        )
    saved, now = storage.read_json(uri, _Record), _identity(requested)
    for part in ("space", "config"):
        for name in sorted({*saved[part], *now[part]}):
            before, after = saved[part].get(name, KEYS_ADDED_LATER.get(name)), now[part].get(name)
            if before != after:
                raise InputError(
                    f"{uri}: was made with {name}={before!r}, now it is {after!r}; set it back, or give another --out",
                    "run/other-settings",
                )
    return str(saved["sweep_key"])


def record_sweep(requested: Sweep) -> str:
    """Write down what the sweep is; returns its name in MLflow."""
    key = uuid.uuid4().hex
    record = {"format": 1, "sweep_key": key, **_identity(requested)}
    storage.write_json(storage.join(requested.out, "sweep.json"), record)
    return key


def _identity(requested: Sweep) -> dict[str, Any]:
    """What may not change while a sweep continues."""
    space = requested.space.model_dump(mode="json", exclude=FREE_SETTINGS)
    config = requested.config.model_dump(mode="json", exclude=FREE_SECTIONS)
    return {
        "space": flatten(space | {"search": _recorded_keys(space["search"])}),
        "config": _recorded_keys(flatten(config)),
    }


def _recorded_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    return {recorded_key(key): value for key, value in values.items()}


def plan_sweep(requested: Sweep, trials: Sequence[Trial], warn: Warn) -> SweepPlan:
    """The plan of what is left to do. Raises InputError where the cluster could never run it."""
    from threestage.ray_backend.capacity import cluster_nodes, more_may_come, refuse_impossible
    from threestage.ray_backend.node_checks import remote_step_time

    space, config = requested.space, requested.config
    trial = trial_config(space, config, {}, config.seed)
    refuse_impossible(space, trial, cluster_nodes(), more_may_come(), warn)
    manifest, shared = load_manifest(config.data.root), shared_folder(requested.out, config.seed)
    parts = [f"{part}{n}" for n in range(1, space.shared_stages + 1) for part in ("stage", "pseudo_masks")]
    done = {part: storage.exists(storage.join(shared, part, "done.json")) for part in parts}
    names = [stage for stage in STAGES[: space.last_stage] if not done.get(stage)]
    measured = {stage: remote_step_time(trial, stage, manifest.version, warn) for stage in names}
    spent = sum(one.seconds for one in trials) * trial.cluster.devices
    return make_plan(
        space,
        config,
        manifest,
        SweepState(left_to_search(requested, trials), done, requested.kept, spent / 3600),
        {stage: step.seconds for stage, step in measured.items()},
        measured[names[-1]].device,
        PoolSize(_pool_images(config, shared, manifest), mean_pixels(manifest, config.data.downscale)),
    )


def _pool_images(config: Config, shared: str, manifest: Manifest) -> int | None:
    """None where the pool is a prefix that nobody has listed yet."""
    listed = storage.join(shared, "pool.parquet")
    if storage.exists(listed):
        return rows_of(load_pool(listed))
    return None if config.data.unlabelled is not None else sum(file.rows for file in pool_files(manifest))


def left_to_search(requested: Sweep, trials: Sequence[Trial]) -> int:
    """Trials of the search that are not over."""
    return number_of_trials(requested.space) - sum(trial.over for trial in trials if trial.kind == "search")


# ---- The trials


@dataclass(frozen=True)
class _Running:
    """A sweep that runs since `begun` (seconds of the monotonic clock)."""

    requested: Sweep
    store: TrialStore
    show: Show
    begun: float

    @property
    def on(self) -> RunCallbacks:
        return RunCallbacks(self.show.on_metrics, self.show.warn, self.show.on_progress)

    def search(self) -> None:
        left = left_to_search(self.requested, self.store.trials)
        if left > 0:
            self._share(self.requested.config.seed)
            self.show.phase("trials")
            self._trials(self.requested.space, self._next_of_search, left)

    def _next_of_search(self) -> Trial | None:
        space, config, store = self.requested.space, self.requested.config, self.store
        if (waiting := store.take("search", config.seed)) is not None:
            return waiting
        tried = store.of("search")
        own = own_params(space, config)
        params = own if not tried and space.searcher != "grid" else None  # first, what there is to beat
        if params is None and len(tried) < number_of_trials(space):
            params = propose(space, tried, config.seed)
        if params is None:
            return None
        store.add(params, config.seed, own=params == own)
        return store.take("search", config.seed)

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
            to_the_end = self.requested.space.model_copy(update={"scheduler": None})
            self._trials(to_the_end, partial(self.store.take, "repeat", seed), self._open_repeats(seed))
            if not self._open_repeats(seed):
                storage.delete(shared_folder(self.requested.out, seed), self.requested.out)

    def _add_repeats(self, seed: int) -> None:
        there = {trial.repeats for trial in self.store.of("repeat") if trial.seed == seed}
        order = ranked(self.store.of("search"))
        for trial in [*order[:REPEATED], *(trial for trial in order[REPEATED:] if trial.own)]:
            if trial.number not in there:
                self.store.add(trial.params, seed, repeats=trial.number)

    def _open_repeats(self, seed: int) -> int:
        return sum(trial.seed == seed and not trial.over for trial in self.store.of("repeat"))

    def _share(self, seed: int) -> None:
        """Compute, unless that is done, what all trials with a seed begin with; once done it is not touched again."""
        from threestage.ray_backend.train import on_cluster

        space, folder = self.requested.space, shared_folder(self.requested.out, seed)
        last = storage.join(folder, f"pseudo_masks{space.shared_stages}", "done.json")
        if space.shared_stages and not storage.exists(last):
            self.show.phase(f"shared by all trials with seed {seed}: the stages before stage {space.first_stage}")
            config = base_config(space, self.requested.config, seed)
            with on_cluster(config, folder, self.on) as backend:
                pipeline.run(config, folder, backend, self.on)

    def _trials(self, space: Space, next_trial: Callable[[], Trial | None], count: int) -> None:
        from threestage.ray_backend.sweep import run_trials

        config, out, store = self.requested.config, self.requested.out, self.store
        try:
            run_trials(space, config, out, store, next_trial, count, self._over, self.show.warn)
        finally:
            store.delete_losing_runs(0.0)
        if self._in_vain():
            reason = next(trial.reason for trial in reversed(store.trials) if trial.reason)
            raise StageFailure(
                f"{store.in_vain} trials in a row have failed before their first evaluation, one of the last: {reason}; fix "
                "that, --resume continues",
                "sweep/trials-failed",
            )
        if self._spent():
            waiting = sum(not trial.over for trial in store.trials)
            self.show.warn(
                f"the budget is spent; {waiting} trials wait: raise it in the space and give --resume to continue"
            )

    def _over(self) -> bool:
        return self._spent() or self._in_vain()

    def _in_vain(self) -> bool:
        return self.store.in_vain >= self.requested.space.max_concurrent + MAX_CONSECUTIVE_FAILURES

    def _spent(self) -> bool:
        space, config = self.requested.space, self.requested.config
        devices = trial_config(space, config, {}, config.seed).cluster.devices
        hours, device_hours = (time.monotonic() - self.begun) / 3600, self.store.seconds() * devices / 3600
        most = space.budget
        return (most.hours is not None and hours >= most.hours) or (
            most.device_hours is not None and device_hours >= most.device_hours
        )
