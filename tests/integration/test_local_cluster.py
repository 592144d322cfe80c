"""`cluster/local.py`: a cluster from the command line, and the loss of its nodes as a test brings it about."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.local import Cluster, Server, local_cluster, members, namespaces_allowed

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240), pytest.mark.filterwarnings("default")]

COMMAND = Path(__file__).parents[2] / "cluster" / "local.py"

# Uses all there is: a task on each node, an object on S3, a run and its artifact in MLflow.
DRIVER = """
import os, boto3, mlflow, ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

@ray.remote(num_cpus=1)
def on_node():
    body = boto3.client("s3").get_object(Bucket="bucket", Key="key")["Body"].read()
    return ray.util.get_node_ip_address(), os.environ["OMP_NUM_THREADS"], body

boto3.client("s3").put_object(Bucket="bucket", Key="key", Body=b"value")
ray.init(log_to_driver=False)
nodes = [node["NodeID"] for node in ray.nodes()]
strategies = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
found = ray.get([on_node.options(scheduling_strategy=strategy).remote() for strategy in strategies])
assert len({ip for ip, *_ in found}) == 3, found
assert all(rest == ["1", b"value"] for _, *rest in found), found
with mlflow.start_run():
    mlflow.log_text("text", "file.txt")
assert boto3.client("s3").list_objects_v2(Bucket="bucket", Prefix="mlflow/")["KeyCount"] == 1
print("done")
"""

# What a stage's worker exports, for as long as a test may need.
MEASURING = """
import time, ray
from threestage.ray_backend.gauges import StageGauges, count_images

@ray.remote(num_cpus=1)
def measure():
    gauges = StageGauges({"run": "a", "stage": "stage1", "rank": "0"})
    count_images("a", "stage1", 10, 1)
    while True:
        gauges.set({"step": 7, "unsaved_seconds": 2.5})
        time.sleep(1)

ray.init(log_to_driver=False)
ray.get(measure.remote())
"""

# Keeps an actor on each node, so that no node is idle, and prints four times a second what Ray says of the nodes.
WATCHER = """
import json, time, ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

@ray.remote(num_cpus=1)
class Busy:
    pass

ray.init(log_to_driver=False)
actors = [
    Busy.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
    for node in ray.nodes()
]
ray.get([actor.__ray_ready__.remote() for actor in actors])
while True:
    alive = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    print(json.dumps({"alive": alive, "draining": list(ray._private.state.state.get_draining_nodes())}), flush=True)
    time.sleep(0.25)
"""


@pytest.mark.slow  # a cluster of its own: a minute
def test_command_line(tmp_path: Path, ray_cluster: None) -> None:
    """All parts serve a driver that has the token; SIGTERM ends all of them and not the session's own Ray."""
    import ray

    command = [sys.executable, str(COMMAND), "--nodes", "2", "--cpus", "5", "--folder", str(tmp_path / "cluster")]
    with subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            assert any(line.startswith("Ready") for line in process.stdout), "it did not start: see its error above"
            environment = os.environ | _sourced(tmp_path / "cluster" / "env.sh")
            assert _run(DRIVER, environment).stdout.endswith("done\n")

            without_token = {name: value for name, value in environment.items() if not name.startswith("RAY_AUTH")}
            without_token["RAY_NUM_REDIS_GET_RETRIES"] = "1"  # Ray's name for its attempts to reach a head
            assert "InvalidAuthToken" in _run("import ray; ray.init()", without_token, status=1).stderr
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(environment["RAY_API_SERVER_ADDRESS"] + "/api/jobs/")

            sessions = {os.getsid(pid) for pid in members({process.pid})}
            assert len(sessions) >= 7, "this command, its guard, S3, MLflow, the head and two nodes"
        finally:
            process.send_signal(signal.SIGTERM)
    assert process.returncode == 0
    assert not members(sessions)
    assert sorted(file.name for file in (tmp_path / "cluster").iterdir()) == ["lock", "logs", "mlflow.db"]
    assert ray.get(ray.remote(lambda: "alive").remote()) == "alive"


@pytest.mark.slow  # nodes that go and come: a minute
def test_lost_and_new_nodes(tmp_path: Path) -> None:
    """A killed node is seen dead soon, a new one takes its place, a preempted one drains; servers stop and come back."""
    with local_cluster(tmp_path, nodes=2, cpus=5, mlflow=False) as cluster, _watched(cluster) as until:
        first, second = cluster.nodes
        assert until(lambda seen: len(seen["alive"]) == 3)["alive"][first.node_id] == first.ip
        first.kill()
        assert not first.alive()
        until(lambda seen: first.node_id not in seen["alive"])
        third = cluster.add_node()
        until(lambda seen: seen["alive"].get(third.node_id) == third.ip)
        second.preempt()
        until(lambda seen: second.node_id in seen["draining"] and second.node_id in seen["alive"])

        assert cluster.s3
        cluster.s3.kill()
        assert not _answers(cluster.s3)
        cluster.s3.start()
        assert _answers(cluster.s3)
        cluster.s3.pause()
        assert not _answers(cluster.s3)
        cluster.s3.resume()
        assert _answers(cluster.s3)
    assert not any(part.alive() for part in (cluster.head, *cluster.nodes, cluster.s3))


@pytest.mark.slow
@pytest.mark.skipif(not namespaces_allowed(), reason="network namespaces need root and the `ip` of iproute2")
def test_namespaces(tmp_path: Path) -> None:
    """Nodes have addresses of their own, reach S3, and are dead to the head when their link is cut."""
    before = _links()
    with local_cluster(tmp_path, nodes=2, cpus=5, mlflow=False, namespaces=True) as cluster:
        with _watched(cluster) as until:
            alive = until(lambda seen: len(seen["alive"]) == 3)["alive"]
            assert alive == {node.node_id: node.ip for node in (cluster.head, *cluster.nodes)}
            assert len(set(alive.values())) == 3
            cut = cluster.nodes[0]
            cut.cut()
            until(lambda seen: cut.node_id not in seen["alive"])
            assert cut.alive(), "the node runs on, alone"
            cut.mend()
            deadline = time.monotonic() + 20
            while cut.alive() and time.monotonic() < deadline:
                time.sleep(0.2)
            assert not cut.alive(), "the node heard that it is dead"
        assert len(_links()) > len(before)
    assert _links() == before


def _run(script: str, environment: dict[str, str], status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def _sourced(file: Path) -> dict[str, str]:
    """What a shell has in its environment when it has read the file, and nothing else."""
    listing = subprocess.run(["env", "-i", "sh", "-c", f". {file} && env"], capture_output=True, text=True, check=True)
    return dict(line.split("=", 1) for line in listing.stdout.splitlines())


@contextlib.contextmanager
def _watched(cluster: Cluster) -> Iterator[Callable[[Callable[[dict[str, Any]], bool]], dict[str, Any]]]:
    """`until(condition)`: the first state of the nodes that Ray reports from now on and that meets the condition."""
    command, environment = [sys.executable, "-c", WATCHER], os.environ | cluster.environment
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as watcher:

        def until(condition: Callable[[dict[str, Any]], bool], limit_s: float = 15) -> dict[str, Any]:
            assert watcher.stdout
            seen, deadline = {}, time.monotonic() + limit_s
            for line in filter(lambda line: line.startswith("{"), watcher.stdout):  # the others are Ray's warnings
                seen = json.loads(line)
                if condition(seen):
                    return seen
                assert time.monotonic() < deadline, f"not within {limit_s} s; the last state is {seen}"
            raise AssertionError("the watcher ended")

        try:
            yield until
        finally:
            watcher.kill()


def _answers(server: Server) -> bool:
    """Whether an S3 request is answered within 2 s."""
    try:
        urllib.request.urlopen(server.url, timeout=2).close()
    except OSError:
        return False
    return True


def _links() -> list[str]:
    """The names of all network links and namespaces."""
    links = subprocess.run(["ip", "-brief", "link"], capture_output=True, text=True, check=True).stdout
    namespaces = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    return sorted(line.split()[0] for line in (links + namespaces).splitlines())


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("prometheus"), reason="no prometheus here (Debian's package of that name)")
def test_prometheus_reads_what_a_stage_exports(tmp_path: Path) -> None:
    with local_cluster(tmp_path, nodes=1, cpus=2, mlflow=False) as cluster:
        cluster.start_prometheus()
        assert cluster.prometheus
        driver = [sys.executable, "-c", MEASURING]
        with subprocess.Popen(driver, env={**os.environ, **cluster.environment}, cwd=COMMAND.parents[1]) as process:
            queries = {"step": 7.0, "unsaved_seconds": 2.5, "images_read_total": 10.0, "images_rejected_total": 1.0}
            for name, value in queries.items():
                found = _series(cluster.prometheus, f"ray_threestage_{name}", 60)
                assert (found["metric"]["run"], float(found["value"][1])) == ("a", value)
            rules = json.loads(urllib.request.urlopen(f"{cluster.prometheus.url}/api/v1/rules").read())
            assert {rule["name"] for rule in rules["data"]["groups"][0]["rules"]} >= {"ThreestageNoStep"}
            process.kill()


def _series(prometheus: Server, query: str, limit_s: float) -> dict[str, Any]:
    """The one series that a query finds, as soon as it does."""
    deadline = time.monotonic() + limit_s
    while True:
        answer = json.loads(urllib.request.urlopen(f"{prometheus.url}/api/v1/query?query={query}").read())
        if answer["data"]["result"]:
            [found] = answer["data"]["result"]
            return dict(found)
        assert time.monotonic() < deadline, f"{query}: no series"
        time.sleep(1)
