"""Why: YOLO's label files say neither the size nor the name of their image."""

from pathlib import Path

import numpy as np
import pytest

from tests.refusals import refused
from tests.unit.labels.exports import read


def yolo(folder: Path, text: str, names: str = "names: {0: ground, 1: thing}") -> Path:
    (folder / "labels/train").mkdir(parents=True, exist_ok=True)
    (folder / "labels/train/a.txt").write_text(text)
    (folder / "data.yaml").write_text(f"path: /elsewhere\n{names}\n")
    return folder


@pytest.mark.parametrize("image_id", ["images/train/a", "train/a", "a"])
@pytest.mark.parametrize("place", ["", "data.yaml"])
def test_polygons_in_shares_of_the_sides(image_id: str, place: str, tmp_path: Path) -> None:
    yolo(tmp_path, "1 0 0 0.25 0 0.25 0.5 0 0.5\n\n0 0.5 0.5 1 1\n", "names: [ground, thing]")
    masks, notes = read("yolo", tmp_path / place, {image_id: (4, 8)}, ["ground", "thing"])
    assert np.argwhere(masks[image_id] == 1).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert notes[-1].endswith("not read: 1 boxes")


def test_an_unknown_class_and_what_is_no_polygon_are_refused(tmp_path: Path) -> None:
    with refused("class-map/unknown-categories", "5 (1 regions)"):
        read("yolo", yolo(tmp_path, "5 0 0 1 0 1 1"), {"a": (4, 8)}, ["ground", "thing"])
    with refused("data/annotations", "a.txt"):
        read("yolo", yolo(tmp_path, "1 0 0 1 0 x 1"), {"a": (4, 8)}, ["ground", "thing"])
    with refused("data/annotations", tmp_path):
        read("yolo", yolo(tmp_path, "", "nc: 2"), {"a": (4, 8)}, ["ground", "thing"])
