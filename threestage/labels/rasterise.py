"""Regions of an image to its mask: the one place where shapes become pixels.

A pixel belongs to a shape when its centre does: pixel (row, column) has its centre at (column + 0.5, row + 0.5), and the
corner (0, 0) is the image's upper left corner. A centre on an edge belongs to the shape on the right of the edge, or below
it, so two shapes that share an edge neither overlap nor leave a gap. A ring that crosses itself is filled by the even-odd
rule; several rings of one region are each filled, and joined. Where regions overlap, the later one wins.
"""

import base64
import binascii
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from threestage.data import storage
from threestage.data.classes import MAX_UNKNOWN
from threestage.data.headers import BadImage
from threestage.data.image_validation import BadFile, check_label_image
from threestage.data.parallel import PIXELS
from threestage.data.records import MAX_IMAGE_BYTES
from threestage.errors import InputError
from threestage.labels.rle import Mask, brush_mask, coco_counts, mask_of

Bytes = npt.NDArray[np.uint8]
Size = tuple[int, int]
"""Height and width in pixels."""

MAX_CROSSINGS = 2**24  # of all edges in an image with rows of pixels: 2,000 edges as high as an image of 8,000 rows
ROWS_BYTES = 2**23
CROSSINGS_AT_ONCE = 2**20
MAX_DRAWN_PIXELS = 2**33  # of the boxes around all regions of an image: some ten seconds
CODE = "mask/shape"

Kind = Literal["polygons", "unit-polygons", "ellipse", "runs", "brush", "png", "file", "values"]


class Region(NamedTuple):
    """Some pixels of one category, which is named by its key. `shape`: JSON, as the function of `SHAPES` for its kind takes it.
    Of kind "values" it has several categories, and `category` is empty."""

    category: str
    kind: Kind
    shape: Any

    @property
    def categories(self) -> Collection[str]:
        return set(self.shape["values"].values()) if self.kind == "values" else (self.category,)


class Patch(NamedTuple):
    """A mask that covers a part of the image; `top`, `left`: where it begins. `class_id`: if it is not the region's.
    `crossings`: of edges with rows of pixels."""

    top: int
    left: int
    inside: Mask
    class_id: int | None = None
    crossings: int = 0


def encode_drawing(
    regions: Sequence[Region], class_ids: Mapping[str, int], size: Size | None, unlabelled: int
) -> bytes:
    """What `draw` takes: regions in order, with class ids for their categories."""
    shapes = []
    for category, kind, shape in regions:
        if kind == "values":
            shape = {**shape, "values": {value: class_ids[key] for value, key in shape["values"].items()}}
        shapes.append([class_ids.get(category), kind, shape])
    return json.dumps({"size": size, "unlabelled": unlabelled, "regions": shapes}).encode()


def draw(data: bytes, size: Size, name: str) -> Bytes:
    """The mask (H,W) of an image of `size`. Raises BadFile, which begins with `name`, for what cannot be drawn."""
    content = json.loads(data)
    if content["size"] is not None and tuple(content["size"]) != size:
        height, width = content["size"]
        raise BadFile(
            f"{name} is for {width}x{height} pixels but its image, upright, has {size[1]}x{size[0]}", "mask/size"
        )
    mask, drawn, crossings = np.full(size, content["unlabelled"], np.uint8), 0, 0
    for class_id, kind, shape in content["regions"]:
        try:
            for part in SHAPES[kind](shape, size):
                rows, columns = part.inside.shape
                window = mask[part.top : part.top + rows, part.left : part.left + columns]
                window[part.inside] = class_id if part.class_id is None else part.class_id
                drawn, crossings = drawn + part.inside.size, crossings + part.crossings
                if drawn > MAX_DRAWN_PIXELS:
                    raise BadImage(f"has regions of more than {MAX_DRAWN_PIXELS} pixels together", "mask/costly")
                if crossings > MAX_CROSSINGS:
                    raise BadImage(
                        f"has polygons with more than {MAX_CROSSINGS} crossings of pixel rows", "mask/costly"
                    )
        except (BadImage, BadFile) as error:
            raise BadFile(f"{name} {error.message}", error.code) from None
        except (TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise BadFile(f"{name} has a damaged {kind} shape: {error}", CODE) from None
    return mask


def fill_ring(points: npt.NDArray[np.float64], size: Size) -> Patch:
    """The pixels inside a closed ring of corners (N,2) as x, y, as far as they lie in the image."""
    if points.ndim != 2 or points.shape[1:] != (2,) or not np.isfinite(points).all():
        raise BadImage("has a polygon whose corners are no pairs of numbers", CODE)
    height, width = size
    low = np.clip(np.ceil(points.min(0) - 0.5), 0, (width, height)).astype(int)
    high = np.clip(np.ceil(points.max(0) - 0.5), 0, (width, height)).astype(int)
    (left, top), (columns, rows) = low, np.maximum(high - low, 0)
    toggles, crossings = np.zeros((rows, columns + 1), np.uint8), 0
    for row, column in _crossings(points, top, rows):
        np.bitwise_xor.at(toggles, (row, np.clip(column - left, 0, columns)), 1)
        crossings += len(row)
    inside = np.bitwise_xor.accumulate(toggles, axis=1)[:, :-1].view(np.bool_)
    return Patch(int(top), int(left), inside, crossings=crossings)


def _crossings(
    points: npt.NDArray[np.float64], top: int, rows: int
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """(row below `top`, first column whose centre is not left of the crossing) of each edge with each row's centres."""
    ends = np.roll(points, -1, axis=0)
    down = points[:, 1] <= ends[:, 1]
    upper, lower = np.where(down[:, None], points, ends), np.where(down[:, None], ends, points)
    first, after = (np.clip(np.ceil(side[:, 1] - 0.5) - top, 0, rows).astype(np.int64) for side in (upper, lower))
    counts = after - first
    if counts.sum() > MAX_CROSSINGS:
        raise BadImage(f"has a polygon with more than {MAX_CROSSINGS} crossings of pixel rows", "mask/costly")
    steep = np.flatnonzero(counts)
    groups = np.cumsum(counts[steep]) // CROSSINGS_AT_ONCE
    for group in np.unique(groups):
        chosen = steep[groups == group]
        edge = np.repeat(chosen, counts[chosen])
        starts = np.cumsum(counts[chosen]) - counts[chosen]
        row = np.arange(len(edge)) - np.repeat(starts, counts[chosen]) + first[edge]
        share = (row + top + 0.5 - upper[edge, 1]) / (lower[edge, 1] - upper[edge, 1])
        crossing = upper[edge, 0] + share * (lower[edge, 0] - upper[edge, 0])
        yield row, np.clip(np.ceil(crossing - 0.5), -(2**40), 2**40).astype(np.int64)


# ---- The kinds of shapes


def _polygons(shape: Sequence[Sequence[float]], size: Size) -> Iterator[Patch]:
    """Rings of x0, y0, x1, y1, … in pixels."""
    for ring in filter(len, shape):
        yield fill_ring(np.array(ring, np.float64).reshape(-1, 2), size)


def _unit_polygons(shape: Sequence[Sequence[float]], size: Size) -> Iterator[Patch]:
    """The same in shares of the image's width and height."""
    for ring in filter(len, shape):
        yield fill_ring(np.array(ring, np.float64).reshape(-1, 2) * (size[1], size[0]), size)


def _ellipse(shape: Sequence[float], size: Size) -> Iterator[Patch]:
    """Centre x, y, radii along x and y, and the degrees by which it is turned clockwise."""
    x, y, along, across, degrees = (float(value) for value in shape)
    if not np.isfinite([x, y, along, across, degrees]).all() or along <= 0 or across <= 0:
        raise BadImage("has an ellipse without a centre or radii", CODE)
    reach = max(along, across)
    top, left = (int(np.clip(centre - reach - 1, 0, most)) for centre, most in ((y, size[0]), (x, size[1])))
    bottom, right = (int(np.clip(centre + reach + 1, 0, most)) for centre, most in ((y, size[0]), (x, size[1])))
    columns = np.arange(left, right)[None] + 0.5 - x
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    at_once = max(1, ROWS_BYTES // (8 * max(1, right - left)))
    for first in range(top, bottom, at_once):
        rows = np.arange(first, min(first + at_once, bottom))[:, None] + 0.5 - y
        one, other = columns * cos + rows * sin, rows * cos - columns * sin
        yield Patch(first, left, (one / along) ** 2 + (other / across) ** 2 <= 1)


def _runs(shape: Mapping[str, Any], size: Size) -> Iterator[Patch]:
    """`counts`, or COCO's `text` of them, in the `order` of rows or columns of a `box` (left, top, width, height), or of
    the whole image, whose `size` (height, width) they have."""
    if "size" in shape and tuple(shape["size"]) != size:
        raise BadImage(f"has run lengths for {shape['size'][1]}x{shape['size'][0]} pixels", "mask/size")
    left, top, width, height = _box(shape.get("box", (0, 0, size[1], size[0])), size)
    counts = coco_counts(shape["text"]) if "text" in shape else shape["counts"]
    yield Patch(top, left, mask_of(counts, height, width, shape["order"]))


def _brush(shape: Sequence[int], size: Size) -> Iterator[Patch]:
    """Label Studio's brush, of the whole image: four bytes a pixel while it is decoded."""
    with PIXELS.hold(size[0] * size[1]):
        inside = brush_mask(shape, *size)
    yield Patch(0, 0, inside)


def _png(shape: Mapping[str, Any], size: Size) -> Iterator[Patch]:
    """A PNG as base64 `data`, whose values other than 0 are inside, at a `box`."""
    left, top, width, height = _box(shape["box"], size)
    try:
        data = base64.b64decode(shape["data"], validate=True)
    except binascii.Error as error:
        raise BadImage(f"has a mask that is no base64 ({error})", CODE) from None
    yield Patch(top, left, check_label_image(data, (height, width)) != 0)


def _file(shape: Mapping[str, Any], size: Size) -> Iterator[Patch]:
    """A mask file at a `uri`: what is not 0 in it."""
    yield Patch(0, 0, _numbers(shape["uri"], size) != 0)


def _values(shape: Mapping[str, Any], size: Size) -> Iterator[Patch]:
    """A mask file at a `uri`, and the class id of each of its `values`; 0 may be unlabelled."""
    numbers = _numbers(shape["uri"], size)
    known = np.zeros(size, bool) if "0" in shape["values"] else numbers == 0
    for value, class_id in shape["values"].items():
        inside = numbers == int(value)
        known |= inside
        yield Patch(0, 0, inside, class_id)
    if not known.all():
        unknown, counts = np.unique(numbers[~known], return_counts=True)
        shown = ", ".join(
            f"{value} ({count} pixels)" for value, count in zip(unknown[:MAX_UNKNOWN], counts, strict=False)
        )
        raise BadImage(f"has values in {_file_name(shape['uri'])} that mean no category: {shown}", "mask/unknown-value")


def _numbers(uri: str, size: Size) -> npt.NDArray[np.integer]:
    try:
        return check_label_image(storage.read_small(uri, MAX_IMAGE_BYTES), size)
    except InputError as error:
        raise BadFile(f"{_file_name(uri)}: {error.message}", error.code) from None
    except (FileNotFoundError, PermissionError) as error:
        raise BadFile(f"{_file_name(uri)} cannot be read: {error}", "image/unreadable") from None
    except BadFile as error:
        raise BadFile(f"{_file_name(uri)} {error.message}", error.code) from None


def _file_name(uri: str) -> str:
    return uri.rsplit("/", 1)[-1]


def _box(box: Sequence[int], size: Size) -> tuple[int, int, int, int]:
    left, top, width, height = (int(value) for value in box)
    if min(left, top) < 0 or min(width, height) < 1 or left + width > size[1] or top + height > size[0]:
        raise BadImage(f"has a mask at {left}, {top} of {width}x{height} pixels, which is not inside the image", CODE)
    return left, top, width, height


SHAPES: dict[str, Callable[[Any, Size], Iterator[Patch]]] = {
    "polygons": _polygons,
    "unit-polygons": _unit_polygons,
    "ellipse": _ellipse,
    "runs": _runs,
    "brush": _brush,
    "png": _png,
    "file": _file,
    "values": _values,
}
