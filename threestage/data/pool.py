"""The unlabelled pool: Parquet files of encoded images (a data set's), or of the URIs of image files that stay where
they are (a listed bucket prefix). Both are read as the same rows, in the file's order; a bad row says what is wrong.

Also how a set of pseudo-masks (threestage/prediction/pseudo_masks.py) is laid out: a file of them for each file of the pool.
Without torch, for those who only read.
"""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc

from threestage.data import parquet, storage
from threestage.data.listing import listed_files
from threestage.data.parallel import ahead, map_ahead
from threestage.data.records import MAX_IMAGE_BYTES, Manifest, pool_files
from threestage.data.safe_walk import WHY_NOT
from threestage.errors import InputError
from threestage.settings import Settings

FETCH_THREADS = 16
CHUNK_BYTES = 256 * 2**20
MAX_ID_BYTES = 2**12
POOL_SCHEMA = pa.schema(
    [
        ("uri", pa.string()),
        ("rows", pa.int64()),
        ("digest", pa.string()),
        ("by_reference", pa.bool_()),
        ("own", pa.bool_()),
        ("replaced", pa.list_(pa.int64())),
    ]
)
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
SOURCE_KEY, EXCLUDED_KEY = b"threestage.unlabelled", b"threestage.excluded"
PARQUET_SUFFIX = ".parquet"


class PoolFile(Settings):
    """One Parquet file of the pool. `digest` covers its rows in order; `by_reference`: they hold URIs, not bytes; `own`:
    of the run's own data set, whose image ids and masks are the run's. `replaced`: rows that are left out, see ListedFile."""

    uri: str
    rows: int
    digest: str
    by_reference: bool = False
    own: bool = False
    replaced: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Unique in the pool; the file's pseudo-masks have the same."""
        return self.uri.rsplit("/", 1)[-1]

    def without(self, rows: Iterable[int]) -> Self:
        """The file less some more of its rows, with a digest of its own."""
        replaced = tuple(sorted({*self.replaced, *rows}))
        digest = hashlib.sha256(f"{self.digest} less {replaced}".encode()).hexdigest()
        return self.model_copy(update={"replaced": replaced, "digest": digest})


@dataclass(frozen=True)
class PoolRow:
    """One image of the pool. `problem`: why its bytes could not be had (`image` is then empty), else None. `replaced`: another
    row has what is there now."""

    image_id: str
    source: str
    image: bytes
    mask: bytes | None = None
    problem: str | None = None
    replaced: bool = False


def data_set_files(root: str, manifest: Manifest, own: bool = True) -> list[PoolFile]:
    """The pool's part that lies in a data set: its train images, labelled or not."""
    return [
        PoolFile(uri=storage.join(root, file.path), rows=file.rows, digest=file.digest, own=own)
        for file in pool_files(manifest)
    ]


def listed_pool(folder: str) -> list[PoolFile]:
    """The pool's part that a finished listing in `folder` names. Raises FileNotFoundError without one."""
    return [
        PoolFile(
            uri=storage.join(folder, file.path),
            rows=file.rows,
            digest=file.digest,
            by_reference=True,
            replaced=file.replaced,
        )
        for file in listed_files(folder)
    ]


def less_excluded(files: Sequence[PoolFile], excluded: frozenset[str]) -> list[PoolFile]:
    """The files less the rows of images that are `excluded`."""
    if not excluded:
        return list(files)
    ids = pa.array(sorted(excluded), pa.string())

    def less(file: PoolFile) -> PoolFile:
        found = pc.is_in(storage.read_table(file.uri, ["image_id"]).column("image_id"), value_set=ids)
        rows = pc.indices_nonzero(found).to_pylist()
        return file.without(rows) if rows else file

    return list(map_ahead(less, files, FETCH_THREADS))


def write_pool(
    uri: str, files: Sequence[PoolFile], unlabelled: str | None, excluded: frozenset[str] = frozenset()
) -> None:
    """Publish which files are a run's pool, and the `data.unlabelled` and `data.exclude` that they were made with."""
    more = {EXCLUDED_KEY: digest_of_ids(excluded)} if excluded else {}
    schema = POOL_SCHEMA.with_metadata({SOURCE_KEY: unlabelled or "", **more})
    storage.write_table(uri, pa.Table.from_pylist([file.model_dump() for file in files], schema=schema))


def pool_source(uri: str) -> str | None:
    """The `data.unlabelled` that a pool was made with."""
    return ((storage.read_metadata(uri) or {}).get(SOURCE_KEY) or b"").decode() or None


def pool_excluded(uri: str) -> str:
    """The digest of the ids that a pool was made without; "" where it was made with all."""
    return ((storage.read_metadata(uri) or {}).get(EXCLUDED_KEY) or b"").decode()


def digest_of_ids(ids: Collection[str]) -> str:
    """ "" for none."""
    return hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest() if ids else ""


def load_pool(uri: str) -> list[PoolFile]:
    return storage.read_models(uri, PoolFile)


def read_pool_rows(file: PoolFile, masks: bool = True) -> Iterator[list[PoolRow]]:
    """All rows of a file in its order, in chunks of some; with `masks` those of the run's own data set bring theirs.

    An image that has vanished, may not be read or is absurdly large is a row with a problem; so are the rows of a row group
    or a file that is damaged. A store that fails raises OSError. By reference, the next chunk is fetched while the caller
    works on this one.
    """
    replaced = frozenset(file.replaced)
    if file.by_reference:
        yield from _read_references(storage.read_table(file.uri), replaced)
        return
    columns = ["image_id", "source", "image", *(["mask"] if masks and file.own else [])]
    for group in parquet.read_own_groups(file.uri, columns):
        if group.table is None:
            rows = group.rows or min(file.rows, parquet.MAX_GROUP_ROWS)
            yield from lost_rows(file.uri, file.name, group._replace(rows=rows))
        else:
            names = unnamed(file.name, group)
            found = map(pool_row, names, *(values_of(group.table, name) for name in columns))
            yield [
                PoolRow(row.image_id, row.source, b"", replaced=True) if number in replaced else row
                for number, row in enumerate(found, group.first)
            ]


def values_of(table: pa.Table, name: str) -> list[Any]:
    """Bytes, less those that are absurdly many, or text, of a column of others."""
    column = table.column(name)
    if name not in parquet.BYTES_COLUMNS:
        return list(parquet.texts(column))
    lengths = pc.binary_length(column)
    if (pc.max(lengths).as_py() or 0) <= MAX_IMAGE_BYTES:
        return list(column.to_pylist())
    return [
        parquet.Damaged(f"has {length} bytes, more than {MAX_IMAGE_BYTES}")
        if (length or 0) > MAX_IMAGE_BYTES
        else value.as_py()
        for value, length in zip(column, lengths.to_pylist(), strict=True)
    ]


def unnamed(name: str, group: parquet.RowGroup) -> list[str]:
    """The ids of rows that have none, by the path of their file and their numbers."""
    stem = name.removesuffix(PARQUET_SUFFIX)
    return [f"{stem}/{number:08d}" for number in range(group.first, group.first + group.rows)]


def pool_row(
    unnamed: str,
    image_id: parquet.Text,
    source: parquet.Text,
    image: bytes | parquet.Damaged | None,
    mask: bytes | None = None,
) -> PoolRow:
    """A row as a file holds it. `unnamed`: its id, where it has none that can be used."""
    place = str(source)
    if isinstance(image_id, parquet.Damaged):
        return PoolRow(unnamed, place, b"", problem=f"its image_id {image_id} [image/damaged-row]")
    if image_id is not None and len(image_id) > MAX_ID_BYTES:
        problem = f"its image_id has {len(image_id)} letters, more than {MAX_ID_BYTES} [image/damaged-row]"
        return PoolRow(unnamed, place, b"", problem=problem)
    name = unnamed if image_id is None else image_id
    if image is None:
        return PoolRow(name, place, b"", problem="is null [image/undecodable]")
    if isinstance(image, parquet.Damaged):
        return PoolRow(name, place, b"", problem=f"{image} [image/too-large]")
    return PoolRow(name, place, image, mask)


def lost_rows(uri: str, name: str, group: parquet.RowGroup) -> Iterator[list[PoolRow]]:
    """Rows that cannot be read, each with the problem of its group; `name`: path of the file."""
    for start in range(group.first, group.first + group.rows, storage.ROW_GROUP_ROWS):
        rows = min(storage.ROW_GROUP_ROWS, group.first + group.rows - start)
        names = unnamed(name, parquet.RowGroup(start, rows, None))
        yield [
            PoolRow(image_id, f"{uri}#{number}", b"", problem=f"{group.problem} [image/damaged-row]")
            for number, image_id in enumerate(names, start)
        ]


def _read_references(table: pa.Table, replaced: frozenset[int]) -> Iterator[list[PoolRow]]:
    with ThreadPoolExecutor(FETCH_THREADS) as threads:
        yield from ahead(
            list(
                threads.map(
                    _fetch, part.to_pylist(), [number in replaced for number in range(start, start + len(part))]
                )
            )
            for start, part in _chunks(table)
        )


def _chunks(table: pa.Table) -> Iterator[tuple[int, pa.Table]]:
    """The number of its first row and the rows: storage.ROW_GROUP_ROWS, fewer where their images are large."""
    start = size = 0
    for number, of_image in enumerate(table.column("bytes").to_pylist()):
        size += min(of_image, MAX_IMAGE_BYTES)
        if number > start and (number - start == storage.ROW_GROUP_ROWS or size > CHUNK_BYTES):
            yield start, table.slice(start, number - start)
            start, size = number, of_image
    if start < len(table):
        yield start, table.slice(start)


def _fetch(row: dict[str, Any], replaced: bool) -> PoolRow:
    image, problem = b"", None
    if replaced:
        return PoolRow(row["image_id"], row["image_uri"], image, replaced=True)
    try:
        if row["bytes"] in WHY_NOT:
            problem = f"{WHY_NOT[row['bytes']]} [image/place]"
        elif row["bytes"] > MAX_IMAGE_BYTES:
            problem = f"has {row['bytes']} bytes, more than {MAX_IMAGE_BYTES} [image/too-large]"
        else:
            image = storage.read_bytes(row["image_uri"])
            if len(image) != row["bytes"]:
                had = row["bytes"]
                problem = f"has changed since it was listed: it had {had} bytes, now {len(image)} [image/unreadable]"
    except (FileNotFoundError, PermissionError, InputError) as error:
        reason = error.message if isinstance(error, InputError) else error
        problem = f"cannot be read: {reason} [image/unreadable]"
    return PoolRow(row["image_id"], row["image_uri"], image, problem=problem)


def rows_of(files: Sequence[PoolFile]) -> int:
    """Images; of one that was replaced in place only the last."""
    return sum(file.rows - len(file.replaced) for file in files)


# ---- Files of pseudo-masks


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
