"""Encoded rows, of the pool each beside its pseudo-mask, and what becomes of them on a CPU: decoded, cut to a canvas.
Without torch: a process that only reads has no use for it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple, overload

import numpy as np
import pyarrow as pa

from threestage import IGNORE_INDEX
from threestage.data import storage
from threestage.data.band_images import decode_pixels
from threestage.data.bands import Bands
from threestage.data.headers import BadImage
from threestage.data.pool import PoolFile, pseudo_mask_uri, read_pool_rows
from threestage.data.records import MAX_IMAGE_PIXELS, decode_mask, downscale_image, downscale_mask
from threestage.data.rejects import Reject
from threestage.errors import InputError

OnReject = Callable[[Reject], None]
NEW_RUN = "the images have changed since, begin a new run with another --out"


@dataclass(frozen=True)
class Sample:
    """One encoded image and what is known of it, as the Parquet files hold it."""

    image_id: str
    image: bytes
    mask: bytes | None = None
    pseudo_mask: bytes | None = None
    confidence: bytes | None = None
    source: str = ""


class Decoding(NamedTuple):
    """How encoded images are read. `bands`: None for 8-bit RGB."""

    downscale: int = 1
    max_pixels: int = MAX_IMAGE_PIXELS
    bands: Bands | None = None


@dataclass(frozen=True)
class Decoded:
    image: np.ndarray  # (H,W,C) uint8, RGB without bands
    maps: dict[str, np.ndarray]  # (H,W) uint8 each


def pool_samples(
    file: PoolFile,
    pseudo_masks: str | None,
    rejected: OnReject,
    least_agreement: int = 0,
    excluded: frozenset[str] = frozenset(),
) -> Iterator[list[Sample]]:
    """The pool's rows of one file, each beside its pseudo-mask, in chunks; rows without one are not in the pool, and those
    whose agreement is less than `least_agreement` (255ths) are left out. Where no stage made pseudo-masks (None), the rows
    alone, but for the images `excluded` of the run's own data set.

    An image that has vanished since its pseudo-mask was made goes to `rejected`. Raises InputError when the two files do
    not hold the same rows in the same order.
    """
    if pseudo_masks is None:
        yield from _without_pseudo_masks(file, rejected, excluded if file.own else frozenset())
        return
    predicted = storage.read_groups(pseudo_mask_uri(pseudo_masks, file))
    rows = chain.from_iterable(read_pool_rows(file, masks=False))
    for masks in predicted:
        found = []
        for row, target in zip(islice(rows, len(masks)), masks.to_pylist(), strict=True):
            if row.image_id != target["image_id"]:
                raise InputError(
                    f"{pseudo_mask_uri(pseudo_masks, file)}: its ids differ from those of {file.uri}; {NEW_RUN}",
                    "run/other-inputs",
                )
            if row.problem is not None and target["pseudo_mask"] is not None:
                rejected(Reject(image_id=row.image_id, source=row.source, reason=row.problem))
            elif target["pseudo_mask"] is not None and target.pop("agreement", 255) >= least_agreement:
                found.append(Sample(image=row.image, source=row.source, **target))
        yield found
    if next(rows, None) is not None:
        raise InputError(
            f"{pseudo_mask_uri(pseudo_masks, file)}: has fewer rows than {file.uri}; {NEW_RUN}", "run/other-inputs"
        )


def _without_pseudo_masks(file: PoolFile, rejected: OnReject, excluded: frozenset[str]) -> Iterator[list[Sample]]:
    for images in read_pool_rows(file, masks=False):
        found = []
        for row in images:
            if row.problem is not None:
                rejected(Reject(image_id=row.image_id, source=row.source, reason=row.problem))
            elif row.image_id not in excluded:
                found.append(Sample(image_id=row.image_id, image=row.image, source=row.source))
        yield found


def decode_sample(
    sample: Sample, downscale: int, max_pixels: int = MAX_IMAGE_PIXELS, bands: Bands | None = None
) -> Decoded:
    """Decode and downscale one row. Pseudo-masks and confidences are stored at the downscaled size already.

    Raises BadImage when the image cannot be decoded, or is not of its pseudo-mask's size.
    """
    image = downscale_image(decode_pixels(sample.image, max_pixels, bands), downscale)
    maps = {}
    if sample.mask is not None:
        maps["mask"] = downscale_mask(decode_mask(sample.mask), downscale)
    if sample.pseudo_mask is not None:
        maps["pseudo_mask"] = decode_mask(sample.pseudo_mask)
    if sample.confidence is not None:
        maps["confidence"] = np.frombuffer(sample.confidence, np.uint8).reshape(image.shape[:2])
    for name, values in maps.items():
        if values.shape != image.shape[:2]:
            raise BadImage(
                f"the image is of {image.shape[:2]} pixels and its {name} of {values.shape}: one has changed",
                "image/unreadable",
            )
    return Decoded(image, maps)


class Placed(NamedTuple):
    """On a canvas, padded at the bottom and the right."""

    image: np.ndarray
    maps: dict[str, np.ndarray]
    extent: np.ndarray
    """(4,2) float64: size, image, origin and place of `augment.views.Extent`"""
    pixel: tuple[int, int] | None
    """row and column in the image of the pixel that the crop has to hold"""


def crop_to_canvas(
    decoded: Decoded, canvas: tuple[int, int], rng: np.random.Generator, class_id: int | None = None
) -> Placed:
    """Cut a window of the canvas's size at a random place, padding what is missing. The crop is cut from it at the same
    place, so that crops of every scale are uniform over the image.

    `class_id`: of the mask; one of its pixels, drawn at random, is one that the window, and its crop, have to hold.
    """
    height, width = decoded.image.shape[:2]
    pixel: tuple[int, int] | None = None
    if class_id is not None:
        pixels = np.flatnonzero(decoded.maps["mask"] == class_id)
        pixel = divmod(int(pixels[rng.integers(len(pixels))]), width)
    drawn = rng.random(2)
    top, left = (
        _first_pixel(side, room, drawn[axis], None if pixel is None else pixel[axis])
        for axis, (side, room) in enumerate(zip((height, width), canvas, strict=True))
    )
    window = (slice(top, top + canvas[0]), slice(left, left + canvas[1]))
    image = decoded.image[window]
    maps = {name: value[window] for name, value in decoded.maps.items()}
    extent = np.array([image.shape[:2], (height, width), (top, left), drawn])
    if image.shape[:2] == canvas:
        return Placed(image, maps, extent, pixel)
    padding = ((0, canvas[0] - image.shape[0]), (0, canvas[1] - image.shape[1]))
    maps = {name: np.pad(value, padding, constant_values=IGNORE_INDEX) for name, value in maps.items()}
    return Placed(np.pad(image, (*padding, (0, 0))), maps, extent, pixel)


def _first_pixel(side: int, room: int, drawn: float, wanted: int | None) -> int:
    """Of a window of `room` pixels along a side, which holds the pixel `wanted`; `drawn` in [0,1) says which."""
    least, most = 0, max(0, side - room)
    if wanted is not None:
        least, most = max(0, wanted - room + 1), min(wanted, most)
    return min(most, least + int(drawn * (most - least + 1)))


class TableSamples(Sequence[Sample]):
    """The rows of a table as samples, each made when it is asked for: encoded bytes stay where the table holds them. Columns
    that a Sample has no field for are ignored."""

    def __init__(self, table: pa.Table) -> None:
        self.ids: list[str] = table.column("image_id").to_pylist()
        fields = Sample.__dataclass_fields__
        self._columns = {name: table.column(name) for name in fields if name in table.column_names}

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return Sample(**{name: column[index].as_py() for name, column in self._columns.items()})
