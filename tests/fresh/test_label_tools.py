"""The tools' own libraries, in an environment of their own, read what we export, and we read what they write: 0 pixels differ."""

import sys
from pathlib import Path

import numpy as np
import pytest

from tests.fresh.processes import command_of
from tests.label_masks import random_mask, random_size
from tests.unit.labels.exports import exported, read
from threestage.labels.label_export import WRITERS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

PACKAGES = {"coco": "pycocotools", "label-studio": "label-studio-sdk", "labelme": "labelme", "cvat": "cvat-sdk"}
CLASSES = [("ground", (9, 9, 9)), ("thing", (200, 0, 0)), ("house", (0, 0, 200))]
SCRIPT = Path(__file__).with_name("label_tools.py")


@pytest.mark.parametrize("format", PACKAGES)
def test_tools_and_we_read_each_others_masks(format: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    masks = {f"{n}.png": random_mask(rng, random_size(rng, 200), len(CLASSES)) for n in range(50)}
    masks = {name: mask for name, mask in masks.items() if (mask != 255).any()}
    np.savez(tmp_path / "masks.npz", **masks)  # type: ignore[arg-type]
    with WRITERS[format](str(tmp_path / "ours"), CLASSES) as add:
        for name, mask in masks.items():
            add(exported(name, mask))
    command_of(Path(sys.executable), "-m", "venv", str(tmp_path / "venv"), env={})
    command_of(tmp_path / "venv/bin/pip", "install", "-q", PACKAGES[format], "numpy", "pillow", env={})
    tool = {"QT_QPA_PLATFORM": "offscreen", "HOME": str(tmp_path)}
    command_of(tmp_path / "venv/bin/python", str(SCRIPT), format, str(tmp_path), env=tool)
    with np.load(tmp_path / "drawn.npz") as drawn:
        assert {name: int((drawn[name] != mask).sum()) for name, mask in masks.items()} == dict.fromkeys(masks, 0)
    sizes = {name.removesuffix(".png"): mask.shape for name, mask in masks.items()}
    theirs, _ = read(format, tmp_path / "theirs", sizes, [name for name, _ in CLASSES])
    wrong = {name: int((theirs[name.removesuffix(".png")] != mask).sum()) for name, mask in masks.items()}
    assert wrong == dict.fromkeys(masks, 0)
