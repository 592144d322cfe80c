"""`threestage predict` as a Ray Data job: parts of the input are predicted by some actors, its listing is done by tasks."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import ray
import ray.exceptions

from threestage.data import storage
from threestage.models.export import load_model
from threestage.on_ray.causes import ours
from threestage.on_ray.nodes import warn_of_folders
from threestage.on_ray.patience import await_resources, noticing_silence
from threestage.on_ray.predict_pool import Predict, reports_of
from threestage.on_ray.settings import ClusterSettings
from threestage.on_ray.tasks import in_tasks
from threestage.on_ray.train import connected
from threestage.pool_prediction import predict_files
from threestage.predict import ModelFiles, PredictReport, PredictSettings, predict_input
from threestage.prediction_output import Predictions, PredictionTask
from threestage.prediction_parts import Part
from threestage.pseudo_masks import FileReport
from threestage.training.worker import default_device

MODEL_FOLDER = "model"


def predict_on_ray(
    model: ModelFiles,
    source: str,
    out: str,
    settings: PredictSettings,
    cluster: ClusterSettings,
    show: Callable[[int, int], None] = lambda done, total: None,
    warn: Callable[[str], None] = print,
) -> PredictReport:
    """`threestage.predict.predict_input` on a cluster, which is connected to when there is work for it.

    Raises InputError, OSError and StageFailure as that does, and StageFailure when an actor fails for good or the
    cluster has no room.
    """
    with contextlib.ExitStack() as stack:

        def connect() -> None:
            if not ray.is_initialized():
                stack.enter_context(connected(cluster))

        def each(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
            if len(items) < 2:
                yield from map(function, items)
                return
            connect()
            yield from in_tasks(function, items, cluster.max_failures)

        def run(files: ModelFiles, task: PredictionTask, parts: Sequence[Part]) -> Iterator[FileReport]:
            connect()
            _warn_of_traps(task, cluster, warn)
            await_resources("predict", cluster, warn)
            folder = _share(files, task)
            with noticing_silence("predict", cluster, warn) as heard:
                for report in reports_of(parts, partial(_open, folder, task.model_dump(mode="json")), cluster):
                    heard()
                    yield report

        try:
            return predict_input(model, source, out, settings, show, run, each)
        except ray.exceptions.RayError as error:
            raise ours(error, "predict: ") from error


def _warn_of_traps(task: PredictionTask, cluster: ClusterSettings, warn: Callable[[str], None]) -> None:
    if not cluster.gpus_per_worker and ray.cluster_resources().get("GPU"):
        warn("the cluster has GPUs and this command uses none: --gpus-per-worker 1")
    warn_of_folders([task.source, task.destination], warn)


def _share(files: ModelFiles, task: PredictionTask) -> str:
    """The model as a folder of the output, which every node reaches, also those that come later."""
    folder = storage.join(task.destination, MODEL_FOLDER)
    for name, content in files.items():
        storage.write_bytes(storage.join(folder, name), content)
    return folder


def _open(model: str, task: dict[str, Any]) -> Predict:
    device = default_device()
    network, card = load_model(model)
    settings = PredictionTask.model_validate(task)
    network, product = network.to(device), Predictions(settings, card)
    return lambda parts: predict_files(network, settings, list(map(Part.model_validate_json, parts)), device, product)
