"""What a sweep is going to do, before it starts: its trials, what is reused, device-hours, storage, and what ends it.

Seconds come from one measured step per stage (step_time.py): waiting for data, evaluation and start-up come on top.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from threestage.config import STAGES, Config, StageName, changed
from threestage.data.records import Manifest
from threestage.format import duration
from threestage.models.network import build_network
from threestage.run.stages import auxiliary
from threestage.sweeps.space import Asha, Space, counts, most_steps, paths, trial_config

if TYPE_CHECKING:
    from rich.table import Table


PSEUDO_MASK_BYTES = 2  # per pixel at most: the class and its confidence, both compressed


@dataclass(frozen=True)
class StagePlan:
    """`steps`: the most that it can have. `step_seconds`: as measured; None where it was not. `shared`: trained once for all
    trials; `finished`: has been. `keys`: searched ones that it depends on."""

    stage: StageName
    steps: int
    step_seconds: float | None
    shared: bool
    finished: bool
    keys: tuple[str, ...]

    @property
    def seconds(self) -> float:
        return self.steps * (self.step_seconds or 0.0)


@dataclass(frozen=True)
class Hours:
    """`device`: of all devices together. `wall`: from the first trial to the last."""

    device: float
    wall: float


@dataclass(frozen=True)
class Storage:
    """`bytes` is None while the pool is not listed."""

    what: str
    bytes: int | None


@dataclass(frozen=True)
class SweepPlan:
    """`trials`: still to be run. `devices`: of one trial, of the kind `unit`; where `gpus_per_worker` is set they are GPUs.

    `shared_hours`: stages trained once. `most_hours`: every trial to its end. `expected_hours`: with ASHA, which judges a
    trial at the steps `judged_at` and lets it pass each with probability 1/reduction_factor; None without it. `ends_with`:
    the limit that is reached first.
    """

    trials: int
    at_once: int
    stages: tuple[StagePlan, ...]
    reused: tuple[str, ...]
    devices: float
    unit: str
    measured_on: str
    judged_at: tuple[int, ...]
    reduction_factor: float | None
    shared_hours: Hours
    most_hours: Hours
    expected_hours: Hours | None
    storage: tuple[Storage, ...]
    ends_with: str

    @property
    def bytes(self) -> int | None:
        """Of the storage at its fullest."""
        parts = [part.bytes for part in self.storage]
        return None if None in parts else sum(part for part in parts if part is not None)


class SweepState(NamedTuple):
    """How far a sweep is. shared_done: by name (stage1, pseudo_masks1 …), whether that part of the shared run is finished.
    kept: trials whose runs stay. device_hours_spent: of the budget, by trials before."""

    trials_left: int
    shared_done: Mapping[str, bool]
    kept: int = 1
    device_hours_spent: float = 0.0


class PoolSize(NamedTuple):
    """images: None while the pool is not listed. pixels: of a mean image."""

    images: int | None
    pixels: int


def make_plan(
    space: Space, config: Config, manifest: Manifest, state: SweepState, step_seconds: Mapping[StageName, float],
    device: str, pool: PoolSize,
) -> SweepPlan:  # fmt: skip
    """The plan of what is left of a sweep. step_seconds: of the stages that are to be trained, measured on `device`."""
    trials_left = max(0, state.trials_left)
    trial = trial_config(space, config, {}, config.seed)
    stages = tuple(_stage_plans(space, config, step_seconds, state.shared_done))
    searched = [stage for stage in stages if not stage.shared]
    devices = trial.cluster.devices
    at_once = max(1, min(space.max_concurrent, trials_left))
    judged = judged_at([stage.steps for stage in searched], trial.training.evaluate_every, space.scheduler)
    factor = None if space.scheduler is None else space.scheduler.reduction_factor
    shared = sum(stage.seconds for stage in stages if stage.shared and not stage.finished) / 3600

    def hours(seconds: float) -> Hours:
        return Hours(trials_left * seconds * devices / 3600, trials_left * seconds / 3600 / at_once)

    most = hours(expected_seconds(searched, (), 1.0))
    expected = None if factor is None else hours(expected_seconds(searched, judged, factor))
    return SweepPlan(
        trials=trials_left,
        at_once=at_once,
        stages=stages,
        reused=tuple(_reused(space, state.shared_done)),
        devices=devices,
        unit="GPU" if trial.cluster.gpus else "worker",
        measured_on=device,
        judged_at=judged,
        reduction_factor=factor,
        shared_hours=Hours(shared * devices, shared),
        most_hours=most,
        expected_hours=expected,
        storage=tuple(_storage(space, trial, manifest, at_once, state.kept, pool.images and pool.images * pool.pixels)),
        ends_with=_ends_with(space, trials_left, (expected or most).wall, devices * at_once, state.device_hours_spent),
    )


def mean_pixels(manifest: Manifest, downscale: int) -> int:
    """Of an image of the data set at its training size."""
    return round(manifest.sizes.mean_height * manifest.sizes.mean_width / downscale**2)


def _stage_plans(
    space: Space, config: Config, step_seconds: Mapping[StageName, float], shared_done: Mapping[str, bool]
) -> Iterator[StagePlan]:
    base = changed(config, space.fixed)
    for stage in STAGES[: space.shared_stages]:
        done = shared_done.get(stage, False)
        yield StagePlan(stage, base.stage(stage).steps, step_seconds.get(stage), True, done, ())
    for number, steps in zip(space.stages, most_steps(space, base), strict=True):
        stage = STAGES[number - 1]
        keys = tuple(key for key in space.search if counts(space, base, key, paths(space, base, key), stage))
        yield StagePlan(stage, steps, step_seconds[stage], False, False, keys)


def judged_at(steps: Sequence[int], evaluate_every: int, scheduler: Asha | None) -> tuple[int, ...]:
    """Steps, over the searched stages of so many `steps`, at which ASHA judges a trial: its rungs grace·r^k below the last
    step, each at the evaluation that follows; rungs that share one count once."""
    if scheduler is None:
        return ()
    total, found, rung = sum(steps), set(), float(scheduler.grace_steps)
    while rung < total:
        found.add(_evaluation_after(rung, steps, evaluate_every))
        rung *= scheduler.reduction_factor
    return tuple(sorted(found - {total}))


def _evaluation_after(step: float, steps: Sequence[int], evaluate_every: int) -> int:
    before = 0
    for length in steps:
        if step <= before + length:
            return before + min(length, math.ceil((step - before) / evaluate_every) * evaluate_every)
        before += length
    return before


def expected_seconds(stages: Sequence[StagePlan], judged: Sequence[int], factor: float) -> float:
    """Of a trial that passes each step of `judged` with probability 1/factor: Σ_k (S(j_{k+1}) − S(j_k)) / factor^k, where S
    is the seconds until a step, j_0 = 0 and the last j the end."""
    marks = [0, *judged, sum(stage.steps for stage in stages)]
    return sum(
        (_seconds_until(end, stages) - _seconds_until(start, stages)) / factor**passed
        for passed, (start, end) in enumerate(pairwise(marks))
    )


def _seconds_until(step: int, stages: Sequence[StagePlan]) -> float:
    seconds = 0.0
    for stage in stages:
        seconds += min(step, stage.steps) * (stage.step_seconds or 0.0)
        step = max(0, step - stage.steps)
    return seconds


def _reused(space: Space, done: Mapping[str, bool]) -> Iterator[str]:
    for number in range(1, space.shared_stages + 1):
        state = "finished already" if done.get(f"stage{number}") else "to be trained"
        yield f"stage {number}: once, shared by all trials ({state})"
        state = "finished already" if done.get(f"pseudo_masks{number}") else "to be predicted"
        yield f"pseudo-masks {number}: once ({state}); thresholds act on stored confidences: no new prediction"


def _storage(
    space: Space, trial: Config, manifest: Manifest, at_once: int, kept: int, pixels: int | None
) -> Iterator[Storage]:
    """At its fullest: the shared run, the trials that run, and those that are kept; a stage's last and its best model.
    pixels: of the whole pool."""
    sizes = {stage: network_bytes(trial, stage, len(manifest.classes)) for stage in STAGES[: space.last_stage]}
    stay = {stage: trial.training.checkpoints_kept * saved + 2 * model for stage, (saved, model) in sizes.items()}
    shared, own = list(sizes)[: space.shared_stages], list(sizes)[space.shared_stages :]
    masks = None if pixels is None else PSEUDO_MASK_BYTES * pixels
    if shared:
        one_more = max(sizes[stage][0] for stage in shared)
        yield Storage("shared stages: checkpoints and models", sum(stay[stage] for stage in shared) + one_more)
        yield Storage("shared pseudo-masks, at most", masks and len(shared) * masks)
    one_more = at_once * max(sizes[stage][0] for stage in own)
    runs = (at_once + kept) * sum(stay[stage] for stage in own) + one_more
    yield Storage(f"checkpoints and models of {at_once} running trials and the best {kept}", runs)
    if between := len(own) - 1:
        yield Storage("their own pseudo-masks, at most", masks and (at_once + kept) * between * masks)


def network_bytes(config: Config, stage: StageName, classes: int) -> tuple[int, int]:
    """Of a checkpoint of a stage (student, teacher, the optimiser's two moments, the best weights) and of its model's weights."""
    config = config.for_stage(stage)
    settings = config.network.model_copy(update={"weights": None, "pretrained": False})
    with torch.device("meta"):
        network = build_network(settings, classes, auxiliary(stage, config))
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    copies = 1 if stage == "stage1" else 2
    model = _bytes(network.main_state_dict().values())
    return copies * _bytes(network.state_dict().values()) + 2 * _bytes(trained) + model, model


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _ends_with(space: Space, trials: int, wall: float, devices: float, spent: float) -> str:
    """The limit that is reached first, and when: hours are counted from the first trial. `devices`: of all trials at once."""
    limits = {f"all {trials} trials": wall}
    if (hours := space.budget.hours) is not None:
        limits[f"budget.hours={hours:g}"] = hours
    if (device_hours := space.budget.device_hours) is not None:
        limits[f"budget.device_hours={device_hours:g}"] = max(0.0, device_hours - spent) / devices
    first = min(limits, key=lambda name: limits[name])
    return f"{first}, after about {duration(limits[first])}"


# ---- The plan as JSON and as a table


def plan_json(plan: SweepPlan) -> dict[str, Any]:
    """The plan as plain values: hours, seconds and bytes."""
    return asdict(plan) | {"bytes": plan.bytes}


def rich_plan(plan: SweepPlan) -> "Table":
    """The plan as a table for a rich console."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="Plan of the sweep", show_header=False)
    for name, text in _rows(plan):
        table.add_row(name, escape(text))
    return table


def _rows(plan: SweepPlan) -> Iterator[tuple[str, str]]:
    yield "Trials", f"{plan.trials}, {plan.at_once} at once, each on {plan.devices:g} × {plan.unit}"
    for stage in plan.stages:
        yield stage.stage, _stage_row(stage)
    yield "Reused", "\n".join(plan.reused) or "nothing: the search begins with stage 1"
    yield f"{plan.unit}-hours", "\n".join(_hour_rows(plan))
    total = "the pool is not listed yet" if plan.bytes is None else _size(plan.bytes)
    parts = [f"{part.what}: {'?' if part.bytes is None else _size(part.bytes)}" for part in plan.storage]
    yield "Storage, at most", "\n".join([total, *parts])
    yield "Ends with", plan.ends_with


def _stage_row(stage: StagePlan) -> str:
    if stage.finished:
        return "finished already"
    speed = "" if stage.step_seconds is None else f" of {stage.step_seconds:.3g} s"
    keys = f"; searched: {', '.join(stage.keys)}" if stage.keys else ""
    return f"{'once' if stage.shared else 'each trial'}: {stage.steps} steps{speed}{keys}"


def _hour_rows(plan: SweepPlan) -> Iterator[str]:
    if plan.shared_hours.device:
        yield f"shared stages: {_hours(plan.shared_hours)}"
    yield f"every trial to its end: {_hours(plan.most_hours)}"
    if plan.expected_hours is not None:
        steps = ", ".join(map(str, plan.judged_at))
        yield f"expected with ASHA: {_hours(plan.expected_hours)}"
        yield f"  judged at steps {steps}; 1 of {plan.reduction_factor:g} passes each"
    yield f"from a step measured on {plan.measured_on}, without waiting for data, evaluation and start-up"


def _hours(hours: Hours) -> str:
    return f"{hours.device:.3g} ({duration(hours.wall)})"


def _size(number: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:.3g} TiB"
