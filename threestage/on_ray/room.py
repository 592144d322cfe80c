"""What a cluster's nodes have, what an autoscaler may add, and whether workers have a place there."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray._private.state import state as cluster_state
from ray.experimental.internal_kv import _internal_kv_get

from threestage.on_ray.nodes import alive_nodes
from threestage.on_ray.settings import ClusterSettings

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


def placed(
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


def text_of(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {amount:g}" for name, amount in resources.items())


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
    asked = f"{workers} × ({text_of(cluster.worker_resources)}"
    asked += f", accelerator {cluster.accelerator}" if cluster.accelerator else ""
    asked += f", placed {placement})" if placement != "PACK" else ")"
    total, left = (
        {name: sum(node.get(name, 0) for node in some) for name in cluster.worker_resources} for some in (nodes, free)
    )
    has = ", ".join(f"{name} {total[name]:g} ({left[name]:g} free)" for name in total)
    there = f"the cluster has {has} on {number_of(len(nodes), 'node')}"
    if placed(free, 1, worker, workers, placement, []):
        return (
            f"{what}: starting for {waited:.0f} s: there is room for {asked}, {there}; on a busy machine this takes a while "
            "(the limit is cluster.start_timeout_s)"
        )
    if placed(nodes, 1, worker, workers, placement, []):
        return (
            f"{what}: waiting for {waited:.0f} s for {asked}; {there}, in use by other work or by workers that are starting: "
            f"wait until it is free, or {MORE_ROOM}"
        )
    return f"{what}: waiting for {waited:.0f} s for {asked}; {there}: {MORE_ROOM}"


def cluster_nodes() -> list[Resources]:
    """Total resources of each node that is alive."""
    return [dict(node["Resources"]) for node in alive_nodes()]


def free_nodes() -> list[Resources]:
    """Free resources of each node that is alive."""
    free = cluster_state.available_resources_per_node()
    return [dict(free.get(node["NodeID"], {})) for node in alive_nodes()]


def has_place_for_one(cluster: ClusterSettings) -> bool:
    """Whether a node could hold a worker."""
    return any(placed([node], 1, worker_takes(cluster), 1, "PACK", []) for node in cluster_nodes())


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
