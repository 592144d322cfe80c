"""Exports of labelling tools for tests: written by our writers, or by hand, and read as an ingest reads them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from threestage import IGNORE_INDEX
from threestage.data.classes import Colour
from threestage.data.formats import SourceItem
from threestage.labels.label_export import WRITERS
from threestage.labels.labelled_source import LabelledSource, map_of_classes
from threestage.labels.outlines import polygons_of
from threestage.labels.output_files import ExportedImage, ExportedRegion
from threestage.labels.rasterise import Bytes, draw
from threestage.labels.readers import read_annotations

CLASSES: list[tuple[str, Colour]] = [("ground", (9, 9, 9)), ("<thing> & co", (200, 0, 0)), ("дом", (0, 0, 200))]


def exported(name: str, mask: Bytes, simplify: float | None = None) -> ExportedImage:
    """An image as `export_labels` gives it to a writer."""
    ids = [class_id for class_id in np.unique(mask).tolist() if class_id != IGNORE_INDEX]
    polygons = {i: None if simplify is None else polygons_of(mask == i, simplify) for i in ids}
    regions = [ExportedRegion(class_id, mask == class_id, polygons[class_id]) for class_id in ids]
    return ExportedImage(name, name.rpartition(".")[0], mask, regions)


def write(to: str, folder: Path, masks: dict[str, Bytes], simplify: float | None = None) -> None:
    with WRITERS[to](str(folder), CLASSES) as add:
        for name, mask in masks.items():
            add(exported(name, mask, simplify))
    if to == "label-studio":
        correct_in_label_studio(folder)


def correct_in_label_studio(folder: Path) -> None:
    """What an annotator does who accepts every prediction."""
    tasks = json.loads((folder / "tasks.json").read_text())
    done = [{"data": task["data"], "annotations": [{"result": task["predictions"][0]["result"]}]} for task in tasks]
    (folder / "tasks.json").write_text(json.dumps(done))


def read(
    format: str, place: Path, sizes: dict[str, tuple[int, int]], names: Sequence[str] = (), unlabelled: str = "ignore"
) -> tuple[dict[str, Bytes], list[str]]:
    """The mask of each image that is labelled, and the notes. `sizes`: of the images by their ids."""
    names = names or [name for name, _ in CLASSES]
    annotations = read_annotations(format, str(place))
    source = LabelledSource(annotations, map_of_classes(names, [(n, n, n) for n in range(len(names))]), unlabelled)
    notes: list[str] = []
    items = source.label([SourceItem(image_id, image_id, None, "train") for image_id in sizes], notes)
    found = {item.image_id: source.drawing_of(item.image_id) for item in items if item.mask_uri}
    return {i: draw(data, sizes[i], i) for i, data in found.items() if data is not None}, notes


def coco(path: Path, entries: list[dict[str, Any]], **others: Any) -> Path:
    """A COCO file of one image, a.jpg of 8 × 6 pixels, and the categories 0: ground and 7: thing."""
    categories = [{"id": 0, "name": "ground"}, {"id": 7, "name": "thing"}]
    images = [{"id": 3, "file_name": "a.jpg", "height": 6, "width": 8}]
    annotations = [{"image_id": 3, "category_id": 7, **entry} for entry in entries]
    content = {"annotations": annotations, "images": images, "categories": categories}
    path.write_text(json.dumps(content | others))
    return path
