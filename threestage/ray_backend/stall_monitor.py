"""Report instead of waiting in silence: no room for workers, no worker of a stage, a worker that stands still.

It reports every `report_after_s` what is asked and what the cluster has. Waiting for workers ends when there has been no room for
them, and no node has come, for `start_timeout_s`; for predictors that are lost later, Ray waits without a limit.
"""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping

import ray
import ray.util

from threestage.errors import NoRoom, Warn
from threestage.ray_backend import ray_internals
from threestage.ray_backend.capacity import (
    are_placed,
    can_place,
    cluster_nodes,
    free_nodes,
    has_place_for_one,
    room_for_one,
    waiting_text,
    worker_takes,
)
from threestage.ray_backend.failures import alive_ids
from threestage.ray_backend.heartbeat import BEAT_SECONDS, WorkerStatus
from threestage.ray_settings import ClusterSettings

SILENCE_SECONDS = 10 * BEAT_SECONDS  # a worker that says nothing for so long is gone
LOOK_SECONDS = 1.0


# ---- How long it has waited


class _Wait:
    """How long it has been, and whether to say so: every `report_after_s`. `nodes`: of the cluster, when they were last looked
    at."""

    def __init__(self, cluster: ClusterSettings) -> None:
        self._every_s = float(cluster.report_after_s)
        self.nodes: frozenset[str] | None = None
        self.restart(time.monotonic())

    def restart(self, since: float) -> None:
        self._since = self._without_room_since = since
        self._next_s = self._every_s

    def room_comes(self) -> None:
        """Count anew for how long there is none."""
        self._without_room_since = time.monotonic()

    @property
    def seconds_without_room(self) -> float:
        return time.monotonic() - self._without_room_since

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._since

    def report_is_due(self) -> bool:
        """True once each time that it has passed."""
        due = self.seconds > self._next_s
        self._next_s += self._every_s if due else 0
        return due


# ---- While a stage trains


class StallMonitor:
    """With the workers of a stage: reports when none is there, and when one of them stands still.

    The clock runs while no heartbeat of a worker arrives: at the start, and when Ray has to start the group again.
    """

    def __init__(self, stage: str, cluster: ClusterSettings, warn: Warn) -> None:
        self._stage, self._cluster, self._warn = stage, cluster, warn
        self._alone = _Wait(cluster)
        self._named: set[tuple[int, int]] = set()

    def look(self, signs: Mapping[int, tuple[WorkerStatus, float]]) -> None:
        """Raises NoRoom after `start_timeout_s` without worker and room. `signs`: each with the seconds since it came."""
        newest = min((age for _, age in signs.values()), default=math.inf)
        if newest < SILENCE_SECONDS:
            self._alone.restart(time.monotonic() - newest)
            self._report_hung_worker([sign for sign, age in signs.values() if age - newest < SILENCE_SECONDS])
            return
        _report_or_end(self._alone, self._stage, self._cluster, self._cluster.least_workers, self._warn)

    def _report_hung_worker(self, signs: list[WorkerStatus]) -> None:
        """The worker that the others wait for is the one that came to where it is last."""
        stalled = [sign for sign in signs if sign.seconds > self._cluster.hang_after_s]
        if len(stalled) < len(signs):
            return
        late = min(stalled, key=lambda sign: (sign.step, sign.phase == "step", -sign.seconds))
        if (late.rank, late.step) not in self._named:
            self._named.add((late.rank, late.step))
            self._warn(
                f"{self._stage} has stood still for {late.seconds:.0f} s: rank {late.rank} of {late.world_size} on {late.node} "
                f"is at step {late.step}, {late.phase}; every worker has written its stacks to its log"
            )


class Membership:
    """The nodes of the cluster while a stage trains: when one will go, or has come to an elastic group, a checkpoint is due.

    An elastic group also starts again sooner when Ray is told of the change.
    """

    def __init__(self, cluster: ClusterSettings) -> None:
        self._elastic = cluster.least_workers < cluster.most_workers
        self._alive, self._draining = alive_ids(), ray_internals.draining_nodes() or frozenset()

    def look(self) -> bool:
        """Whether the workers should save a checkpoint: Ray may soon start the group anew."""
        alive, draining = alive_ids(), ray_internals.draining_nodes() or self._draining
        joined, leaves = not alive <= self._alive, not draining <= self._draining
        if alive != self._alive:
            ray_internals.refresh_reservations()
        self._alive, self._draining = alive, draining
        return leaves or (joined and self._elastic)


# ---- While the pool or images are predicted


def await_resources(what: str, cluster: ClusterSettings, warn: Warn) -> None:
    """Until the cluster has room for one predictor: asks for it meanwhile, so that an autoscaler brings a node. Reports and
    raises like StallMonitor."""
    if room_for_one(cluster):
        return
    group = ray.util.placement_group([worker_takes(cluster)])
    try:
        wait = _Wait(cluster)
        while not group.wait(1):
            _report_or_end(wait, what, cluster, 1, warn)
    finally:
        ray.util.remove_placement_group(group)


@contextlib.contextmanager
def warn_if_stalled(what: str, cluster: ClusterSettings, warn: Warn) -> Iterator[Callable[[], None]]:
    """Reports that no node could hold a predictor, as long as nothing is heard: what is yielded is to be called then.

    Ray waits for nodes for ever, and asks an autoscaler for them.
    """
    heard, ended = threading.Event(), threading.Event()

    def watch() -> None:
        wait = _Wait(cluster)
        while not ended.wait(LOOK_SECONDS):
            if heard.is_set():
                heard.clear()
                wait.restart(time.monotonic())
            if wait.report_is_due():
                with contextlib.suppress(Exception):  # the connection is going
                    if not has_place_for_one(cluster):
                        warn(_state(what, cluster, wait.seconds, 1))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield heard.set
    finally:
        ended.set()
        thread.join()


def _report_or_end(wait: _Wait, what: str, cluster: ClusterSettings, workers: int, warn: Warn) -> None:
    wait.nodes = alive_ids() if wait.nodes is None else wait.nodes
    if wait.seconds_without_room > cluster.start_timeout_s:
        if not _room_comes(wait, cluster, workers):
            raise NoRoom(_state(what, cluster, wait.seconds, workers), "ray/no-room")
        wait.room_comes()
    if wait.report_is_due():
        warn(_state(what, cluster, wait.seconds, workers))


def _room_comes(wait: _Wait, cluster: ClusterSettings, workers: int) -> bool:
    """Whether a node has come since the last look, or there is room: then the workers are starting, however long that takes."""
    before, wait.nodes = wait.nodes, alive_ids()
    came = before is not None and not wait.nodes <= before
    free = free_nodes()
    return came or are_placed(cluster) or can_place(free, 1, worker_takes(cluster), workers, cluster.placement, [])


def _state(what: str, cluster: ClusterSettings, waited: float, workers: int) -> str:
    return waiting_text(what, cluster, waited, workers, cluster_nodes(), free_nodes(), are_placed(cluster))
