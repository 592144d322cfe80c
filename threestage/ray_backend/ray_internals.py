"""Every use of Ray that is not its documented API: five, read in Ray 2.60.

None is needed. Where a release of Ray lacks one, its function does nothing or returns None, and the banner says what that costs.
tests/unit/ray_backend/test_ray_internals.py takes each away, and keeps all other code to the documented API.
"""

import contextlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import grpc  # type: ignore[import-untyped]
import ray
import ray.exceptions

MISSING = (ImportError, AttributeError, TypeError, ValueError)
"""What Python raises for a module, a name, an argument or a field that another release does not have."""

# ---- 1. Requests to the cluster's head (its GCS)
# Why: ray.init tries a wrong address or token for 20 s and more, and does not say which it is; ray.nodes() lists neither what is
#   free on a node nor which nodes are being drained, and ray.train.get_preemption_info is a barrier of all workers.
# Without: an address is refused only if nobody listens, all else by ray.init; reports add up what is free on all nodes; a drained
#   node costs the steps since the last checkpoint.

ANSWER_S = 5.0


def cluster_metadata(address: str, with_token: bool = True) -> dict[str, str] | None:
    """Versions of the cluster at HOST:PORT: ray_version, python_version. None where Ray cannot be asked.

    Raises grpc.RpcError, Ray's AuthenticationError where a token is wanted and none was found, ValueError for another service.
    """
    key = {"namespace": b"cluster", "key": b"CLUSTER_METADATA"}
    answer = _ask_head(address, "InternalKV", "InternalKVGet", with_token, **key)
    return None if answer is None else dict(json.loads(answer.value))


def free_resources() -> dict[str, dict[str, float]] | None:
    """What is free on each node, by the node's id. None where Ray cannot be asked."""
    with contextlib.suppress(grpc.RpcError, ray.exceptions.RayError, *MISSING):
        answer = _ask_head(_head(), "NodeResourceInfo", "GetAllAvailableResources")
        return {node.node_id.hex(): dict(node.resources_available) for node in answer.resources_list}
    return None


def draining_nodes() -> frozenset[str] | None:
    """Ids of the nodes that will be gone soon. None where Ray cannot be asked."""
    with contextlib.suppress(grpc.RpcError, ray.exceptions.RayError, *MISSING):
        answer = _ask_head(_head(), "NodeResourceInfo", "GetDrainingNodes")
        return frozenset(node.node_id.hex() for node in answer.draining_nodes)
    return None


def _head() -> str:
    return str(ray.get_runtime_context().gcs_address)


def _ask_head(address: str, service: str, method: str, with_token: bool = True, **fields: bytes) -> Any:
    """The answer; None where this Ray has no such request."""
    try:
        from ray._private.gcs_utils import create_gcs_channel
        from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

        request = getattr(gcs_service_pb2, f"{method}Request")(**fields)
        stub = getattr(gcs_service_pb2_grpc, f"{service}GcsServiceStub")
    except MISSING:
        return None
    with create_gcs_channel(address) if with_token else grpc.insecure_channel(address) as channel:
        return getattr(stub(channel), method)(request, timeout=ANSWER_S)


# ---- 2. Ray Train's controller
# Why: `fit` has no way to be ended from another thread (Ray itself ends it on Ctrl-C in the main thread, ray-project/ray#53600).
# Without: a stage that has failed or was interrupted keeps its workers until the driver ends.

ABORT_SECONDS = 30.0


def controller_callbacks(introduce: Callable[[Any], None]) -> list[Any]:
    """For RunConfig: in the controller, hands the controller to `introduce` when it starts."""
    try:
        from ray.train.v2._internal.execution.callback import ControllerCallback
    except MISSING:
        return []

    class Introduction(ControllerCallback):
        def after_controller_start(self, train_run_context: Any) -> None:
            introduce(ray.get_runtime_context().current_actor)

    return [Introduction()]


def abort(controller: Any) -> None:
    """End the controller and its workers; `fit` then returns.

    One that is killed before it has let go of its resources keeps them until the driver ends: wait ABORT_SECONDS for it.
    """
    with contextlib.suppress(ray.exceptions.RayError, *MISSING):
        ray.get(controller.abort.remote(), timeout=ABORT_SECONDS)
    ray.kill(controller)


# ---- 3. The actor that reserves nodes for elastic groups
# Why: Ray Train starts an elastic group on the nodes that this actor knows, and it looks only every 20 s; from
#   ray-project/ray#66002 on, Ray Train has it look when a group starts.
# Without: an elastic group starts again up to 20 s later when a node has come or gone.

RESERVATIONS = "AutoscalingCoordinator"


def refresh_reservations() -> None:
    """Have it look at the nodes now. Does nothing where no elastic group has asked it yet."""
    with contextlib.suppress(*MISSING):
        ray.get_actor(RESERVATIONS, RESERVATIONS).get_reserved_resources.remote("threestage", recompute=True)


# ---- 4. The loop of Ray Data's executor
# Why: under back-pressure it asks again and again for blocks that it may not take, without a pause. No issue is known.
# Without: each stream of a stage keeps a CPU core busy.

STEP_SECONDS = 0.1


def throttle(context: Any) -> None:
    """Let the executors of a DataContext sleep between their steps."""
    try:
        from ray.data._internal.execution.execution_callback import ExecutionCallback
    except MISSING:
        return

    class Pause(ExecutionCallback):
        def __init__(self) -> None:
            self._last_step = time.monotonic()

        def on_execution_step(self, executor: Any) -> None:
            time.sleep(max(0.0, self._last_step + STEP_SECONDS - time.monotonic()))
            self._last_step = time.monotonic()

    context.custom_execution_callback_classes = [Pause]


# ---- 5. The address that Ray listens on
# Why: ray.init turns 127.0.0.1 into the machine's own address, except on macOS and Windows (ray-project/ray#18730, #59110).
# Without: the ports of a Ray that a run starts are open to other machines; its token guards them, and a warning says so.

LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


@contextlib.contextmanager
def loopback_only() -> Iterator[None]:
    """What Ray starts meanwhile listens on 127.0.0.1 alone."""
    try:
        from ray._private import ray_constants

        enabled = ray_constants.ENABLE_RAY_CLUSTER
    except MISSING:
        text = f"Ray {ray.__version__} opens its ports to other machines; its token guards them"
        warnings.warn(text, RuntimeWarning, stacklevel=3)
        yield
        return
    before = {name: os.environ.get(name) for name in LOOPBACK}
    os.environ.update(LOOPBACK)
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = enabled
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
