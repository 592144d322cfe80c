"""Why: COCO files differ in everything that the format leaves open."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.refusals import refused
from tests.unit.labels.exports import coco, read
from threestage.data.formats import SourceItem
from threestage.data.image_validation import BadFile
from threestage.labels.labelled_source import LabelledSource, map_of_classes
from threestage.labels.readers import read_annotations
from threestage.labels.rle import coco_text, counts_of

SIZES = {"a": (6, 8)}
SQUARE = [1, 1, 4, 1, 4, 3, 1, 3]
IN_SQUARE = [[1, 1], [1, 2], [1, 3], [2, 1], [2, 2], [2, 3]]


def labelled_items(path: Path) -> list[SourceItem]:
    source = LabelledSource(
        read_annotations("coco", str(path)), map_of_classes(["ground", "thing"], [(0, 0, 0)] * 2), "ignore"
    )
    return source.label([SourceItem("a", "a.jpg", None, "train")], [])


def things(path: Path, names: tuple[str, ...] = ("ground", "thing")) -> list[list[int]]:
    """Where the mask of a.jpg has the class thing."""
    masks, _ = read("coco", path, SIZES, names)
    return np.argwhere(masks["a"] == 1).tolist()


@pytest.mark.parametrize("form", ["polygon", "flat", "counts", "text", "crowd"])
def test_every_form_of_segmentation(form: str, tmp_path: Path) -> None:
    mask = np.zeros((6, 8), bool)
    mask[1:3, 1:4] = True
    counts = counts_of(mask, "columns")
    shape = {
        "polygon": [SQUARE],
        "flat": SQUARE,
        "counts": {"size": [6, 8], "counts": counts.tolist()},
        "text": {"size": [6, 8], "counts": coco_text(counts)},
        "crowd": {"size": [6, 8], "counts": coco_text(counts)},
    }[form]
    path = coco(tmp_path / "a.json", [{"segmentation": shape, "iscrowd": int(form == "crowd")}])
    assert things(path) == things(tmp_path) == IN_SQUARE


def test_several_polygons_are_one_region_and_later_annotations_lie_above(tmp_path: Path) -> None:
    two = {"segmentation": [[0, 0, 1, 0, 1, 1, 0, 1], [7, 5, 8, 5, 8, 6, 7, 6]]}
    assert things(coco(tmp_path / "a.json", [two])) == [[0, 0], [5, 7]]
    above = {"segmentation": [[0, 0, 1, 0, 1, 1, 0, 1]], "category_id": 0}
    assert things(coco(tmp_path / "a.json", [two, above])) == [[5, 7]]


def test_what_is_no_region_is_counted(tmp_path: Path) -> None:
    path = coco(tmp_path / "a.json", [{"segmentation": [], "bbox": [1, 2, 3, 4]}, {"caption": "a street"}])
    content = json.loads(path.read_text())
    del content["annotations"][1]["category_id"]
    path.write_text(json.dumps(content))
    masks, notes = read("coco", path, SIZES, ["ground", "thing"])
    assert masks == {}
    assert notes[-1] == f"{path}: not read: 1 annotations with a box only, 1 annotations without a category"
    path = coco(tmp_path / "a.json", [{"segmentation": [[]]}, {"segmentation": [[], SQUARE, []]}])
    assert things(path) == IN_SQUARE


def test_several_files_that_annotate_the_same_images_are_joined(tmp_path: Path) -> None:
    """As COCO has its things and its stuff in two files; the ids are each file's own."""
    coco(tmp_path / "a.json", [{"segmentation": [[0, 0, 8, 0, 8, 6, 0, 6]], "category_id": 0}])
    other = {"id": 9, "file_name": "a.jpg", "height": 6, "width": 8}
    coco(tmp_path / "b.json", [{"segmentation": [SQUARE], "image_id": 9}], images=[other])
    assert things(tmp_path) == IN_SQUARE
    coco(tmp_path / "b.json", [], images=[other, {**other, "id": 10}])
    (item,) = labelled_items(tmp_path)
    assert item.problem == "is annotated twice, as a.jpg and as a.jpg: keep one [mask/unpaired]", "twice in one file"


def test_two_images_of_one_id_are_refused(tmp_path: Path) -> None:
    images = [{"id": 3, "file_name": name, "height": 6, "width": 8} for name in ("a.jpg", "b.jpg")]
    with refused("data/annotations", "a.jpg and b.jpg", 3):
        things(coco(tmp_path / "a.json", [{"segmentation": [SQUARE]}], images=images))
    images[1]["file_name"] = "a.jpg"
    assert things(coco(tmp_path / "a.json", [{"segmentation": [SQUARE]}], images=images)) == IN_SQUARE


def test_every_unknown_category_is_named_with_its_count(tmp_path: Path) -> None:
    path = coco(tmp_path / "a.json", [{"segmentation": [SQUARE]}, {"segmentation": [SQUARE], "category_id": 99}] * 3)
    with refused("class-map/unknown-categories", "thing (3 regions)", "99 (3 regions)"):
        read("coco", path, SIZES, ["ground"])


def test_panoptic_segments(tmp_path: Path) -> None:
    (tmp_path / "pan").mkdir()
    ids = np.zeros((6, 8, 3), np.uint8)
    ids[1, 1], ids[2, 2] = (44, 1, 0), (0, 0, 1)  # 300, 65536
    Image.fromarray(ids).save(tmp_path / "pan/a.png")
    segments = [{"id": 300, "category_id": 7}, {"id": 65536, "category_id": 0}]
    path = coco(tmp_path / "pan.json", [{"file_name": "a.png", "segments_info": segments}])
    masks, _ = read("coco", path, SIZES, ["ground", "thing"])
    assert masks["a"][1, 1] == 1 and masks["a"][2, 2] == 0 and (masks["a"] == 255).sum() == 46
    (before,) = labelled_items(path)
    Image.fromarray(ids[::-1]).save(tmp_path / "pan/a.png")
    (after,) = labelled_items(path)
    assert before.stamp != after.stamp, "a mask that changed is read again"
    path = coco(tmp_path / "pan.json", [{"file_name": "../../b.png", "segments_info": segments}])
    with refused("data/annotations", "b.png"):
        read("coco", path, SIZES, ["ground", "thing"])


@pytest.mark.parametrize(
    "change",
    [{"annotations": [{"image_id": 3, "category_id": {}}]}, {"annotations": ["x"]}, {"images": [3]}, {"images": [{"id": 3}]},
     {"categories": {"a": 1}}, {"images": []}],
)  # fmt: skip
def test_what_is_not_as_coco_writes_it_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    path = coco(tmp_path / "a.json", [], **change)
    with refused("data/annotations", "a.json"):
        read("coco", path, SIZES, ["ground", "thing"])


def test_a_folder_without_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with refused("data/annotations", tmp_path):
        read("coco", tmp_path, SIZES)


def test_run_lengths_for_another_size_are_a_bad_mask(tmp_path: Path) -> None:
    path = coco(tmp_path / "a.json", [{"segmentation": {"size": [3, 4], "counts": [0, 12]}}])
    with refused("mask/size", "4x3", error=BadFile):
        read("coco", path, SIZES, ("ground", "thing"))
