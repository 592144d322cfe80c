"""The unlabelled pool: Parquet files of encoded images (a data set's), or of the URIs of image files that stay where
they are (a listed bucket prefix). Both are read as the same rows, in the file's order; a bad row says what is wrong.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from threestage.data import storage
from threestage.data.folders import NOT_INSIDE, WHY_NOT_INSIDE
from threestage.data.listing import listed_files
from threestage.data.records import MAX_IMAGE_BYTES, Manifest, pool_files
from threestage.settings import Settings

FETCH_THREADS = 16
POOL_SCHEMA = pa.schema(
    [
        ("uri", pa.string()),
        ("rows", pa.int64()),
        ("digest", pa.string()),
        ("by_reference", pa.bool_()),
        ("own", pa.bool_()),
    ]
)
SOURCE_KEY = b"threestage.unlabelled"


class PoolFile(Settings):
    """One Parquet file of the pool. `digest` covers its rows in order; `by_reference`: they hold URIs, not bytes; `own`:
    of the run's own data set, whose image ids and masks are the run's."""

    uri: str
    rows: int
    digest: str
    by_reference: bool = False
    own: bool = False

    @property
    def name(self) -> str:
        """Unique in the pool; the file's pseudo-masks have the same."""
        return self.uri.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class PoolRow:
    """One image of the pool. `problem`: why its bytes could not be had (`image` is then empty), else None."""

    image_id: str
    source: str
    image: bytes
    mask: bytes | None = None
    problem: str | None = None


def data_set_files(root: str, manifest: Manifest, own: bool = True) -> list[PoolFile]:
    """The pool's part that lies in a data set: its train images, labelled or not."""
    return [
        PoolFile(uri=storage.join(root, file.path), rows=file.rows, digest=file.digest, own=own)
        for file in pool_files(manifest)
    ]


def listed_pool(folder: str) -> list[PoolFile]:
    """The pool's part that a finished listing in `folder` names. Raises FileNotFoundError without one."""
    return [
        PoolFile(uri=storage.join(folder, file.path), rows=file.rows, digest=file.digest, by_reference=True)
        for file in listed_files(folder)
    ]


def write_pool(uri: str, files: Sequence[PoolFile], unlabelled: str | None) -> None:
    """Publish which files are a run's pool, and the `data.unlabelled` that they were made with."""
    schema = POOL_SCHEMA.with_metadata({SOURCE_KEY: unlabelled or ""})
    storage.write_table(uri, pa.Table.from_pylist([file.model_dump() for file in files], schema=schema))


def pool_source(uri: str) -> str | None:
    """The `data.unlabelled` that a pool was made with."""
    return ((storage.read_metadata(uri) or {}).get(SOURCE_KEY) or b"").decode() or None


def load_pool(uri: str) -> list[PoolFile]:
    return [PoolFile(**row) for row in storage.read_table(uri).to_pylist()]


def read_rows(file: PoolFile, masks: bool = True) -> Iterator[list[PoolRow]]:
    """All rows of a file in its order, storage.ROW_GROUP_ROWS at a time; with `masks` those of the run's own data set bring
    theirs.

    An image that has vanished, may not be read or is absurdly large is a row with a problem. A store that fails raises
    OSError. By reference, the next chunk is fetched while the caller works on this one.
    """
    if file.by_reference:
        yield from _read_references(storage.read_table(file.uri))
        return
    columns = ["image_id", "source", "image", *(["mask"] if masks and file.own else [])]
    for part in storage.read_groups(file.uri, columns):
        yield [PoolRow(**row) for row in part.to_pylist()]


def _read_references(table: pa.Table) -> Iterator[list[PoolRow]]:
    with ThreadPoolExecutor(FETCH_THREADS) as threads:
        waiting: list[Future[PoolRow]] = []
        for start in range(0, len(table), storage.ROW_GROUP_ROWS):
            part = table.slice(start, storage.ROW_GROUP_ROWS)
            following = [threads.submit(_fetch, row) for row in part.to_pylist()]
            if waiting:
                yield [future.result() for future in waiting]
            waiting = following
        yield [future.result() for future in waiting]


def _fetch(row: dict[str, Any]) -> PoolRow:
    image, problem = b"", None
    try:
        if row["bytes"] == NOT_INSIDE:
            problem = WHY_NOT_INSIDE
        elif row["bytes"] > MAX_IMAGE_BYTES:
            problem = f"has {row['bytes']} bytes, more than {MAX_IMAGE_BYTES}"
        else:
            image = storage.read_bytes(row["image_uri"])
            if len(image) != row["bytes"]:
                problem = f"has changed since it was listed: it had {row['bytes']} bytes, now {len(image)}"
    except (FileNotFoundError, PermissionError) as error:
        problem = f"cannot be read: {error}"
    return PoolRow(row["image_id"], row["image_uri"], image, problem=problem)


def rows_of(files: Sequence[PoolFile]) -> int:
    return sum(file.rows for file in files)
