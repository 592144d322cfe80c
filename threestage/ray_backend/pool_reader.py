"""What runs beside the training to read the unlabelled pool: a file with its pseudo-masks becomes blocks of canvases.

A cluster has many of these processes, so this module imports no torch.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from threestage.allocator import disable_malloc_trim
from threestage.data import storage
from threestage.data.pool import PoolFile
from threestage.data.records import DataSettings
from threestage.data.rejects import Reject, RejectList
from threestage.data.samples import Sample, crop_to_canvas, decode_sample, pool_samples
from threestage.seeds import derive_seed

BLOCK_BYTES = 32 * 2**20

Arrays = dict[str, np.ndarray]


class FileReader:
    """Reads one image file with its pseudo-mask file; every pass cuts canvases of its own."""

    def __init__(
        self,
        pseudo_masks: str | None,
        rejects: str,
        place: tuple[int | str, ...],
        data: DataSettings,
        canvas: tuple[int, int],
        least_agreement: int = 0,
        excluded: frozenset[str] = frozenset(),
    ) -> None:
        """rejects: folder of the lists of images that have become bad. place: of the random draws. See `pool_samples`."""
        self._pseudo_masks, self._rejects, self._place = pseudo_masks, rejects, place
        self._least_agreement, self._excluded = least_agreement, excluded
        self._data, self._canvas = data, canvas

    def __call__(self, batch: Arrays) -> Iterator[dict[str, Any]]:
        disable_malloc_trim()
        pass_, file = int(batch["pass"][0]), PoolFile.model_validate_json(str(batch["file"][0]))
        rejects: list[Reject] = []
        rng = np.random.default_rng(derive_seed(*self._place, "canvases", pass_, file.digest))
        chunks = pool_samples(file, self._pseudo_masks, rejects.append, self._least_agreement, self._excluded)
        samples = (sample for chunk in chunks for sample in chunk)
        yield from blocks(self._placed(samples, rejects, rng), self._canvas)
        if rejects:
            RejectList(rejects).write(storage.join(self._rejects, file.name))

    def _placed(self, samples: Iterable[Sample], rejects: list[Reject], rng: np.random.Generator) -> Iterator[Arrays]:
        for sample in samples:
            try:
                decoded = decode_sample(sample, self._data.downscale, self._data.max_image_pixels)
            except ValueError as error:  # it was good when its pseudo-mask was made
                rejects.append(Reject(image_id=sample.image_id, source=sample.source, reason=str(error)))
                continue
            image, maps, extent, _ = crop_to_canvas(decoded, self._canvas, rng)
            yield {"image": image, **maps, "extent": extent, "image_id": np.array(sample.image_id)}


def blocks(rows: Iterable[Arrays], canvas: tuple[int, int]) -> Iterator[Arrays]:
    """Rows stacked so that each block is a little larger than BLOCK_BYTES: Ray Data then passes it on without a copy."""
    per_block = math.ceil(1.1 * BLOCK_BYTES / (canvas[0] * canvas[1] * 5))
    waiting: list[Arrays] = []
    for row in rows:
        waiting.append(row)
        if len(waiting) == per_block:
            yield _stacked(waiting)
            waiting = []
    if waiting:
        yield _stacked(waiting)


def _stacked(rows: Sequence[Arrays]) -> Arrays:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
