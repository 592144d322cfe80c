"""Why: Supervisely has masks as compressed PNGs at a place, and holes as rings of their own."""

import base64
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.images import encoded
from tests.refusals import refused
from tests.unit.labels.exports import read
from threestage.labels.class_list import class_map_text

SIZES = {"ds/img/a": (6, 8)}
SQUARE = [[1, 1], [5, 1], [5, 5], [1, 5]]


def project(root: Path, *objects: dict[str, Any]) -> Path:
    (root / "ds/ann").mkdir(parents=True, exist_ok=True)
    classes = [{"title": "ground", "shape": "any", "color": "#090909"}, {"title": "thing", "color": "#0A0B0C"}]
    (root / "meta.json").write_text(json.dumps({"classes": classes, "tags": []}))
    (root / "ds/ann/a.jpg.json").write_text(json.dumps({"size": {"height": 6, "width": 8}, "objects": objects}))
    return root


def bitmap(image: Image.Image, origin: tuple[int, int]) -> dict[str, Any]:
    data = base64.b64encode(zlib.compress(encoded(image))).decode()
    return {"classTitle": "thing", "geometryType": "bitmap", "bitmap": {"data": data, "origin": origin}}


def things(root: Path) -> list[list[int]]:
    return np.argwhere(read("supervisely", root, SIZES, ["ground", "thing"])[0]["ds/img/a"] == 1).tolist()


def test_polygons_with_holes_rectangles_and_bitmaps(tmp_path: Path) -> None:
    points = {"exterior": SQUARE, "interior": [[[2, 2], [4, 2], [4, 4], [2, 4]]]}
    polygon = {"classTitle": "thing", "geometryType": "polygon", "points": points}
    found = things(project(tmp_path, polygon))
    assert len(found) == 12 and [2, 2] not in found and [3, 3] not in found and [1, 1] in found
    corners = {"exterior": [[5, 3], [3, 1]], "interior": []}
    assert things(project(tmp_path, {**polygon, "geometryType": "rectangle", "points": corners})) == [
        [1, 3], [1, 4], [2, 3], [2, 4],
    ]  # fmt: skip
    inside = np.array([[0, 1], [1, 0]], np.uint8)
    expected = [[4, 3], [5, 2]]
    assert things(project(tmp_path, bitmap(Image.fromarray(inside * 255), (2, 4)))) == expected
    clear = np.dstack([np.full((2, 2, 3), 255, np.uint8), inside * 255])
    assert things(project(tmp_path, bitmap(Image.fromarray(clear, "RGBA"), (2, 4)))) == expected, (
        "what is not transparent"
    )


def test_classes_are_those_of_the_project(tmp_path: Path) -> None:
    project(
        tmp_path, {"classTitle": "thing", "geometryType": "point", "points": {"exterior": [[1, 1]], "interior": []}}
    )
    text = class_map_text(str(tmp_path))
    assert "supervisely" in text and '{name: "thing", colour: [10, 11, 12]}  # 0 regions' in text


def test_what_is_damaged_is_refused(tmp_path: Path) -> None:
    damaged = bitmap(Image.new("L", (2, 2)), (0, 0))
    for data in ("§", base64.b64encode(b"x").decode(), base64.b64encode(zlib.compress(b"x")).decode()):
        damaged["bitmap"]["data"] = data
        with refused("data/annotations", "a.jpg.json", "thing"):
            things(project(tmp_path, damaged))
    with refused("data/annotations", "a.jpg.json"):
        things(project(tmp_path, {"classTitle": 3}))
    (tmp_path / "ds/ann/a.jpg.json").unlink()
    with refused("data/annotations", tmp_path):
        things(tmp_path)


@pytest.mark.parametrize("colour", ["", "#12", "#zzzzzz"])
def test_a_colour_that_is_none_is_left_out(colour: str, tmp_path: Path) -> None:
    project(tmp_path)
    (tmp_path / "meta.json").write_text(json.dumps({"classes": [{"title": "thing", "color": colour}]}))
    assert "thing" in class_map_text(str(tmp_path))
