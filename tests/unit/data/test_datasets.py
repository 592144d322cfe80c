"""Why: the labels of ten thousand images lie in as many files, and each request takes tens of milliseconds."""

import threading
from collections.abc import Collection
from pathlib import Path

import pyarrow as pa
import pytest

from threestage.data import storage
from threestage.data.datasets import labelled_set
from threestage.data.pool import PSEUDO_MASK_SCHEMA, IndexRow, write_index
from threestage.data.records import labelled_ids, labelled_rows, load_manifest
from threestage.data.split import Split

FILES = 8


@pytest.fixture(scope="module")
def ids(scenes: Path) -> list[str]:
    return labelled_ids(str(scenes), load_manifest(str(scenes)), "train")[:FILES]


@pytest.fixture(scope="module")
def masks(ids: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A set of pseudo-masks in which each label lies in a file of its own."""
    folder = str(tmp_path_factory.mktemp("masks"))
    for name in ids:
        columns = [["other", name], [b"", name.encode()], [b"", f"{name}!".encode()]]
        storage.write_table(f"{folder}/{name}.parquet", pa.table(columns, PSEUDO_MASK_SCHEMA))
    write_index(folder, [IndexRow(f"{name}.parquet", 2, 9, 9, (name,)) for name in ids])
    return folder


def test_pseudo_masks_of_labels_are_fetched_at_once(
    scenes: Path, ids: list[str], masks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, read_rows = threading.Barrier(FILES, timeout=20), storage.read_rows

    def read(uri: str, key: str, values: Collection[str]) -> pa.Table:
        together.wait()
        return read_rows(uri, key, values)

    monkeypatch.setattr(storage, "read_rows", read)
    split = Split(labelled=tuple(ids), validation=(), validation_split="val")
    found = labelled_set(str(scenes), load_manifest(str(scenes)), split, 1, masks).samples
    assert [(sample.image_id, sample.pseudo_mask, sample.confidence) for sample in found] == [
        (name, name.encode(), f"{name}!".encode()) for name in ids
    ]


def test_what_the_processes_of_a_node_share_has_only_what_is_needed(scenes: Path, ids: list[str]) -> None:
    manifest = load_manifest(str(scenes))
    some = labelled_rows(str(scenes), manifest, "train", ids[:3])
    every = labelled_rows(str(scenes), manifest, "train")
    assert some.column("image_id").to_pylist() == ids[:3] and some.nbytes < every.nbytes / 5
    assert some.to_pylist() == [row for row in every.to_pylist() if row["image_id"] in ids[:3]]
