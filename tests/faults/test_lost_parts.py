"""A run with two workers on a cluster of several nodes with S3, of which parts are lost for good or for a while.

Each test prints how long it took to train again (`pytest -s`); docs/reliability.md holds the measured times.
"""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cluster.local import Cluster, local_cluster, namespaces_allowed
from tests.ceph import ceph_gateway, needs_ceph
from tests.conftest import copy_to, tiny_config
from tests.faults.looking_on import Run, assert_published_once, node_with_worker, processes_of
from threestage.config import Config
from threestage.data import storage

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600, func_only=True),  # the first test also starts the cluster and waits for two runs
    pytest.mark.filterwarnings("default"),
]

ONE_PER_NODE = {"slot": 1.0}
GOAL_S = 30  # from the loss of a node to training again; where machines are slower, a start of the same run may take it
STEPS = {"stage1": 100, "stage2": 350}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Head and two nodes; a test that takes one away gives another back. SIGTERM leaves a node 8 s."""
    drain = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "8"}
    folder = tmp_path_factory.mktemp("cluster")
    with local_cluster(folder, 2, 8, node_environment=drain, resources=ONE_PER_NODE) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def data(cluster: Cluster, scenes: Path) -> str:
    return put_scenes(scenes, cluster)


def put_scenes(scenes: Path, cluster: Cluster) -> str:
    """Copy the scenes' data set to the cluster's S3; returns where."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cluster.environment.items():
            patch.setenv(name, value)
        copy_to("s3://bucket/data", scenes)
    return "s3://bucket/data"


def config_for(data: str, **cluster: Any) -> Config:
    """Two stages; a row every 10 steps, a checkpoint every 50; the same batches for any number of workers."""
    return tiny_config(
        Path("unused"), data={"root": data, "labelled": 16}, stages=2, cluster={"placement": "SPREAD", **cluster},
        optimiser={"learning_rate": 2e-3, "encoder_learning_rate": 2e-3, "schedule": "poly"},
        stage1={"steps": STEPS["stage1"], "labelled_batch": 4},
        stage2={"steps": STEPS["stage2"], "warm_start": True, "labelled_batch": 4, "unlabelled_batch": 4},
        training={"batch": "global", "log_every": 10, "checkpoint_every": 50, "evaluate_every": 500},
    )  # fmt: skip


class Undisturbed(NamedTuple):
    """Runs that nothing happens to: stage 2's mean IoU, the noise between two seeds, and how long a fault may cost."""

    mean_iou: float
    noise: float
    limit_s: float


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, data: str, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    scores, starts = [], []
    for seed in (0, 1):
        config = config_for(data, workers=2).model_copy(update={"seed": seed})
        run = Run(config, f"s3://bucket/undisturbed{seed}", cluster.environment, tmp_path_factory.mktemp("log") / "log")
        scores.append(run.wait_for_end()["stage2"]["mean_iou"])
        starts.append(run.start_s())
    print(f"\nundisturbed: {scores}, training {starts} s after the command")
    noise = max(0.05, 2 * abs(scores[0] - scores[1]))
    return Undisturbed(sum(scores) / 2, noise, max(GOAL_S, *starts))


class Case:
    """One disturbed run: started, waited for, judged."""

    def __init__(self, cluster: Cluster, config: Config, name: str, folder: Path) -> None:
        self.cluster, self.config, self.name = cluster, config, name
        os.environ.update(cluster.environment)  # this process looks into the run's storage; put back after the test
        self._folder = folder
        self.run = self.start()

    def start(self) -> Run:
        """The same command, again."""
        return Run(self.config, f"s3://bucket/{self.name}", self.cluster.environment, self._folder / "log")

    def half_way(self) -> None:
        self.run.wait_for_step("stage2", 150)

    def judge(self, undisturbed: Undisturbed, fault: float) -> float:
        """The seconds to train again, after every assertion that holds for any fault.

        Where the number of workers has changed, batch norm has seen other batches than in the undisturbed runs of two
        workers: the score must then not be worse.
        """
        score = self.run.wait_for_end()["stage2"]["mean_iou"]
        assert_published_once(self.run)
        expected, noise = undisturbed.mean_iou, undisturbed.noise
        recovery = self.run.recovery_s("stage2", fault)
        expectation = f"mean IoU {score:.3f}, undisturbed {expected:.3f} ± {noise:.3f}"
        print(f"\n{self.name}: training again after {recovery:.1f} s, {expectation}")
        sizes = {said["row"]["workers"] for said in self.run.rows("stage2")}
        assert score >= expected - noise and (score <= expected + noise or sizes != {2})
        return recovery


def test_a_worker_is_killed(cluster: Cluster, data: str, undisturbed: Undisturbed, tmp_path: Path) -> None:
    case = Case(cluster, config_for(data, workers=2), "worker", tmp_path)
    case.half_way()
    fault = time.time()
    os.kill(processes_of(node_with_worker(cluster), "ray::RayTrainWorker")[0], signal.SIGKILL)
    assert case.judge(undisturbed, fault) <= undisturbed.limit_s


def test_a_node_is_lost_and_replaced(cluster: Cluster, data: str, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """A group of three, one worker on every node: it needs the replacement."""
    case = Case(cluster, config_for(data, workers=3, resources_per_worker=ONE_PER_NODE), "node_replaced", tmp_path)
    case.half_way()
    fault = time.time()
    node_with_worker(cluster).kill()
    cluster.add_node()
    assert case.judge(undisturbed, fault) <= undisturbed.limit_s


def test_a_node_is_lost_and_the_group_goes_on_without_it(
    cluster: Cluster, data: str, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    config = config_for(data, workers=[1, 3], resources_per_worker=ONE_PER_NODE)
    case = Case(cluster, config, "node_elastic", tmp_path)
    case.half_way()
    fault = time.time()
    node_with_worker(cluster).kill()
    recovery = case.judge(undisturbed, fault)
    assert {said["row"]["workers"] for said in case.run.rows("stage2")} == {2, 3}
    cluster.add_node()
    assert recovery <= undisturbed.limit_s


def test_ray_trains_controller_is_killed(cluster: Cluster, data: str, undisturbed: Undisturbed, tmp_path: Path) -> None:
    case = Case(cluster, config_for(data, workers=2), "controller", tmp_path)
    case.half_way()
    fault = time.time()
    os.kill(processes_of(cluster.head, "ray::TrainController")[0], signal.SIGKILL)
    case.judge(undisturbed, fault)
    assert any("controller was lost" in warning for warning in case.run.warnings())


def test_the_driver_is_killed_and_the_same_command_given_again(
    cluster: Cluster, data: str, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    case = Case(cluster, config_for(data, workers=2), "driver", tmp_path)
    case.half_way()
    before = [said["row"]["step"] for said in case.run.rows("stage2")][-1]
    case.run.kill()
    fault = time.time()
    case.run = case.start()
    case.run.wait_for_step("stage2", 1)
    first = case.run.rows("stage2")[0]
    print(f"\ndriver: training again after {first['time'] - fault:.1f} s")
    assert not case.run.rows("stage1") and before - 60 <= first["row"]["step"] <= before + 20
    case.judge(undisturbed, fault)


def test_mlflow_is_killed(cluster: Cluster, data: str, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """The run's folder is the record: nothing waits for MLflow, and the same command fills it when it is back."""
    assert cluster.mlflow is not None
    case = Case(cluster, config_for(data, workers=2), "mlflow_killed", tmp_path)
    case.half_way()
    fault = time.time()
    cluster.mlflow.kill()
    try:
        case.judge(undisturbed, fault)
        assert any("not all in MLflow" in warning for warning in case.run.warnings())
    finally:
        cluster.mlflow.start()
    case.run = case.start()
    case.run.wait_for_end()
    assert not any("not all in MLflow" in warning for warning in case.run.warnings())


def test_a_node_is_preempted(cluster: Cluster, data: str, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """SIGTERM to a node: a checkpoint is saved at once, training goes on there until the node is gone, and then elsewhere."""
    case = Case(cluster, config_for(data, workers=2), "preempted", tmp_path)
    case.half_way()
    node = node_with_worker(cluster)
    fault = time.time()
    node.preempt()
    cluster.add_node()
    while node.alive():
        time.sleep(0.2)
    gone = time.time()
    recovery = case.judge(undisturbed, gone)
    notice = next(warning for warning in case.run.warnings() if "leaves or joins" in warning)
    step = int(notice.rsplit("step ", 1)[1].split()[0])
    saved = next(said["time"] for said in case.run.said if said.get("warning") == notice)
    print(
        f"\npreempted: checkpoint of step {step} saved {saved - fault:.1f} s after the notice; gone {gone - fault:.1f} s after it"
    )
    assert saved - fault < 8 and step % 50, "saved because of the notice, before the node was gone"
    assert 0 < recovery <= undisturbed.limit_s


def test_a_node_joins(cluster: Cluster, data: str, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """The group takes it in, from a checkpoint that was saved because it came."""
    slots = 1 + sum(node.alive() for node in cluster.nodes)
    config = config_for(data, workers=[1, slots + 1], resources_per_worker=ONE_PER_NODE, resize_after_s=5)
    case = Case(cluster, config, "joined", tmp_path)
    case.half_way()
    fault = time.time()
    cluster.add_node()
    case.judge(undisturbed, fault)
    assert {said["row"]["workers"] for said in case.run.rows("stage2")} == {slots, slots + 1}
    assert any("leaves or joins" in warning for warning in case.run.warnings())


@pytest.mark.skipif(not namespaces_allowed(), reason="needs network namespaces: root and iproute2")
def test_a_node_is_cut_off(scenes: Path, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Its link goes down: its worker waits for the others and they for it, until Ray takes the node for dead."""
    with local_cluster(tmp_path / "cluster", nodes=2, cpus=8, namespaces=True, resources=ONE_PER_NODE) as cluster:
        data = put_scenes(scenes, cluster)
        config = config_for(data, workers=[1, 3], resources_per_worker=ONE_PER_NODE, collective_timeout_s=20)
        case = Case(cluster, config, "cut", tmp_path)
        case.half_way()
        node = node_with_worker(cluster)
        fault = time.time()
        node.cut()
        recovery = case.judge(undisturbed, fault)
        assert {said["row"]["workers"] for said in case.run.rows("stage2")} == {2, 3}
        assert recovery <= undisturbed.limit_s


@needs_ceph[0]
@needs_ceph[1]
def test_the_s3_endpoint_is_killed_for_20_s(
    scenes: Path, undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While stage 2 trains and saves checkpoints; what Ceph's gateway had stored is there again when it is back."""
    with ceph_gateway() as gateway:
        for name, value in gateway.variables().items():
            monkeypatch.setenv(name, value)
        storage.ask_s3("create_bucket", "bucket")
        with local_cluster(tmp_path / "cluster", nodes=2, cpus=8, s3=gateway.variables()) as cluster:
            case = Case(cluster, config_for(put_scenes(scenes, cluster), workers=2), "s3", tmp_path)
            case.half_way()
            fault = time.time()
            gateway.kill()
            time.sleep(20)
            gateway.start()
            print(f"\ns3: away for {time.time() - fault:.1f} s")
            case.judge(undisturbed, fault)


def test_the_head_node_is_lost_and_the_same_command_given_on_another_cluster(
    scenes: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    with local_cluster(tmp_path / "first", nodes=1, cpus=6) as first:
        case = Case(first, config_for(put_scenes(scenes, first), workers=2), "head", tmp_path)
        case.half_way()
        before = case.run.rows("stage2")[-1]["row"]["step"]
        for node in (first.head, *first.nodes):
            node.kill()
        case.run.kill()
        s3 = {name: value for name, value in first.environment.items() if name.startswith(("AWS_", "MLFLOW_S3"))}
        with local_cluster(tmp_path / "second", nodes=1, cpus=6, s3=s3) as case.cluster:
            case.run = case.start()
            case.judge(undisturbed, time.time())
        assert not case.run.rows("stage1") and before - 60 <= case.run.rows("stage2")[0]["row"]["step"]
