"""Which samples a stage trains and validates on: rows of the data set joined with their pseudo-masks."""

from collections.abc import Collection, Iterator

import pyarrow as pa

from threestage.data import storage
from threestage.data.batches import Sample, SampleSet, samples_of
from threestage.data.records import DataFile, Manifest, SplitName, labelled_rows, pool_files
from threestage.data.split import Split
from threestage.pseudo_masks import pseudo_mask_uri


def labelled_set(root: str, manifest: Manifest, split: Split, downscale: int, pseudo_masks: str | None) -> SampleSet:
    """The labelled images with their masks, and with pseudo-masks where a folder of them is given."""
    table = labelled_rows(root, manifest, "train", split.labelled)
    if pseudo_masks is not None:
        table = _with_pseudo_masks(table, _pseudo_mask_rows(manifest, pseudo_masks, set(split.labelled)))
    return SampleSet(samples_of(table.to_pydict()), downscale)


def validation_set(root: str, manifest: Manifest, split: Split, downscale: int) -> SampleSet:
    """The images that a run validates on, each with its mask."""
    name: SplitName = "val" if split.validation_split == "val" else "train"
    return SampleSet(samples_of(labelled_rows(root, manifest, name, split.validation).to_pydict()), downscale)


def pool_set(root: str, manifest: Manifest, pseudo_masks: str, downscale: int) -> SampleSet:
    """The whole pool in memory, still encoded: for `--local` only."""
    samples = [sample for file in pool_files(manifest) for sample in pool_file_samples(root, file, pseudo_masks)]
    return SampleSet(samples, downscale)


def pool_file_samples(root: str, file: DataFile, pseudo_masks: str) -> Iterator[Sample]:
    """The pool's rows of one file, each beside its pseudo-mask; rows without one are not in the pool.

    Raises ValueError when the two files do not hold the same rows in the same order.
    """
    images = storage.read_table(storage.join(root, file.path), ["image_id", "image"])
    predicted = storage.read_table(pseudo_mask_uri(pseudo_masks, file))
    if images.column("image_id") != predicted.column("image_id"):
        raise ValueError(
            f"{pseudo_mask_uri(pseudo_masks, file)} does not belong to {file.path}: their image ids differ"
        )
    for column in ("pseudo_mask", "confidence"):
        images = images.append_column(column, predicted.column(column))
    return (sample for sample in samples_of(images.to_pydict()) if sample.pseudo_mask is not None)


def _pseudo_mask_rows(manifest: Manifest, folder: str, ids: Collection[str]) -> dict[str, tuple[bytes, bytes]]:
    found = {}
    for file in pool_files(manifest):
        table = storage.read_table(pseudo_mask_uri(folder, file))
        keep = pa.array([image_id in ids for image_id in table.column("image_id").to_pylist()], pa.bool_())
        for row in table.filter(keep).to_pylist():
            found[row["image_id"]] = (row["pseudo_mask"], row["confidence"])
    return found


def _with_pseudo_masks(table: pa.Table, rows: dict[str, tuple[bytes, bytes]]) -> pa.Table:
    ids = table.column("image_id").to_pylist()
    for position, column in enumerate(("pseudo_mask", "confidence")):
        table = table.append_column(column, pa.array([rows[image_id][position] for image_id in ids], pa.binary()))
    return table
