"""Why: a cluster that refuses, is too small or has other code is found out in seconds, not by a run that waits for it."""

import contextlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc  # type: ignore[import-untyped]
import pytest
import ray
import torch

from tests.conftest import tiny_config
from tests.refusals import refused
from threestage.checks.result import CheckOutcome, CheckResult
from threestage.config import Config, changed
from threestage.ray_backend import capacity, job_check, node_checks
from threestage.ray_backend import connect as entry
from threestage.ray_backend.capacity import Growth


@pytest.fixture
def config(scenes: Path, tmp_path: Path) -> Config:
    return tiny_config(scenes, registry={"tracking_uri": f"sqlite:///{tmp_path}/mlflow.db"})


def with_cluster(config: Config, **values: object) -> Config:
    return changed(config, {f"cluster.{key}": value for key, value in values.items()})


# ---- Room


def room(config: Config, *nodes: dict[str, float], growth: Growth = Growth(), **cluster: object) -> CheckOutcome:
    return capacity._room(with_cluster(config, **cluster), nodes, growth, "there", "add nodes")


def test_room_for_workers_and_the_reader(config: Config) -> None:
    asked = "the run asks for 3 × (CPU 1) and CPU 1 to read the pool; there"
    assert room(config, {"CPU": 4.0}, workers=3) == CheckOutcome(asked)
    with refused("ray/too-small", f"{asked}; set cluster.workers=2, or add nodes"):
        room(config, {"CPU": 3.0}, workers=3)
    with refused("ray/too-small", "cluster.cpus_per_worker"):
        room(config, {"CPU": 8.0}, cpus_per_worker=9)
    with refused("ray/too-small", "(CPU 1, GPU 1)"):
        room(config, {"CPU": 8.0}, gpus_per_worker=1)
    with refused("ray/too-small", "placed STRICT_SPREAD"):
        room(config, {"CPU": 8.0}, workers=2, placement="STRICT_SPREAD")


def test_an_elastic_group_begins_with_what_fits(config: Config) -> None:
    assert room(config, {"CPU": 4.0}, workers=[2, 8]).value.endswith("there; it would begin with 3 workers")


def test_an_elastic_group_that_would_leave_no_cpu_to_the_reader(config: Config) -> None:
    """Stage 2 would stand still for ever."""
    found = room(config, {"CPU": 4.0}, workers=[2, 8])
    assert str(found.warning).endswith(
        "Ray begins with 4, which leaves no CPU to read the pool: set cluster.workers=[2,3]"
    )
    assert room(config, {"CPU": 9.0}, workers=[2, 8]).warning is None
    assert room(config, {"CPU": 5.0, "GPU": 4.0}, workers=[2, 8], gpus_per_worker=1).warning is None


def test_nodes_that_an_autoscaler_may_add(config: Config) -> None:
    coming = Growth(nodes=({"CPU": 8.0, "GPU": 1.0},))
    assert room(config, {"CPU": 1.0}, growth=coming, gpus_per_worker=1).warning is None
    untold = room(config, {"CPU": 1.0}, growth=Growth(untold=True), gpus_per_worker=1)
    assert "an autoscaler whose limits are not known" in str(untold.warning)


def test_gpus_that_nobody_uses(config: Config) -> None:
    assert "set cluster.gpus_per_worker=1" in str(room(config, {"CPU": 8.0, "GPU": 2.0}).warning)


def test_this_machine(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "share them" in str(capacity.room_here(with_cluster(config, workers=4, gpus_per_worker=0.25)).warning)
    with refused("ray/too-small", "name a cluster that has more"):
        capacity.room_here(with_cluster(config, workers=2, gpus_per_worker=1))


# ---- The cluster's door


def test_which_cluster(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    assert entry.address_of(config.cluster) is None
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert entry.address_of(config.cluster) == ("RAY_ADDRESS", "head:6379")
    named = with_cluster(config, address="other:6379").cluster
    assert entry.address_of(named) == ("cluster.address", "other:6379")


@pytest.mark.parametrize("address", ["ray://head:10001", "http://head:8265"])
def test_an_address_that_a_run_cannot_use(address: str) -> None:
    with refused("ray/address", f"RAY_ADDRESS={address}: ", "HOST:PORT"):
        entry.probe_cluster("RAY_ADDRESS", address)


def test_nobody_listens() -> None:
    with refused("ray/no-answer", "cluster.address=127.0.0.1:1: ", "UNAVAILABLE"):
        entry.probe_cluster("cluster.address", "127.0.0.1:1")


class Refusing(grpc.GenericRpcHandler):
    """Answers every call as a cluster does whose token is another one."""

    def service(self, details: Any) -> Any:
        def refuse(request: bytes, context: Any) -> bytes:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
            return b""

        return grpc.unary_unary_rpc_method_handler(refuse)


@pytest.fixture
def refusing() -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(1), handlers=[Refusing()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def test_another_token(refusing: str) -> None:
    with refused("ray/wrong-token", f"cluster.address={refusing}: ", "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"):
        entry.probe_cluster("cluster.address", refusing)


def test_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_token(address: str) -> None:
        raise ray.exceptions.AuthenticationError("no token was found")

    monkeypatch.setattr(entry, "create_gcs_channel", no_token)
    with refused("ray/no-token", "cluster.address=127.0.0.1:1: ", "RAY_AUTH_MODE=token"):
        entry.probe_cluster("cluster.address", "127.0.0.1:1")


@pytest.mark.filterwarnings("default")  # Ray's own
def test_a_machine_that_is_no_node_of_it(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: str, **options: Any) -> None:
        raise RuntimeError("no raylet\nhere")

    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    monkeypatch.setattr(node_checks, "probe_cluster", lambda name, address: CheckOutcome("fine"))
    monkeypatch.setattr("threestage.ray_backend.connect.check_connection", lambda name, address: None)
    monkeypatch.setattr(ray, "init", refuse)
    with contextlib.ExitStack() as connection, refused("ray/not-a-node", "RAY_ADDRESS=head:6379: ", "(no raylet here)"):
        node_checks.connect_to_check("RAY_ADDRESS", "head:6379", config.cluster, connection)


@pytest.mark.parametrize("what", ["Ray", "Python"])
def test_other_versions(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"ray_version": ray.__version__, "python_version": platform.python_version()}
    monkeypatch.setattr(entry, "_metadata", lambda channel: there | {f"{what.lower()}_version": "1.2.3"})
    with refused("ray/other-version", "cluster.address=127.0.0.1:1: ", f"{what} 1.2.3"):
        entry.probe_cluster("cluster.address", "127.0.0.1:1")


def test_a_cluster_that_anybody_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"ray_version": ray.__version__, "python_version": platform.python_version()}
    monkeypatch.setattr(entry, "_metadata", lambda channel: there)
    assert "asks for no token" in str(entry.probe_cluster("cluster.address", "127.0.0.1:1").warning)


# ---- The nodes


def test_a_node_with_another_folder_of_that_name(config: Config, tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    with node_checks._marked(out) as marker:
        assert node_checks._look(config.model_dump(mode="json"), out, marker)["problems"] == []
    (found,) = node_checks._look(config.model_dump(mode="json"), out, marker)["problems"]
    assert found.startswith(f"--out {out} is another folder there: give s3://bucket/prefix") and not os.listdir(
        tmp_path
    )


def test_nodes_that_lack_something(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    alive = [{"NodeID": name, "NodeManagerAddress": name, "Alive": True} for name in ("one", "two", "three")]
    old = node_checks.NodeView(
        versions=node_checks.versions() | {"threestage": "0.0.1"}, problems=("data.root: not there",)
    )
    fine = node_checks.NodeView(versions=node_checks.versions())
    monkeypatch.setattr(ray, "nodes", lambda: alive)
    monkeypatch.setattr(node_checks, "_views", lambda *given: {"one": old, "two": old, "three": fine})
    nodes = "node one and 1 more: "
    with refused("check/nodes", f"{nodes}it has threestage 0.0.1", f"{nodes}data.root: not there"):
        node_checks.nodes_reach(config, "s3://bucket/run")


def test_a_database_in_a_file(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [{"Alive": True}]
    monkeypatch.setattr(ray, "nodes", lambda: alone)
    assert node_checks.own_file(config) is None
    monkeypatch.setattr(ray, "nodes", lambda: alone * 2)
    line = node_checks.own_file(config)
    assert line is not None and "no other node reads it" in str(line.warning)
    monkeypatch.setenv(node_checks.JOB, "{}")
    line = node_checks.own_file(config)
    assert line is not None and "set registry.tracking_uri" in str(line.problem) and line.code == "mlflow/local-file"


# ---- The job


def test_what_a_job_could_not_read(config: Config, scenes: Path) -> None:
    assert job_check._travels(config, "s3://bucket/run").warning is None
    with refused("submit/unshared-place", "--out=runs/x: "):
        job_check._travels(config, "runs/x")
    relative = changed(config, {"data.root": "data"})
    with refused("submit/unshared-place", "data.root=data: "):
        job_check._travels(relative, "s3://bucket/run")
    secret = changed(config, {"registry.tracking_uri": "http://me:secret@mlflow:5000"})
    with refused("submit/secret-setting"):
        job_check._travels(secret, "s3://bucket/run")


class Client:
    """Stands in for the job API: a log that grows, then a status."""

    def __init__(self, *logs: str, status: str = "SUCCEEDED") -> None:
        self._logs, self._status, self.deleted = list(logs), status, False

    def get_address(self) -> str:
        return "http://head:8265"

    def get_job_status(self, job: str) -> str:
        return self._status if len(self._logs) == 1 else "RUNNING"

    def get_job_logs(self, job: str) -> str:
        return self._logs.pop(0) if len(self._logs) > 1 else self._logs[0]

    def delete_job(self, job: str) -> None:
        self.deleted = True


@pytest.fixture
def follow(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[CheckResult]]:
    monkeypatch.setattr(job_check, "POLL_S", 0.0)
    return lambda client: list(job_check._follow(client, "raysubmit_1"))


def logged(*lines: CheckResult) -> str:
    return "".join(f"threestage-check {json.dumps(line.as_json())}\n" for line in lines)


def test_the_lines_of_a_job(follow: Callable[[Any], list[CheckResult]]) -> None:
    one, two = CheckResult("a", "b", 1.0), CheckResult("c", "", problem="d")
    client = Client(logged(one), logged(one, two)[:-5], "noise\n" + logged(one, two))
    assert follow(client) == [one, two] and client.deleted


def test_a_job_that_ends_too_early(follow: Callable[[Any], list[CheckResult]]) -> None:
    (found,) = follow(Client("Traceback\nModuleNotFoundError: No module named 'torch'\n", status="FAILED"))
    assert found.problem == (
        "it ended too early: ModuleNotFoundError: No module named 'torch'; see `ray job logs --address http://head:8265 "
        "raysubmit_1`"
    )


def test_a_job_that_says_nothing(follow: Callable[[Any], list[CheckResult]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("threestage.ray_backend.job_check.SILENCE_S", 0.05)
    (found,) = follow(Client("", "", status="RUNNING"))
    assert "no word of it" in str(found.problem) and found.code == "check/job"


def test_the_image_of_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    here = node_checks.versions()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: here["torch"])
    assert "renew the image" in str(job_check._code(here).warning)

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(job_check, "versions", lambda: here)
    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert "holds no threestage: submit with --wheel FILE" in str(job_check._code(here | {"Python": "3.9"}).warning)
