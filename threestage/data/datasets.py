"""The image sets of a run: labelled images (with pseudo-masks in stages 2 and 3), validation images, and the whole pool with
`--local`. Also the size of the pool's canvas, and the pixels that are void in most labels (`data.fixed_void`)."""

import base64
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from threestage import IGNORE_INDEX
from threestage.augment.views import AugmentSettings
from threestage.data import storage
from threestage.data.bands import Bands
from threestage.data.batches import SampleSet, canvas_size
from threestage.data.parallel import map_ahead
from threestage.data.pool import IndexRow, PoolFile, read_index
from threestage.data.records import (
    MAX_IMAGE_PIXELS,
    Bytes,
    DataSettings,
    Manifest,
    SplitName,
    decode_mask,
    encode_mask,
    labelled_rows,
)
from threestage.data.rejects import Reject
from threestage.data.samples import Decoding, OnReject, Sample, TableSamples, decode_sample, pool_samples
from threestage.data.split import Split
from threestage.errors import InputError, StageFailure

LABEL_THREADS = 24
"""Requests at a time for the pseudo-masks of labels, which may lie in as many files; pyarrow has 25 connections to S3."""
ANY_SIDE = 2**31
"""Pixels, more than any image has along a side."""


# ---- The sets

OncePerNode = Callable[[str, Callable[[], pa.Table]], pa.Table]
"""Gives what the function returns, which the processes of a node may share by its name."""


def _read(name: str, make: Callable[[], pa.Table]) -> pa.Table:
    return make()


def labelled_set(
    root: str,
    manifest: Manifest,
    split: Split,
    downscale: int,
    pseudo_masks: str | None,
    bands: Bands | None = None,
    once: OncePerNode = _read,
) -> SampleSet:
    """The labelled images with their masks, and with pseudo-masks where a folder of them is given. `bands`: those that a network
    sees, else all."""

    def read() -> pa.Table:
        table = labelled_rows(root, manifest, "train", split.labelled)
        return table if pseudo_masks is None else _with_pseudo_masks(table, _pseudo_mask_rows(pseudo_masks))

    return _seen_set(once("labelled", read), manifest, downscale, bands)


def validation_set(
    root: str,
    manifest: Manifest,
    split: Split,
    downscale: int,
    bands: Bands | None = None,
    once: OncePerNode = _read,
) -> SampleSet:
    """The images that a run validates on, each with its mask. `bands`: see `labelled_set`."""
    name: SplitName = "val" if split.validation_split == "val" else "train"
    table = once("validation", lambda: labelled_rows(root, manifest, name, split.validation))
    return _seen_set(table, manifest, downscale, bands)


def _seen_set(table: pa.Table, manifest: Manifest, downscale: int, bands: Bands | None) -> SampleSet:
    return SampleSet(TableSamples(table), downscale, MAX_IMAGE_PIXELS, bands or manifest.bands)


def pool_set(
    files: Sequence[PoolFile],
    pseudo_masks: str | None,
    data: DataSettings,
    rejected: OnReject,
    least_agreement: int = 0,
    excluded: frozenset[str] = frozenset(),
    bands: Bands | None = None,
) -> SampleSet:
    """The whole pool in memory, still encoded: for `--local` only. Without pseudo-masks, whose making has looked at every
    image, those that cannot be decoded go to `rejected` here."""
    parts = (chunk for file in files for chunk in pool_samples(file, pseudo_masks, rejected, least_agreement, excluded))
    samples = [sample for chunk in parts for sample in chunk]
    decoding = Decoding(data.downscale, data.max_image_pixels, bands)
    if pseudo_masks is None:
        samples = [sample for sample in samples if is_usable(sample, decoding, rejected)]
    return SampleSet(samples, *decoding)


def is_usable(sample: Sample, decoding: Decoding, rejected: OnReject) -> bool:
    """Whether an image can be decoded; else it goes to `rejected`."""
    try:
        decode_sample(sample, *decoding)
    except ValueError as error:
        rejected(Reject(image_id=sample.image_id, source=sample.source, reason=str(error)))
        return False
    return True


def pool_canvas(index: Sequence[IndexRow] | None, augment: AugmentSettings) -> tuple[int, int]:
    """Canvas of the pool's images; their sizes are known once they are predicted (None: they are not)."""
    if index is None:
        return canvas_size((ANY_SIDE, ANY_SIDE), augment)
    return canvas_size((max(row.max_height for row in index), max(row.max_width for row in index)), augment)


# ---- Labelled images joined with their pseudo-masks


def _pseudo_mask_rows(folder: str) -> dict[str, tuple[bytes, bytes]]:
    """Pseudo-mask and confidence of the labelled images, read from the files that the set's index names for them."""

    def read(entry: IndexRow) -> pa.Table:
        return storage.read_rows(storage.join(folder, entry.file), "image_id", entry.labelled_ids)

    entries = (entry for entry in read_index(folder) if entry.labelled_ids)
    tables = map_ahead(read, entries, LABEL_THREADS)
    rows = (row for table in tables for row in table.to_pylist())
    return {row["image_id"]: (row["pseudo_mask"], row["confidence"]) for row in rows}


def _with_pseudo_masks(table: pa.Table, rows: dict[str, tuple[bytes, bytes]]) -> pa.Table:
    ids = table.column("image_id").to_pylist()
    for image_id in ids:
        if image_id not in rows:
            raise StageFailure(
                f"the labelled image {image_id} has no pseudo-mask, it is among the rejects: fix it and ingest it again, or "
                "raise data.max_image_pixels",
                "data/bad-labelled-image",
            )
    for position, column in enumerate(("pseudo_mask", "confidence")):
        table = table.append_column(column, pa.array([rows[image_id][position] for image_id in ids], pa.binary()))
    return table


# ---- Pixels that are void in most labels


def static_void_mask(samples: SampleSet, share: float) -> str:
    """Base64 of a PNG (H,W) at the size of training: 1 where at least `share` of the samples' masks is void, else 0.

    Raises InputError, naming an image, when the masks are not all of one size.
    """
    first = samples.decoded(0).maps["mask"]
    votes = np.zeros(first.shape, np.int64)
    for index, sample in enumerate(samples.samples):
        mask = samples.decoded(index).maps["mask"]
        if mask.shape != first.shape:
            raise InputError(
                f"data.fixed_void={share} takes masks of one size, but {samples.samples[0].image_id} has {first.shape} and "
                f"{sample.image_id} {mask.shape} pixels; set it to null",
                "data/mask-sizes",
            )
        votes += mask == IGNORE_INDEX
    region = votes >= share * len(samples)
    return base64.b64encode(encode_mask(region.astype(np.uint8))).decode()


def unpacked(region: str) -> Bytes:
    """uint8 (H,W) of what `static_void_mask` returned."""
    return decode_mask(base64.b64decode(region))
