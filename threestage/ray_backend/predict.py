"""Predict files as a Ray Data job: the pool's pseudo-masks for a run, and the images of `threestage predict`.

A row of the job is some files of images; one of a few actors, each with the network, predicts it.
"""

import json
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import numpy as np
import ray
import ray.data
import ray.exceptions
import torch

from threestage.allocator import disable_malloc_trim
from threestage.data import storage
from threestage.data.pool import PoolFile
from threestage.errors import Warn
from threestage.mlflow_sync.records import RegistrySettings
from threestage.models.export import load_model
from threestage.prediction.input_parts import Part
from threestage.prediction.pool_prediction import predict_files
from threestage.prediction.predict import (
    ModelFiles,
    PredictionTask,
    PredictReport,
    PredictSettings,
    estimator_of,
    network_of,
    predict_input,
    predict_parts,
    read_model,
)
from threestage.prediction.pseudo_masks import FileReport, PoolTask
from threestage.ray_backend.capacity import warn_of_folders
from threestage.ray_backend.connect import connected_on_demand, gpus_taken
from threestage.ray_backend.failures import RetryBudget, retry_budget, to_user_error, translate_ray_errors
from threestage.ray_backend.stall_monitor import await_resources, warn_if_stalled
from threestage.ray_backend.tasks import map_function
from threestage.ray_settings import ClusterSettings
from threestage.training.worker import default_device

# ---- Predict files on the cluster; the pool of a run

MAX_TASKS = 1024
TASKS_PER_PREDICTOR = 16

Predict = Callable[[Sequence[str]], Iterator[FileReport]]
"""Files as JSON → their reports, each as soon as the file is published."""


def predict_pool(
    model: str, task: PoolTask, files: Sequence[PoolFile], cluster: ClusterSettings, warn: Warn = print
) -> Iterator[FileReport]:
    """Predict all files of the pool, see `watched_reports`."""
    open_predictor = partial(_open_pool, model, task.model_dump(mode="json"))
    return watched_reports("pseudo-masks", files, open_predictor, cluster, warn)


def predict_pool_connected(
    model: str, task: PoolTask, files: Sequence[PoolFile], cluster: ClusterSettings, warn: Warn = print
) -> Iterator[FileReport]:
    """`predict_pool` on a cluster that is connected to meanwhile. Raises StageFailure when an actor fails for good or the cluster
    has no room."""
    cluster = gpus_taken(cluster)
    with connected_on_demand(cluster) as connect:
        connect()
        warn_of_folders([model, task.destination], warn)
        try:
            yield from predict_pool(model, task, files, cluster, warn)
        except ray.exceptions.RayError as error:
            raise to_user_error(error, "predict: ") from error


def watched_reports(
    what: str, files: Sequence[PoolFile], open_predictor: Callable[[], Predict], cluster: ClusterSettings, warn: Warn
) -> Iterator[FileReport]:
    """`reports_of`, once there is room for a predictor; what is missing is reported. Raises NoRoom."""
    await_resources(what, cluster, warn)
    with warn_if_stalled(what, cluster, warn) as heard:
        for report in reports_of(files, open_predictor, cluster):
            heard()
            yield report


def reports_of(
    files: Sequence[PoolFile], open_predictor: Callable[[], Predict], cluster: ClusterSettings
) -> Iterator[FileReport]:
    """Predict files on `cluster.number_of_predictors` processes, each with what `open_predictor` gives it; the report of
    each file comes as soon as it is published.

    An actor that dies is replaced and predicts its files again, but for those that it had published. Raises a RayError with an
    error of ours as its cause, also when the same files end it more than `cluster.max_failures` times.
    """
    if not files:
        return
    tasks = number_of_tasks(len(files), cluster)
    starts = [len(files) * task // tasks for task in range(tasks + 1)]
    parts = [[file.model_dump_json() for file in files[start:end]] for start, end in pairwise(starts)]
    rows = ray.data.from_items(
        [{"task": task, "files": json.dumps(part)} for task, part in enumerate(parts)], override_num_blocks=tasks
    )
    rows.context.target_max_block_size = 1  # a report leaves the actor alone, not with those of the files that follow
    with retry_budget(cluster.max_failures) as attempts:
        reports = rows.map_batches(
            _Predictor,
            batch_size=1,  # one row a task; with GPUs Ray wants a number
            fn_constructor_args=(open_predictor, cluster.cpus_per_worker, attempts),
            compute=ray.data.ActorPoolStrategy(
                size=min(cluster.number_of_predictors, len(files)), max_tasks_in_flight_per_actor=2
            ),
            **cluster.task_options,
        )
        blocks = reports.iter_batches(batch_size=None, prefetch_batches=0)  # prefetching holds a report back
        with closing(iter(blocks)) as found:
            for block in found:
                for report in block["report"]:
                    yield FileReport.model_validate_json(str(report))


def number_of_tasks(files: int, cluster: ClusterSettings) -> int:
    """Few enough that a task holds many files, which follow each other without a pause and keep the plan small; enough
    that the predictors finish together."""
    return min(files, MAX_TASKS, TASKS_PER_PREDICTOR * cluster.number_of_predictors)


class _Predictor:
    """An actor that holds the network."""

    def __init__(self, open_predictor: Callable[[], Predict], cpus: float, attempts: RetryBudget) -> None:
        self._open, self._cpus, self._attempts = open_predictor, cpus, attempts

    @cached_property
    def _predict(self) -> Predict:
        """Opened in the first task: what Ray Data tells of an actor that fails while it is made is not why."""
        disable_malloc_trim()
        torch.set_num_threads(max(1, int(self._cpus)))
        return self._open()

    def __call__(self, rows: dict[str, np.ndarray]) -> Iterator[dict[str, list[str]]]:
        """Predict the files of a task; their reports."""
        task, files = int(rows["task"][0]), json.loads(str(rows["files"][0]))
        with translate_ray_errors():
            self._attempts.begin(task, [json.loads(file)["uri"] for file in files])
            for number, report in enumerate(self._predict(files), 1):
                self._attempts.done(task, number)
                yield {"report": [report.model_dump_json()]}


def _open_pool(model: str, task: dict[str, Any]) -> Predict:
    device = default_device()
    network, settings = load_model(model)[0].to(device), PoolTask.model_validate(task)
    return lambda files: predict_files(network, settings, list(map(PoolFile.model_validate_json, files)), device)


# ---- threestage predict

MODEL_FOLDER = "model"


def predict_on_ray(
    model: ModelFiles,
    source: str,
    out: str,
    settings: PredictSettings,
    cluster: ClusterSettings,
    show: Callable[[int, int], None] = lambda done, total: None,
    warn: Warn = print,
) -> PredictReport:
    """`predict_input` on a cluster, which is connected to when there is work for it. Raises as that does, and StageFailure when
    an actor fails for good or the cluster has no room."""
    cluster = gpus_taken(cluster)
    with connected_on_demand(cluster) as connect:

        def run(files: ModelFiles, task: PredictionTask, parts: Sequence[Part]) -> Generator[FileReport]:
            connect()
            _warn_of_traps(task, cluster, warn)
            open_predictor = partial(_open, _share(files, task), task.model_dump(mode="json"))
            yield from watched_reports("predict", parts, open_predictor, cluster, warn)

        try:
            return predict_input(model, source, out, settings, show, run, map_function(cluster, connect))
        except ray.exceptions.RayError as error:
            raise to_user_error(error, "predict: ") from error


def _warn_of_traps(task: PredictionTask, cluster: ClusterSettings, warn: Warn) -> None:
    if not cluster.gpus and ray.cluster_resources().get("GPU"):
        warn("the cluster has GPUs and this command uses none: --gpus-per-worker 1")
    warn_of_folders([task.source, task.destination], warn)


def _share(files: ModelFiles, task: PredictionTask) -> str:
    """The model as a folder of the output, which every node reaches, also those that come later."""
    folder = storage.join(task.destination, MODEL_FOLDER)
    for name, content in files.items():
        storage.write_bytes(storage.join(folder, name), content)
    return folder


def _open(model: str, task: dict[str, Any]) -> Predict:
    device, files = default_device(), read_model(model, RegistrySettings())
    network, card = network_of(files, model)
    settings = PredictionTask.model_validate(task)
    network, estimator = network.to(device), estimator_of(files, model)
    return lambda parts: predict_parts(
        network, card, settings, list(map(Part.model_validate_json, parts)), device, estimator
    )
