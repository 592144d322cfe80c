"""Make folders.tar.xz with the version that is installed, so that the next one is tested with what this one writes:

    python -m tests.golden.version_before.make

One folder in /tmp, always the same, is used and removed.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import tarfile
from pathlib import Path

import torch
import yaml

from tests.golden.command_line import run_command, this_machine
from tests.golden.version_before import ARCHIVE, PLACE
from tests.golden.version_before.without_ray import without_ray
from tests.narrow_resnet import NAME
from threestage.data.synthetic import write_scenes
from threestage.run.local_main import main as run_here

LIMIT = 400_000  # bytes in git
IMAGES = 10
CONFIG = {
    "name": "before",
    "data": {"root": f"{PLACE}/data", "labelled": 6},
    "network": {"encoder": NAME, "batch_norm": "live", "dilations": [1]},
    "augment": {"crop_size": [32, 32], "strong": {"cutout_size": 8}},
    "optimiser": {"learning_rate": 3e-3, "encoder_learning_rate": 3e-3},
    "consistency": {"confidence_threshold": 0.2, "cutmix": 0.5},
    "pseudo_mask": {"guard": "ignore"},
    "stage1": {"steps": 40, "labelled_batch": 4},
    "stage2": {"steps": 12, "labelled_batch": 2, "unlabelled_batch": 2, "warm_start": True},
    "stage3": {"steps": 12, "labelled_batch": 2, "unlabelled_batch": 2, "warm_start": True, "reliable_share": 0.7},
    "training": {
        "log_every": 2,
        "checkpoint_every": 3,
        "checkpoints_kept": 1,
        "evaluate_every": 6,
        "precision": "float32",
    },
}
SPACE = {
    "stages": [2],
    "search": {"pseudo_mask.confidence_threshold": {"choice": [0.0, 0.3, 0.5, 0.7]}},
    "searcher": "grid",
}
STOP_AT = "stage2 step 4 "
DRAWN_ANEW = ("report.html", "pictures.png", "parallel_coordinates.png", "thresholds.png", "importances.png")


class Killed(BaseException):
    """Stands in for kill -9."""


class StoppingOutput(io.StringIO):
    """Sends this process a SIGTERM when a line that begins with STOP_AT is printed."""

    def write(self, text: str) -> int:
        if text.startswith(STOP_AT):
            os.kill(os.getpid(), signal.SIGTERM)
        return super().write(text)


def make_images(place: Path) -> None:
    """source/ as it is at first, and more/ with one image of its own."""
    write_scenes(str(place / "source"), {"train": IMAGES, "val": 4}, seed=5)
    (place / "source" / "train" / "images" / "broken.jpg").write_bytes(b"no image")
    write_scenes(str(place / "more"), {"train": IMAGES + 1}, seed=5)
    for file in [*(place / "more").rglob("*.jpg"), *(place / "more").rglob("*.png")]:
        if file.stem != f"train_{IMAGES:05d}":
            file.unlink()


def make_data(place: Path) -> None:
    """Version 1 without a mask that version 2 brings; the last ingest adds nothing and leaves its index."""
    late, hidden = place / "source" / "train" / "masks" / "train_00000.png", place / "late.png"
    late.rename(hidden)
    for _ in range(3):
        run_command("ingest", place / "source", place / "data", "--format", "camvid", "--local", "--rows-per-file", 8,
                    "--class-map", place / "source" / "class_map.yaml", "--max-bad-fraction", 0.2, "--json")  # fmt: skip
        if hidden.exists():
            hidden.rename(late)


def make_runs(place: Path) -> None:
    config = place / "config.yaml"
    config.write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    run_command("run", config, "--local", "--out", place / "run", "--json")
    with contextlib.redirect_stdout(StoppingOutput()), contextlib.redirect_stderr(io.StringIO()):
        assert run_here([str(config), "--out", str(place / "stopped")]) == 1
    latest = json.loads((place / "stopped" / "stage2" / "checkpoints" / "latest.json").read_text())
    assert 4 <= latest["step"] < 12, latest
    for run in ("run", "stopped"):
        run_command("clean", place / run, "--yes", "--json")
    shutil.copytree(place / "run" / "stage3" / "model", place / "model")
    run_command("predict", place / "model", place / "data", place / "predictions", "--local", "--no-overlays",
                "--confidence", "--json")  # fmt: skip


def make_sweep(place: Path) -> None:
    (place / "space.yaml").write_text(yaml.safe_dump(SPACE, sort_keys=False))
    with without_ray({2: "CUDA out of memory", 3: Killed()}), contextlib.suppress(Killed):
        run_command("sweep", place / "space.yaml", place / "config.yaml", "--out", place / "sweep", "--json")
    for checkpoints in (place / "sweep").rglob("checkpoints"):
        run_command("clean", checkpoints.parents[1], "--yes", "--json")


def pack(place: Path) -> None:
    """The folders without what is drawn anew; no user, no times."""
    shutil.rmtree(place / "source")
    for file in place.rglob("*"):
        if file.name in DRAWN_ANEW:
            file.unlink()

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = member.mtime = 0
        member.uname = member.gname = ""
        return member

    with tarfile.open(ARCHIVE, "w:xz", preset=9) as archive:
        for path in sorted(place.iterdir()):
            archive.add(path, path.name, filter=plain)
    assert ARCHIVE.stat().st_size < LIMIT, f"{ARCHIVE.stat().st_size} bytes"


def make() -> None:
    torch.set_num_threads(1)
    place = Path(PLACE)
    place.mkdir()  # one that is there is somebody else's
    try:
        make_images(place)
        make_data(place)
        make_runs(place)
        make_sweep(place)
        (place / "machine.json").write_text(json.dumps(this_machine(), indent=1))
        pack(place)
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    make()
