"""Waiting for workers: reports at their times, and an end, by a clock that the test sets."""

import time

import pytest
import ray
import ray.util

from tests.refusals import refused
from tests.waiting import wait_for
from threestage.errors import NoRoom
from threestage.ray_backend import ray_internals, stall_monitor
from threestage.ray_backend.capacity import waiting_text
from threestage.ray_backend.heartbeat import WorkerStatus
from threestage.ray_backend.stall_monitor import Membership, StallMonitor
from threestage.ray_settings import ClusterSettings

CLUSTER = ClusterSettings(workers=2, report_after_s=10, start_timeout_s=35, hang_after_s=100)


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stall_monitor, "time", clock)
    for name in ("cluster_nodes", "free_nodes"):
        monkeypatch.setattr(stall_monitor, name, lambda: [{"CPU": 1.0}])
    monkeypatch.setattr(stall_monitor, "alive_ids", lambda: frozenset({"a"}))
    monkeypatch.setattr(stall_monitor, "are_placed", lambda cluster: False)
    return clock


def test_no_worker_is_reported_again_and_again_and_ends(clock: Clock) -> None:
    said: list[str] = []
    waiting = StallMonitor("stage1", CLUSTER, said.append)
    for second in range(35):
        clock.now = 1000.5 + second
        waiting.look({})
    assert [line.split(" s for ")[0] for line in said] == [f"stage1: waiting for {s}" for s in (10, 20, 30)]
    assert "2 × (CPU 1); the cluster has CPU 1 (1 free) on 1 node: add nodes" in said[0]
    clock.now = 1035.5
    with refused("ray/no-room", "stage1", "36 s for 2", error=NoRoom):
        waiting.look({})


@pytest.mark.parametrize("placed", [True, False])
def test_a_slow_start_is_no_lack_of_room(clock: Clock, monkeypatch: pytest.MonkeyPatch, placed: bool) -> None:
    """An image is pulled, or a node is busy: the room is there, free or given to these workers. Once it is lost it ends."""
    said, free = list[str](), [{"CPU": 1.0 if placed else 2.0}]
    monkeypatch.setattr(stall_monitor, "cluster_nodes", lambda: [{"CPU": 2.0}])
    monkeypatch.setattr(stall_monitor, "free_nodes", lambda: free)
    monkeypatch.setattr(stall_monitor, "are_placed", lambda cluster: placed)
    waiting = StallMonitor("stage1", CLUSTER, said.append)
    for second in range(200):
        clock.now = 1000.5 + second
        waiting.look({})
    assert len(said) == 19 and all("starting" in line for line in said)
    free[0]["CPU"], placed = 0.0, False
    monkeypatch.setattr(stall_monitor, "are_placed", lambda cluster: False)
    clock.now += 36
    with refused("ray/no-room", "stage1", "236 s for 2", error=NoRoom):
        waiting.look({})


def test_while_nodes_come_it_waits(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """An autoscaler that answers, with too little so far; after the last node it has `start_timeout_s` for the next."""
    waiting, nodes = StallMonitor("stage1", CLUSTER, lambda text: None), {"a"}
    monkeypatch.setattr(stall_monitor, "alive_ids", lambda: frozenset(nodes))
    for second in range(106):
        nodes |= {"b"} if second == 30 else {"c"} if second == 60 else set()
        clock.now = 1000.5 + second
        waiting.look({})
    clock.now += 2
    with refused("ray/no-room", "for 2", error=NoRoom):
        waiting.look({})


@pytest.mark.parametrize(
    ("workers", "free", "expected"),
    [
        (1, [4.0], "starting for 31 s: there is room for 1 × (CPU 1), the cluster has CPU 5 (4 free) on 1 node"),
        (4, [1.0], "waiting for 31 s for 4 × (CPU 1); the cluster has CPU 5 (1 free) on 1 node, in use"),
        (6, [5.0], "waiting for 31 s for 6 × (CPU 1); the cluster has CPU 5 (5 free) on 1 node: add nodes"),
        (2, [0.5, 0.5, 0.9], "waiting for 31 s for 2 × (CPU 1); the cluster has CPU 15 (1.9 free) on 3 nodes, in use"),
    ],
)
def test_a_report_says_whether_room_is_there_in_use_or_missing(workers: int, free: list[float], expected: str) -> None:
    """On a busy machine, workers take long to start in a room that is theirs: no node is missing then."""
    text = waiting_text("stage1", CLUSTER, 31, workers, [{"CPU": 5.0} for _ in free], [{"CPU": cpus} for cpus in free])
    assert text.startswith(f"stage1: {expected}")
    assert ("add nodes" in text) == text.startswith("stage1: waiting")


def test_the_clock_begins_anew_when_workers_were_there(clock: Clock) -> None:
    said: list[str] = []
    waiting = StallMonitor("stage1", CLUSTER, said.append)
    clock.now = 1030
    waiting.look({0: (sign(0), 0.0)})
    clock.now = 1039.5
    waiting.look({0: (sign(0), 9.5)})
    assert said == []
    clock.now = 1030 + stall_monitor.SILENCE_SECONDS + 1
    waiting.look({0: (sign(0), stall_monitor.SILENCE_SECONDS + 1)})
    assert len(said) == 1


def test_the_worker_that_the_others_wait_for_is_named_once(clock: Clock) -> None:
    said: list[str] = []
    waiting = StallMonitor("stage1", CLUSTER, said.append)
    for _ in range(2):
        waiting.look({0: (sign(0, step=7, seconds=120), 0.0), 1: (sign(1, step=6, seconds=130), 0.0)})
    assert len(said) == 1 and "rank 1 of 2" in said[0] and "step 6" in said[0]
    waiting.look({0: (sign(0, step=7, seconds=120), 0.0), 1: (sign(1, step=8, seconds=2), 0.0)})
    assert len(said) == 1, "one that works is not waited for"


class Nodes:
    """Stands in for what Ray knows of its nodes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.alive, self.draining, self.refreshed = {"a", "b"}, frozenset[str](), 0
        monkeypatch.setattr(stall_monitor, "alive_ids", lambda: frozenset(self.alive))
        monkeypatch.setattr(ray_internals, "draining_nodes", lambda: self.draining)
        monkeypatch.setattr(ray_internals, "refresh_reservations", self.refresh)

    def refresh(self) -> None:
        self.refreshed += 1


@pytest.mark.parametrize("elastic", [True, False])
def test_a_checkpoint_is_due_when_a_node_will_go_or_joins_an_elastic_group(
    elastic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = Nodes(monkeypatch)
    membership = Membership(ClusterSettings(workers=(1, 3) if elastic else 2))
    assert not membership.look()
    nodes.draining = frozenset({"a"})
    assert membership.look() and not membership.look(), "once for each node"
    nodes.alive.remove("a")
    assert not membership.look() and nodes.refreshed == 1, "it is too late for a checkpoint"
    nodes.alive.add("c")
    assert membership.look() == elastic and nodes.refreshed == 2


class Group:
    """Stands in for a placement group that is granted after so many seconds of the clock."""

    def __init__(self, clock: Clock, granted: float) -> None:
        self._clock, self._granted = clock, clock.now + granted
        self.asked: list[dict[str, float]] = []
        self.removed = 0

    def make(self, bundles: list[dict[str, float]]) -> "Group":
        self.asked += bundles
        return self

    def wait(self, seconds: int) -> bool:
        self._clock.now += seconds
        return self._clock.now >= self._granted

    def remove(self, group: "Group") -> None:
        self.removed += 1


@pytest.mark.parametrize("seconds", [12, 99])
def test_a_predictor_is_asked_for_while_it_is_waited_for(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, seconds: int
) -> None:
    """Nothing else would tell an autoscaler to bring a node."""
    group, said = Group(clock, seconds), list[str]()
    monkeypatch.setattr(stall_monitor, "room_for_one", lambda cluster: False)
    monkeypatch.setattr(ray.util, "placement_group", group.make)
    monkeypatch.setattr(ray.util, "remove_placement_group", group.remove)
    cluster = CLUSTER.model_copy(update={"gpus_per_worker": 1, "accelerator": "A100"})
    if seconds == 12:
        stall_monitor.await_resources("pseudo-masks", cluster, said.append)
    else:
        with refused("ray/no-room", "pseudo-masks", "36 s for 1", error=NoRoom):
            stall_monitor.await_resources("pseudo-masks", cluster, said.append)
    assert group.asked == [{"CPU": 1.0, "GPU": 1.0, "accelerator_type:A100": 0.001}] and group.removed == 1
    assert len(said) == (1 if seconds == 12 else 3)


def test_predictors_that_nobody_hears_of_are_missed(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    place = [True]
    monkeypatch.setattr(stall_monitor, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(stall_monitor, "cluster_nodes", list)
    monkeypatch.setattr(stall_monitor, "free_nodes", list)
    monkeypatch.setattr(stall_monitor, "has_place_for_one", lambda cluster: place[0])
    with stall_monitor.warn_if_stalled("pseudo-masks", CLUSTER, said.append) as heard:
        clock.now += 11
        time.sleep(0.1)
        assert said == [], "a long file is no loss"
        place[0] = False
        clock.now += 11
        wait_for(lambda: len(said) == 1)
        assert said[0].startswith("pseudo-masks: waiting for 22 s for 1 ")
        heard()
        time.sleep(0.1)
        clock.now += 9
        time.sleep(0.1)
        assert len(said) == 1
        clock.now += 2
        wait_for(lambda: len(said) == 2)


def sign(rank: int, step: int = 1, seconds: float = 0.0) -> WorkerStatus:
    return WorkerStatus(rank=rank, world_size=2, node="here", step=step, phase="draw", seconds=seconds)
