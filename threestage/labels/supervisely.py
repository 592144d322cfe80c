"""Supervisely: a project with meta.json, and for each image DATASET/ann/IMAGE.json with polygons, bitmaps and rectangles."""

import base64
import binascii
import zlib
from pathlib import PurePosixPath

import numpy as np
from pydantic import Field, FiniteFloat

from threestage.data import storage
from threestage.data.classes import Colour
from threestage.data.headers import BadImage
from threestage.data.records import DECODER_ERRORS, open_image
from threestage.errors import InputError
from threestage.labels.annotations import Annotations
from threestage.labels.export_files import CODE, ExportFiles, ToolModel, as_model
from threestage.labels.rasterise import Region, Size
from threestage.labels.rle import Mask, counts_of

META = "meta.json"
MAX_PNG_BYTES = 2**26

Corner = tuple[FiniteFloat, FiniteFloat]


class ClassMeta(ToolModel):
    title: str
    color: str = ""


class Meta(ToolModel):
    classes: list[ClassMeta]


class Outline(ToolModel):
    exterior: list[Corner] = Field(default_factory=list)
    interior: list[list[Corner]] = Field(default_factory=list)


class Bitmap(ToolModel):
    """`origin`: x and y of its upper left corner."""

    data: str
    origin: tuple[int, int]


class Shape(ToolModel):
    classTitle: str
    geometryType: str
    points: Outline = Outline()
    bitmap: Bitmap | None = None


class ImageSize(ToolModel):
    height: int
    width: int


class ImageAnnotation(ToolModel):
    size: ImageSize
    objects: list[Shape]


def read_supervisely(files: ExportFiles, into: Annotations) -> None:
    """The classes of meta.json, and every annotation in a folder `ann`."""
    jsons = files.ending(".json")
    for path, content in files.read_all({p: uri for p, uri in jsons.items() if PurePosixPath(p).name == META}):
        for entry in as_model(storage.parse_json(content, files.paths[path]), Meta, files.paths[path]).classes:
            into.add_category(entry.title, entry.title, _colour(entry.color))
    annotated = {path: uri for path, uri in jsons.items() if PurePosixPath(path).parent.name == "ann"}
    for path, content in files.read_all(annotated):
        uri = files.paths[path]
        found = as_model(storage.parse_json(content, uri), ImageAnnotation, uri)
        into.add_image(path, _image_path(path), (found.size.height, found.size.width))
        for shape in found.objects:
            region = _region(shape, (found.size.height, found.size.width), uri)
            if region is None:
                into.passed_over[f"objects of kind {shape.geometryType}"] += 1
                continue
            into.add_category(shape.classTitle, shape.classTitle)
            into.add_region(path, region)
    if not into.images:
        raise files.wrong("no DATASET/ann/IMAGE.json there; give the folder of the project, which holds meta.json")


def _image_path(path: str) -> str:
    """DATASET/ann/a.jpg.json is of DATASET/img/a.jpg."""
    folder = PurePosixPath(path).parent.parent
    return str(folder / "img" / PurePosixPath(path).name.removesuffix(".json"))


def _colour(text: str) -> Colour | None:
    try:
        red, green, blue = bytes.fromhex(text.removeprefix("#"))
    except ValueError:
        return None
    return red, green, blue


def _region(shape: Shape, size: Size, uri: str) -> Region | None:
    corners = shape.points.exterior
    if shape.geometryType == "polygon" and corners:
        return Region(shape.classTitle, "polygons", [_one_ring(corners, shape.points.interior)])
    if shape.geometryType == "rectangle" and len(corners) == 2:
        (left, right), (top, bottom) = (sorted(side) for side in zip(*corners, strict=True))
        return Region(shape.classTitle, "polygons", [[left, top, right, top, right, bottom, left, bottom]])
    if shape.geometryType != "bitmap" or shape.bitmap is None:
        return None
    try:
        inside = _mask(shape.bitmap.data, size)
    except (BadImage, binascii.Error, zlib.error, *DECODER_ERRORS) as error:
        raise InputError(f"{uri}: a bitmap of {shape.classTitle} is damaged ({error}); export it again", CODE) from None
    height, width = inside.shape
    runs = {"counts": counts_of(inside, "rows").tolist(), "order": "rows", "box": [*shape.bitmap.origin, width, height]}
    return Region(shape.classTitle, "runs", runs)


def _one_ring(exterior: list[Corner], holes: list[list[Corner]]) -> list[float]:
    """With bridges there and back to the holes, which the even-odd rule does not see."""
    ring = [*exterior, exterior[0]]
    for hole in filter(None, holes):
        ring += [*hole, hole[0], exterior[0]]
    return [number for corner in ring for number in corner]


def _mask(data: str, size: Size) -> Mask:
    """A compressed PNG as base64: what is not transparent in it, or not 0 where it has no transparency."""
    unpack = zlib.decompressobj()
    png = unpack.decompress(base64.b64decode(data, validate=True), MAX_PNG_BYTES)
    with open_image(png, size[0] * size[1]) as image:
        if image.mode == "RGBA" or "transparency" in image.info:
            return np.asarray(image.convert("RGBA"))[..., 3] > 0
        return np.asarray(image.convert("L")) > 0
