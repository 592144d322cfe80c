"""What the numbers of an image's bands mean: measured when a data set is made, turned into 256 levels wherever it is read.

8 bits stay as they are. Of other numbers the percentiles LOW and HIGH of each band become 0 and 255; what lies outside is cut
off. From there on an image of any bands is uint8 (H,W,C), as RGB is.
"""

from collections.abc import Sequence
from typing import Annotated, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, FiniteFloat, model_validator

from threestage.data.headers import BadImage
from threestage.errors import InputError
from threestage.settings import Settings

LOW, HIGH = 1, 99
MAX_BANDS = 64
PIXELS_OF_IMAGE = 1024
"""Measured of each image, evenly over it."""
POINTS = np.arange(0.25, 100, 0.5)
"""Percentiles that a shard of images is summed up by: the middles of 200 equal parts."""
MOST = 255.0
RGB = 3

BandNumber = Annotated[int, Field(ge=1, le=MAX_BANDS)]
Levels = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.generic]


class Bands(Settings):
    """The bands of a data set's images. `low`, `high`: of each, the numbers that become 0 and 255. `used`: those that a network
    sees, in its order, from 1 on; all without."""

    count: BandNumber
    low: tuple[FiniteFloat, ...]
    high: tuple[FiniteFloat, ...]
    used: Annotated[tuple[BandNumber, ...], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _of_each(self) -> Self:
        if not len(self.low) == len(self.high) == self.count or max(self.used or (1,)) > self.count:
            raise InputError(f"low, high or used are not of {self.count} bands", "config/invalid-value")
        return self

    @property
    def channels(self) -> int:
        """How many bands a network sees."""
        return self.count if self.used is None else len(self.used)

    def levels(self, values: Numbers) -> Levels:
        """The file's own numbers (H,W,count) → uint8 (H,W,channels). What is no number becomes 0.

        Raises BadImage where there are other bands.
        """
        if values.ndim != 3 or values.shape[2] != self.count:
            raise BadImage(
                f"has the shape {values.shape}, and the images of the data set {self.count} bands", "image/bands"
            )
        chosen = range(self.count) if self.used is None else [number - 1 for number in self.used]
        plain = values.dtype == np.uint8
        if plain and self.used is None and self._keeps(range(self.count)):
            return np.ascontiguousarray(values, np.uint8)
        found = np.empty((*values.shape[:2], self.channels), np.uint8)
        for channel, band in enumerate(chosen):
            one = values[:, :, band]
            found[:, :, channel] = one if plain and self._keeps([band]) else self._scaled(one, band)
        return found

    def _keeps(self, bands: Sequence[int]) -> bool:
        return all((self.low[band], self.high[band]) == (0, MOST) for band in bands)

    def _scaled(self, values: Numbers, band: int) -> Levels:
        is_short = values.dtype.itemsize <= 2 or values.dtype == np.float32
        wide: npt.NDArray[np.float64] = values.astype(np.float32 if is_short else np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            wide -= self.low[band]
            wide *= MOST / ((self.high[band] - self.low[band]) or 1.0)
        np.nan_to_num(wide, copy=False, nan=0, posinf=MOST, neginf=0)
        return np.rint(np.clip(wide, 0, MOST, out=wide), out=wide).astype(np.uint8)


def chosen_bands(bands: Bands | None, used: tuple[int, ...] | None, root: str) -> Bands | None:
    """The bands of the data set `root`, of which a network sees those `used` (`data.bands`). None: 8-bit RGB."""
    if used is None:
        return bands
    shown = f"data.bands={list(used)}"
    if bands is None:
        raise InputError(
            f"{shown}: the data set {root} holds 8-bit RGB; ingest the images anew with --bands, or leave it out",
            "data/no-such-band",
        )
    if max(used) > bands.count:
        raise InputError(
            f"{shown}: the images of {root} have the bands 1 to {bands.count}; name some of these", "data/no-such-band"
        )
    return bands.model_copy(update={"used": used})


def shown_bands(pixels: Levels) -> Levels:
    """(H,W,C) as RGB (H,W,3) for people: its first three bands; of fewer the first one as grey."""
    if pixels.shape[2] == RGB:
        return pixels
    return np.ascontiguousarray(pixels[:, :, :RGB] if pixels.shape[2] > RGB else pixels[:, :, :1].repeat(RGB, 2))


# ---- Measured at ingest


class BandSample(Settings):
    """Some images: how many, whether all are of 8 bits, and of each band the percentiles POINTS of their numbers; none of a band
    without a finite number."""

    images: int
    plain: bool
    percentiles: tuple[tuple[FiniteFloat, ...], ...]


def some_pixels(values: Numbers) -> Numbers:
    """Of an image (H,W,B) at most PIXELS_OF_IMAGE pixels (n,B), of its own type."""
    flat = values.reshape(-1, values.shape[2])
    chosen = np.linspace(0, len(flat) - 1, min(len(flat), PIXELS_OF_IMAGE)).astype(np.int64)
    return flat[chosen]


def sampled(images: Sequence[Numbers]) -> BandSample:
    """Of what `some_pixels` gave of one or more images."""
    bands = (np.concatenate([one[:, band].astype(np.float64) for one in images]) for band in range(images[0].shape[1]))
    finite = (numbers[np.isfinite(numbers)] for numbers in bands)
    found = (np.percentile(numbers, POINTS).tolist() if len(numbers) else () for numbers in finite)
    plain = all(one.dtype == np.uint8 for one in images)
    return BandSample(images=len(images), plain=plain, percentiles=tuple(tuple(points) for points in found))


def measured(samples: Sequence[BandSample]) -> Bands | None:
    """The bands of the images that were sampled, whatever the samples' order; None without any."""
    if not samples:
        return None
    count = len(samples[0].percentiles)
    if all(sample.plain for sample in samples):
        return Bands(count=count, low=(0.0,) * count, high=(MOST,) * count)
    ends = [_ends([(sample.percentiles[band], sample.images) for sample in samples]) for band in range(count)]
    return Bands(count=count, low=tuple(low for low, _ in ends), high=tuple(high for _, high in ends))


def _ends(parts: Sequence[tuple[tuple[float, ...], int]]) -> tuple[float, float]:
    """The percentiles LOW and HIGH of the parts together, each (percentiles POINTS, weight)."""
    points = sorted((value, weight) for values, weight in parts for value in values)
    if not points:
        return 0.0, MOST
    values, weights = np.array(points, np.float64).T
    share = 100 * (weights.cumsum() - weights / 2) / weights.sum()
    low, high = np.interp([LOW, HIGH], share, values).tolist()
    return low, high
