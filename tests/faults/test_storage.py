"""What object stores do to a run: outages, broken connections, vanished and broken objects, a kill in mid-write."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.conftest import tiny_config
from tests.faulty_s3 import Faults
from tests.refusals import refused
from tests.runs import run_local
from threestage.config import Config
from threestage.data import storage
from threestage.data.ingest import IngestSettings, ingest
from threestage.data.listing import list_images
from threestage.data.pool import load_pool
from threestage.data.rejects import read_rejects
from threestage.data.synthetic import write_scenes
from threestage.errors import StageFailure

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

BUCKET = "s3://bucket"
UNLABELLED = 120


@pytest.fixture
def config(faults: Faults, tmp_path: Path) -> Config:
    """A data set and a prefix of 120 image files, both on S3."""
    write_scenes(str(tmp_path / "scenes"), {"train": 24, "val": 6, "test": 2}, seed=3)
    settings = IngestSettings(format="camvid", class_map=str(tmp_path / "scenes" / "class_map.yaml"))
    ingest(str(tmp_path / "scenes"), f"{BUCKET}/data", settings)
    for number in range(UNLABELLED):
        put_image(number)
    config = tiny_config(tmp_path, registry={"tracking_uri": f"sqlite:///{tmp_path}/mlflow.db"})
    data = config.data.model_copy(update={"root": f"{BUCKET}/data", "unlabelled": f"{BUCKET}/photos"})
    return config.model_copy(update={"data": data})


def photo(number: int) -> str:
    return f"{BUCKET}/photos/{number % 7}/{number:04d}.jpg"


def put_image(number: int) -> None:
    pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((64, 64)).save(stream, "JPEG")
    storage.write_bytes(photo(number), stream.getvalue())


def run(config: Config, warnings: list[str]) -> dict[str, dict[str, float]]:
    return dict(run_local(config, f"{BUCKET}/run", lambda stage, row: None, warnings.append)["stages"])


def every_image_once(config: Config, pseudo_masks: str) -> None:
    """One pseudo-mask file per image file, of the same rows in the same order; the pool holds every image once."""
    ids = []
    files = load_pool(f"{BUCKET}/run/pool.parquet")
    for file in files:
        rows = storage.read_table(file.uri, ["image_id"]).column("image_id")
        assert storage.read_table(f"{pseudo_masks}/{file.name}").column("image_id") == rows
        ids += rows.to_pylist()
    assert len(ids) == len(set(ids)) == UNLABELLED + 24
    written = {uri.rsplit("/", 1)[-1] for uri in storage.list_files(pseudo_masks)}
    assert written == {file.name for file in files} | {"index.parquet", "rejects.parquet", "done.json"}


def test_a_store_that_answers_503_for_20_seconds(config: Config, faults: Faults) -> None:
    starter = threading.Timer(3, faults.unavailable_for, [20])
    starter.start()
    results = run(config, [])
    starter.join()
    assert faults.refused >= 5 and [figures["steps"] for figures in results.values()] == [6, 6, 6]
    every_image_once(config, f"{BUCKET}/run/pseudo_masks1")


def test_connections_reset_in_mid_object(faults: Faults) -> None:
    content = np.random.default_rng(0).bytes(20 * 2**20)
    storage.write_bytes(f"{BUCKET}/large", content)
    faults.resets_left = 3
    assert storage.read_bytes(f"{BUCKET}/large") == content and faults.reset == 3


def test_objects_deleted_between_listing_and_reading_cost_themselves_only(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def list_then_delete(*arguments: object) -> None:
        list_images(*arguments)  # type: ignore[arg-type]
        storage.delete(photo(5), BUCKET)
        storage.delete(photo(6), BUCKET)

    monkeypatch.setattr("threestage.run.pool_files.list_images", list_then_delete)
    warnings: list[str] = []
    results = run(config, warnings)
    assert all(figures["steps"] == 6 for figures in results.values())
    gone = read_rejects(f"{BUCKET}/run/pseudo_masks1/rejects.parquet")
    assert [reject.source for reject in gone] == [photo(5), photo(6)] and "cannot be read" in gone[0].reason
    assert any("2 images of the pool could not be used" in warning for warning in warnings)


def test_objects_deleted_before_the_second_stage_reads_them(config: Config) -> None:
    lenient = config.data.model_copy(update={"max_bad_fraction": 0.05})

    def only_stage(number: int) -> Config:
        return config.model_copy(update={"stages": number, "data": lenient})

    run(only_stage(1), [])
    storage.delete(photo(9), BUCKET)
    warnings: list[str] = []
    run(only_stage(2), warnings)
    assert [reject.source for reject in read_rejects(f"{BUCKET}/run/stage2/rejects.parquet")] == [photo(9)]
    assert any("could no longer be read" in warning for warning in warnings)


@pytest.mark.parametrize("bad", [6, 60])
def test_corrupt_images_are_listed_and_too_many_of_them_refused(config: Config, bad: int) -> None:
    for number in range(bad):
        storage.write_bytes(photo(number * 2), b"\xff\xd8\xff this is no JPEG")
    data = config.data.model_copy(update={"max_bad_fraction": 0.05})
    strict = config.model_copy(update={"data": data})
    if bad == 6:
        results = run(strict, [])
        assert results["stage3"]["rejected"] == 6
    else:
        with refused("data/bad-images", f"{BUCKET}/run/pseudo_masks1/rejects.parquet", error=StageFailure):
            run(strict, [])
    listed = read_rejects(f"{BUCKET}/run/pseudo_masks1/rejects.parquet")
    assert len(listed) == 6 if bad == 6 else len(listed) > 7
    assert all("cannot be decoded" in reject.reason for reject in listed)


def test_killed_while_it_writes_pseudo_masks_and_run_again(config: Config, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-c", "from threestage.cli.app import main; main()", "run", "config.yaml"]
    command += ["--out", f"{BUCKET}/run"]
    kills = 0
    for when in ("pseudo_masks1", "stage2/checkpoints", "pseudo_masks2"):
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not storage.list_files(f"{BUCKET}/run/{when}"):
            time.sleep(0.05)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert kills == 3
    for number in (1, 2, 3):
        every_image_once(config, f"{BUCKET}/run/pseudo_masks{number}")
    stages = json.loads(storage.read_bytes(f"{BUCKET}/run/results.json"))["stages"]
    assert [figures["steps"] for figures in stages.values()] == [6, 6, 6]
