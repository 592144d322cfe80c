"""`threestage ingest` from a folder to S3, killed with SIGKILL at several moments, holds every image exactly once."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from threestage.data import storage
from threestage.data.ingest import IngestSettings, ingest
from threestage.data.records import MANIFEST_NAME, load_manifest

IMAGES = 400
BAD = 5
OPTIONS = ["--format", "images", "--rows-per-file", "16"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Images large enough that an ingest takes seconds; the first few are cut short."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (480, 640, 3), np.uint8)
    for i in range(IMAGES):
        Image.fromarray(np.roll(pixels, i, axis=1)).save(folder / f"{i:03d}.jpg", quality=90)
        if i < BAD:
            (folder / f"{i:03d}.jpg").write_bytes((folder / f"{i:03d}.jpg").read_bytes()[:-5000])
    return folder


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("where", "moments"), [(["--local"], (1, 5, 12)), ([], (3,))])
def test_killed_in_mid_write_and_run_again(
    photos: Path, bucket: str, where: list[str], moments: tuple[int, ...]
) -> None:
    """`moments`: finished shards at which it is killed."""
    root = f"{bucket}/ds"
    command = [sys.executable, "-c", "from threestage.cli.app import main; main()", "ingest", str(photos), root]
    command += OPTIONS + where
    for shards in moments:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while len(storage.list_files(f"{root}/shards")) < shards and process.poll() is None:
            time.sleep(0.01)
        assert process.poll() is None, "it ended before it could be killed"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not storage.exists(f"{root}/{MANIFEST_NAME}")
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    manifest = load_manifest(root)
    ids: Counter[str] = Counter()
    for file in manifest.files:
        ids.update(storage.read_table(f"{root}/{file.path}", ["image_id"]).column("image_id").to_pylist())
    assert ids == Counter(f"{i:03d}" for i in range(BAD, IMAGES))
    assert manifest.counts["train"].images == IMAGES - BAD
    assert sorted(f"{root}/{file.path}" for file in manifest.files) == storage.list_files(f"{root}/images")
    settings = IngestSettings(format="images", rows_per_file=16)
    undisturbed = ingest(str(photos), f"{bucket}/undisturbed", settings)
    assert undisturbed.manifest == manifest and undisturbed.bad == BAD
