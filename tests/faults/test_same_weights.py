"""A run on Ray that is killed again and again ends with the weights of one that nothing happens to, to the last bit."""

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.local import Cluster, local_cluster
from tests.conftest import tiny_config
from tests.faults import looking_on
from tests.faults.looking_on import Run, assert_published_once, node_with_worker, processes_of
from tests.faults.test_lost_parts import put_scenes
from threestage.config import Config
from threestage.data import storage
from threestage.training.checkpoint import Checkpoints, checkpoint_folder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800, func_only=True),
    pytest.mark.filterwarnings("default"),
]

KILLS = 10
EVERY = 15  # steps
STEPS = EVERY * (KILLS + 1)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with local_cluster(tmp_path_factory.mktemp("cluster"), 2, 8) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def data(cluster: Cluster, scenes: Path) -> str:
    return put_scenes(scenes, cluster)


def config_for(data: str, workers: int) -> Config:
    return tiny_config(
        Path("unused"), data={"root": data, "labelled": 16}, stages=2,
        cluster={"placement": "SPREAD", "workers": workers, "max_failures": -1},
        stage1={"steps": 20, "labelled_batch": 6},
        stage2={"steps": STEPS, "warm_start": True, "labelled_batch": 6, "unlabelled_batch": 6},
        training={"batch_scope": "global", "log_every": 1, "checkpoint_every": 4, "evaluate_every": STEPS},
    )  # fmt: skip


def weights(run: Run) -> list[bytes]:
    """Of the model, and of the student's last checkpoint with its optimiser."""
    folder = storage.join(run.out, "stage2")
    return [
        storage.read_bytes(uri) for uri in storage.list_files(storage.join(folder, "model")) if "safetensors" in uri
    ]


def losses(run: Run) -> dict[float, list[float]]:
    """Of stage 2, by step: a difference shows here first, and which kill came before it."""
    history = Checkpoints(checkpoint_folder(storage.join(run.out, "stage2"))).rows()
    return {row["step"]: [value for name, value in row.items() if name.endswith("_loss")] for row in history}


def kill(what: str, cluster: Cluster, run: Run) -> None:
    if what == "worker":
        os.kill(random.choice(processes_of(node_with_worker(cluster), "ray::RayTrainWorker")), signal.SIGKILL)
    elif what == "controller":
        os.kill(processes_of(cluster.head, "ray::TrainController")[0], signal.SIGKILL)
    elif what == "node":
        node_with_worker(cluster).kill()
        cluster.add_node()
    else:
        run.kill()


@pytest.mark.parametrize("workers", [2, 3])
def test_a_run_that_is_killed_at_random(
    workers: int, cluster: Cluster, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers, the controller, nodes and the driver, each some steps after the run trains again; with three workers the sums
    of gradients have an order."""
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(looking_on, "LIMIT_S", 1200)
    config, log = config_for(data, workers), tmp_path / "log"
    undisturbed = Run(config, f"s3://bucket/undisturbed{workers}", cluster.environment, log)
    undisturbed.wait_for_end()

    seed = int(os.environ.get("KILL_SEED", "0"))
    print(f"\nKILL_SEED={seed}")
    draws = random.Random(seed + workers)
    killed = Run(config, f"s3://bucket/killed{workers}", cluster.environment, log)
    for number in range(1, KILLS + 1):
        killed.wait_for_step("stage2", EVERY * (number - 1) + draws.randrange(3, EVERY))
        time.sleep(draws.random())
        what = draws.choice(["worker", "worker", "controller", "node", "driver"])
        print(f"{what} killed after step {killed.rows('stage2')[-1]['row']['step']:.0f}")
        kill(what, cluster, killed)
        if what == "driver":
            killed = Run(config, killed.out, cluster.environment, log)
    killed.wait_for_end()
    assert_published_once(killed)
    was = losses(undisturbed)
    assert {step: (found, was[step]) for step, found in losses(killed).items() if found != was[step]} == {}
    assert weights(killed) == weights(undisturbed) != []
