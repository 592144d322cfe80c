"""The pipeline on a Ray cluster: every stage is a Ray Train run, every set of pseudo-masks a Ray Data job."""

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import ray
import ray.exceptions
import ray.train
from ray.train import CheckpointConfig, DataConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from threestage import pipeline
from threestage.config import Config
from threestage.data import storage
from threestage.data.pool import PoolFile
from threestage.errors import StageFailure
from threestage.on_ray.data import stream_options, unlabelled_stream
from threestage.on_ray.predict import predict_pool
from threestage.on_ray.settings import ClusterSettings
from threestage.on_ray.tasks import in_tasks
from threestage.on_ray.worker import train_worker
from threestage.pseudo_masks import FileReport, PoolTask
from threestage.stages import StageTask

TRAIN_NAME = "checkpoints"
SPARE_CPUS = 3  # besides the workers': one reads the pool, one is the controller's, one predicts
POLL_SECONDS = 0.5

Show = Callable[[str, Mapping[str, float]], None]  # (stage, row of metrics)


def run_on_ray(
    config: Config,
    out: str,
    show: Show,
    warn: pipeline.Warn = print,
    record: pipeline.Record = lambda outcome: None,
    watch: pipeline.Watch = lambda what, done, total: None,
) -> dict[str, Any]:
    """Run the three stages on a cluster; returns what results.json holds."""

    def run_stage(task: StageTask) -> None:
        train_on_ray(task, show)

    def predict(model: str, task: PoolTask, files: Sequence[PoolFile]) -> Generator[FileReport]:
        try:
            yield from predict_pool(model, task, files, config.cluster)
        except ray.exceptions.RayError as error:
            raise StageFailure(f"pseudo-masks: {_root_cause(error)}; the same command goes on") from error

    def each(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        if len(items) < 2:
            return map(function, items)
        return in_tasks(function, items, config.cluster.max_failures, at_once=1 + config.cluster.predictors)

    with connected(config.cluster):
        _warn_of_traps(config, out, warn)
        return pipeline.run(config, out, run_stage, predict, record, warn, each, watch)


def _warn_of_traps(config: Config, out: str, warn: pipeline.Warn) -> None:
    if not config.cluster.gpus_per_worker and ray.cluster_resources().get("GPU"):
        warn("the cluster has GPUs and this run uses none: --set cluster.gpus_per_worker=1")
    if len(ray.nodes()) > 1 and not (storage.is_s3(out) and storage.is_s3(config.data.root)):
        warn(
            f"the cluster has {len(ray.nodes())} nodes: {out} and {config.data.root} must be folders that all of them share"
        )


@contextlib.contextmanager
def connected(cluster: ClusterSettings) -> Iterator[None]:
    """A connection to the cluster of the settings, or to one started on this machine; an existing one is kept."""
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(cluster.start_timeout_s))
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")
    quiet_ray_data()
    if ray.is_initialized():
        yield
        return
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is not None:
        options["runtime_env"] = {"env_vars": storage.environment(storage.StorageSettings())}
    else:
        wanted = int(cluster.workers * cluster.cpus_per_worker + cluster.predictors * cluster.cpus_per_worker)
        options |= {"num_cpus": max(os.cpu_count() or 1, wanted + SPARE_CPUS), "dashboard_host": "127.0.0.1"}
    ray.init(address=address or "local", **options)
    try:
        yield
    finally:
        ray.shutdown()


def train_on_ray(task: StageTask, show: Show) -> None:
    """Train one stage with Ray Train; it goes on from the last checkpoint in the stage's folder.

    Raises StageFailure with the worker's own words when the stage could not be trained.
    """
    cluster = task.settings().cluster
    progress = _Progress.options(num_cpus=0).remote()  # type: ignore[attr-defined]
    files, path = storage.filesystem(task.folder)
    datasets = {}
    if task.stage != "stage1":
        # Ray calls it whenever it starts the workers, so that one restarted goes on where the last checkpoint is
        datasets["unlabelled"] = partial(_stream_from_last_checkpoint, task)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "task": task.model_dump(mode="json"),
            "progress": progress,
            "threads": cluster.cpus_per_worker,
        },
        scaling_config=ScalingConfig(
            num_workers=cluster.workers,
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker=_resources(cluster),
        ),
        run_config=RunConfig(
            name=TRAIN_NAME,
            storage_path=path,
            storage_filesystem=files,
            failure_config=FailureConfig(
                max_failures=cluster.max_failures, controller_failure_limit=cluster.max_failures
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
        datasets=datasets,
        dataset_config=DataConfig(execution_options=stream_options(cluster.workers)),
    )
    with _shown(progress, lambda row: show(task.stage, row)):
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise StageFailure(f"{task.stage}: {_root_cause(error)}") from error


def _stream_from_last_checkpoint(task: StageTask) -> ray.data.Dataset:
    return unlabelled_stream(task, last_checkpoint_step(task.folder))


def _resources(cluster: ClusterSettings) -> dict[str, float]:
    resources = {"CPU": cluster.cpus_per_worker}
    return resources | ({"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {})


def last_checkpoint_step(folder: str) -> int:
    """The step of the newest checkpoint that Ray Train's snapshot in a stage's folder names; 0 without one."""
    snapshot = storage.join(folder, TRAIN_NAME, "checkpoint_manager_snapshot.json")
    if not storage.exists(snapshot):
        return 0
    latest = storage.read_json(snapshot).get("latest_checkpoint_result") or {}
    return int(latest.get("metrics", {}).get("step", 0))


def _root_cause(error: BaseException) -> str:
    """The last line of the innermost error: what the worker said, without Ray's trace of it."""
    if isinstance(error, ray.exceptions.RayTaskError):
        error = error.cause
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def quiet_ray_data() -> None:
    """The CLI shows progress itself."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    for library in ("ray.data", "ray.train"):
        logging.getLogger(library).setLevel(logging.WARNING)


@ray.remote
class _Progress:
    """Rows on their way from the first worker to the driver's screen."""

    def __init__(self) -> None:
        self._rows: list[dict[str, float]] = []

    def push(self, row: dict[str, float]) -> None:
        self._rows.append(row)

    def take(self) -> list[dict[str, float]]:
        rows, self._rows = self._rows, []
        return rows


@contextlib.contextmanager
def _shown(progress: Any, show: Callable[[Mapping[str, float]], None]) -> Iterator[None]:
    """Show the rows that arrive at the actor while the block runs."""
    stop = threading.Event()

    def drain() -> None:
        for row in ray.get(progress.take.remote()):
            show(row)

    def poll() -> None:
        while not stop.wait(POLL_SECONDS):
            drain()

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
        drain()
    finally:
        stop.set()
        thread.join()
        ray.kill(progress)
