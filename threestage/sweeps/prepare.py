"""What a sweep needs before it may begin: a space that fits, a folder of its own, a cluster with room, and a plan."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from threestage.checks.store import check_store
from threestage.config import STAGES, Config, changed, flatten, recorded_key, refuse_unconfirmed_hosts
from threestage.data import storage
from threestage.data.outputs import SWEEP, claim
from threestage.data.pool import load_pool, rows_of
from threestage.data.records import Manifest, load_manifest, pool_files
from threestage.errors import InputError, Warn
from threestage.sweeps.journal import Trial, shared_folder
from threestage.sweeps.plan import PoolSize, SweepPlan, SweepState, make_plan, mean_pixels
from threestage.sweeps.proposals import number_of_trials
from threestage.sweeps.space import Space, check_space, trial_config

FREE_SECTIONS = {"cluster", "storage", "registry"}  # these may be others with --resume
FREE_SETTINGS = {
    "trials",
    "max_concurrent",
    "budget",
    "scheduler",
    "searcher",
    "fixed",
}  # what is fixed is in the configuration

REPEATED = 3  # of the best trials, with --repeat


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


@with_config(ConfigDict(extra="allow"))
class _Record(TypedDict):
    """sweep.json."""

    sweep_key: str
    space: dict[str, Any]
    config: dict[str, Any]


def checked(requested: Sweep) -> Sweep:
    """The same with absolute paths and with the space's fixed settings in its configuration. Raises InputError where they do
    not fit each other, or a place cannot be reached."""
    check_space(requested.space, requested.config)
    config = changed(requested.config, requested.space.fixed)
    refuse_unconfirmed_hosts(requested.config)
    check_store(config, requested.out, SWEEP)
    out = storage.absolute(requested.out)
    claim(out, SWEEP)  # a busy store passes the check above
    return replace(requested, config=config.with_absolute_paths(), out=out)


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
    over = sum(trial.over for trial in trials if trial.kind == "search")
    names = [stage for stage in STAGES[: space.last_stage] if not done.get(stage)]
    measured = {stage: remote_step_time(trial, stage, manifest.version, warn) for stage in names}
    spent = sum(one.seconds for one in trials) * trial.cluster.devices
    return make_plan(
        space,
        config,
        manifest,
        SweepState(number_of_trials(space) - over, done, REPEATED if requested.repeat else 1, spent / 3600),
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
            before, after = saved[part].get(name), now[part].get(name)
            if before != after:
                raise InputError(
                    f"{uri}: was made with {name}={before!r}, now it is {after!r}; set it back, or give another --out",
                    "run/other-settings",
                )
    return str(saved["sweep_key"])


def record_sweep(requested: Sweep) -> str:
    """Write down what the sweep is; returns its name in MLflow."""
    key = uuid.uuid4().hex
    storage.write_json(
        storage.join(requested.out, "sweep.json"), {"format": 1, "sweep_key": key, **_identity(requested)}
    )
    return key


def _identity(requested: Sweep) -> dict[str, Any]:
    """What may not change while a sweep goes on."""
    space = requested.space.model_dump(mode="json", exclude=FREE_SETTINGS)
    config = requested.config.model_dump(mode="json", exclude=FREE_SECTIONS)
    recorded = {part: _recorded_keys(space[part]) for part in ("search", "fixed") if part in space}
    return {"space": flatten(space | recorded), "config": _recorded_keys(flatten(config))}


def _recorded_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    return {recorded_key(key): value for key, value in values.items()}
