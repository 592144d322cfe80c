"""What runs beside the training to read the unlabelled pool: a file with its pseudo-masks becomes blocks of canvases.

A cluster has many of these processes, so this module imports no torch.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from threestage.allocator import disable_malloc_trim
from threestage.data import storage
from threestage.data.bands import RGB
from threestage.data.pool import PoolFile
from threestage.data.rejects import Reject, RejectList
from threestage.data.samples import Decoding, Sample, crop_to_canvas, decode_sample, pool_samples
from threestage.ray_backend.gauges import count_images
from threestage.seeds import derive_seed
from threestage.settings import Settings

Arrays = dict[str, np.ndarray]


class FilePart(Settings):
    """A file's part in the stream of one pass: rows `first` … `first + rows - 1` of the stream, in blocks of `block_rows`, over
    which the file's `images` are spread. Blocks that end before row `begin` are left out: they were used before the stage
    was continued."""

    file: PoolFile
    pass_: int
    first: int
    rows: int
    images: int
    block_rows: int
    begin: int = 0


class FileReader:
    """Reads one image file with its pseudo-mask file; every pass cuts canvases of its own."""

    def __init__(
        self,
        pseudo_masks: str | None,
        rejects: str,
        place: tuple[int | str, ...],
        decoding: Decoding,
        canvas: tuple[int, int],
        least_agreement: int = 0,
        excluded: frozenset[str] = frozenset(),
        run: str = "",
    ) -> None:
        """rejects: folder of the lists of images that have become bad. place: of the random draws. run: whose images are
        counted. See `pool_samples`."""
        self._pseudo_masks, self._rejects, self._place = pseudo_masks, rejects, place
        self._least_agreement, self._excluded = least_agreement, excluded
        self._decoding, self._canvas, self._run = decoding, canvas, run

    def __call__(self, batch: Arrays) -> Iterator[dict[str, Any]]:
        """Blocks of one file of the order, see FilePart."""
        disable_malloc_trim()
        part = FilePart.model_validate_json(str(batch["part"][0]))
        file = part.file
        rejects: list[Reject] = []
        rng = np.random.default_rng(derive_seed(*self._place, "canvases", part.pass_, file.digest))
        chunks = pool_samples(file, self._pseudo_masks, rejects.append, self._least_agreement, self._excluded)
        samples = (sample for chunk in chunks for sample in chunk)
        read, placed = 0, self._placed(samples, rejects, rng)
        for block in blocks(placed, self._blank(), part):
            read += int(block["filled"].sum())
            yield block
        deque(placed, maxlen=0)  # images that have become bad after the last good one are listed too
        count_images(self._run, str(self._place[-1]), read + len(rejects), len(rejects))
        if rejects:
            RejectList(rejects).write(storage.join(self._rejects, file.name))

    def _placed(self, samples: Iterable[Sample], rejects: list[Reject], rng: np.random.Generator) -> Iterator[Arrays]:
        for sample in samples:
            try:
                decoded = decode_sample(sample, *self._decoding)
            except ValueError as error:  # it was good when its pseudo-mask was made
                rejects.append(Reject(image_id=sample.image_id, source=sample.source, reason=str(error)))
                continue
            image, maps, extent, _ = crop_to_canvas(decoded, self._canvas, rng)
            yield {"image": image, **maps, "extent": extent, "image_id": np.array(sample.image_id)}

    def _blank(self) -> Arrays:
        maps = () if self._pseudo_masks is None else ("pseudo_mask", "confidence")
        bands = self._decoding.bands
        return {
            "image": np.zeros((*self._canvas, RGB if bands is None else bands.channels), np.uint8),
            **{name: np.zeros(self._canvas, np.uint8) for name in maps},
            "extent": np.zeros((4, 2)),
            "image_id": np.array(""),
        }


def blocks(rows: Iterable[Arrays], blank: Arrays, part: FilePart) -> Iterator[Arrays]:
    """The rows of a part of the stream stacked to blocks of `part.block_rows`, filled up with blank ones, so that it does not
    depend on what could be read which worker gets which row. Adds `number`, of the row, and `filled`."""
    rows = iter(rows)
    for first, share in zip(range(part.first, part.first + part.rows, part.block_rows), shares(part), strict=True):
        filled = list(islice(rows, share))
        if first + part.block_rows > part.begin:
            missing = part.block_rows - len(filled)
            block = _stacked([*filled, *[blank] * missing])
            block["number"] = np.arange(first, first + part.block_rows)
            block["filled"] = np.arange(part.block_rows) < len(filled)
            yield block


def shares(part: FilePart) -> Sequence[int]:
    """How many images each block takes: all the same, or one more. Which take more is drawn, and differs between files and
    passes: Ray deals the blocks out in turn, and no worker may get the short ones of all files."""
    number = part.rows // part.block_rows
    more = np.random.default_rng(derive_seed("blocks", part.pass_, part.file.digest)).permutation(number)
    return (part.images // number + (more < part.images % number)).tolist()


def _stacked(rows: Sequence[Arrays]) -> Arrays:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
