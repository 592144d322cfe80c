"""What is drawn of each image of a labelling tool's export: a file for each shard, written and read some images at a time."""

import tempfile
from collections.abc import Iterable, Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from threestage.data import storage
from threestage.errors import InputError

DRAWINGS = "drawings"
SCHEMA = pa.schema([("image_id", pa.string()), ("drawing", pa.binary())])
AT_ONCE_BYTES = 2**24
COPY_BYTES = 2**22


def write_drawings(uri: str, drawings: Iterable[tuple[str, bytes]]) -> None:
    """(image id, what `rasterise.draw` takes) of a shard's images in their order. Memory: AT_ONCE_BYTES and one drawing."""
    with tempfile.TemporaryFile() as waiting:
        with pq.ParquetWriter(waiting, SCHEMA, compression="zstd", use_dictionary=False) as writer:
            for rows in _groups(drawings):
                writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
        waiting.seek(0)
        storage.write_pieces(uri, iter(lambda: waiting.read(COPY_BYTES), b""))


def _groups(drawings: Iterable[tuple[str, bytes]]) -> Iterator[list[dict[str, object]]]:
    rows, size = list[dict[str, object]](), 0
    for image_id, data in drawings:
        rows.append({"image_id": image_id, "drawing": data})
        size += len(data)
        if size > AT_ONCE_BYTES or len(rows) == storage.ROW_GROUP_ROWS:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows


def read_drawings(uri: str) -> Iterator[tuple[str, bytes]]:
    """Those of `write_drawings`. Raises InputError where another ingest of the same has ended, and deleted them."""
    try:
        for group in storage.read_groups(uri):
            yield from zip(group.column("image_id").to_pylist(), group.column("drawing").to_pylist(), strict=True)
    except FileNotFoundError:
        raise InputError(
            f"{uri}: another ingest of the same images has ended meanwhile; run this one again",
            "data/concurrent-ingest",
        ) from None
