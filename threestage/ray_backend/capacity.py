"""Does a cluster have room? Its nodes, what is free on them, whether more may come, and whether workers have a place there.

Asked while a stage waits for workers, before a sweep, when a run starts, and by `threestage check`.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import ray
import ray.util
import torch

from threestage.checks.result import CheckOutcome
from threestage.checks.step_time import machine_bytes
from threestage.config import Config
from threestage.data import storage
from threestage.errors import InputError, Warn
from threestage.ray_backend import ray_internals
from threestage.ray_backend.failures import alive_ids, alive_nodes
from threestage.ray_settings import ClusterSettings
from threestage.sweeps.space import Space

# ---- Do workers have a place on nodes?

SPARE_CPUS = 3  # besides the workers': one reads the pool, one is the controller's, one predicts
READER_CPUS = 1.0  # of the task that reads the pool while stage 2 or 3 trains
ACCELERATOR_SHARE = 0.001  # what Ray takes of a node's accelerator_type for each task that asks for it
ROUNDING = 1e-6
MORE_ROOM = "add nodes, or ask for less with cluster.workers, cluster.cpus_per_worker and cluster.gpus_per_worker"
NODE_GROUP = "ray.io/node-group"  # label of nodes that KubeRay, Anyscale or `ray up` has started

Resources = dict[str, float]


def largest(too_many: int, fits: Callable[[int], bool]) -> int:
    """The largest number below `too_many` that fits, 0 for none; what fits with more fits with fewer."""
    low, high = 0, too_many
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def worker_takes(cluster: ClusterSettings) -> Resources:
    """What a worker takes: of a GPU that some share, as large a part as can be given to that many."""
    asked = dict(cluster.worker_resources)
    if 0 < asked.get("GPU", 0) < 1:
        asked["GPU"] = 1 / math.floor(1 / asked["GPU"] + ROUNDING)
    if cluster.accelerator is not None:
        asked[f"accelerator_type:{cluster.accelerator}"] = ACCELERATOR_SHARE
    return asked


def can_place(
    nodes: Sequence[Mapping[str, float]], trials: int, worker: Resources, workers: int, placement: str,
    others: Sequence[Resources],
) -> bool:  # fmt: skip
    """Whether all workers of all trials, and what each trial takes besides, have a place: the largest first, each on the
    first node with room."""
    free = [dict(node) for node in nodes]
    if placement == "STRICT_PACK":
        worker, workers = {name: amount * workers for name, amount in worker.items()}, 1
    asked = sorted([(worker, workers), *((other, 1) for other in others)], key=lambda ask: -_weight(ask[0], nodes))
    for resources, number in asked:
        for _ in range(trials):
            apart = placement == "STRICT_SPREAD" and resources is worker
            if not (_place_apart(free, resources, number) if apart else _place(free, resources, number)):
                return False
    return True


def _weight(resources: Resources, nodes: Sequence[Mapping[str, float]]) -> float:
    """Its part of the cluster, over all kinds of resources."""
    return sum(amount / (sum(node.get(name, 0) for node in nodes) or 1) for name, amount in resources.items())


def _place(free: list[Resources], resources: Resources, number: int) -> bool:
    for node in free:
        taken = min(number, _times(node, resources))
        _take(node, resources, taken)
        number -= taken
    return number == 0


def _place_apart(free: list[Resources], resources: Resources, number: int) -> bool:
    """Each on a node of its own: those with the most room."""
    chosen = sorted(free, key=lambda node: -_times(node, resources))[:number]
    if len(chosen) < number or not all(_times(node, resources) for node in chosen):
        return False
    for node in chosen:
        _take(node, resources, 1)
    return True


def _times(node: Resources, resources: Resources) -> int:
    """How often the resources are there."""
    return min(math.floor(node.get(name, 0) / amount + ROUNDING) for name, amount in resources.items() if amount > 0)


def _take(node: Resources, resources: Resources, times: int) -> None:
    for name, amount in resources.items():
        if times:
            node[name] -= amount * times


def number_of(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)


def resources_text(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {amount:g}" for name, amount in resources.items())


# ---- Why workers have not started


def waiting_text(
    what: str,
    cluster: ClusterSettings,
    waited: float,
    workers: int,
    nodes: Sequence[Resources],
    free: Sequence[Resources],
    placed: bool = False,
) -> str:
    """Why workers have not started yet: they are starting, their room is in use, or the cluster is too small.

    Args:
        waited: seconds.
        nodes, free: total and free resources of each node.
        placed: whether the workers have their places.
    """
    worker, placement = worker_takes(cluster), cluster.placement
    asked = f"{workers} × ({resources_text(cluster.worker_resources)}"
    asked += f", accelerator {cluster.accelerator}" if cluster.accelerator else ""
    asked += f", placed {placement})" if placement != "PACK" else ")"
    total, left = (
        {name: sum(node.get(name, 0) for node in some) for name in cluster.worker_resources} for some in (nodes, free)
    )
    has = ", ".join(f"{name} {total[name]:g} ({left[name]:g} free)" for name in total)
    there = f"the cluster has {has} on {number_of(len(nodes), 'node')}"
    if placed or can_place(free, 1, worker, workers, placement, []):
        return (
            f"{what}: starting for {waited:.0f} s: there is room for {asked}, {there}; this takes a while on a busy machine, and "
            "where a node pulls an image"
        )
    if can_place(nodes, 1, worker, workers, placement, []):
        return (
            f"{what}: waiting for {waited:.0f} s for {asked}; {there}, in use by other work or by workers that are starting: "
            f"wait until it is free, or {MORE_ROOM}"
        )
    return f"{what}: waiting for {waited:.0f} s for {asked}; {there}: {MORE_ROOM}"


# ---- The nodes of the cluster


def warn_of_folders(places: Sequence[str], warn: Warn) -> None:
    """Of several nodes each has folders of its own: say which of the places must be shared."""
    here, nodes = [place for place in places if not storage.is_s3(place)], len(alive_nodes())
    if here and nodes > 1:
        warn(f"the cluster has {nodes} nodes, which must share {' and '.join(here)}, or give s3://bucket/prefix")


def cluster_nodes() -> list[Resources]:
    """Total resources of each node."""
    return [dict(node["Resources"]) for node in alive_nodes()]


def free_nodes() -> list[Resources]:
    """Free resources of each node; of all nodes together where Ray cannot be asked for each."""
    free = ray_internals.free_resources()
    return [ray.available_resources()] if free is None else [free.get(node, {}) for node in alive_ids()]


def are_placed(cluster: ClusterSettings) -> bool:
    """Whether Ray has given such workers their places, and lets none wait for some: they are starting."""
    worker, states = worker_takes(cluster), set[str]()
    for group in ray.util.placement_group_table().values():
        if all(_times(bundle, worker) for bundle in group["bundles"].values()):
            states.add(group["state"])
    return "CREATED" in states and states <= {"CREATED", "REMOVED"}


def more_may_come() -> bool:
    """Whether an autoscaler may add nodes. Ray documents no way to ask for one, or for its limits; nodes of a group may have
    one."""
    return any(node.get("Labels", {}).get(NODE_GROUP) for node in alive_nodes())


def has_place_for_one(cluster: ClusterSettings) -> bool:
    """Whether a node could hold a worker."""
    return any(can_place([node], 1, worker_takes(cluster), 1, "PACK", []) for node in cluster_nodes())


def room_for_one(cluster: ClusterSettings) -> bool:
    """Whether a worker finds room at once."""
    free = ray.available_resources()
    return has_place_for_one(cluster) and all(
        free.get(name, 0) >= amount for name, amount in cluster.worker_resources.items()
    )


# ---- Does what runs side by side have room?

TRIAL_CPUS = 0.1  # of the process that leads a trial; Ray Tune refuses 0
ASK_FOR_LESS = "ask for less with cluster.cpus_per_worker and cluster.gpus_per_worker"


@dataclass(frozen=True)
class _Demand:
    """What `runs` runs with the same settings ask of nodes at once. `reads`: a task of each reads the pool while it trains;
    `predicts`: each predicts pseudo-masks before that; `lead`: what leads each. Numbers that are tried replace its own."""

    cluster: ClusterSettings
    nodes: Sequence[Mapping[str, float]]
    reads: bool
    runs: int = 1
    predicts: bool = False
    lead: tuple[Resources, ...] = ()

    def fits(self, runs: int | None = None, workers: int | None = None, predictors: int | None = None) -> bool:
        """Whether all have room while they train, and while they predict."""
        runs, workers = runs or self.runs, workers or self.cluster.least_workers
        predictors = predictors or self.cluster.predictors or workers
        worker, reader = worker_takes(self.cluster), [{"CPU": READER_CPUS}] if self.reads else []
        trains = can_place(self.nodes, runs, worker, workers, self.cluster.placement, [*reader, *self.lead])
        return trains and (not self.predicts or can_place(self.nodes, runs, worker, predictors, "PACK", [*self.lead]))

    def most_workers(self) -> int:
        """The largest number, of those that the settings allow, that has room."""
        return largest(self.cluster.most_workers + 1, lambda number: self.fits(workers=number))

    def asked(self) -> str:
        """Of one of the runs."""
        cluster = self.cluster
        elastic = f" to {cluster.most_workers}" if cluster.least_workers < cluster.most_workers else ""
        placed = f", placed {cluster.placement}" if cluster.placement.startswith("STRICT") else ""
        reader = f" and CPU {READER_CPUS:g} to read the pool" if self.reads else ""
        return f"{cluster.least_workers}{elastic} × ({resources_text(worker_takes(cluster))}){placed}{reader}"


# ---- Room for a run: threestage check, and a run's start


def room_here(config: Config) -> CheckOutcome:
    """On this machine, where the run will start Ray. Raises InputError when the workers could never all be placed."""
    cluster, cpus, gpus = config.cluster, os.cpu_count() or 1, torch.cuda.device_count()
    there = f"no cluster is named, so Ray will be started here: {number_of(cpus, 'CPU')}, {number_of(gpus, 'GPU')}"
    found = _room(config, [_this_machine(cluster)], False, there, "name a cluster that has more (--address)")
    asked = cluster.most_workers * cluster.cpus_per_worker
    slow = f"{there}; cluster.workers={cluster.most_workers} × cluster.cpus_per_worker={cluster.cpus_per_worker:g} share them"
    return found._replace(warning=found.warning or (slow if asked > cpus else None))


def _this_machine(cluster: ClusterSettings) -> Resources:
    """What the Ray that a run starts here has: as many CPUs as it asks for; the type of its GPUs is not known yet."""
    asked = (cluster.most_workers + cluster.number_of_predictors) * cluster.cpus_per_worker
    node = {"CPU": max(os.cpu_count() or 1, asked + SPARE_CPUS), "memory": float(machine_bytes())}
    if gpus := torch.cuda.device_count():
        node |= {"GPU": float(gpus), f"accelerator_type:{cluster.accelerator}": 1.0}
    return node


def room_there(config: Config) -> CheckOutcome:
    """On the cluster that this process is connected to. Raises InputError like `room_here`."""
    nodes = cluster_nodes()
    total, free = ray.cluster_resources(), ray.available_resources()
    names = [name for name in worker_takes(config.cluster) if not name.startswith("accelerator_type")]
    has = ", ".join(f"{name} {total.get(name, 0):g} ({free.get(name, 0):g} free)" for name in names)
    there = f"the cluster has {has} on {number_of(len(nodes), 'node')}"
    return _room(config, nodes, more_may_come(), there, "add nodes")


def _room(config: Config, nodes: Sequence[Mapping[str, float]], may_grow: bool, there: str, more: str) -> CheckOutcome:
    """nodes: total resources of each. more: how they could become more."""
    cluster, demand = config.cluster, _Demand(config.cluster, nodes, reads=config.stages > 1)
    asked, most = f"the run asks for {demand.asked()}", demand.most_workers()
    if most < cluster.least_workers:
        fix = f"{f'set cluster.workers={most}' if most else ASK_FOR_LESS}, or {more}"
        if not may_grow:
            raise InputError(f"{asked}; {there}; {fix}", "ray/too-small")
        return CheckOutcome(asked, f"{asked}; {there}, and an autoscaler may add nodes: should none come, {fix}")
    fewer = f"; it would begin with {number_of(most, 'worker')}" if most < cluster.most_workers else ""
    value = f"{asked}; {there}{fewer}"
    if (alone := replace(demand, reads=False).most_workers()) > most:
        workers = f"[{cluster.least_workers},{most}]"
        return CheckOutcome(
            value,
            f"{value}, but Ray begins with {alone}, which leaves no CPU to read the pool: set cluster.workers={workers}",
        )
    if not cluster.gpus and any(node.get("GPU") for node in nodes):
        return CheckOutcome(value, f"{value}; it has GPUs and the run uses none: set cluster.gpus_per_worker=1")
    return CheckOutcome(value)


# ---- Room for the trials of a sweep


def refuse_impossible(
    space: Space, config: Config, nodes: Sequence[Mapping[str, float]], may_grow: bool = False, warn: Warn = print
) -> None:
    """Raises InputError, with the numbers that do fit, when the trials that run at once would never all have room.

    config: of a trial. nodes: total resources of each (`cluster_nodes`). Warns instead where an autoscaler may add nodes.
    """
    demand = _Demand(
        config.cluster, nodes, reads=space.last_stage > 1, runs=space.max_concurrent,
        predicts=len(space.stages) > 1,  # of the last stage, trials predict nothing
        lead=({"CPU": TRIAL_CPUS},),
    )  # fmt: skip
    if demand.fits():
        return
    many = demand.predicts and (config.cluster.predictors or 0) > config.cluster.least_workers
    later = f", later {config.cluster.predictors} predictors" if many else ""
    problem = (
        f"max_concurrent={space.max_concurrent}: each trial needs {demand.asked()} and CPU {TRIAL_CPUS:g} to lead it{later}; "
        f"the cluster has {_total_text(config.cluster, nodes)} on {number_of(len(nodes), 'node')}"
    )
    fitting = " or ".join(_what_fits(demand))
    fix = f"{f'set {fitting}' if fitting else ASK_FOR_LESS}, or add nodes"
    if not may_grow:
        raise InputError(f"{problem}; {fix}", "ray/too-small")
    warn(f"{problem}, and an autoscaler may add nodes: trials wait for them; should none come, {fix}")


def _what_fits(demand: _Demand) -> Iterator[str]:
    """The largest numbers that have room: one of them with the others as they are, else workers of a trial alone."""
    least, predictors = demand.cluster.least_workers, demand.cluster.predictors or 0
    if runs := largest(demand.runs, lambda number: demand.fits(runs=number)):
        yield f"max_concurrent={runs} in the space"
    if fewer := largest(least, lambda number: demand.fits(workers=number)):
        yield f"cluster.workers={fewer}"
    if demand.predicts and (less := largest(predictors, lambda number: demand.fits(predictors=number))):
        yield f"cluster.predictors={less}"
    alone = largest(least, lambda number: demand.fits(runs=1, workers=number))
    if alone and not (runs or fewer):
        yield f"max_concurrent=1 in the space with cluster.workers={alone}"


def _total_text(cluster: ClusterSettings, nodes: Sequence[Mapping[str, float]]) -> str:
    names = list(worker_takes(cluster))
    total = {name: sum(node.get(name, 0) for node in nodes) for name in names}
    most = {name: max((node.get(name, 0) for node in nodes), default=0) for name in names}
    return resources_text(total) + (f" (one node at most {resources_text(most)})" if len(nodes) > 1 else "")
