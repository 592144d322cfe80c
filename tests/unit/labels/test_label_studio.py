"""Why: a task of Label Studio has several annotations, labels apart from shapes, and images under other names."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.refusals import refused
from tests.unit.labels.exports import read

SIZES = {"in/a": (10, 20)}
SQUARE = {"points": [[0, 0], [10, 0], [10, 20], [0, 20]], "polygonlabels": ["thing"]}


def result(value: dict[str, Any], type: str = "polygonlabels", id: str = "x") -> dict[str, Any]:
    return {"id": id, "type": type, "value": value, "original_width": 20, "original_height": 10}


def tasks(path: Path, *annotations: dict[str, Any], image: str = "s3://bucket/in/a.jpg") -> Path:
    path.write_text(json.dumps([{"id": 1, "data": {"image": image}, "annotations": annotations}]))
    return path


def things(path: Path) -> list[list[int]]:
    return np.argwhere(read("label-studio", path, SIZES, ["ground", "thing"])[0]["in/a"] == 1).tolist()


def test_polygons_and_labels_that_stand_apart(tmp_path: Path) -> None:
    square = [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert things(tasks(tmp_path / "t.json", {"result": [result(SQUARE)]})) == square
    apart = [result({"points": SQUARE["points"]}, "polygon"), result({"labels": ["thing"]}, "labels")]
    assert things(tasks(tmp_path / "t.json", {"result": apart})) == square
    ellipse = {"x": 7.5, "y": 15, "radiusX": 3, "radiusY": 6, "ellipselabels": ["thing"]}
    assert things(tasks(tmp_path / "t.json", {"result": [result(ellipse, "ellipselabels")]})) == [[1, 1]]


def test_the_annotation_that_counts(tmp_path: Path) -> None:
    other = {"points": [[50, 50], [55, 50], [55, 60], [50, 60]], "polygonlabels": ["thing"]}
    first, second = {"result": [result(other)]}, {"result": [result(SQUARE)]}
    assert len(things(tasks(tmp_path / "t.json", first, second))) == 4, "the last one"
    assert things(tasks(tmp_path / "t.json", first, {**second, "was_cancelled": True})) == [[5, 10]]
    assert things(tasks(tmp_path / "t.json", {**first, "ground_truth": True}, second)) == [[5, 10]]
    with refused("data/annotations", "t.json"):
        read("label-studio", tasks(tmp_path / "t.json", image="in/a.jpg"), SIZES)


@pytest.mark.parametrize(
    "image",
    ["/data/upload/12/0a1b2c3d-a.jpg", "/data/local-files/?d=any%20where/in/a.jpg", "https://host/x/in/a.jpg?sig=1"],
)
def test_images_are_found_under_the_tools_urls(image: str, tmp_path: Path) -> None:
    assert len(things(tasks(tmp_path / "t.json", {"result": [result(SQUARE)]}, image=image))) == 4


def test_what_is_not_as_label_studio_writes_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text('[{"data": 1}]')
    with refused("data/annotations", "t.json"):
        read("label-studio", tmp_path, SIZES)
    (tmp_path / "t.json").write_text("[]")
    with refused("data/annotations", tmp_path):
        read("label-studio", tmp_path, SIZES)


def test_a_relation_has_no_value_and_a_damaged_shape_is_named(tmp_path: Path) -> None:
    relation = {"type": "relation", "from_id": "x", "to_id": "y"}
    assert things(tasks(tmp_path / "t.json", {"result": [result(SQUARE), relation]}))
    damaged = tasks(tmp_path / "t.json", {"result": [result({"polygonlabels": ["thing"]})]})
    with refused("data/annotations", f"{tmp_path}/t.json", "polygonlabels", "points"):
        things(damaged)


def brush(path: Path, *pixels: tuple[int, int]) -> None:
    mask = np.zeros((10, 20), np.uint8)
    for pixel in pixels:
        mask[pixel] = 255
    Image.fromarray(mask).save(path)


@pytest.mark.parametrize("minimal", [False, True])
def test_pngs_of_brushes_are_named_back_to_their_images_by_the_json_beside_them(minimal: bool, tmp_path: Path) -> None:
    labels = [{"brushlabels": ["big-thing"], "format": "rle"}]
    task: dict[str, Any] = {"id": 12, "image": "/data/upload/1/0a1b2c3d-a.jpg", "tag": labels, "annotation_id": 5}
    if not minimal:
        task = {
            "id": 12,
            "data": {"image": "in/a.jpg"},
            "annotations": [{"id": 5, "result": [result(labels[0], "brushlabels")]}],
        }
    (tmp_path / "t.json").write_text(json.dumps([task]))
    brush(tmp_path / "task-12-annotation-4-by-1-tag-ground-0.png", (9, 9))  # an annotation that was replaced
    brush(tmp_path / "task-12-annotation-5-by-a-b@c.org-tag-big-thing-0.png", (0, 0))
    brush(tmp_path / "task-12-annotation-5-by-a-b@c.org-tag-big-thing-1.png", (1, 2))
    brush(tmp_path / "task-12-annotation-5-by-a-b@c.org-tag-ground-0.png", (1, 3))
    brush(tmp_path / "task-13-annotation-6-by-1-tag-ground-0.png", (1, 3))
    masks, notes = read("label-studio", tmp_path, SIZES, ["ground", "big-thing"])
    assert np.argwhere(masks["in/a"] == 1).tolist() == [[0, 0], [1, 2]]
    assert np.argwhere(masks["in/a"] == 0).tolist() == [[1, 3]]
    assert notes[-1].endswith("not read: 1 masks of tasks that no JSON file there has")
    (tmp_path / "t.json").unlink()
    with refused("data/annotations", tmp_path, "beside the PNGs"):
        read("label-studio", tmp_path, SIZES)
