"""Each use of Ray's internals works with the Ray that is installed; without it the caller works too. No other file has one."""

import ast
import contextlib
import json
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc  # type: ignore[import-untyped]
import pytest
import ray
from ray import cloudpickle
from ray.data import DataContext
from ray.train import RunConfig

from tests.refusals import refused
from threestage.ray_backend import capacity, connect, ray_internals, stall_monitor
from threestage.ray_settings import ClusterSettings

ROOT = Path(__file__).parents[3]
INTERNALS = ROOT / "threestage" / "ray_backend" / "ray_internals.py"

Remove = Callable[[str], None]


@pytest.fixture
def remove(monkeypatch: pytest.MonkeyPatch) -> Remove:
    """Makes a module of Ray one that cannot be imported."""

    def remove(module: str) -> None:
        parent, _, name = module.rpartition(".")
        monkeypatch.delattr(sys.modules[parent], name, raising=False)
        monkeypatch.setitem(sys.modules, module, None)

    return remove


# ---- 1. The head

NODE = b"\x01" * 28


class Head(grpc.GenericRpcHandler):
    """Answers the requests of a cluster's head, with its own messages."""

    def __init__(self, answers: Mapping[str, bytes]) -> None:
        self._answers = answers

    def service(self, details: Any) -> Any:
        answer = self._answers.get(details.method.rpartition("/")[2])
        return None if answer is None else grpc.unary_unary_rpc_method_handler(lambda request, context: answer)


@contextlib.contextmanager
def head(answers: Mapping[str, bytes]) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(1), handlers=[Head(answers)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a head with one node, of which 1.5 CPUs are free, and which is being drained."""
    from ray.core.generated import gcs_service_pb2 as messages

    metadata = messages.InternalKVGetReply(value=json.dumps({"ray_version": "2.60.0"}).encode())
    free, draining = messages.GetAllAvailableResourcesReply(), messages.GetDrainingNodesReply()
    free.resources_list.add(node_id=NODE).resources_available["CPU"] = 1.5
    draining.draining_nodes.add(node_id=NODE)
    answers = {"InternalKVGet": metadata, "GetAllAvailableResources": free, "GetDrainingNodes": draining}
    with head({method: answer.SerializeToString() for method, answer in answers.items()}) as address:
        monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address=address))
        yield address


def test_the_head_is_asked(cluster: str) -> None:
    assert ray_internals.cluster_metadata(cluster) == {"ray_version": "2.60.0"}
    assert ray_internals.free_resources() == {NODE.hex(): {"CPU": 1.5}}
    assert ray_internals.draining_nodes() == frozenset({NODE.hex()})


@pytest.mark.parametrize("missing", ["ray.core.generated.gcs_service_pb2_grpc", "ray._private.gcs_utils"])
def test_without_requests_to_the_head(
    cluster: str, missing: str, remove: Remove, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An address is refused when nobody listens, reports add up what is free, and no node is known to be drained."""
    remove(missing)
    assert connect.check_connection("cluster.address", cluster) == {}
    assert "something listens there" in connect.probe_cluster("cluster.address", cluster).value
    with refused("ray/no-answer", "cluster.address=127.0.0.1:1: "):
        connect.check_connection("cluster.address", "127.0.0.1:1")
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": name, "Alive": True} for name in "ab"])
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 3.0})
    assert capacity.free_nodes() == [{"CPU": 3.0}]
    assert not stall_monitor.Membership(ClusterSettings(workers=2)).look()


def test_a_head_without_such_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    with head({}) as address:
        monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address=address))
        assert ray_internals.free_resources() is None and ray_internals.draining_nodes() is None


# ---- 2. Ray Train's controller


class Call:
    """Stands in for a method of an actor."""

    def __init__(self, *names: str) -> None:
        self.calls = list[Any]()
        for name in names:
            setattr(self, name, SimpleNamespace(remote=lambda *given, name=name, **named: self.calls.append(name)))


def test_the_controller_is_introduced_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(current_actor="controller"))
    seen = list[Any]()
    (callback,) = ray_internals.controller_callbacks(seen.append)
    assert RunConfig(callbacks=[callback]).callbacks == [callback], "Ray Train takes it"
    callback.after_controller_start(None)
    assert seen == ["controller"]
    assert cloudpickle.loads(cloudpickle.dumps(ray_internals.controller_callbacks(print))), (
        "it travels to the controller"
    )

    killed = list[Any]()
    monkeypatch.setattr(ray, "kill", killed.append)
    monkeypatch.setattr(ray, "get", lambda reference, timeout: None)
    controller = Call("abort")
    ray_internals.abort(controller)
    assert controller.calls == ["abort"] and killed == [controller]


def test_without_the_controllers_callback_or_its_abort(remove: Remove, monkeypatch: pytest.MonkeyPatch) -> None:
    remove("ray.train.v2._internal.execution.callback")
    assert RunConfig(callbacks=ray_internals.controller_callbacks(print)).callbacks == []
    killed = list[Any]()
    monkeypatch.setattr(ray, "kill", killed.append)
    controller = Call()
    ray_internals.abort(controller)
    assert killed == [controller]


# ---- 3. The actor that reserves nodes


def test_the_reservations_are_refreshed(monkeypatch: pytest.MonkeyPatch) -> None:
    actor = Call("get_reserved_resources")
    monkeypatch.setattr(ray, "get_actor", lambda name, namespace: actor)
    ray_internals.refresh_reservations()
    assert actor.calls == ["get_reserved_resources"]
    from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as module

    assert "recompute" in module._AutoscalingCoordinatorActor.get_reserved_resources.__code__.co_varnames


@pytest.mark.parametrize("actor", [None, Call()])
def test_without_the_actor_or_its_method(actor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str, namespace: str) -> Any:
        if actor is None:
            raise ValueError("no such actor")
        return actor

    monkeypatch.setattr(ray, "get_actor", find)
    ray_internals.refresh_reservations()


# ---- 4. Ray Data's executor


@pytest.mark.filterwarnings("default")  # Ray's own
def test_the_executor_pauses_between_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    context, slept = DataContext(), list[float]()
    ray_internals.throttle(context)
    (kind,) = pickle.loads(cloudpickle.dumps(context)).custom_execution_callback_classes
    assert any(known.__name__ == kind.__name__ for known in context.execution_callback_classes), "Ray Data uses it"
    monkeypatch.setattr("threestage.ray_backend.ray_internals.time.sleep", slept.append)
    pause = context.custom_execution_callback_classes[0]()
    pause.before_execution_starts(None)
    pause.on_execution_step(None)
    assert 0 < slept[0] <= ray_internals.STEP_SECONDS


@pytest.mark.filterwarnings("default")  # Ray's own
def test_without_the_executors_callback(remove: Remove) -> None:
    context = DataContext()
    remove("ray.data._internal.execution.execution_callback")
    ray_internals.throttle(context)
    assert context.custom_execution_callback_classes == []


# ---- 5. The address that Ray listens on


def test_what_is_changed_for_loopback_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import ray_constants, services

    for name in ray_internals.LOOPBACK:
        monkeypatch.delenv(name, raising=False)
    with ray_internals.loopback_only():
        assert ray_internals.LOOPBACK.items() <= os.environ.items()
        assert not ray_constants.ENABLE_RAY_CLUSTER and services.get_node_ip_address() == "127.0.0.1"
    assert ray_constants.ENABLE_RAY_CLUSTER and not ray_internals.LOOPBACK.keys() & os.environ.keys()


def test_without_the_constant_a_warning_says_that_ports_are_open(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import ray_constants

    monkeypatch.delattr(ray_constants, "ENABLE_RAY_CLUSTER")
    with pytest.warns(RuntimeWarning, match="opens its ports"), ray_internals.loopback_only():
        pass


# ---- Nowhere else

FORBIDDEN = {"_private", "_raylet", "_internal", "_common", "generated", "internal_kv"}


def internals(tree: ast.AST) -> Iterator[str]:
    """Modules, names and attributes of Ray that are not public: imported, or reached from `ray`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ray":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "ray"]
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("ray."):
            names = [ast.unparse(node)]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if FORBIDDEN.intersection(parts) or any(p.startswith("_") and not p.endswith("__") for p in parts):
                yield name


FILES = [file for folder in ("threestage", "jobs", "cluster", "tune") for file in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_all_other_code_uses_documented_api(file: Path) -> None:
    found = list(internals(ast.parse(file.read_text())))
    assert bool(found) == (file == INTERNALS), found


def test_internals_are_found() -> None:
    code = "from ray._private import x\nimport ray.data._internal\nfrom ray.job_submission import _y\nray._z.a\nray.nodes()\n"
    found = set(internals(ast.parse(code + "from ray.train.v2._internal.execution import context\nray.__version__\n")))
    assert found == {
        "ray._private.x", "ray.data._internal", "ray.job_submission._y", "ray._z", "ray._z.a",
        "ray.train.v2._internal.execution.context",
    }  # fmt: skip


def test_there_are_five_uses() -> None:
    banners = [line for line in INTERNALS.read_text().splitlines() if line.startswith("# ---- ")]
    assert [line.split()[2] for line in banners] == ["1.", "2.", "3.", "4.", "5."]
