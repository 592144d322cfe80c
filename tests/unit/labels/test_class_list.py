"""Why: a class map written by hand from memory is the first thing that goes wrong."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.refusals import refused
from tests.unit.labels.exports import CLASSES, coco, write
from threestage.data.classes import load_class_map
from threestage.labels.class_list import class_map_text


def proposed(place: Path, into: Path) -> dict[str, object]:
    (into / "classes.out").write_text(class_map_text(str(place)))
    load_class_map(str(into / "classes.out"))
    return dict(yaml.safe_load((into / "classes.out").read_text()))


def test_values_of_masks(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    mask = np.array([[0, 7, 255], [7, 7, 0]], np.uint8)
    Image.fromarray(mask).save(tmp_path / "m/a.png")
    palette = Image.fromarray(np.zeros((1, 2), np.uint8))
    palette.putpalette([9, 8, 7])
    palette.save(tmp_path / "m/b.png")
    found = proposed(tmp_path / "m", tmp_path)
    assert found["ignore"] == {"ids": [255]}
    assert [(c["name"], c["ids"]) for c in found["classes"]] == [("class_0", [0]), ("class_7", [7])]  # type: ignore[attr-defined]
    assert found["classes"][0]["colour"] == [9, 8, 7]  # type: ignore[index]
    text = class_map_text(str(tmp_path / "m"))
    assert "# 4 pixels in 2 files" in text and "# 3 pixels in 1 files" in text and "# 1 pixels in 1 files" in text


def test_a_foreground_of_255_is_a_class(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    Image.fromarray(np.array([[0, 255]], np.uint8)).save(tmp_path / "m/a.png")
    assert [entry["ids"] for entry in proposed(tmp_path / "m", tmp_path)["classes"]] == [[0], [255]]  # type: ignore[attr-defined]


def test_colours_of_masks(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    Image.fromarray(np.array([[[1, 2, 3], [200, 0, 0]]], np.uint8)).save(tmp_path / "m/a.png")
    entries = proposed(tmp_path / "m", tmp_path)["classes"]
    assert [entry["colour"] for entry in entries] == [[1, 2, 3], [200, 0, 0]]  # type: ignore[attr-defined]


def test_masks_with_too_many_values_are_no_masks(tmp_path: Path) -> None:
    Image.fromarray(np.arange(300, dtype=np.int32)[None].astype(np.uint16)).save(tmp_path / "a.png")
    with refused("class-map/too-many-values", 299):
        class_map_text(str(tmp_path))


@pytest.mark.parametrize("format", ["coco", "cvat", "labelme", "label-studio"])
def test_categories_of_exports(format: str, tmp_path: Path) -> None:
    write(format, tmp_path / "x", {"a.jpg": np.array([[0, 1], [2, 255]], np.uint8)})
    entries = proposed(tmp_path / "x", tmp_path)["classes"]
    assert [entry["name"] for entry in entries] == [name for name, _ in CLASSES]  # type: ignore[attr-defined]
    if format in ("coco", "cvat"):
        assert [tuple(entry["colour"]) for entry in entries] == [colour for _, colour in CLASSES]  # type: ignore[attr-defined]


def test_a_category_that_regions_use_and_the_export_does_not_name(tmp_path: Path) -> None:
    text = class_map_text(str(coco(tmp_path / "a.json", [{"segmentation": [[0, 0, 1, 0, 1, 1]], "category_id": 5}])))
    assert '{name: "5", ' in text and text.count("# 0 regions") == 2 and text.count("# 1 regions") == 1


def test_a_folder_of_neither_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with refused("data/annotations", tmp_path):
        class_map_text(str(tmp_path))
