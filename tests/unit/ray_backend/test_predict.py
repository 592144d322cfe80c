"""What Ray is asked for where files are predicted; no Ray is started. What comes of it: tests/integration."""

import json
from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import MagicMock, call

import numpy as np
import pytest
import ray.data

from tests.refusals import refused
from threestage.data.pool import PoolFile
from threestage.errors import InputError, StageFailure
from threestage.ray_backend import predict as predict
from threestage.ray_settings import ClusterSettings


class Rows:
    """Stands for Ray's data set, which would start a cluster."""

    def __init__(self, rows: list[dict[str, str]], override_num_blocks: int) -> None:
        assert len(rows) == override_num_blocks
        self.rows, self.context = rows, MagicMock()
        self.options: dict[str, Any] = {}

    def map_batches(self, function: type, **options: Any) -> "Rows":
        ray.data.Dataset.map_batches(MagicMock(), function, **options)  # refuses what it cannot do
        self.options = options
        return self

    def iter_batches(self, **options: Any) -> Iterator[dict[str, list[str]]]:
        yield from ()


def asked(monkeypatch: pytest.MonkeyPatch, files: int, **cluster: Any) -> Rows:
    made: list[Rows] = []

    def from_items(rows: list[dict[str, str]], override_num_blocks: int) -> Rows:
        made.append(Rows(rows, override_num_blocks))
        return made[0]

    monkeypatch.setattr("ray.data.from_items", from_items)
    pool = [PoolFile(uri=f"{i}.parquet", rows=1, digest="d") for i in range(files)]
    monkeypatch.setattr(predict, "retry_budget", MagicMock())
    assert list(predict.reports_of(pool, MagicMock(), ClusterSettings(**cluster))) == []
    return made[0]


def test_memory_is_no_resource_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    options = asked(monkeypatch, 2, resources_per_worker={"memory": 1e9, "fpga": 1}).options
    assert (options["memory"], options["resources"]) == (1e9, {"fpga": 1})
    options = asked(monkeypatch, 2).options
    assert (options["num_cpus"], options["num_gpus"], options["memory"], options["resources"]) == (1, 0, None, {})


def test_predictors_may_have_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    options = asked(monkeypatch, 2, gpus_per_worker=1, accelerator="H100").options
    assert (options["num_gpus"], options["accelerator_type"]) == (1, "H100")


@pytest.mark.parametrize(("files", "workers"), [(1, 1), (16, 1), (100, 1), (1000, 2), (5000, 100)])
def test_every_file_is_in_one_task_in_order(monkeypatch: pytest.MonkeyPatch, files: int, workers: int) -> None:
    tasks = [json.loads(row["files"]) for row in asked(monkeypatch, files, workers=workers).rows]
    assert [PoolFile.model_validate_json(file).uri for task in tasks for file in task] == [
        f"{i}.parquet" for i in range(files)
    ]
    sizes = {len(task) for task in tasks}
    assert max(sizes) - min(sizes) <= 1


def test_a_predictor_tells_each_report_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "disable_malloc_trim", lambda: None)
    seen: list[Sequence[str]] = []

    def predicted(files: Sequence[str]) -> Iterator[Any]:
        seen.append(files)
        for file in files:
            yield MagicMock(model_dump_json=lambda file=file: f"report of {file}")

    attempts = MagicMock()
    opened = MagicMock(return_value=predicted)
    predictor = predict._Predictor(opened, 1, attempts)
    files = [json.dumps({"uri": name}) for name in "ab"]
    reports = predictor({"task": np.array([7]), "files": np.array([json.dumps(files)])})
    assert seen == [] and next(reports) == {"report": [f"report of {files[0]}"]}
    assert attempts.mock_calls == [call.begin(7, ["a", "b"]), call.done(7, 1)]
    assert list(reports) == [{"report": [f"report of {files[1]}"]}] and seen == [files]
    assert attempts.mock_calls[2:] == [call.done(7, 2)] and opened.call_count == 1


def test_why_a_predictor_could_not_be_opened_or_go_on_is_told() -> None:
    rows = {"task": np.array([0]), "files": np.array([json.dumps(['{"uri": "a"}'])])}
    with refused("ray/task-failed", "FileNotFoundError", "model.json", error=StageFailure):
        next(
            predict._Predictor(MagicMock(side_effect=FileNotFoundError(2, "gone", "model.json")), 1, MagicMock())(rows)
        )
    wrong = InputError("fix it", "models/no-model")
    with refused("models/no-model", "fix it"):
        next(predict._Predictor(lambda: MagicMock(side_effect=wrong), 1, MagicMock())(rows))
