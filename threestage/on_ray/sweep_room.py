"""Whether a cluster has room for the trials that a sweep runs at once, and how long a step takes on its devices."""

import json
import math
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

from threestage.allocator import keep_freed_memory
from threestage.config import Config, StageName
from threestage.data import storage
from threestage.data.records import load_manifest
from threestage.errors import InputError, StageFailure
from threestage.on_ray.settings import ClusterSettings
from threestage.sweeps.space import Space
from threestage.sweeps.step_time import StepTime, measure_step
from threestage.training.worker import default_device

TRIAL_CPUS = 0.1  # of the process that leads a trial; Ray Tune refuses 0
READER_CPUS = 1.0  # of the task that reads the pool while stage 2 or 3 trains
ACCELERATOR_SHARE = 0.001  # what Ray takes of a node's accelerator_type for each task that asks for it
ROUNDING = 1e-6
MEASURING_SECONDS = 600.0  # in which a step is measured, once there is room; torch.compile takes minutes
NODE_GROUP = "ray.io/node-group"  # label of nodes that an autoscaler or a launcher has started
ASK_FOR_LESS = "ask for less with cluster.cpus_per_worker and cluster.gpus_per_worker, or add nodes"

Resources = dict[str, float]
Warn = Callable[[str], None]


@dataclass(frozen=True)
class Growth:
    """What an autoscaler may add: `nodes` that it tells of; `untold`: it is there and does not tell how far it goes."""

    nodes: tuple[Resources, ...] = ()
    untold: bool = False


def refuse_impossible(
    space: Space, config: Config, nodes: Sequence[Mapping[str, float]], growth: Growth = Growth(), warn: Warn = print
) -> None:
    """Raises InputError, with the numbers that do fit, when the trials that run at once would never all have room.

    config: of a trial. nodes: total resources of each (`cluster_nodes`). Where an autoscaler does not tell its limits, it
    warns instead.
    """
    room = _Room(space, config, (*nodes, *(_with_accelerator(node, config.cluster) for node in growth.nodes)))
    if room.fits():
        return
    coming = f" (and {len(growth.nodes)} that may come)" if growth.nodes else ""
    problem = f"at_once={space.at_once}: {room.asked()}; the cluster has {room.there()} on {_number(len(nodes), 'node')}{coming}"
    if not growth.untold:
        raise InputError(f"{problem}: {room.mend()}")
    warn(
        f"{problem} and an autoscaler whose limits are not known: trials wait for nodes; should none come, {room.mend()}"
    )


def _with_accelerator(node: Resources, cluster: ClusterSettings) -> Resources:
    """A node to come: of which type its GPUs will be is not told."""
    return node | {f"accelerator_type:{cluster.accelerator}": 1.0} if "GPU" in node else node


@dataclass(frozen=True)
class _Room:
    """What a sweep asks of nodes, and whether they have it. The numbers that are tried stand in for the sweep's own."""

    space: Space
    config: Config
    nodes: tuple[Mapping[str, float], ...]

    def fits(self, at_once: int | None = None, workers: int | None = None, predictors: int | None = None) -> bool:
        """Whether all trials have room while they train, and while they predict."""
        at_once, workers = at_once or self.space.at_once, workers or self.config.cluster.least_workers
        predictors = predictors or self.config.cluster.predictors or workers
        worker, placement = _worker(self.config.cluster), self.config.cluster.placement
        lead, reader = {"CPU": TRIAL_CPUS}, {"CPU": READER_CPUS}
        trains = _placed(self.nodes, at_once, worker, workers, placement, [reader, lead] if self._reads else [lead])
        predicts = not self._predicts or _placed(self.nodes, at_once, worker, predictors, "PACK", [lead])
        return trains and predicts

    @property
    def _reads(self) -> bool:
        return self.space.last_stage > 1

    @property
    def _predicts(self) -> bool:
        """Of the last stage, trials predict nothing."""
        return len(self.space.stages) > 1

    def mend(self) -> str:
        return f"set {' or '.join(found)}, or add nodes" if (found := list(self._mends())) else ASK_FOR_LESS

    def _mends(self) -> Iterator[str]:
        """The largest numbers that have room: one of them with the others as they are, else workers of a trial alone."""
        cluster, predictors = self.config.cluster, self.config.cluster.predictors or 0
        if at_once := _largest(self.space.at_once, lambda number: self.fits(at_once=number)):
            yield f"at_once={at_once} in the space"
        if fewer := _largest(cluster.least_workers, lambda number: self.fits(workers=number)):
            yield f"cluster.workers={fewer}"
        if self._predicts and (less := _largest(predictors, lambda number: self.fits(predictors=number))):
            yield f"cluster.predictors={less}"
        if not (at_once or fewer):
            alone = _largest(cluster.least_workers, lambda number: self.fits(at_once=1, workers=number))
            if alone:
                yield f"at_once=1 in the space with cluster.workers={alone}"

    def asked(self) -> str:
        cluster = self.config.cluster
        placed = f", placed {cluster.placement}" if cluster.placement.startswith("STRICT") else ""
        reader = f" and CPU {READER_CPUS:g} to read the pool" if self._reads else ""
        many = self._predicts and (cluster.predictors or 0) > cluster.least_workers
        later = f", later {cluster.predictors} predictors" if many else ""
        one = f"{cluster.least_workers} × ({_text(_worker(cluster))}){placed}{later}"
        return f"each trial needs {one}{reader} and CPU {TRIAL_CPUS:g} to lead it"

    def there(self) -> str:
        names = list(_worker(self.config.cluster))
        total = {name: sum(node.get(name, 0) for node in self.nodes) for name in names}
        most = {name: max((node.get(name, 0) for node in self.nodes), default=0) for name in names}
        return _text(total) + (f" (one node at most {_text(most)})" if len(self.nodes) > 1 else "")


def _largest(too_many: int, fits: Callable[[int], bool]) -> int:
    """The largest number below `too_many` that fits, 0 for none; what fits with more fits with fewer."""
    low, high = 0, too_many
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _worker(cluster: ClusterSettings) -> Resources:
    """What a worker takes: of a GPU that some share, as large a part as can be given to that many."""
    asked = dict(cluster.worker_resources)
    if 0 < asked.get("GPU", 0) < 1:
        asked["GPU"] = 1 / math.floor(1 / asked["GPU"] + ROUNDING)
    if cluster.accelerator is not None:
        asked[f"accelerator_type:{cluster.accelerator}"] = ACCELERATOR_SHARE
    return asked


def _placed(
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


def _number(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)


def _text(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {amount:g}" for name, amount in resources.items())


def cluster_nodes() -> list[Resources]:
    """Total resources of each node that is alive."""
    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def cluster_growth(at_most: int) -> Growth:
    """What may come beside `cluster_nodes`; of a group without a limit, `at_most` nodes.

    Some autoscalers write their groups down where Ray Train and Ray Data look for them too. Ray's own does not (2.60), but
    writes the report that `ray status` shows, in which the nodes of a cluster without autoscaler are called node_<id>;
    its second version writes none, and its nodes carry the name of their group.
    """
    alive = [node for node in ray.nodes() if node["Alive"]]
    groups = [node.get("Labels", {}).get(NODE_GROUP, "") for node in alive]
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
        what = f"{stage}: a step is to be measured on {_text(_worker(cluster))}; waiting for {waited:.0f} s for room or its end"
        if waited > cluster.start_timeout_s + MEASURING_SECONDS:
            ray.cancel(result, force=True)
            raise StageFailure(f"{what}: is the cluster busy? Try again, or ask for less with cluster.cpus_per_worker")
        warn(what)
    try:
        return ray.get(result)
    except ray.exceptions.RayError as error:
        cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
        if isinstance(cause, InputError):
            raise cause from error
        reason = (str(cause) or type(cause).__name__).splitlines()[0]
        raise StageFailure(f"{stage}: no step could be trained to measure it: {reason}") from error


def _measure(settings: dict[str, Any], stage: StageName, manifest_version: int) -> StepTime:
    """On a worker's process: threads and memory as worker.py has them."""
    keep_freed_memory()
    config = Config.model_validate(settings)
    storage.configure(config.storage)
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
    return measure_step(config, stage, load_manifest(config.data.root, manifest_version), default_device())
