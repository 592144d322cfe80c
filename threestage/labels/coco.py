"""COCO: one JSON file with images, categories and annotations, and panoptic ones, which name a PNG of segments for each image.

Segmentations are polygons, plain run lengths or compressed ones. Crowds (`iscrowd`) are regions like others; an annotation
that has a box only is not read. Ids may have gaps, begin at 0 and be texts.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

from threestage.data import storage
from threestage.data.classes import Colour
from threestage.errors import InputError
from threestage.labels.annotations import Annotations
from threestage.labels.export_files import CODE, ExportFiles, ToolModel, as_model
from threestage.labels.json_stream import elements
from threestage.labels.output_files import COPY_BYTES, Add, ExportedImage, ExportedRegion, as_json, streamed
from threestage.labels.rasterise import Region, Size
from threestage.labels.rle import coco_text, counts_of

Id = int | str


class CocoImage(ToolModel):
    id: Id
    file_name: str
    height: int | None = None
    width: int | None = None

    @property
    def size(self) -> Size | None:
        return None if self.height is None or self.width is None else (self.height, self.width)


class CocoCategory(ToolModel):
    id: Id
    name: str
    color: tuple[int, int, int] | None = None


class RunLengths(ToolModel):
    counts: str | list[int]
    size: Size


class CocoAnnotation(ToolModel):
    image_id: Id
    category_id: Id
    segmentation: RunLengths | list[Any] | None = None


class Segment(ToolModel):
    id: int
    category_id: Id


class PanopticAnnotation(ToolModel):
    image_id: Id
    file_name: str
    segments_info: list[Segment]


def read_coco(files: ExportFiles, into: Annotations) -> None:
    """Every JSON file there; of several the images and categories are joined by their names."""
    found = files.ending(".json")
    if not found:
        raise files.wrong("no JSON file of COCO there")
    for number, uri in enumerate(found.values()):
        _read_file(files, uri, f"{number}:", into)
    if len(found) > 1:
        into.join_images()
    if not any(image.name for image in into.images):
        raise files.wrong("no images in its JSON, which COCO has under `images`")


def _read_file(files: ExportFiles, uri: str, prefix: str, into: Annotations) -> None:
    """`prefix`: of the ids, which are the file's own."""
    masks: ExportFiles | None = None
    for key, value in elements(uri):
        if key == "images":
            image = as_model(value, CocoImage, f"{uri}: images")
            into.add_image(f"{prefix}{image.id}", image.file_name, image.size)
        elif key == "categories":
            category = as_model(value, CocoCategory, f"{uri}: categories")
            into.add_category(f"{prefix}{category.id}", category.name, category.color)
        elif key == "annotations" and isinstance(value, dict) and "segments_info" in value:
            masks = masks or _panoptic_masks(files, uri)
            _add_panoptic(masks, as_model(value, PanopticAnnotation, f"{uri}: annotations"), prefix, into)
        elif key == "annotations" and isinstance(value, dict) and "category_id" not in value:
            into.passed_over["annotations without a category"] += 1  # captions
        elif key == "annotations":
            _add(as_model(value, CocoAnnotation, f"{uri}: annotations"), prefix, into)


def _add(annotation: CocoAnnotation, prefix: str, into: Annotations) -> None:
    category, shape = f"{prefix}{annotation.category_id}", annotation.segmentation
    rings = [ring for ring in (shape if isinstance(shape, list) else ()) if ring != []]
    if not rings and not isinstance(shape, RunLengths):
        into.passed_over["annotations with a box only"] += 1
        return
    if isinstance(shape, RunLengths):
        counts = {"text" if isinstance(shape.counts, str) else "counts": shape.counts}
        region = Region(category, "runs", {**counts, "order": "columns", "size": shape.size})
    else:
        region = Region(category, "polygons", rings if isinstance(rings[0], list) else [rings])
    into.add_region(f"{prefix}{annotation.image_id}", region)


# ---- Panoptic


def _panoptic_masks(files: ExportFiles, uri: str) -> ExportFiles:
    """The PNGs of a panoptic JSON file: in the folder of its name, else in its own."""
    try:
        return files.beside(uri.removesuffix(".json"))
    except InputError:
        return files.beside(uri)


def _add_panoptic(masks: ExportFiles, of: PanopticAnnotation, prefix: str, into: Annotations) -> None:
    mask = masks.paths.find(of.file_name)
    if mask is None:
        raise InputError(
            f"{masks.place}: the panoptic mask {of.file_name} is missing; put the PNGs into a folder named like the JSON",
            CODE,
        )
    values = {str(segment.id): f"{prefix}{segment.category_id}" for segment in of.segments_info}
    into.add_region(f"{prefix}{of.image_id}", Region("", "values", {**masks.mask(mask), "values": values}))


# ---- Written: categories from 1, and an annotation for each class in an image, of all its parts


@contextmanager
def write_coco(folder: str, classes: Sequence[tuple[str, Colour]]) -> Iterator[Add]:
    """FOLDER/annotations.json: compressed run lengths, or polygons where the regions have them."""
    categories = [{"id": number, "name": name, "color": colour} for number, (name, colour) in enumerate(classes, 1)]
    image_numbers, annotation_numbers = count(1), count(1)
    with tempfile.TemporaryFile("w+") as images, streamed(storage.join(folder, "annotations.json")) as write:
        write(f'{{"categories":{as_json(categories)},\n"annotations":[')

        def add(image: ExportedImage) -> None:
            number, (height, width) = next(image_numbers), image.mask.shape
            entry = {"id": number, "file_name": image.name, "height": height, "width": width}
            images.write(f"{',' * (number > 1)}\n{as_json(entry)}")
            for region in image.regions:
                write(_annotation(next(annotation_numbers), number, region))

        yield add
        write('],\n"images":[')
        images.seek(0)
        for piece in iter(lambda: images.read(COPY_BYTES), ""):
            write(piece)
        write("]}\n")


def _annotation(number: int, image: int, region: ExportedRegion) -> str:
    shape: Any = {"size": region.inside.shape, "counts": coco_text(counts_of(region.inside, "columns"))}
    if region.polygons is not None:
        shape = [ring.ravel().tolist() for ring in region.polygons]
    entry = {"id": number, "image_id": image, "category_id": region.class_id + 1, "segmentation": shape, "iscrowd": 0}
    entry |= {"bbox": region.box, "area": int(region.inside.sum())}
    return f"{',' * (number > 1)}\n{as_json(entry)}"
