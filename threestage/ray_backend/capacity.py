"""Does a cluster have room? What its nodes have, what an autoscaler may add, and whether workers have a place there.

Asked while a stage waits for workers, before a sweep, and by `threestage check`. Also measures a step on a worker's device,
for the plan of a sweep.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions
import torch
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray._private.state import state as cluster_state
from ray.experimental.internal_kv import _internal_kv_get

from threestage.allocator import disable_malloc_trim
from threestage.checks.result import CheckOutcome
from threestage.checks.step_time import StepTime, measure_step
from threestage.checks.steps import machine_bytes
from threestage.config import Config, StageName
from threestage.data import storage
from threestage.data.records import load_manifest
from threestage.errors import InputError, StageFailure, Warn
from threestage.ray_backend.failures import cause_of, code_of, first_line
from threestage.ray_backend.nodes import alive_nodes
from threestage.ray_settings import ClusterSettings
from threestage.sweeps.space import Space
from threestage.training.worker import default_device

# ---- Do workers have a place on nodes?

SPARE_CPUS = 3  # besides the workers': one reads the pool, one is the controller's, one predicts
READER_CPUS = 1.0  # of the task that reads the pool while stage 2 or 3 trains
ACCELERATOR_SHARE = 0.001  # what Ray takes of a node's accelerator_type for each task that asks for it
ROUNDING = 1e-6
MORE_ROOM = "add nodes, or ask for less with cluster.workers, cluster.cpus_per_worker and cluster.gpus_per_worker"
NODE_GROUP = "ray.io/node-group"  # label of nodes that an autoscaler or a launcher has started

Resources = dict[str, float]


@dataclass(frozen=True)
class Growth:
    """What an autoscaler may add: `nodes` that it tells of; `untold`: it is there and does not tell how far it goes."""

    nodes: tuple[Resources, ...] = ()
    untold: bool = False


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
) -> str:
    """Why workers have not started yet: they are starting, their room is in use, or the cluster is too small.

    Args:
        waited: seconds.
        nodes, free: total and free resources of each node.
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
    if can_place(free, 1, worker, workers, placement, []):
        return (
            f"{what}: starting for {waited:.0f} s: there is room for {asked}, {there}; on a busy machine this takes a while "
            "(the limit is cluster.start_timeout_s)"
        )
    if can_place(nodes, 1, worker, workers, placement, []):
        return (
            f"{what}: waiting for {waited:.0f} s for {asked}; {there}, in use by other work or by workers that are starting: "
            f"wait until it is free, or {MORE_ROOM}"
        )
    return f"{what}: waiting for {waited:.0f} s for {asked}; {there}: {MORE_ROOM}"


# ---- What the cluster has, and what may be added


def cluster_nodes() -> list[Resources]:
    """Total resources of each node that is alive."""
    return [dict(node["Resources"]) for node in alive_nodes()]


def free_nodes() -> list[Resources]:
    """Free resources of each node that is alive."""
    free = cluster_state.available_resources_per_node()
    return [dict(free.get(node["NodeID"], {})) for node in alive_nodes()]


def has_place_for_one(cluster: ClusterSettings) -> bool:
    """Whether a node could hold a worker."""
    return any(can_place([node], 1, worker_takes(cluster), 1, "PACK", []) for node in cluster_nodes())


def room_for_one(cluster: ClusterSettings) -> bool:
    """Whether a worker finds room at once."""
    free = ray.available_resources()
    return has_place_for_one(cluster) and all(
        free.get(name, 0) >= amount for name, amount in cluster.worker_resources.items()
    )


def with_accelerator(node: Resources, cluster: ClusterSettings) -> Resources:
    """A node to come: of which type its GPUs will be is not told."""
    return node | {f"accelerator_type:{cluster.accelerator}": 1.0} if "GPU" in node else node


def cluster_growth(at_most: int) -> Growth:
    """What may come beside `cluster_nodes`; of a group without a limit, `at_most` nodes.

    Some autoscalers write their groups down where Ray Train and Ray Data look for them too. Ray's own does not (2.60), but
    writes the report that `ray status` shows, in which the nodes of a cluster without autoscaler are called node_<id>;
    its second version writes none, and its nodes carry the name of their group.
    """
    groups = [node.get("Labels", {}).get(NODE_GROUP, "") for node in alive_nodes()]
    config = cluster_state.get_cluster_config()
    if config is not None and config.node_group_configs:
        return Growth(tuple(node for group in config.node_group_configs for node in _to_come(group, groups, at_most)))
    report = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or "{}").get("autoscaler_report")
    if report is None:
        return Growth(untold=any(groups))
    return Growth(untold=any(not kind.startswith("node_") for kind in report["active_nodes"]))


def _to_come(group: Any, groups: Sequence[str], at_most: int) -> Iterator[Resources]:
    """group: Ray's NodeGroupConfig; its max_count is -1 where there is no limit. groups: of the nodes that are alive."""
    number = at_most if group.max_count < 0 else min(at_most, group.max_count - groups.count(group.name))
    for _ in range(number):
        yield {name: float(amount) for name, amount in group.resources.items()}


# ---- Room for the trials of a sweep

TRIAL_CPUS = 0.1  # of the process that leads a trial; Ray Tune refuses 0
MEASURING_SECONDS = 600.0  # in which a step is measured, once there is room; torch.compile takes minutes
ASK_FOR_LESS = "ask for less with cluster.cpus_per_worker and cluster.gpus_per_worker"


def refuse_impossible(
    space: Space, config: Config, nodes: Sequence[Mapping[str, float]], growth: Growth = Growth(), warn: Warn = print
) -> None:
    """Raises InputError, with the numbers that do fit, when the trials that run at once would never all have room.

    config: of a trial. nodes: total resources of each (`cluster_nodes`). Where an autoscaler does not tell its limits, it
    warns instead.
    """
    room = _Room(space, config, (*nodes, *(with_accelerator(node, config.cluster) for node in growth.nodes)))
    if room.fits():
        return
    coming = f" (and {len(growth.nodes)} that may come)" if growth.nodes else ""
    there = f"the cluster has {room.there()} on {number_of(len(nodes), 'node')}{coming}"
    problem = f"max_concurrent={space.max_concurrent}: {room.asked()}; {there}"
    if not growth.untold:
        raise InputError(f"{problem}; {room.mend()}", "ray/too-small")
    warn(
        f"{problem} and an autoscaler whose limits are not known: trials wait for nodes; should none come, {room.mend()}"
    )


@dataclass(frozen=True)
class _Room:
    """What a sweep asks of nodes, and whether they have it. The numbers that are tried stand in for the sweep's own."""

    space: Space
    config: Config
    nodes: tuple[Mapping[str, float], ...]

    def fits(self, at_once: int | None = None, workers: int | None = None, predictors: int | None = None) -> bool:
        """Whether all trials have room while they train, and while they predict."""
        at_once, workers = at_once or self.space.max_concurrent, workers or self.config.cluster.least_workers
        predictors = predictors or self.config.cluster.predictors or workers
        worker, placement = worker_takes(self.config.cluster), self.config.cluster.placement
        lead, reader = {"CPU": TRIAL_CPUS}, {"CPU": READER_CPUS}
        trains = can_place(self.nodes, at_once, worker, workers, placement, [reader, lead] if self._reads else [lead])
        predicts = not self._predicts or can_place(self.nodes, at_once, worker, predictors, "PACK", [lead])
        return trains and predicts

    @property
    def _reads(self) -> bool:
        return self.space.last_stage > 1

    @property
    def _predicts(self) -> bool:
        """Of the last stage, trials predict nothing."""
        return len(self.space.stages) > 1

    def mend(self) -> str:
        return (
            f"set {' or '.join(found)}, or add nodes"
            if (found := list(self._mends()))
            else f"{ASK_FOR_LESS}, or add nodes"
        )

    def _mends(self) -> Iterator[str]:
        """The largest numbers that have room: one of them with the others as they are, else workers of a trial alone."""
        cluster, predictors = self.config.cluster, self.config.cluster.predictors or 0
        if at_once := largest(self.space.max_concurrent, lambda number: self.fits(at_once=number)):
            yield f"max_concurrent={at_once} in the space"
        if fewer := largest(cluster.least_workers, lambda number: self.fits(workers=number)):
            yield f"cluster.workers={fewer}"
        if self._predicts and (less := largest(predictors, lambda number: self.fits(predictors=number))):
            yield f"cluster.predictors={less}"
        if not (at_once or fewer):
            alone = largest(cluster.least_workers, lambda number: self.fits(at_once=1, workers=number))
            if alone:
                yield f"max_concurrent=1 in the space with cluster.workers={alone}"

    def asked(self) -> str:
        cluster = self.config.cluster
        placed = f", placed {cluster.placement}" if cluster.placement.startswith("STRICT") else ""
        reader = f" and CPU {READER_CPUS:g} to read the pool" if self._reads else ""
        many = self._predicts and (cluster.predictors or 0) > cluster.least_workers
        later = f", later {cluster.predictors} predictors" if many else ""
        one = f"{cluster.least_workers} × ({resources_text(worker_takes(cluster))}){placed}{later}"
        return f"each trial needs {one}{reader} and CPU {TRIAL_CPUS:g} to lead it"

    def there(self) -> str:
        names = list(worker_takes(self.config.cluster))
        total = {name: sum(node.get(name, 0) for node in self.nodes) for name in names}
        most = {name: max((node.get(name, 0) for node in self.nodes), default=0) for name in names}
        return resources_text(total) + (f" (one node at most {resources_text(most)})" if len(self.nodes) > 1 else "")


# ---- A step measured on the cluster, for the plan of a sweep


def remote_step_time(config: Config, stage: StageName, manifest_version: int, warn: Warn = print) -> StepTime:
    """`measure_step` as a task that takes what one worker takes, so on a device that will train.

    Says after `cluster.report_after_s`, and again, that it waits. Raises InputError as `measure_step` does, StageFailure
    when the step could not be measured (a GPU's memory is too small …) or there was no room for it for
    `cluster.start_timeout_s`.
    """
    cluster, began = config.cluster, time.monotonic()
    result = (
        ray.remote(_measure)
        .options(**cluster.task_options)
        .remote(config.model_dump(mode="json"), stage, manifest_version)
    )
    while not ray.wait([result], timeout=cluster.report_after_s)[0]:
        waited = time.monotonic() - began
        device = resources_text(worker_takes(cluster))
        what = f"{stage}: a step is to be measured on {device}; waiting for {waited:.0f} s for room or its end"
        if waited > cluster.start_timeout_s + MEASURING_SECONDS:
            ray.cancel(result, force=True)
            raise StageFailure(
                f"{what}: is the cluster busy? Try again, or ask for less with cluster.cpus_per_worker", "ray/no-room"
            )
        warn(what)
    try:
        return ray.get(result)
    except ray.exceptions.RayError as error:
        if isinstance(cause := cause_of(error), InputError):
            raise cause from error
        raise StageFailure(
            f"{stage}: no step could be trained to measure it: {first_line(error)}",
            code_of(error) or "stage/not-measured",
        ) from error


def _measure(settings: dict[str, Any], stage: StageName, manifest_version: int) -> StepTime:
    """On a worker's process: threads and memory as worker.py has them."""
    disable_malloc_trim()
    config = Config.model_validate(settings)
    storage.configure(config.storage)
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
    return measure_step(config, stage, load_manifest(config.data.root, manifest_version), default_device())


# ---- Room for a run: threestage check, and a run's start


def room_here(config: Config) -> CheckOutcome:
    """On this machine, where the run will start Ray. Raises InputError when the workers could never all be placed."""
    cluster, cpus, gpus = config.cluster, os.cpu_count() or 1, torch.cuda.device_count()
    there = f"no cluster is named, so Ray will be started here: {number_of(cpus, 'CPU')}, {number_of(gpus, 'GPU')}"
    found = _room(config, [_this_machine(cluster)], Growth(), there, "name a cluster that has more (--address)")
    asked = cluster.most_workers * cluster.cpus_per_worker
    slow = f"{there}; cluster.workers={cluster.most_workers} × cluster.cpus_per_worker={cluster.cpus_per_worker:g} share them"
    return found._replace(warning=found.warning or (slow if asked > cpus else None))


def _this_machine(cluster: ClusterSettings) -> Resources:
    """What the Ray that a run starts here has: as many CPUs as it asks for."""
    asked = (cluster.most_workers + cluster.number_of_predictors) * cluster.cpus_per_worker
    node = {"CPU": max(os.cpu_count() or 1, asked + SPARE_CPUS), "memory": float(machine_bytes())}
    if gpus := torch.cuda.device_count():
        return with_accelerator({**node, "GPU": float(gpus)}, cluster)
    return node


def room_there(config: Config) -> CheckOutcome:
    """On the cluster that this process is connected to. Raises InputError like `room_here`."""
    nodes = cluster_nodes()
    total, free = ray.cluster_resources(), ray.available_resources()
    names = [name for name in worker_takes(config.cluster) if not name.startswith("accelerator_type")]
    has = ", ".join(f"{name} {total.get(name, 0):g} ({free.get(name, 0):g} free)" for name in names)
    there = f"the cluster has {has} on {number_of(len(nodes), 'node')}"
    return _room(config, nodes, cluster_growth(config.cluster.most_workers + 1), there, "add nodes")


def _room(config: Config, nodes: Sequence[Mapping[str, float]], growth: Growth, there: str, more: str) -> CheckOutcome:
    """nodes: total resources of each. more: how they could become more."""
    cluster, worker = config.cluster, worker_takes(config.cluster)
    all_nodes = (*nodes, *(with_accelerator(node, cluster) for node in growth.nodes))
    others = [{"CPU": READER_CPUS}] if config.stages > 1 else []
    asked = _asked(config, worker)

    def largest_beside(others: Sequence[Resources]) -> int:
        return largest(
            cluster.most_workers + 1, lambda number: can_place(all_nodes, 1, worker, number, cluster.placement, others)
        )

    most = largest_beside(others)
    if most < cluster.least_workers:
        mend = f"{f'set cluster.workers={most}' if most else ASK_FOR_LESS}, or {more}"
        if not growth.untold:
            raise InputError(f"{asked}; {there}; {mend}", "ray/too-small")
        return CheckOutcome(
            asked, f"{asked}; {there} and an autoscaler whose limits are not known: should no node come, {mend}"
        )
    coming = f" (and {number_of(len(growth.nodes), 'node')} that may come)" if growth.nodes else ""
    fewer = f"; it would begin with {number_of(most, 'worker')}" if most < cluster.most_workers else ""
    value = f"{asked}; {there}{coming}{fewer}"
    if (alone := largest_beside([])) > most:
        workers = f"[{cluster.least_workers},{most}]"
        return CheckOutcome(
            value,
            f"{value}, but Ray begins with {alone}, which leaves no CPU to read the pool: set cluster.workers={workers}",
        )
    if not cluster.gpus_per_worker and any(node.get("GPU") for node in all_nodes):
        return CheckOutcome(value, f"{value}; it has GPUs and the run uses none: set cluster.gpus_per_worker=1")
    return CheckOutcome(value)


def _asked(config: Config, worker: Mapping[str, float]) -> str:
    cluster = config.cluster
    number = str(cluster.least_workers)
    if cluster.least_workers < cluster.most_workers:
        number += f" to {cluster.most_workers}"
    placed = f", placed {cluster.placement}" if cluster.placement.startswith("STRICT") else ""
    reader = f" and CPU {READER_CPUS:g} to read the pool" if config.stages > 1 else ""
    return f"the run asks for {number} × ({resources_text(worker)}){placed}{reader}"
