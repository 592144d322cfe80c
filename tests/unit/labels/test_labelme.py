"""Why: LabelMe names images as the annotator's machine did, and has shapes that are no polygons."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.refusals import refused
from tests.unit.labels.exports import read

SIZES = {"one/a": (6, 8)}


def labelme(folder: Path, *shapes: dict[str, Any], **others: Any) -> Path:
    content = {"imagePath": "a.jpg", "imageHeight": 6, "imageWidth": 8, "imageData": "x" * 99, "shapes": shapes}
    (folder / "one").mkdir(exist_ok=True)
    (folder / "one/a.json").write_text(json.dumps(content | others))
    return folder


def shape(kind: str, *points: tuple[float, float], label: str = "thing") -> dict[str, Any]:
    return {"label": label, "points": points, "shape_type": kind}


def test_shapes_of_every_kind(tmp_path: Path) -> None:
    labelme(
        tmp_path,
        shape("polygon", (0, 0), (2, 0), (2, 1), (0, 1)),
        shape("rectangle", (5, 3), (3, 2)),
        shape("rectangle", (0, 2), (1, 2), (1, 3), (0, 3)),
        shape("circle", (6.5, 4.5), (6.5, 5.6)),
        shape("line", (1, 1), (2, 2)),
    )
    masks, notes = read("labelme", tmp_path, SIZES, ["ground", "thing"])
    circle = [[3, 6], [4, 5], [4, 6], [4, 7], [5, 6]]
    assert np.argwhere(masks["one/a"] == 1).tolist() == [[0, 0], [0, 1], [2, 0], [2, 3], [2, 4], *circle]
    assert notes[-1] == f"{tmp_path}: not read: 1 shapes of kind line"


@pytest.mark.parametrize("path", ["..\\one\\a.jpg", "../../../one/a.jpg", "a.jpg"])
def test_paths_of_other_machines(path: str, tmp_path: Path) -> None:
    labelme(tmp_path, shape("rectangle", (0, 0), (1, 1)), imagePath=path)
    assert list(read("labelme", tmp_path, SIZES, ["ground", "thing"])[0]) == ["one/a"]


def test_what_is_not_as_labelme_writes_it_is_refused(tmp_path: Path) -> None:
    with refused("data/annotations", "one/a.json"):
        read("labelme", labelme(tmp_path, {"label": "thing"}), SIZES)
    (tmp_path / "one/a.json").write_text("[]")
    with refused("data/annotations", tmp_path):
        read("labelme", tmp_path, SIZES)
