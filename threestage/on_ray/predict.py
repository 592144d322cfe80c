"""Pseudo-masks of the whole pool as a Ray Data job: a row is one image file of the data set."""

from collections.abc import Sequence
from typing import Any

import ray.data
import torch

from threestage.data.records import DataFile
from threestage.models.export import load_model
from threestage.on_ray.settings import ClusterSettings
from threestage.pseudo_masks import PoolTask, Statistics, predict_file
from threestage.training.worker import default_device


def predict_pool(model: str, task: PoolTask, files: Sequence[DataFile], cluster: ClusterSettings) -> Statistics:
    """Predict all files on `cluster.predictors` processes. Each file is published whole, so a rerun predicts the rest."""
    rows = ray.data.from_items([{"file": file.model_dump_json()} for file in files], override_num_blocks=len(files))
    predicted = rows.map(
        _Predictor,
        fn_constructor_args=(model, task.model_dump(mode="json"), cluster.cpus_per_worker),
        compute=ray.data.ActorPoolStrategy(size=min(cluster.predictors, len(files))),
        num_cpus=cluster.cpus_per_worker,
        num_gpus=cluster.gpus_per_worker,
    )
    statistics = Statistics()
    for row in predicted.iter_rows():
        statistics += Statistics.model_validate_json(row["statistics"])
    return statistics


class _Predictor:
    """An actor that holds the network and predicts one file after the other."""

    def __init__(self, model: str, task: dict[str, Any], cpus: float) -> None:
        torch.set_num_threads(max(1, int(cpus)))
        self._device = default_device()
        self._network = load_model(model)[0].to(self._device)
        self._task = PoolTask.model_validate(task)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        file = DataFile.model_validate_json(row["file"])
        return {"statistics": predict_file(self._network, self._task, file, self._device).model_dump_json()}
