"""The formats that `threestage ingest` reads of labelling tools: which function reads which."""

from collections.abc import Callable

from threestage.data.formats import files_below
from threestage.labels.annotations import Annotations
from threestage.labels.binary_masks import read_binary_masks
from threestage.labels.coco import read_coco
from threestage.labels.cvat import read_cvat
from threestage.labels.export_files import ExportFiles
from threestage.labels.label_studio import read_label_studio
from threestage.labels.labelme import read_labelme
from threestage.labels.supervisely import read_supervisely
from threestage.labels.yolo import read_yolo

Reader = Callable[[ExportFiles, Annotations], None]
"""Tells the annotations what the files hold. Raises InputError, naming the file and what is expected in it."""

READERS: dict[str, Reader] = {
    "binary-masks": read_binary_masks,
    "coco": read_coco,
    "cvat": read_cvat,
    "label-studio": read_label_studio,
    "labelme": read_labelme,
    "supervisely": read_supervisely,
    "yolo": read_yolo,
}


def read_annotations(format: str, place: str, source: str | None = None) -> Annotations:
    """What an export, a file or a folder, says; `source`: the folder of its images.

    Raises InputError where it is none of that format."""
    paths, stamps = files_below(place, f"files of {format}")
    annotations = Annotations(place)
    READERS[format](ExportFiles(place, paths, stamps, source), annotations)
    return annotations
