"""YOLO segmentation: a text file for each image, one polygon a line (class, then x and y in shares of the sides), and
data.yaml with the names of the classes."""

from pathlib import PurePosixPath
from typing import Any

from threestage.errors import InputError
from threestage.labels.annotations import Annotations
from threestage.labels.export_files import CODE, ExportFiles
from threestage.labels.rasterise import Region
from threestage.user_files import lines_of, read_yaml

BOX_NUMBERS = 5
LISTS = frozenset({"train", "val", "valid", "test", "classes", "readme", "readme.roboflow", "readme.dataset"})


def read_yolo(files: ExportFiles, into: Annotations) -> None:
    """The data.yaml that was given, or lies in the folder, and the labels below that folder."""
    files = files if len(files.paths) > 1 else files.beside(next(iter(files.paths.values())))
    for number, name in _names(files).items():
        into.add_category(number, name)
    texts = {path: uri for path, uri in files.ending(".txt").items() if PurePosixPath(path).stem.lower() not in LISTS}
    for path, content in files.read_all(texts):
        into.add_image(path, _image_path(path), None)
        for line in lines_of(content, files.paths[path]):
            number, *ring = line.split()
            if len(ring) + 1 <= BOX_NUMBERS:
                into.passed_over["boxes"] += 1
                continue
            region = Region(number, "unit-polygons", [_numbers(ring, files.paths[path], line)])
            into.add_region(path, region)
    if not into.images:
        raise files.wrong("no text files of YOLO there")


def _names(files: ExportFiles) -> dict[str, str]:
    """The classes' names by their numbers, from the first YAML file that has `names`."""
    for _, content in files.read_all(files.ending(".yaml", ".yml")):
        found = read_yaml(content, files.place)
        names: Any = found.get("names") if isinstance(found, dict) else None
        if isinstance(names, list | dict):
            pairs = names.items() if isinstance(names, dict) else enumerate(names)
            return {str(number): str(name) for number, name in pairs}
    raise files.wrong("no data.yaml with `names` there")


def _image_path(path: str) -> str:
    """That of the image of a label file: YOLO has both in folders `images` and `labels`."""
    parts = list(PurePosixPath(path).with_suffix("").parts)
    places = [place for place, part in enumerate(parts[:-1]) if part == "labels"]
    if places:
        parts[places[-1]] = "images"
    return "/".join(parts)


def _numbers(texts: list[str], uri: str, line: str) -> list[float]:
    try:
        return [float(text) for text in texts]
    except ValueError:
        raise InputError(f"{uri}: {line[:80]}: no class and polygon of YOLO; export it again", CODE) from None
