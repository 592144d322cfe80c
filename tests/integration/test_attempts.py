"""What ends its process is tried again, and fails the job when it does so each time; what goes well meanwhile counts."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import ray.exceptions

from tests.refusals import refused
from threestage.data.pool import PoolFile
from threestage.errors import StageFailure
from threestage.prediction.pseudo_masks import FileReport, Statistics
from threestage.ray_backend.failures import first_line
from threestage.ray_backend.predict import Predict, reports_of
from threestage.ray_backend.tasks import in_tasks
from threestage.ray_settings import ClusterSettings

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("default"),  # Ray's own
]


def ends_its_process_at(name: str, times: int, folder: Path) -> Callable[[str], str]:
    def work(item: str) -> str:
        if item == name and len(list(folder.iterdir())) < times:
            (folder / str(len(list(folder.iterdir())))).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    return work


def predictor(work: Callable[[str], str]) -> Callable[[], Predict]:
    def predict(files: Sequence[str]) -> Iterator[FileReport]:
        for file in map(PoolFile.model_validate_json, files):
            nothing = Statistics.of(1, 0, [], 2)
            yield FileReport(
                file=work(file.uri), statistics=nothing, max_height=1, max_width=1, labelled_ids=(), rejects=()
            )

    return lambda: predict


FILES = [PoolFile(uri=f"{number}.parquet", rows=1, digest="d") for number in range(40)]
CLUSTER = ClusterSettings(max_failures=2, predictors=2)


def test_files_that_end_their_predictor_once_are_begun_again(ray_cluster: None, tmp_path: Path) -> None:
    opened = predictor(ends_its_process_at("21.parquet", 1, tmp_path))
    assert {report.file for report in reports_of(FILES, opened, CLUSTER)} == {file.uri for file in FILES}


def test_files_that_always_end_their_predictor_fail_the_job(ray_cluster: None, tmp_path: Path) -> None:
    opened = predictor(ends_its_process_at("21.parquet", 9, tmp_path))
    found: list[str] = []
    with pytest.raises(ray.exceptions.RayError) as raised:
        for report in reports_of(FILES, opened, CLUSTER):
            found.append(report.file)
    assert first_line(raised.value).startswith(
        "21.parquet: the process that works on it or on what follows was lost 3 times"
    )
    assert len(list(tmp_path.iterdir())) == 3 and "21.parquet" not in found and len(found) > 20


def test_an_item_that_ends_its_task(ray_cluster: None, tmp_path: Path) -> None:
    with refused("ray/process-lost", "x: ", "2 times", "the same command continues", error=StageFailure):
        list(in_tasks(ends_its_process_at("x", 9, tmp_path), ["a", "x", "b"], max_failures=1))
    assert len(list(tmp_path.iterdir())) == 2
