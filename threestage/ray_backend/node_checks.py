"""Checks of a cluster for `threestage check`: connect, then ask every node for its versions and the places it reaches.
Also measures the stages' steps on a worker's device, for the check and for the plan of a sweep."""

import contextlib
import importlib.metadata
import os
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from threestage import __version__
from threestage.allocator import disable_malloc_trim
from threestage.checks.result import CheckOutcome, CheckResult, merged, try_all
from threestage.checks.step_time import (
    START_S,
    STEP_S,
    MeasuredStep,
    StepSpecification,
    StepTime,
    measure_step,
    measure_steps,
    too_slow,
)
from threestage.checks.store import PROBE_NAME, places
from threestage.config import Config, StageName
from threestage.data import storage
from threestage.data.records import load_manifest
from threestage.errors import InputError, StageFailure, Warn
from threestage.mlflow_sync.connection import resolve_uri, sqlite_path
from threestage.ray_backend.capacity import resources_text, room_for_one, worker_takes
from threestage.ray_backend.connect import connected, probe_cluster
from threestage.ray_backend.failures import alive_nodes, cause_of, code_of, first_line, last_line
from threestage.ray_settings import ClusterSettings
from threestage.settings import Settings
from threestage.training.worker import default_device

# ---- What every node can use

MOST_NODES = 32
LOOK_S = 90.0  # for a new process on each node, which imports torch, and then tries the places
SAME = ("threestage", "Ray", "Python")
JOB = "THREESTAGE_CHECK_JOB"  # set where job_check.py runs as a job


class NodeView(Settings):
    """Of a node. `problems`: of places that it cannot use."""

    versions: dict[str, str]
    problems: tuple[str, ...] = ()


def nodes_reach(config: Config, out: str) -> CheckOutcome:
    """Every node, MOST_NODES at most, has our code and can use the run's places. Raises InputError, naming the nodes."""
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in alive_nodes()}
    looked_at = dict(list(nodes.items())[:MOST_NODES])
    with _marked(out) as marker:
        views = _views(looked_at, config, out, marker)
    problems: dict[str, list[str]] = {}
    for name, view in views.items():
        for problem in (*_other_versions(view), *view.problems):
            problems.setdefault(problem, []).append(name)
    if problems:
        raise InputError("; ".join(f"{_names(found)}: {problem}" for problem, found in problems.items()), "check/nodes")
    torches = sorted({view.versions["torch"] for view in views.values()} | {versions()["torch"]})
    number = f"{len(views)} of {len(nodes)} nodes" if len(nodes) > 1 else "its one node"
    here = ", ".join(f"{what} {version}" for what, version in versions().items())
    warning = f"torch is not the same on all of them: {', '.join(torches)}" if len(torches) > 1 else None
    return CheckOutcome(f"{number} can use data.root and --out, with {here}", warning)


def _names(nodes: Sequence[str]) -> str:
    return f"node {nodes[0]}" + (f" and {len(nodes) - 1} more" if len(nodes) > 1 else "")


def _other_versions(view: NodeView) -> Iterator[str]:
    for what, version in versions().items():
        if what in SAME and view.versions[what] != version:
            yield f"it has {what} {view.versions[what]}, here is {version}: install the same"


@contextlib.contextmanager
def _marked(out: str) -> Iterator[str | None]:
    """A file where a local `out` is, or will be made, by which a node sees whether it has that folder too."""
    if storage.is_s3(out):
        yield None
        return
    folder = next(path for path in (Path(out), *Path(out).parents) if path.is_dir())
    with tempfile.NamedTemporaryFile(prefix=PROBE_NAME, dir=folder) as file:
        yield file.name


def _views(nodes: Mapping[str, str], config: Config, out: str, marker: str | None) -> dict[str, NodeView]:
    """By the address of the node."""
    look = ray.remote(num_cpus=0, max_retries=0)(_look)
    given = (config.model_dump(mode="json"), out, marker)
    asked = {
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote(*given): name
        for node_id, name in nodes.items()
    }
    ray.wait(list(asked), num_returns=len(asked), timeout=LOOK_S)
    return {name: _view(reference) for reference, name in asked.items()}


def _view(reference: Any) -> NodeView:
    try:
        return NodeView.model_validate(ray.get(reference, timeout=0.1))
    except ray.exceptions.GetTimeoutError:
        ray.cancel(reference, force=True)
        reason = f"no answer within {LOOK_S:.0f} s: is it overloaded, or cut off?"
    except ray.exceptions.RayError as error:
        reason = reason_of_ray(error)
    return NodeView(versions=versions(), problems=(reason,))


def reason_of_ray(error: ray.exceptions.RayError) -> str:
    """What went wrong there, in a line."""
    if "No module named 'threestage'" in str(error):
        return "it has no threestage: install the version that is here"
    return last_line(error)[:300]


def _look(settings: dict[str, Any], out: str, marker: str | None) -> dict[str, Any]:
    """On a node."""
    config = Config.model_validate(settings)
    storage.configure(config.storage)
    if marker is not None and not os.path.exists(marker):
        problem = f"--out {out} is another folder there: give s3://bucket/prefix, or one that all nodes share"
        return {"versions": versions(), "problems": [problem]}
    outcomes = merged(try_all(places(config, out)))
    problems = [f"{outcome.name}: {outcome.problem}" for outcome in outcomes if outcome.problem]
    return {"versions": versions(), "problems": problems}


# ---- An MLflow store that is a file


def own_file(config: Config) -> CheckResult | None:
    """What is to be said of an MLflow store that is a file: nothing on a cluster of this machine alone."""
    path = sqlite_path(resolve_uri(config.registry.tracking_uri))
    others = len(alive_nodes()) - 1
    if path is None or (JOB not in os.environ and not others):
        return None
    mend = "set registry.tracking_uri (or MLFLOW_TRACKING_URI) to an MLflow server"
    line = CheckResult("registry.tracking_uri for others", f"sqlite:///{path}")
    if JOB in os.environ:
        problem = f"sqlite:///{path} is a file where the job runs, and is lost with it; {mend}"
        return line._replace(problem=problem, code="mlflow/local-file")
    return line._replace(
        warning=f"sqlite:///{path} is a file of this machine: the run writes it, no other node reads it: {mend}"
    )


# ---- A measured step


def measure_there(specification: StepSpecification) -> Iterator[MeasuredStep]:
    """`measure` as a task that takes what a worker takes, if there is room for it now."""
    stages, cluster = specification.config.stage_names, specification.config.cluster
    if not room_for_one(cluster):
        for stage in stages:
            yield MeasuredStep(stage=stage, warning="not measured: the cluster has no room for a worker now")
        return
    task = ray.remote(_measure).options(**cluster.task_options, num_returns="streaming", max_retries=0)
    results = task.remote(specification.model_dump(mode="json"))
    limit = START_S + specification.stage_seconds + STEP_S
    for stage in stages:
        if not ray.wait([results], timeout=limit)[0]:
            ray.cancel(results, force=True)
            yield too_slow(stage)
            return
        try:
            yield MeasuredStep.model_validate(ray.get(next(results)))
        except ray.exceptions.RayError as error:
            yield MeasuredStep(stage=stage, problem=f"no step could be computed on the cluster: {reason_of_ray(error)}")
            return
        limit = specification.stage_seconds + STEP_S


def _measure(specification: dict[str, Any]) -> Iterator[dict[str, Any]]:
    found = StepSpecification.model_validate(specification)
    storage.configure(found.config.storage)
    for measured in measure_steps(found):
        yield measured.model_dump(mode="json")


# ---- A measured step, for the plan of a sweep

MEASURING_SECONDS = 600.0  # in which a step is measured, once there is room; torch.compile takes minutes


def remote_step_time(config: Config, stage: StageName, manifest_version: int, warn: Warn = print) -> StepTime:
    """`measure_step` as a task that takes what one worker takes, so on a device that will train.

    Says after `cluster.report_after_s`, and again, that it waits. Raises InputError as `measure_step` does, StageFailure
    when the step could not be measured (a GPU's memory is too small …) or there was no room for it for
    `cluster.start_timeout_s`.
    """
    cluster, began = config.cluster, time.monotonic()
    task = ray.remote(_measure_step).options(**cluster.task_options)
    result = task.remote(config.model_dump(mode="json"), stage, manifest_version)
    while not ray.wait([result], timeout=cluster.report_after_s)[0]:
        waited = time.monotonic() - began
        device = resources_text(worker_takes(cluster))
        what = f"{stage}: a step is to be measured on {device}; waiting for {waited:.0f} s for room or its end"
        if waited > cluster.start_timeout_s + MEASURING_SECONDS:
            ray.cancel(result, force=True)
            raise StageFailure(
                f"{what}: is the cluster busy? Try again, or ask for less with cluster.cpus_per_worker", "ray/no-room"
            )
        warn(what)
    try:
        return ray.get(result)
    except ray.exceptions.RayError as error:
        if isinstance(cause := cause_of(error), InputError):
            raise cause from error
        raise StageFailure(
            f"{stage}: no step could be trained to measure it: {first_line(error)}",
            code_of(error) or "stage/not-measured",
        ) from error


def _measure_step(settings: dict[str, Any], stage: StageName, manifest_version: int) -> StepTime:
    """On a worker's process: threads and memory as worker.py has them."""
    disable_malloc_trim()
    config = Config.model_validate(settings)
    storage.configure(config.storage)
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
    return measure_step(config, stage, load_manifest(config.data.root, manifest_version), default_device())


# ---- The connection, and the versions of this process


def connect_to_check(name: str, cluster: ClusterSettings, connection: contextlib.ExitStack) -> CheckOutcome:
    """Connects this process, until `connection` is closed. Raises InputError like `probe_cluster` and `connected`."""
    connection.enter_context(connected(cluster))
    return probe_cluster(name, ray.get_runtime_context().gcs_address)


def versions() -> dict[str, str]:
    """Of this process."""
    return {
        "threestage": __version__,
        "Ray": ray.__version__,
        "Python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
    }
