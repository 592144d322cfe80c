"""How a set of pseudo-masks is laid out (threestage/prediction/pseudo_masks.py), for those who only read it: without torch."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa

from threestage.data import storage
from threestage.data.pool import PoolFile

PSEUDO_MASK_SCHEMA = pa.schema([("image_id", pa.string()), ("pseudo_mask", pa.binary()), ("confidence", pa.binary())])
AGREEMENT = pa.field("agreement", pa.uint8())
"""In 255ths, where a stage chooses its images by it: mean IoU of the pseudo-mask and of what half-way weights predict."""
INDEX_SCHEMA = pa.schema(
    [
        ("file", pa.string()),
        ("images", pa.int64()),
        ("max_height", pa.int32()),
        ("max_width", pa.int32()),
        ("labelled_ids", pa.list_(pa.string())),
        ("agreement", pa.list_(pa.int64())),
    ]
)
INDEX_NAME = "index.parquet"


@dataclass(frozen=True)
class IndexRow:
    """What a stage must know of a file of pseudo-masks before it reads it; see FileReport. `images`: predicted ones;
    `agreement`: how many of them have each of the 256 values, empty where none was measured."""

    file: str
    images: int
    max_height: int
    max_width: int
    labelled_ids: tuple[str, ...]
    agreement: tuple[int, ...] = ()

    def images_of(self, least: int) -> int:
        """Those that agree so much at least."""
        return sum(self.agreement[least:]) if least > 0 else self.images


def least_agreement(index: Sequence[IndexRow], share: float) -> int:
    """The agreement, in 255ths, that at least this share of the images have; 0 lets in all."""
    if share == 1:
        return 0
    measured = (row.agreement for row in index if row.agreement)  # a file without a usable image has none
    counts = [sum(values) for values in zip(*measured, strict=True)]
    wanted, found, least = share * sum(counts), 0, len(counts)
    while found < wanted:
        least -= 1
        found += counts[least]
    return least


def pseudo_mask_uri(folder: str, file: PoolFile) -> str:
    """Where the pseudo-masks of an image file lie."""
    return storage.join(folder, file.name)


def write_index(folder: str, rows: Sequence[IndexRow]) -> None:
    storage.write_table(
        storage.join(folder, INDEX_NAME), pa.Table.from_pylist([asdict(row) for row in rows], INDEX_SCHEMA)
    )


def read_index(folder: str) -> list[IndexRow]:
    """The index of a finished set, in the order of its pool's files. Raises FileNotFoundError where there is none."""
    rows = storage.read_table(storage.join(folder, INDEX_NAME)).to_pylist()
    return [
        IndexRow(**row | {name: tuple(row.get(name) or ()) for name in ("labelled_ids", "agreement")}) for row in rows
    ]
