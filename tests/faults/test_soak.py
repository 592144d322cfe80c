"""A run on a cluster of several nodes with S3 for an hour, a checkpoint every few steps, something killed every few minutes:
neither memory nor open files grow, and SIGTERM ends it with a checkpoint.

SOAK_MINUTES=60 is the length (10 at least for a slope that means anything); SOAK_KILL_EVERY_S=240 the time between kills.
"""

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.local import Cluster, Node, local_cluster, members
from tests.conftest import tiny_config
from tests.faults import looking_on
from tests.faults.growth import GrowthWatch
from tests.faults.looking_on import Run, node_with_worker, processes_of
from tests.faults.test_lost_parts import put_scenes
from threestage.config import Config
from threestage.data import storage
from threestage.private_folder import private_folder

MINUTES = float(os.environ.get("SOAK_MINUTES", "60"))
KILL_EVERY_S = float(os.environ.get("SOAK_KILL_EVERY_S", "240"))
SAMPLE_EVERY_S = 10.0
START_S, END_S = 300.0, 120.0

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(60 * MINUTES + 1200, func_only=True),
    pytest.mark.filterwarnings("default"),
]

MIB_PER_HOUR = {"driver": 40.0, "worker": 150.0, "controller": 60.0, "head's Ray": 150.0}
"""A leak that ends a week's run in a container of some GiB is far above; noise of the allocator is below."""
FILES_PER_HOUR = {"driver": 10.0, "worker": 30.0, "controller": 15.0, "head's Ray": 60.0}
OBJECTS = 40  # of the run's folder, more at the end than after a quarter of the time


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with local_cluster(tmp_path_factory.mktemp("cluster"), 2, 8) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def data(cluster: Cluster, scenes: Path) -> str:
    return put_scenes(scenes, cluster)


def config_for(data: str) -> Config:
    """A stage 2 that does not end; a row every 10 steps, a checkpoint every 5."""
    return tiny_config(
        Path("unused"), data={"root": data, "labelled": 16}, stages=2,
        cluster={"placement": "SPREAD", "workers": 2, "max_failures": -1},
        stage1={"steps": 10, "labelled_batch": 4},
        stage2={"steps": 10_000_000, "warm_start": True, "labelled_batch": 4, "unlabelled_batch": 4},
        training={"batch_scope": "global", "log_every": 10, "checkpoint_every": 5, "evaluate_every": 500},
    )  # fmt: skip


def ray_of(node: Node) -> list[int]:
    """Ray's own processes that live as long as the node: its store of states and its raylet."""
    names = {pid: Path(f"/proc/{pid}/comm") for pid in members({node.pid})}
    found = []
    for pid, comm in names.items():
        try:
            if comm.read_text().strip() in ("gcs_server", "raylet"):
                found.append(pid)
        except OSError:
            continue
    return found


def look(watch: GrowthWatch, cluster: Cluster, run: Run) -> None:
    nodes = [node for node in [cluster.head, *cluster.nodes] if node.alive()]
    watch.look("driver", [run.process.pid])
    watch.look("head's Ray", ray_of(cluster.head))
    watch.look("controller", processes_of(cluster.head, "ray::TrainController"))
    watch.look("worker", [pid for node in nodes for pid in processes_of(node, "ray::RayTrainWorker")])


def kill_something(number: int, cluster: Cluster, draws: random.Random) -> str:
    """Every third time a node, which is replaced; else a worker."""
    node = node_with_worker(cluster)
    if number % 3 == 2:
        node.kill()
        cluster.add_node()
        return "node"
    os.kill(draws.choice(processes_of(node, "ray::RayTrainWorker")), signal.SIGKILL)
    return "worker"


def last_step(run: Run) -> float:
    rows = run.rows("stage2")
    return float(rows[-1]["row"]["step"]) if rows else 0.0


def log_of_end(run: Run) -> str:
    """What the driver said last; its exit code is that of the tests' driver."""
    time.sleep(1)  # its last line is read in a thread
    return str(run.said[-1].get("error"))


def test_a_run_is_left_alone_for_an_hour(
    cluster: Cluster, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(looking_on, "LIMIT_S", START_S)
    draws = random.Random(int(os.environ.get("KILL_SEED", "0")))
    log, watch = tmp_path / "log", GrowthWatch()
    run = Run(config_for(data), "s3://bucket/soak", cluster.environment, log)
    run.wait_for_step("stage2", 10)
    began, kills, objects = time.monotonic(), 0, 0
    next_kill, reached, heard = KILL_EVERY_S, last_step(run), began
    while (elapsed := time.monotonic() - began) < 60 * MINUTES:
        assert run.process.poll() is None, f"it ended: {run.said[-3:]}\n{log.read_text()[-3000:]}"
        if (step := last_step(run)) != reached:
            reached, heard = step, time.monotonic()
        assert time.monotonic() - heard < START_S, f"no row for {START_S:g} s after step {reached:g}: {run.said[-3:]}"
        look(watch, cluster, run)
        if objects == 0 and elapsed > 15 * MINUTES:
            objects = len(storage.list_files(run.out))
        if elapsed > next_kill and time.monotonic() - heard < 3 * SAMPLE_EVERY_S:  # not while it starts again
            what = kill_something(kills, cluster, draws)
            kills, next_kill = kills + 1, elapsed + KILL_EVERY_S
            print(f"\n{elapsed / 60:.0f} min, step {reached:.0f}: a {what} is killed")
        time.sleep(SAMPLE_EVERY_S)

    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(END_S) == 1 and "stage/stopped" in log_of_end(run), run.said[-1:]
    assert not storage.exists(f"{run.out}/lease.json")
    found, left = watch.growth(), len(storage.list_files(run.out))
    print(f"\n{MINUTES:g} min, {kills} kills, step {reached:.0f}; objects {objects} after a quarter, {left} at the end")
    for kind, growth in found.items():
        print(
            f"{kind}: {growth.processes} processes, {growth.hours:.2f} h, {growth.mib_per_hour:+.1f} MiB/h of "
            f"{growth.most_mib:.0f}, {growth.files_per_hour:+.1f} open files/h of {growth.most_files}"
        )
    assert "driver" in found and "worker" in found and (kills > 0 or 60 * MINUTES < KILL_EVERY_S)
    assert left - objects <= OBJECTS, "old checkpoints and working files are removed"
    assert {kind: g.mib_per_hour for kind, g in found.items() if g.mib_per_hour > MIB_PER_HOUR[kind]} == {}
    assert {kind: g.files_per_hour for kind, g in found.items() if g.files_per_hour > FILES_PER_HOUR[kind]} == {}
    assert [path for path in (private_folder() / "tables").glob("*.arrow") if path.stat().st_size] == []
