"""Heartbeats of a stage's workers: rows of metrics, warnings and failures for the driver, and where each worker is.

A worker that stands still writes its stacks to its log. Also places actors on the driver's own node.
"""

import contextlib
import faulthandler
import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from threestage.errors import StageFailure
from threestage.ray_backend.gauges import SECONDS_IN_PHASE, STEP, UNSAVED_SECONDS, StageGauges

if TYPE_CHECKING:  # the monitor's process needs no torch
    from threestage.run.stages import StageTask

# ---- What the driver learns

BEAT_SECONDS = 2.0


class WorkerStatus(NamedTuple):
    """Of one worker: where it is, and for how many seconds it has been there."""

    rank: int
    world_size: int
    node: str
    step: int
    phase: str
    seconds: float


class MonitorUpdate(NamedTuple):
    """What has come since the last time, and the latest sign of each worker of the group, with the seconds since it came."""

    rows: list[dict[str, float]]
    warnings: list[str]
    failure: StageFailure | None
    signs: dict[int, tuple[WorkerStatus, float]]


# ---- Beside the driver: the monitor of a stage


class _Monitor:
    def __init__(self) -> None:
        self._rows: list[dict[str, float]] = []
        self._warnings: list[str] = []
        self._failure: StageFailure | None = None
        self._signs: dict[int, tuple[WorkerStatus, float]] = {}
        self._checkpoint_requests = self._requests_met = self._groups = 0
        self._controller: Any = None

    def join(self, stage: str, rank: int, world_size: int) -> bool:
        """A worker begins; whether it may."""
        self._groups += rank == 0
        if rank == 0 and self._groups > 1 and self._failure is None:
            self._warnings.append(f"{stage}: its workers were started again, {world_size} of them")
        return self._failure is None

    def row(self, row: dict[str, float]) -> None:
        self._rows.append(row)

    def warn(self, text: str) -> None:
        self._warnings.append(text)

    def fail(self, failure: StageFailure) -> None:
        self._failure = self._failure or failure

    def sign(self, sign: WorkerStatus) -> int:
        """Returns how many notices the driver has given."""
        self._signs[sign.rank] = (sign, time.monotonic())
        return self._checkpoint_requests

    def introduce(self, controller: Any) -> None:
        self._controller = controller

    def controller(self) -> Any:
        """Ray Train's controller, or None before it has started."""
        return self._controller

    def request_checkpoint(self) -> int:
        """The number of requests so far."""
        self._checkpoint_requests += 1
        return self._checkpoint_requests

    def checkpoint_saved(self, requests: int) -> None:
        """A checkpoint is written that so many requests have asked for."""
        self._requests_met = requests

    def requests_met(self) -> int:
        return self._requests_met

    def news(self) -> MonitorUpdate:
        now = time.monotonic()  # of this process: the driver gets ages, since no two clocks are compared
        ages = {rank: (sign, now - arrived) for rank, (sign, arrived) in self._signs.items()}
        news = MonitorUpdate(self._rows, self._warnings, self._failure, ages)
        self._rows, self._warnings = [], []
        return news


def start_monitor() -> Any:
    """Of one stage, on the driver's own node."""
    return driver_actor(_Monitor)


# ---- In a worker: the thread that reports to the monitor


class Heartbeat:
    """A context in a worker: a thread that tells the monitor every BEAT_SECONDS where the loop is, and the cluster's
    metrics what it measured.

    When it has been at one place for `hang_after_s`, the stacks of all its threads go to the worker's log, under a line
    that names the rank, once for each place.
    """

    def __init__(self, monitor: Any, task: "StageTask", rank: int, world_size: int) -> None:
        config = task.settings()
        self._monitor, self._stage, self._rank, self._world_size = monitor, task.stage, rank, world_size
        self._hang_after_s = config.cluster.hang_after_s
        self._gauges = StageGauges({"run": config.name, "stage": task.stage, "rank": str(rank)})
        self._measured: dict[str, float] = {}
        self.checkpoint_requests = 0  # of the driver
        self.unsaved_seconds: Callable[[], float] | None = None  # of the worker that saves checkpoints
        self._node = ray.util.get_node_ip_address()
        self._place: tuple[int, str, float] = (0, "start", time.monotonic())
        self._dumped: tuple[int, str, float] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def set_phase(self, step: int, what: str) -> None:
        self._place = (step, what, time.monotonic())

    def measured(self, values: Mapping[str, float]) -> None:
        """The worker's figures since its last row, for the cluster's metrics."""
        self._measured = dict(values)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()

    def _beat(self) -> None:
        while True:
            place = self._place
            step, what, since = place
            seconds = time.monotonic() - since
            self._gauges.set({**self._measured, **self._progress(step, seconds)})
            sign = WorkerStatus(self._rank, self._world_size, self._node, step, what, seconds)
            with contextlib.suppress(ray.exceptions.RayError):  # the driver is gone, and this process soon too
                self.checkpoint_requests = ray.get(self._monitor.sign.remote(sign), timeout=BEAT_SECONDS)
            if seconds > self._hang_after_s and place != self._dumped:
                self._dumped = place
                sys.stderr.write(
                    f"threestage: {self._stage} rank {self._rank} of {self._world_size} on {self._node} has stood still for "
                    f"{seconds:.0f} s: step {step}, {what}; its stacks:\n"
                )
                sys.stderr.flush()
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
            if self._stop.wait(BEAT_SECONDS):
                return

    def _progress(self, step: int, seconds: float) -> dict[str, float]:
        """What alerts look at."""
        progress = {STEP: float(step), SECONDS_IN_PHASE: seconds}
        return progress if self.unsaved_seconds is None else progress | {UNSAVED_SECONDS: self.unsaved_seconds()}


# ---- Actors on the driver's node


def driver_actor(kind: type) -> Any:
    """An actor of a class, on the driver's own node; when its process is lost, another begins with nothing."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "scheduling_strategy": here, "max_restarts": -1, "max_task_retries": -1}
    return ray.remote(kind).options(**options).remote()
