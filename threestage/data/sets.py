"""Which samples a stage trains and validates on: rows of the data set joined with their pseudo-masks."""

from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa

from threestage.augment.views import AugmentSettings
from threestage.data import storage
from threestage.data.batches import Sample, SampleSet, canvas_size, samples_of
from threestage.data.pool import PoolFile, chunks, read_rows
from threestage.data.records import DataSettings, Manifest, SplitName, labelled_rows
from threestage.data.rejects import Reject
from threestage.data.split import Split
from threestage.errors import StageFailure
from threestage.pseudo_masks import IndexRow, pseudo_mask_uri, read_index

OnReject = Callable[[Reject], None]


def labelled_set(root: str, manifest: Manifest, split: Split, downscale: int, pseudo_masks: str | None) -> SampleSet:
    """The labelled images with their masks, and with pseudo-masks where a folder of them is given."""
    table = labelled_rows(root, manifest, "train", split.labelled)
    if pseudo_masks is not None:
        table = _with_pseudo_masks(table, _pseudo_mask_rows(pseudo_masks))
    return SampleSet(samples_of(table.to_pydict()), downscale)


def validation_set(root: str, manifest: Manifest, split: Split, downscale: int) -> SampleSet:
    """The images that a run validates on, each with its mask."""
    name: SplitName = "val" if split.validation_split == "val" else "train"
    return SampleSet(samples_of(labelled_rows(root, manifest, name, split.validation).to_pydict()), downscale)


def pool_set(files: Sequence[PoolFile], pseudo_masks: str, data: DataSettings, rejected: OnReject) -> SampleSet:
    """The whole pool in memory, still encoded: for `--local` only."""
    parts = (chunk for file in files for chunk in pool_samples(file, pseudo_masks, rejected))
    return SampleSet([sample for chunk in parts for sample in chunk], data.downscale, data.max_image_pixels)


def pool_canvas(index: Sequence[IndexRow], augment: AugmentSettings) -> tuple[int, int]:
    """Canvas of the pool's images, whose sizes are known once they are predicted."""
    return canvas_size((max(row.max_height for row in index), max(row.max_width for row in index)), augment)


def pool_samples(file: PoolFile, pseudo_masks: str, rejected: OnReject) -> Iterator[list[Sample]]:
    """The pool's rows of one file, each beside its pseudo-mask, in chunks; rows without one are not in the pool.

    An image that has vanished since its pseudo-mask was made goes to `rejected`. Raises ValueError when the two files do
    not hold the same rows in the same order.
    """
    predicted = storage.read_table(pseudo_mask_uri(pseudo_masks, file))
    rows = read_rows(file, masks=False)
    for images, masks in zip(rows, chunks(predicted), strict=True):
        found = []
        for row, target in zip(images, masks.to_pylist(), strict=True):
            if row.image_id != target["image_id"]:
                raise ValueError(f"{pseudo_mask_uri(pseudo_masks, file)} does not belong to {file.uri}: ids differ")
            if row.problem is not None and target["pseudo_mask"] is not None:
                rejected(Reject(image_id=row.image_id, source=row.source, reason=row.problem))
            elif target["pseudo_mask"] is not None:
                found.append(Sample(image=row.image, source=row.source, **target))
        yield found


def _pseudo_mask_rows(folder: str) -> dict[str, tuple[bytes, bytes]]:
    """Pseudo-mask and confidence of the labelled images, read from the files that the set's index names for them."""
    found: dict[str, tuple[bytes, bytes]] = {}
    for entry in read_index(folder):
        if entry.labelled_ids:
            table = storage.read_rows(storage.join(folder, entry.file), "image_id", entry.labelled_ids)
            for row in table.to_pylist():
                found[row["image_id"]] = (row["pseudo_mask"], row["confidence"])
    return found


def _with_pseudo_masks(table: pa.Table, rows: dict[str, tuple[bytes, bytes]]) -> pa.Table:
    ids = table.column("image_id").to_pylist()
    for image_id in ids:
        if image_id not in rows:
            raise StageFailure(
                f"the labelled image {image_id} has no pseudo-mask, it is among the rejects: mend it and ingest it again, or "
                "raise data.max_image_pixels"
            )
    for position, column in enumerate(("pseudo_mask", "confidence")):
        table = table.append_column(column, pa.array([rows[image_id][position] for image_id in ids], pa.binary()))
    return table
