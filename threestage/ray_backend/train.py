"""The pipeline on a Ray cluster: every stage is a Ray Train run, every set of pseudo-masks a Ray Data job."""

import contextlib
import secrets
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from functools import partial
from typing import Any

import ray
import ray.exceptions
import ray.train
from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from threestage.config import Config, StageName
from threestage.data import storage
from threestage.data.outages import tries
from threestage.data.parallel import in_daemon_thread
from threestage.data.pool import PoolFile
from threestage.errors import InputError, StageFailure, Stopped, Warn, reason_of
from threestage.prediction.pseudo_masks import FileReport, PoolTask
from threestage.ray_backend import ray_internals
from threestage.ray_backend.capacity import room_there, warn_of_folders
from threestage.ray_backend.connect import address_of, connected
from threestage.ray_backend.failures import FAILED, first_line, last_line, to_stage_failure
from threestage.ray_backend.heartbeat import MonitorUpdate, start_monitor
from threestage.ray_backend.pool_stream import stream_options, unlabelled_stream
from threestage.ray_backend.predict import predict_pool
from threestage.ray_backend.stall_monitor import Membership, StallMonitor
from threestage.ray_backend.tasks import map_function
from threestage.ray_backend.worker import train_worker
from threestage.run.backend import Item, OnMetrics, Result, RunCallbacks
from threestage.run.stages import StageTask
from threestage.termination import sigterm_noted
from threestage.training.checkpoint import Checkpoints, Pointer, checkpoint_folder

POLL_SECONDS = 0.5
SAVE_SECONDS = 12.0  # a driver that is to end waits so long for a checkpoint

TrainWorker = Callable[[dict[str, Any]], None]


class RayBackend:
    """Stages as Ray Train runs, the pool as Ray Data jobs, on the cluster that this process is connected to."""

    def __init__(self, config: Config, on: RunCallbacks) -> None:
        self._cluster, self._on = config.cluster, on

    def train_stage(self, task: StageTask) -> None:
        train_on_ray(task, self._on.on_metrics, self._on.on_warning)

    def predict_pool(self, model: str, task: PoolTask, files: Sequence[PoolFile]) -> Generator[FileReport]:
        try:
            yield from predict_pool(model, task, files, self._cluster, self._on.on_warning)
        except ray.exceptions.RayError as error:
            raise to_stage_failure(error, f"pseudo-masks: {first_line(error)}", FAILED) from error

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        return map_function(self._cluster, at_once=1 + self._cluster.number_of_predictors)(function, items)


@contextlib.contextmanager
def on_cluster(config: Config, out: str, on: RunCallbacks) -> Iterator[RayBackend]:
    """The backend of a run in `out`, connected meanwhile."""
    first = not ray.is_initialized()  # what is connected already was warned then
    with connected(config.cluster):
        if first:
            warn_of_traps(config, out, on.on_warning)
        yield RayBackend(config, on)


def warn_of_traps(config: Config, out: str, warn: Warn) -> None:
    if address_of(config.cluster) is not None:
        try:
            warning = room_there(config).warning
        except InputError as error:
            warning = f"{error.message}; the run waits for room"
        if warning is not None:
            warn(warning)
    elif not config.cluster.gpus and ray.cluster_resources().get("GPU"):
        warn("this machine has GPUs and this run uses none: --set cluster.gpus_per_worker=1")
    for name in config.stage_names:
        warn_of_uneven_batch(config, name, warn)
    unlabelled = [config.data.unlabelled] if config.data.unlabelled else []
    warn_of_folders([out, config.data.root, *unlabelled], warn)


def warn_of_uneven_batch(config: Config, stage: StageName, warn: Warn) -> None:
    """The stream gives all workers the same number of images."""
    workers, batch = config.cluster.most_workers, config.stage(stage).unlabelled_batch
    if config.training.batch_scope == "global" and (rest := -batch % workers):
        warn(
            f"{stage}.unlabelled_batch={batch}: {workers} workers cannot share it evenly; each step reads {batch + rest} images "
            f"and trains on {batch} of them. A multiple of {workers} uses all"
        )


def train_on_ray(task: StageTask, show: OnMetrics, warn: Warn, function: TrainWorker = train_worker) -> None:
    """Train one stage with Ray Train; it goes on from the last checkpoint in the stage's folder.

    `function` is what every worker runs. A worker or a node that is lost costs a restart of the group, which Ray sees to; a
    lost controller costs a new one. Raises StageFailure with the worker's own words when the stage could not be trained,
    and when the cluster has had no room for it for `cluster.start_timeout_s`.
    """
    failures, driver = 0, secrets.token_hex(8)
    while True:
        try:
            _watch_fit(task, partial(show, task.stage), warn, function, driver)
            return
        except ray.train.TrainingFailedError as error:
            raise to_stage_failure(error, f"{task.stage}: {last_line(error)}", "stage/training-failed") from error
        except ray.exceptions.RayActorError as error:
            failures += 1
            if 0 <= task.settings().cluster.max_failures < failures:
                raise StageFailure(
                    f"{task.stage}: Ray Train's controller was lost {failures} times: {error}", "ray/process-lost"
                ) from error
            warn(f"{task.stage}: Ray Train's controller was lost; the stage resumes from its last checkpoint")


def _watch_fit(
    task: StageTask,
    show: Callable[[Mapping[str, float]], None],
    warn: Warn,
    function: TrainWorker,
    driver: str,
) -> None:
    """Ray Train's fit in a thread, while this one passes on what the workers say and reports what is missing."""
    cluster = task.settings().cluster
    monitor = start_monitor()
    trainer = make_trainer(task, monitor, function, driver)
    patience, membership = StallMonitor(task.stage, cluster, warn), Membership(cluster)
    training = in_daemon_thread(trainer.fit)
    try:
        with sigterm_noted() as terminated:
            while not training.done() and not terminated.is_set():
                wait([training], POLL_SECONDS)
                if membership.look():
                    monitor.request_checkpoint.remote()
                news = ray.get(monitor.news.remote())
                _pass_on(news, task.stage, show, warn)
                if not training.done():
                    patience.look(news.signs)
            if terminated.is_set():
                raise _stopped(task.stage, monitor, training)
        _pass_on(ray.get(monitor.news.remote()), task.stage, show, warn)
        training.result()
    finally:
        if not training.done():
            _abort(monitor)
        ray.kill(monitor)


def _stopped(stage: str, monitor: Any, training: Future[Any]) -> Stopped:
    """The end of a driver that got SIGTERM: once the workers have saved a checkpoint, if they can within SAVE_SECONDS."""
    saved, deadline = False, time.monotonic() + SAVE_SECONDS
    wanted = ray.get(monitor.request_checkpoint.remote())
    while not training.done() and not saved and time.monotonic() < deadline:
        wait([training], POLL_SECONDS)
        saved = ray.get(monitor.requests_met.remote()) >= wanted
    checkpoint = "a checkpoint is saved" if saved else "no checkpoint could be saved in time"
    return Stopped(f"{stage}: stopped by SIGTERM; {checkpoint}, the same command continues", "stage/stopped")


def _abort(monitor: Any) -> None:
    """End what Ray Train has started; without it `fit` returns."""
    controller = ray.get(monitor.controller.remote())
    if controller is not None:
        ray_internals.abort(controller)


def _pass_on(news: MonitorUpdate, stage: str, show: Callable[[Mapping[str, float]], None], warn: Warn) -> None:
    for row in news.rows:
        show(row)
    for warning in news.warnings:
        warn(warning)
    if news.failure is not None:
        raise type(news.failure)(f"{stage}: {news.failure.message}", news.failure.code)


def _introduce(monitor: Any, controller: Any) -> None:
    """In the controller, so that the driver can end it."""
    ray.get(monitor.introduce.remote(controller))


def make_trainer(task: StageTask, monitor: Any, function: TrainWorker, driver: str) -> TorchTrainer:
    """Ray Train keeps nothing of ours: the stage's checkpoints are our own files. `driver` names who asks for it."""
    cluster = task.settings().cluster
    files, path = storage.filesystem(task.folder)
    datasets = {}
    if task.pool is not None:
        # Ray calls it whenever it starts the workers, so that one restarted goes on where the last checkpoint is
        datasets["unlabelled"] = partial(_stream_from_last_checkpoint, task, monitor)
    elastic = cluster.least_workers < cluster.most_workers
    return TorchTrainer(
        function,
        train_loop_config={
            "task": task.model_dump(mode="json"),
            "monitor": monitor,
            "driver": driver,
            "threads": cluster.cpus_per_worker,
        },
        torch_config=TorchConfig(
            backend=None if cluster.backend == "auto" else cluster.backend, timeout_s=cluster.collective_timeout_s
        ),
        scaling_config=ScalingConfig(
            num_workers=(cluster.least_workers, cluster.most_workers) if elastic else cluster.most_workers,
            use_gpu=cluster.gpus > 0,
            resources_per_worker=cluster.worker_resources,
            placement_strategy=cluster.placement,
            accelerator_type=cluster.accelerator,
            elastic_resize_monitor_interval_s=cluster.resize_after_s,
        ),
        run_config=RunConfig(
            name="ray_train",
            storage_path=path,
            storage_filesystem=files,
            failure_config=FailureConfig(max_failures=cluster.max_failures, controller_failure_limit=-1),
            callbacks=ray_internals.controller_callbacks(partial(_introduce, monitor)),
        ),
        datasets=datasets,
        dataset_config=DataConfig(execution_options=stream_options(cluster.most_workers)),
    )


def _stream_from_last_checkpoint(task: StageTask, monitor: Any) -> ray.data.Dataset:
    """Runs in the controller, for which an error is the end: an outage is waited out, any other error ends the stage."""
    checkpoints = Checkpoints(checkpoint_folder(task.folder))
    try:
        for attempt in tries(f"{task.stage}: the unlabelled stream", monitor.warn.remote):
            with attempt:
                stream = unlabelled_stream(task, checkpoints.latest() or Pointer())
    except OSError as error:
        ray.get(monitor.fail.remote(checkpoints.refusal(error) or StageFailure(reason_of(error), FAILED)))
        raise
    except StageFailure as error:
        ray.get(monitor.fail.remote(error))
        raise
    return stream
