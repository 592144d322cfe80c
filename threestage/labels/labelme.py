"""LabelMe: a JSON file for each image, with polygons, rectangles, circles and masks. Image data in it is left out."""

import base64
import io
import math
import posixpath
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from PIL import Image
from pydantic import FiniteFloat

from threestage.data import storage
from threestage.data.classes import Colour
from threestage.labels.annotations import Annotations
from threestage.labels.export_files import ExportFiles, ToolModel, as_model
from threestage.labels.output_files import Add, ExportedImage, ExportedRegion, as_json
from threestage.labels.rasterise import Region, Size
from threestage.labels.rle import Mask


class LabelMeShape(ToolModel):
    label: str
    points: list[tuple[FiniteFloat, FiniteFloat]]
    shape_type: str = "polygon"
    mask: str | None = None


class LabelMeFile(ToolModel):
    imagePath: str
    shapes: list[LabelMeShape]
    imageHeight: int | None = None
    imageWidth: int | None = None

    @property
    def size(self) -> Size | None:
        return None if self.imageHeight is None or self.imageWidth is None else (self.imageHeight, self.imageWidth)


def read_labelme(files: ExportFiles, into: Annotations) -> None:
    """Every JSON file there that has shapes."""
    for path, content in files.read_all(files.ending(".json")):
        value = storage.parse_json(content, files.paths[path])
        if not isinstance(value, dict) or "shapes" not in value:
            into.passed_over["JSON files without shapes"] += 1
            continue
        found = as_model(value, LabelMeFile, files.paths[path])
        into.add_image(path, _image_path(path, found.imagePath), found.size)
        for shape in found.shapes:
            into.add_category(shape.label, shape.label)
            if (region := _region(shape)) is None:
                into.passed_over[f"shapes of kind {shape.shape_type}"] += 1
            else:
                into.add_region(path, region)
    if not into.images:
        raise files.wrong("no JSON file of LabelMe there")


def _image_path(path: str, image: str) -> str:
    """LabelMe names the image from the JSON's folder on, on Windows with backslashes."""
    whole = posixpath.normpath(posixpath.join(posixpath.dirname(path), image.replace("\\", "/")))
    while whole.startswith("../"):
        whole = whole.removeprefix("../")
    return whole


def _region(shape: LabelMeShape) -> Region | None:
    points: Any = shape.points
    if shape.shape_type in ("polygon", "oriented_rectangle"):
        return Region(shape.label, "polygons", [[number for point in points for number in point]])
    if shape.shape_type not in ("rectangle", "circle", "mask") or len(points) < 2:
        return None
    (x, y), (u, v) = points[:2]
    if shape.shape_type == "circle":  # its centre, and a point on its edge
        radius = math.hypot(u - x, v - y)
        return Region(shape.label, "ellipse", [x, y, radius, radius, 0])
    (left, right), (top, bottom) = ((min(of), max(of)) for of in zip(*points, strict=True))  # two corners, or four
    if shape.shape_type == "rectangle":
        return Region(shape.label, "polygons", [[left, top, right, top, right, bottom, left, bottom]])
    box = [int(left), int(top), int(right) - int(left) + 1, int(bottom) - int(top) + 1]
    return Region(shape.label, "png", {"data": shape.mask or "", "box": box})


# ---- Written


@contextmanager
def write_labelme(folder: str, classes: Sequence[tuple[str, Colour]]) -> Iterator[Add]:
    """FOLDER/NAME.json for each image; LabelMe looks for them beside the images."""

    def add(image: ExportedImage) -> None:
        height, width = image.mask.shape
        shapes = [shape for region in image.regions for shape in _shapes(classes[region.class_id][0], region)]
        content: dict[str, Any] = {
            "version": "5.5.0",
            "flags": {},
            "shapes": shapes,
            "imagePath": image.name.rsplit("/", 1)[-1],
        }
        content |= {"imageData": None, "imageHeight": height, "imageWidth": width}
        storage.write_bytes(storage.join(folder, f"{image.stem}.json"), as_json(content).encode())

    yield add


def _shapes(label: str, region: ExportedRegion) -> Iterator[dict[str, Any]]:
    common: dict[str, Any] = {"label": label, "group_id": None, "description": "", "flags": {}}
    if region.polygons is not None:
        yield from (
            {**common, "shape_type": "polygon", "points": ring.tolist(), "mask": None} for ring in region.polygons
        )
        return
    left, top, width, height = region.box
    corners = [[left, top], [left + width - 1, top + height - 1]]
    yield {**common, "shape_type": "mask", "points": corners, "mask": _png(region.cropped)}


def _png(mask: Mask) -> str:
    stream = io.BytesIO()
    Image.fromarray(mask.astype("uint8")).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()
