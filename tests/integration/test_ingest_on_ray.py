"""Ingest as a Ray Data job, from one S3 prefix to another: the same data set as in this process, whatever fails."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.refusals import refused
from threestage.data import storage
from threestage.data.ingest import IngestSettings, ingest
from threestage.data.records import load_manifest
from threestage.data.rejects import read_rejects
from threestage.errors import StageFailure
from threestage.ray_backend.connect import connected
from threestage.ray_backend.tasks import in_tasks, ingest_on_ray
from threestage.ray_settings import ClusterSettings

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("default"),  # Ray's own
]


def upload(folder: str, count: int, bad: int = 0) -> None:
    for i in range(count):
        stream = io.BytesIO()
        pixels = np.random.default_rng(i).integers(0, 255, (20, 30, 3), np.uint8)
        Image.fromarray(pixels).save(stream, "JPEG")
        data = stream.getvalue()
        storage.write_bytes(f"{folder}/{i // 10}/{i:03d}.jpg", data[:-200] if i < bad else data)


def test_from_s3_to_s3(s3_root: str, ray_cluster: None) -> None:
    upload(f"{s3_root}/source", 20, bad=2)
    settings = IngestSettings(format="images", rows_per_file=4, max_bad_fraction=0.1)
    seen: list[tuple[int, int]] = []
    report = ingest_on_ray(
        f"{s3_root}/source", f"{s3_root}/ds", settings, ClusterSettings(), lambda *done: seen.append(done)
    )
    assert (report.added_images, report.bad, seen[-1]) == (18, 2, (20, 20))
    assert report.rejects_uri is not None
    assert [reject.image_id for reject in read_rejects(report.rejects_uri)] == ["0/000", "0/001"]
    here = ingest(f"{s3_root}/source", f"{s3_root}/here", settings)
    assert report.manifest == here.manifest == load_manifest(f"{s3_root}/ds")
    again = ingest_on_ray(f"{s3_root}/source", f"{s3_root}/ds", settings, ClusterSettings())
    assert (again.added_images, again.skipped, again.bad) == (0, 18, 2)


def fails_at_first(folder: str) -> str:
    marker = Path(folder) / "tried"
    if not marker.exists():
        marker.touch()
        raise OSError("503 Slow Down")
    return "done"


def always_fails(_: str) -> str:
    raise OSError("503 Slow Down")


def test_an_outage_of_the_store_is_a_retry_of_the_task(tmp_path: Path, ray_cluster: None) -> None:
    with connected(ClusterSettings()):
        assert list(in_tasks(fails_at_first, [str(tmp_path)], 3)) == ["done"]


def test_an_outage_that_lasts_fails_the_ingest(
    tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    monkeypatch.setattr("threestage.data.ingest.write_shard", _broken)
    cluster = ClusterSettings(max_failures=1)
    with refused("ray/task-failed", "ingest: ", "503 Slow Down", "the same command continues", error=StageFailure):
        ingest_on_ray(str(tmp_path), f"{tmp_path}/ds", IngestSettings(format="images", rows_per_file=1), cluster)
    assert not os.path.exists(tmp_path / "ds" / "manifest.json")


def _broken(*_: object) -> None:
    raise OSError("503 Slow Down")
