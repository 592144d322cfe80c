"""Label Studio's export "Brush labels to PNG": task-7-annotation-9-by-1-tag-Car-0.png, a mask of each brush, for task 7.

The names say which task a mask is of, and only the JSON export says which image a task has: it lies beside the masks.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from threestage.labels.annotations import Annotations
from threestage.labels.export_files import ExportFiles
from threestage.labels.rasterise import Region

NAME = re.compile(r"task-(?P<task>\d+)-annotation-(?P<annotation>\d+)-by-(?P<label>.+)-\d+", re.DOTALL)


class BrushPng(NamedTuple):
    """`label`: who drew it, with which tag, and its label, joined by hyphens."""

    annotation: int
    label: str
    uri: str


def brush_pngs(files: ExportFiles) -> dict[int, list[BrushPng]]:
    """The masks of each task, in the order of their paths."""
    found: dict[int, list[BrushPng]] = {}
    for path, uri in files.ending(".png").items():
        name = NAME.fullmatch(path.rsplit("/", 1)[-1].rpartition(".")[0])
        if name is not None:
            png = BrushPng(int(name["annotation"]), name["label"], uri)
            found.setdefault(int(name["task"]), []).append(png)
    return found


def add_brush_pngs(pngs: list[BrushPng], files: ExportFiles, value: Any, key: str, into: Annotations) -> None:
    """The masks of one annotation of a task: the last. `value`: the task in the JSON export, whose labels are known."""
    last = max(png.annotation for png in pngs)
    labels = {"-".join(names): names[0] for names in _labels(value)}
    for png in pngs:
        if png.annotation == last:
            fits = [name for name in labels if png.label.endswith(f"-{name}")]
            label = labels[max(fits, key=len)] if fits else png.label.rpartition("-")[2]
            into.add_category(label, label)
            into.add_region(key, Region(label, "file", files.mask(png.uri)))


def _labels(value: Any) -> Iterator[list[str]]:
    """Every list of brush labels in a task."""
    for key, part in value.items() if isinstance(value, dict) else ():
        if key in ("brushlabels", "labels") and isinstance(part, list) and part:
            yield [str(name) for name in part]
        yield from _labels(part)
    for part in value if isinstance(value, list) else ():
        yield from _labels(part)
