"""Whether a cluster, or this machine, has room for a run: `threestage check`."""

import os
from collections.abc import Mapping, Sequence

import ray
import torch

from threestage.checks.lines import Found
from threestage.checks.steps import machine_bytes
from threestage.config import Config
from threestage.errors import InputError
from threestage.on_ray.room import (
    READER_CPUS,
    SPARE_CPUS,
    Growth,
    Resources,
    cluster_growth,
    cluster_nodes,
    largest,
    number_of,
    placed,
    text_of,
    with_accelerator,
    worker_takes,
)
from threestage.on_ray.settings import ClusterSettings

ASK_FOR_LESS = "ask for less with cluster.cpus_per_worker and cluster.gpus_per_worker"


def room_here(config: Config) -> Found:
    """On this machine, where the run will start Ray. Raises InputError when the workers could never all be placed."""
    cluster, cpus, gpus = config.cluster, os.cpu_count() or 1, torch.cuda.device_count()
    there = f"no cluster is named, so Ray will be started here: {number_of(cpus, 'CPU')}, {number_of(gpus, 'GPU')}"
    found = _room(config, [_this_machine(cluster)], Growth(), there, "name a cluster that has more (--address)")
    asked = cluster.most_workers * cluster.cpus_per_worker
    slow = f"{there}; cluster.workers={cluster.most_workers} × cluster.cpus_per_worker={cluster.cpus_per_worker:g} share them"
    return found._replace(doubt=found.doubt or (slow if asked > cpus else None))


def _this_machine(cluster: ClusterSettings) -> Resources:
    """What the Ray that a run starts here has: as many CPUs as it asks for."""
    asked = (cluster.most_workers + cluster.number_of_predictors) * cluster.cpus_per_worker
    node = {"CPU": max(os.cpu_count() or 1, asked + SPARE_CPUS), "memory": float(machine_bytes())}
    if gpus := torch.cuda.device_count():
        return with_accelerator({**node, "GPU": float(gpus)}, cluster)
    return node


def room_there(config: Config) -> Found:
    """On the cluster that this process is connected to. Raises InputError like `room_here`."""
    nodes = cluster_nodes()
    total, free = ray.cluster_resources(), ray.available_resources()
    names = [name for name in worker_takes(config.cluster) if not name.startswith("accelerator_type")]
    has = ", ".join(f"{name} {total.get(name, 0):g} ({free.get(name, 0):g} free)" for name in names)
    there = f"the cluster has {has} on {number_of(len(nodes), 'node')}"
    return _room(config, nodes, cluster_growth(config.cluster.most_workers + 1), there, "add nodes")


def _room(config: Config, nodes: Sequence[Mapping[str, float]], growth: Growth, there: str, more: str) -> Found:
    """nodes: total resources of each. more: how they could become more."""
    cluster, worker = config.cluster, worker_takes(config.cluster)
    all_nodes = (*nodes, *(with_accelerator(node, cluster) for node in growth.nodes))
    others = [{"CPU": READER_CPUS}] if config.stages > 1 else []
    asked = _asked(config, worker)

    def largest_beside(others: Sequence[Resources]) -> int:
        return largest(
            cluster.most_workers + 1, lambda number: placed(all_nodes, 1, worker, number, cluster.placement, others)
        )

    most = largest_beside(others)
    if most < cluster.least_workers:
        mend = f"{f'set cluster.workers={most}' if most else ASK_FOR_LESS}, or {more}"
        if not growth.untold:
            raise InputError(f"{asked}; {there}; {mend}", "ray/too-small")
        return Found(
            asked, f"{asked}; {there} and an autoscaler whose limits are not known: should no node come, {mend}"
        )
    coming = f" (and {number_of(len(growth.nodes), 'node')} that may come)" if growth.nodes else ""
    fewer = f"; it would begin with {number_of(most, 'worker')}" if most < cluster.most_workers else ""
    value = f"{asked}; {there}{coming}{fewer}"
    if (alone := largest_beside([])) > most:
        workers = f"[{cluster.least_workers},{most}]"
        return Found(
            value,
            f"{value}, but Ray begins with {alone}, which leaves no CPU to read the pool: set cluster.workers={workers}",
        )
    if not cluster.gpus_per_worker and any(node.get("GPU") for node in all_nodes):
        return Found(value, f"{value}; it has GPUs and the run uses none: set cluster.gpus_per_worker=1")
    return Found(value)


def _asked(config: Config, worker: Mapping[str, float]) -> str:
    cluster = config.cluster
    number = str(cluster.least_workers)
    if cluster.least_workers < cluster.most_workers:
        number += f" to {cluster.most_workers}"
    placed = f", placed {cluster.placement}" if cluster.placement.startswith("STRICT") else ""
    reader = f" and CPU {READER_CPUS:g} to read the pool" if config.stages > 1 else ""
    return f"the run asks for {number} × ({text_of(worker)}){placed}{reader}"
