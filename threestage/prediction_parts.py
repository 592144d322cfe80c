"""What a prediction job reads, cut into parts that are predicted apart from each other: image files below a folder or a
prefix, which are listed first; a data set of `threestage ingest`; or Parquet files with a column `image` of bytes.
"""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from threestage.data import folders, storage
from threestage.data.known import id_hash
from threestage.data.listing import Each, first_image, list_images
from threestage.data.pool import FETCH_THREADS, PoolFile, PoolRow, listed_pool, read_rows
from threestage.data.records import MANIFEST_NAME, MAX_IMAGE_BYTES, load_manifest
from threestage.errors import InputError

PARQUET_SUFFIX = ".parquet"
READ_BUFFER_BYTES = 8 * 2**20
NAME_BYTES = 200  # of a file's or folder's name; file systems take 255
PATH_BYTES = 800  # of names and folders together; S3 takes 1024
CHUNK_BYTES = 256 * 2**20

Kind = Literal["images", "data set", "parquet"]


class Part(PoolFile):
    """Some of the input's rows. `groups`: first and number of a Parquet file's row groups, where it is not a file of ours;
    `first_row`: the number of its first row in that file."""

    groups: tuple[int, int] | None = None
    first_row: int = 0

    @property
    def name(self) -> str:
        return f"{self.digest[:16]}{PARQUET_SUFFIX}"


def kind_of(source: str) -> Kind:
    """Looks at few files. InputError where nothing is that could be predicted."""
    if not storage.exists(source):
        raise InputError(f"{source}: not found; give the folder or prefix that holds the images")
    if storage.exists(storage.join(source, MANIFEST_NAME)):
        return "data set"
    if source.endswith(PARQUET_SUFFIX):
        return "parquet"
    found = first_image(source)
    if not found and _parquet_files(source):
        return "parquet"
    if found is None:
        raise InputError(f"{source}: no images there, and no Parquet files; give the folder that holds them")
    return "images"


def plan(source: str, kind: Kind, listing: str, rows_per_part: int, each: Each) -> list[Part]:
    """The parts of an input. Image files are listed into the folder `listing`, of which `each` does the ranges; a rerun
    adds what is new. Raises InputError, and OSError when the source cannot be listed."""
    if kind == "images":
        list_images(source, listing, rows_per_part, each)
        return [Part(**file.model_dump()) for file in listed_pool(listing)]
    if kind == "data set":
        files = [file for file in load_manifest(source).files if file.kind == "images"]
        parts = [Part(uri=storage.join(source, file.path), rows=file.rows, digest=file.digest) for file in files]
    else:
        with ThreadPoolExecutor(FETCH_THREADS) as pool:
            found = pool.map(partial(_parts_of, rows_per_part), _parquet_files(source))
            parts = [part for parts in found for part in parts]
    if not parts:
        raise InputError(f"{source}: it holds no row; give another input")
    return parts


def read_part(source: str, part: Part) -> Iterator[list[PoolRow]]:
    """The rows of a part in their order, in chunks; one without usable bytes says what is wrong. The source of a row of
    others' Parquet is URI#number."""
    if part.groups is None:
        yield from read_rows(part, masks=False)
        return
    files, path = storage.filesystem(part.uri)
    with (
        files.open_input_file(path) as stream,
        pq.ParquetFile(stream, buffer_size=READ_BUFFER_BYTES, pre_buffer=False) as parquet,
    ):
        columns = [name for name in ("image_id", "image") if name in parquet.schema_arrow.names]
        first, number = part.groups
        groups = list(range(first, first + number))
        batches = parquet.iter_batches(1, groups, columns, use_threads=False)  # a few bytes may stand for gigabytes
        yield from _chunks(_row(source, part, row, batch) for row, batch in enumerate(batches, part.first_row))


def _chunks(rows: Iterable[PoolRow]) -> Iterator[list[PoolRow]]:
    """The rows, as many at a time as pool files have in a row group, or fewer where they are large."""
    chunk, size = list[PoolRow](), 0
    for row in rows:
        chunk.append(row)
        size += len(row.image)
        if len(chunk) == storage.ROW_GROUP_ROWS or size > CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _row(source: str, part: Part, number: int, batch: pa.RecordBatch) -> PoolRow:
    image_id = _ids(batch.column("image_id"))[0] if "image_id" in batch.schema.names else None
    if image_id is None:
        image_id = f"{_below(source, part.uri).removesuffix(PARQUET_SUFFIX)}/{number:08d}"
    place, image = f"{part.uri}#{number}", batch.column("image")[0]
    if not image.is_valid:
        return PoolRow(image_id, place, b"", problem="is null")
    size = image.as_buffer().size
    if size > MAX_IMAGE_BYTES:
        return PoolRow(image_id, place, b"", problem=f"has {size} bytes, more than {MAX_IMAGE_BYTES}")
    return PoolRow(image_id, place, image.as_py())


def _ids(column: pa.Array | pa.ChunkedArray) -> list[str | None]:
    """The ids as text; bytes that are not UTF-8, which only a broken writer leaves there, as escapes."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        raw = column.cast(pa.large_binary()).to_pylist()
        return [None if value is None else value.decode(errors="backslashreplace") for value in raw]
    return [None if value is None else str(value) for value in column.to_pylist()]


def _below(source: str, uri: str) -> str:
    """A file's path below the source; its name when it is the source."""
    below = uri.removeprefix(storage.absolute(source)).strip("/")
    return below or uri.rsplit("/", 1)[-1]


# Parquet files of others


def _parquet_files(source: str) -> list[str]:
    """URIs; names that begin with _ or . are left out, as Parquet's readers do."""
    if source.endswith(PARQUET_SUFFIX) and _is_file(source):
        return [storage.absolute(source)]
    below = len(storage.absolute(source))
    found = (uri for uri in _files_below(source) if uri.endswith(PARQUET_SUFFIX))
    return [uri for uri in found if not any(name.startswith(("_", ".")) for name in uri[below:].split("/"))]


def _files_below(source: str) -> list[str]:
    if storage.is_s3(source):
        return storage.list_files(source)
    folder = storage.absolute(source)
    entries = filter(None, (folders.entry(folder, path) for path in folders.walk(folder)))
    return [storage.join(folder, entry.path) for entry in entries if entry.size != folders.NOT_INSIDE]


def _is_file(uri: str) -> bool:
    files, path = storage.filesystem(uri)
    return bool(files.get_file_info(path).is_file)


def _parts_of(rows_per_part: int, uri: str) -> list[Part]:
    """A file's row groups in runs of about `rows_per_part` rows; more where one group has more."""
    files, path = storage.filesystem(uri)
    info, sizes = files.get_file_info(path), _group_sizes(uri)
    parts, first, first_row = list[Part](), 0, 0
    for end, row in enumerate(accumulate(sizes), 1):
        if row - first_row >= rows_per_part or (end == len(sizes) and row > first_row):
            content = f"{uri}/{info.size}/{info.mtime_ns}/{first}/{end}"
            digest = hashlib.sha256(content.encode()).hexdigest()
            groups = (first, end - first)
            parts.append(Part(uri=uri, rows=row - first_row, digest=digest, groups=groups, first_row=first_row))
            first, first_row = end, row
    return parts


def _group_sizes(uri: str) -> list[int]:
    """Rows of each row group. InputError where the file is not Parquet or has no images."""
    files, path = storage.filesystem(uri)
    try:
        with files.open_input_file(path) as stream, pq.ParquetFile(stream) as parquet:
            schema, metadata = parquet.schema_arrow, parquet.metadata
            sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    except pa.ArrowInvalid as error:
        raise InputError(f"{uri}: not a Parquet file ({error}); remove it") from None
    if "image" not in schema.names or not _is_bytes(schema.field("image").type):
        names = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise InputError(
            f"{uri}: a column image of bytes (encoded images) is expected, it has {names}; rename or convert it"
        )
    return sizes


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


# Names of what is written


def repeated_ids(parts: Sequence[Part], kind: Kind) -> frozenset[int]:
    """Hashes (see `id_hash`) of the image ids that more than one row has: their files need longer names.

    Memory: 8 bytes for each row of the input. A data set's ids are unique.
    """
    if kind == "data set":
        return frozenset()
    with ThreadPoolExecutor(FETCH_THREADS) as pool:
        hashes = list(pool.map(_id_hashes, sorted({part.uri for part in parts})))
    found, counts = np.unique(np.concatenate(hashes), return_counts=True)
    return frozenset(found[counts > 1].tolist())


def _id_hashes(uri: str) -> npt.NDArray[np.uint64]:
    """Those of a file that has ids; without them they are made, and unique."""
    files, path = storage.filesystem(uri)
    with files.open_input_file(path) as stream, pq.ParquetFile(stream) as parquet:
        if "image_id" not in parquet.schema_arrow.names:
            return np.empty(0, np.uint64)
        ids = _ids(parquet.read(columns=["image_id"]).column("image_id"))
    return np.array([id_hash(image_id) for image_id in ids if image_id is not None], np.uint64)


def output_name(row: PoolRow, source: str, kind: Kind, repeated: Collection[int]) -> str:
    """Path of what is written for a row, without an ending: the image's path below the source, or its id in a Parquet
    file. Where others have the same, with its ending, or with a digest of the place that it came from."""
    if id_hash(row.image_id) not in repeated:
        return safe_name(row.image_id)
    return safe_name(_below(source, row.source) if kind == "images" else f"{row.image_id}-{_short_digest(row.source)}")


def safe_name(name: str) -> str:
    """A relative path that stays below its folder. A name that has to be changed for it ends with a digest of what it was."""
    kept = [_shortened(part) for part in name.replace("\0", "").split("/") if part not in ("", ".", "..")]
    safe = "/".join(kept)
    if len(safe.encode()) > PATH_BYTES:
        return _short_digest(name)
    return name if safe == name != "" else f"{safe or 'image'}-{_short_digest(name)}"


def _shortened(part: str) -> str:
    return part.encode()[:NAME_BYTES].decode(errors="ignore")


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
