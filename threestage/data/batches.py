"""From encoded rows to batches: decode, place on a common canvas, stack; order and placement are functions of the step.

A canvas is the part of an image that a weak view can need (crop size / smallest scale), so that images of many sizes
stack; smaller ones are padded at the bottom and the right.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from threestage import IGNORE_INDEX
from threestage.augment.views import AugmentSettings, Extent
from threestage.data.bands import Bands
from threestage.data.parallel import ahead
from threestage.data.records import MAX_IMAGE_PIXELS
from threestage.data.samples import Decoded, Decoding, Sample, TableSamples, crop_to_canvas, decode_sample
from threestage.errors import CodedError, StageFailure, reason_of
from threestage.seeds import derive_seed

DECODED_CACHE_BYTES = 512 * 2**20
BatchMode = Literal["per_worker", "global"]


@dataclass(frozen=True)
class Batch:
    """N canvases: image (N,C,H,W) uint8, in memory the channels last as decoders give them; size: what of them is valid, and
    where the crops are cut; maps (N,H,W) uint8 by name."""

    image: Tensor
    size: Extent
    maps: dict[str, Tensor]
    image_ids: tuple[str, ...]

    def first(self, count: int) -> "Batch":
        maps = {name: value[:count] for name, value in self.maps.items()}
        return Batch(self.image[:count], self.size.map(lambda part: part[:count]), maps, self.image_ids[:count])

    def to(self, device: torch.device) -> "Batch":
        maps = {name: send(value, device) for name, value in self.maps.items()}
        size = self.size.map(lambda part: send(part, device))
        return Batch(send(self.image, device), size, maps, self.image_ids)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on its way to a device, without waiting for it."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def canvas_size(largest: tuple[int, int], augment: AugmentSettings) -> tuple[int, int]:
    """Height and width of the canvas: what the widest weak view needs, no more than the `largest` image has. Scaled images
    are of whole pixels and crops begin at whole ones, which together can shift a crop by one and a half."""
    spare = 0 if augment.scale[0] == 1 else 1.5
    needed = [math.ceil((side + spare) / augment.scale[0]) for side in augment.crop_size]
    return min(largest[0], needed[0]), min(largest[1], needed[1])


def stack(
    samples: Sequence[tuple[str, Decoded]],
    canvas: tuple[int, int],
    randoms: Sequence[np.random.Generator],
    class_ids: Sequence[int | None],
) -> Batch:
    """One batch of the samples, in their order, each placed with a generator of its own; `class_ids`: see `place`, of all
    samples or of none."""
    placed = [
        crop_to_canvas(decoded, canvas, rng, class_id)
        for (_, decoded), rng, class_id in zip(samples, randoms, class_ids, strict=True)
    ]
    image = torch.from_numpy(np.stack([one.image for one in placed])).permute(0, 3, 1, 2)
    maps = {name: torch.from_numpy(np.stack([one.maps[name] for one in placed])) for name in placed[0].maps}
    pixels = [one.pixel for one in placed if one.pixel is not None]
    return Batch(
        image,
        Extent.of(torch.from_numpy(np.stack([one.extent for one in placed])), torch.tensor(pixels) if pixels else None),
        maps,
        tuple(name for name, _ in samples),
    )


class SampleSet:
    """Encoded rows; decoded ones are kept as long as they fit into DECODED_CACHE_BYTES."""

    def __init__(
        self,
        samples: Sequence[Sample],
        downscale: int,
        max_pixels: int = MAX_IMAGE_PIXELS,
        bands: Bands | None = None,
    ) -> None:
        self.samples = samples
        self._decoding = Decoding(downscale, max_pixels, bands)
        self.ids = samples.ids if isinstance(samples, TableSamples) else [sample.image_id for sample in samples]
        self._cache: dict[int, Decoded] = {}
        self._free = DECODED_CACHE_BYTES

    def __len__(self) -> int:
        return len(self.samples)

    def digest(self) -> str:
        """sha256 over ids, images and masks, and what their bands mean: what was trained or validated on."""
        bands = self._decoding.bands
        whole = hashlib.sha256(b"" if bands is None else bands.model_dump_json().encode())
        for sample in self.samples:
            for part in (sample.image_id.encode(), sample.image, sample.mask or b""):
                whole.update(hashlib.sha256(part).digest())
        return whole.hexdigest()

    def decoded(self, index: int) -> Decoded:
        if index in self._cache:
            return self._cache[index]
        try:
            decoded = decode_sample(self.samples[index], *self._decoding)
        except ValueError as error:
            code = error.code if isinstance(error, CodedError) else "image/undecodable"
            raise StageFailure(f"{self.ids[index]}: {reason_of(error)}", code) from error
        self._free -= decoded.image.nbytes + sum(value.nbytes for value in decoded.maps.values())
        if self._free > 0:
            self._cache[index] = decoded
        return decoded


class ShuffledIndex:
    """Which item stands at a position: pass after pass, each a permutation that depends on (place, pass) alone."""

    def __init__(self, length: int, *place: int | str) -> None:
        self._length = length
        self._place = place
        self._pass = -1
        self._items = np.empty(0, np.int64)

    def __getitem__(self, position: int) -> int:
        pass_, offset = divmod(position, self._length)
        if pass_ != self._pass:
            rng = np.random.default_rng(derive_seed(*self._place, "pass", pass_))
            self._items, self._pass = rng.permutation(self._length), pass_
        return int(self._items[offset])


class BalancedOrder:
    """Which item, and which class of it, stands at a position: first a class, then an image that has it, each by chance.

    class_pixels: (items, classes) pixels of each class in each image. A class has the chance ∝ its pixels^-balance, the
    images that have it the same chance each. A function of (place, position) alone.
    """

    def __init__(self, class_pixels: np.ndarray, balance: float, *place: int | str) -> None:
        self._place = place
        self._classes = np.flatnonzero(class_pixels.sum(0))
        self._items = [np.flatnonzero(class_pixels[:, class_id]) for class_id in self._classes]
        chances = class_pixels.sum(0)[self._classes].astype(float) ** -balance
        self._chances = chances / chances.sum()

    def __getitem__(self, position: int) -> tuple[int, int]:
        rng = np.random.default_rng(derive_seed(*self._place, "class", position))
        drawn = int(rng.choice(len(self._classes), p=self._chances))
        items = self._items[drawn]
        return int(items[rng.integers(len(items))]), int(self._classes[drawn])


@dataclass(frozen=True)
class BatchSlice:
    """The rows of a step's global batch that one worker takes."""

    first: int
    count: int
    total: int  # images in the global batch


def share_of(batch_size: int, batch: BatchMode, rank: int, world_size: int) -> BatchSlice:
    """`per_worker`: every worker takes `batch_size` images; `global`: all together take them, the shares differ by one."""
    if batch == "per_worker":
        return BatchSlice(rank * batch_size, batch_size, world_size * batch_size)
    first, end = (batch_size * r // world_size for r in (rank, rank + 1))
    return BatchSlice(first, end - first, batch_size)


def max_shard_size(total: int, world_size: int) -> int:
    """The images that the largest share of a global batch has."""
    return -(-total // world_size)


def batches(
    samples: SampleSet,
    share: BatchSlice,
    canvas: tuple[int, int],
    seed_place: tuple[int | str, ...],
    first_image: int = 0,
    class_balance: float = 0.0,
) -> Iterator[Batch]:
    """Endless batches: a worker's rows of every global batch, the first of which begins at image `first_image`.

    Which images they are, and where they are cut, depends on their place in the order alone, not on the number of workers.
    class_balance: above 0, every sample has a mask, and BalancedOrder draws image and crop.
    """
    order = _order(samples, class_balance, seed_place)
    with ThreadPoolExecutor(2) as pool:
        for start in count(first_image + share.first, share.total):
            places = range(start, start + share.count)
            chosen, class_ids = zip(*(order(place) for place in places), strict=True)
            randoms = [np.random.default_rng(derive_seed(*seed_place, "canvas", place)) for place in places]
            decoded = pool.map(samples.decoded, chosen)
            named = [(samples.ids[i], d) for i, d in zip(chosen, decoded, strict=True)]
            yield stack(named, canvas, randoms, class_ids)


def _order(
    samples: SampleSet, class_balance: float, seed_place: tuple[int | str, ...]
) -> Callable[[int], tuple[int, int | None]]:
    """Position → item, and the class that its crop has to hold."""
    if class_balance > 0:
        return BalancedOrder(label_pixels(samples), class_balance, *seed_place).__getitem__
    order = ShuffledIndex(len(samples), *seed_place)
    return lambda position: (order[position], None)


def label_weights(samples: SampleSet, exponent: float, device: torch.device) -> Tensor | None:
    """(256,) uint8 by class id: what a pixel of a class counts, ∝ the labelled pixels of it^-exponent, 255 for the rarest;
    None where all count alike."""
    if exponent == 0:
        return None
    pixels = label_pixels(samples).sum(0).astype(float)
    weight = np.zeros(256)
    weight[:IGNORE_INDEX][pixels > 0] = pixels[pixels > 0] ** -exponent
    return torch.from_numpy(np.rint(255 * weight / weight.max()).clip(1).astype(np.uint8)).to(device)


def label_pixels(samples: SampleSet) -> np.ndarray:
    """(samples, 255) pixels of each class id."""
    masks = (samples.decoded(item).maps["mask"] for item in range(len(samples)))
    return np.stack([np.bincount(mask.ravel(), minlength=256)[:IGNORE_INDEX] for mask in masks])


class TimedIterator:
    """An iterator that sums up how long it was waited for, in seconds."""

    def __init__(self, source: Iterator[Batch]) -> None:
        self._source = source
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        batch = next(self._source)
        self.seconds += time.perf_counter() - started
        return batch


def prefetch(source: Iterator[Batch], device: torch.device, depth: int = 3) -> Iterator[Batch]:
    """The same batches, made ahead in a thread and on their way to the device; an error in the source is raised here."""
    return ahead((batch.to(device) for batch in source), depth)
