"""Parquet files that others may have written: read within a bound of memory, and damage told apart from a failing store."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple, Self

import pyarrow as pa
import pyarrow.parquet as pq

from threestage.data import storage
from threestage.errors import InputError

READ_BUFFER_BYTES = 8 * 2**20
FILE_BYTES = 2**30  # several times what an ingest puts into one
GROUP_BYTES = 2**30
"""Larger row groups of a data set are read in pieces."""
EXPANDED_BYTES = 2**26
"""What a batch of rows may come to where few bytes stand for many."""
MAX_GROUP_ROWS = 2**24
AS_LONG_AS_THEY_SAY = {"PLAIN", "RLE", "BIT_PACKED"}
"""Encodings whose values unpack to the size in the metadata; of others each value may be as long as the whole column."""
BYTES_COLUMNS = {"image", "mask"}
READ_ERRORS = (pa.ArrowException, OSError)


class Damaged(ValueError):
    """Why a Parquet file, or a row group of it, cannot be read, in words for the user."""


class RowGroup(NamedTuple):
    """Rows that were read, or why they cannot be. `first`: number of the first in its file; `rows`: how many, 0 where the
    whole file is lost."""

    first: int
    rows: int
    table: pa.Table | None
    problem: str | None = None


class _Source:
    """A file for pyarrow that keeps what its store raised: pyarrow raises OSError for damage too."""

    def __init__(self, stream: pa.NativeFile) -> None:
        self.failure: OSError | None = None
        self._stream = stream

    def read(self, size: int = -1) -> bytes:
        try:
            return bytes(self._stream.read(None if size < 0 else size))
        except OSError as error:
            self.failure = error
            raise

    def __getattr__(self, name: str) -> Any:  # seek, tell, size, closed
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def read_by_arrow(self) -> Iterator[None]:
        """Raises Damaged for what arrow raises, and OSError for what the store did."""
        try:
            yield
        except READ_ERRORS as error:
            if self.failure is not None:
                raise self.failure from None
            raise Damaged(" ".join(str(error).split())[:300]) from None


class ForeignParquet:
    """A Parquet file that may be damaged or hostile. Opening it raises Damaged when it is none, FileNotFoundError and
    PermissionError as files do, other OSErrors when the store fails."""

    def __init__(self, uri: str) -> None:
        files, path = storage.filesystem(uri)
        with contextlib.ExitStack() as stack:
            self._source = _Source(stack.enter_context(files.open_input_file(path)))
            with self._source.read_by_arrow():
                # `pre_buffer` would read whole columns
                parquet = pq.ParquetFile(self._source, buffer_size=READ_BUFFER_BYTES, pre_buffer=False)
                self._parquet = stack.enter_context(parquet)
                self.schema: pa.Schema = parquet.schema_arrow
                self.group_rows = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
            if max(self.group_rows, default=0) > MAX_GROUP_ROWS:
                raise Damaged(
                    f"a row group of {max(self.group_rows)} rows, more than {MAX_GROUP_ROWS}: write smaller ones"
                )
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def batches(self, group: int, columns: Sequence[str], rows: int) -> Iterator[pa.RecordBatch]:
        """The rows of a group, so many at a time. Raises Damaged at the first that cannot be read."""
        with self._source.read_by_arrow():
            batches = self._parquet.iter_batches(rows, [group], list(columns), use_threads=False)
        while True:
            with self._source.read_by_arrow():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def groups(self, groups: Sequence[int], columns: Sequence[str], most_bytes: int) -> Iterator[RowGroup]:
        """Row groups, or as many rows at a time as fit into `most_bytes`, at least one; what is lost of each comes as one
        entry without a table."""
        first = sum(self.group_rows[: groups[0]]) if groups else 0
        for group in groups:
            end = first + self.group_rows[group]
            try:
                for batch in self.batches(
                    group, columns, rows_at_once(self._parquet.metadata, group, columns, most_bytes)
                ):
                    yield RowGroup(first, len(batch), pa.Table.from_batches([batch]))
                    first += len(batch)
            except Damaged as damage:
                yield RowGroup(first, end - first, None, f"its row group {group} cannot be read: {damage}")
            first = end


def rows_at_once(metadata: pq.FileMetaData, group: int, columns: Sequence[str], most_bytes: int) -> int:
    """How many rows of a group fit into `most_bytes` by the file's own account, at least one: fewer than all where a few
    bytes may stand for many. A page that lies about it takes up to 2 GiB."""
    chunks = [metadata.row_group(group).column(i) for i in range(metadata.num_columns)]
    chosen = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns]
    whole = sum(chunk.total_uncompressed_size for chunk in chosen if _is_plain(chunk))
    each = sum(chunk.total_uncompressed_size for chunk in chosen if not _is_plain(chunk))
    rows: int = metadata.row_group(group).num_rows
    if whole > most_bytes:
        return 1
    return max(1, min(rows, min(most_bytes - whole, EXPANDED_BYTES) // max(1, each)))


def _is_plain(chunk: pq.ColumnChunkMetaData) -> bool:
    return set(chunk.encodings) <= AS_LONG_AS_THEY_SAY


def read_own_groups(uri: str, columns: Sequence[str], most_bytes: int = GROUP_BYTES) -> Iterator[RowGroup]:
    """The row groups of a data set's file, each whole where it is as this package writes them: with requests ahead.

    A file that is no Parquet is one entry without a table. Raises FileNotFoundError where there is none, and OSError when the
    store fails.
    """
    files, path = storage.filesystem(uri)
    first, odd = 0, 0
    try:
        with files.open_input_file(path) as stream, pq.ParquetFile(stream, pre_buffer=True) as parquet:
            _check_columns(parquet.schema_arrow, columns)
            for odd in range(parquet.num_row_groups):
                rows = parquet.metadata.row_group(odd).num_rows
                if rows_at_once(parquet.metadata, odd, columns, most_bytes) < rows:
                    break
                yield RowGroup(first, rows, parquet.read_row_group(odd, columns=list(columns)))
                first += rows
            else:
                return
    except FileNotFoundError:
        raise
    except Damaged as damage:
        yield RowGroup(0, 0, None, str(damage))
        return
    except READ_ERRORS:  # the store or the file: what follows tells which
        pass
    try:
        with ForeignParquet(uri) as foreign:
            yield from foreign.groups(range(odd, len(foreign.group_rows)), columns, most_bytes)
    except Damaged as damage:
        yield RowGroup(0, 0, None, f"not a Parquet file ({damage})")


def read_file(uri: str, columns: Sequence[str]) -> pa.Table:
    """Some columns of a data set's file, all of whose rows are needed. Raises InputError when some cannot be read or come to
    more than FILE_BYTES, FileNotFoundError and OSError as `read_groups`."""
    tables, size = list[pa.Table](), 0
    for group in read_own_groups(uri, columns):
        if group.table is None:
            raise InputError(
                f"{uri}: {group.problem}; bring it back from a copy, or ingest its images again", "data/damaged-file"
            )
        tables.append(group.table)
        size += group.table.nbytes
        if size > FILE_BYTES:
            raise InputError(
                f"{uri}: unpacks to more than {FILE_BYTES} bytes; ingest its images again", "data/too-large"
            )
    return pa.concat_tables(tables) if tables else storage.read_table(uri, columns)


def _check_columns(schema: pa.Schema, columns: Iterable[str]) -> None:
    for name in columns:
        is_right = schema.names.count(name) == 1
        if not is_right or (name in BYTES_COLUMNS and not is_bytes(schema.field(name).type)):
            kind = " of bytes" * (name in BYTES_COLUMNS)
            raise Damaged(f"one column {name}{kind} is expected, it has {shown(schema)}")


def shown(schema: pa.Schema) -> str:
    """The columns of a table and their types, shortened."""
    names = ", ".join(f"{field.name} ({field.type})" for field in islice(schema, 20))
    return (names[:300] or "none") + "…" * (len(schema.names) > 20 or len(names) > 300)


def is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


Text = str | Damaged | None


def texts(column: pa.Array | pa.ChunkedArray) -> list[Text]:
    """The values of a column as text: bytes that are not UTF-8, which only a broken writer leaves there, as escapes; None for
    null, Damaged for what Python has no value for (a timestamp of the year 140,000)."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if is_text(column.type):
        raw = column.cast(pa.large_binary()).to_pylist()
        return [None if value is None else value.decode(errors="backslashreplace") for value in raw]
    return [_text(value) for value in column]


def is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _text(value: pa.Scalar) -> Text:
    try:
        return str(value.as_py()) if value.is_valid else None
    except (ValueError, OverflowError, TypeError, pa.ArrowException) as error:
        return Damaged(f"cannot be read as {value.type} ({error})")
