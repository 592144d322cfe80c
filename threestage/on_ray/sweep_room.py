"""Whether a cluster has room for the trials that a sweep runs at once, and how long a step takes on its devices."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions
import torch

from threestage.allocator import keep_freed_memory
from threestage.config import Config, StageName
from threestage.data import storage
from threestage.data.records import load_manifest
from threestage.errors import InputError, StageFailure
from threestage.on_ray.causes import cause_of, code_of, first_line
from threestage.on_ray.room import (
    READER_CPUS,
    Growth,
    largest,
    number_of,
    placed,
    text_of,
    with_accelerator,
    worker_takes,
)
from threestage.sweeps.space import Space
from threestage.sweeps.step_time import StepTime, measure_step
from threestage.training.worker import default_device

TRIAL_CPUS = 0.1  # of the process that leads a trial; Ray Tune refuses 0
MEASURING_SECONDS = 600.0  # in which a step is measured, once there is room; torch.compile takes minutes
ASK_FOR_LESS = "ask for less with cluster.cpus_per_worker and cluster.gpus_per_worker, or add nodes"

Warn = Callable[[str], None]


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
    problem = f"at_once={space.at_once}: {room.asked()}; {there}"
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
        at_once, workers = at_once or self.space.at_once, workers or self.config.cluster.least_workers
        predictors = predictors or self.config.cluster.predictors or workers
        worker, placement = worker_takes(self.config.cluster), self.config.cluster.placement
        lead, reader = {"CPU": TRIAL_CPUS}, {"CPU": READER_CPUS}
        trains = placed(self.nodes, at_once, worker, workers, placement, [reader, lead] if self._reads else [lead])
        predicts = not self._predicts or placed(self.nodes, at_once, worker, predictors, "PACK", [lead])
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
        if at_once := largest(self.space.at_once, lambda number: self.fits(at_once=number)):
            yield f"at_once={at_once} in the space"
        if fewer := largest(cluster.least_workers, lambda number: self.fits(workers=number)):
            yield f"cluster.workers={fewer}"
        if self._predicts and (less := largest(predictors, lambda number: self.fits(predictors=number))):
            yield f"cluster.predictors={less}"
        if not (at_once or fewer):
            alone = largest(cluster.least_workers, lambda number: self.fits(at_once=1, workers=number))
            if alone:
                yield f"at_once=1 in the space with cluster.workers={alone}"

    def asked(self) -> str:
        cluster = self.config.cluster
        placed = f", placed {cluster.placement}" if cluster.placement.startswith("STRICT") else ""
        reader = f" and CPU {READER_CPUS:g} to read the pool" if self._reads else ""
        many = self._predicts and (cluster.predictors or 0) > cluster.least_workers
        later = f", later {cluster.predictors} predictors" if many else ""
        one = f"{cluster.least_workers} × ({text_of(worker_takes(cluster))}){placed}{later}"
        return f"each trial needs {one}{reader} and CPU {TRIAL_CPUS:g} to lead it"

    def there(self) -> str:
        names = list(worker_takes(self.config.cluster))
        total = {name: sum(node.get(name, 0) for node in self.nodes) for name in names}
        most = {name: max((node.get(name, 0) for node in self.nodes), default=0) for name in names}
        return text_of(total) + (f" (one node at most {text_of(most)})" if len(self.nodes) > 1 else "")


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
        device = text_of(worker_takes(cluster))
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
    keep_freed_memory()
    config = Config.model_validate(settings)
    storage.configure(config.storage)
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
    return measure_step(config, stage, load_manifest(config.data.root, manifest_version), default_device())
