"""Images that could not be used: who, where from, why. One bad image costs itself only; too many of them fail the job."""

import csv
import io
import re
from collections.abc import Iterable, Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from threestage.data import storage
from threestage.plain_text import one_line
from threestage.settings import Settings

REJECT_SCHEMA = pa.schema([("image_id", pa.string()), ("source", pa.string()), ("reason", pa.string())])
SHOWN = 20
WRITTEN_AT_ONCE = 10_000
CODE = re.compile(r" \[[a-z-]+/[a-z0-9-]+\]$")


class Reject(Settings):
    """`source`: URI of the image's file. `reason`: a line that ends with its code, as that of a CodedError."""

    image_id: str
    source: str
    reason: str


class RejectList:
    """Rejects as they come, kept as compressed Parquet: some 50 bytes for each in memory. `first`: at most 20 by source."""

    def __init__(self, rejects: Iterable[Reject] = ()) -> None:
        self.count = 0
        self.first: list[Reject] = []
        self._waiting: list[Reject] = []
        self._sink = pa.BufferOutputStream()
        self._parquet = pq.ParquetWriter(self._sink, REJECT_SCHEMA, compression="zstd")
        self.add(rejects)

    def add(self, rejects: Iterable[Reject]) -> None:
        new = list(rejects)
        self.count += len(new)
        self.first = sorted([*self.first, *new], key=_by_source)[:SHOWN]
        self._waiting += new
        if len(self._waiting) >= WRITTEN_AT_ONCE:
            self._compress()

    def write(self, uri: str) -> pa.Buffer:
        """Publish a Parquet file of REJECT_SCHEMA, sorted by source while they are fewer than WRITTEN_AT_ONCE. Once."""
        self._compress()
        self._parquet.close()
        content = self._sink.getvalue()
        storage.write_bytes(uri, content)
        return content

    def write_for_people(self, uri: str, within: str) -> None:
        """`write`, and the same as CSV beside it; without rejects an earlier CSV is removed. `within`: see `storage.delete`."""
        content = self.write(uri)
        if self.count:
            storage.write_pieces(csv_uri(uri), _csv_pieces(content))
        else:
            storage.delete(csv_uri(uri), within)

    def complaint(self, total: int, max_bad_fraction: float, listed: str) -> str | None:
        """What to tell the user when they are more than the share `max_bad_fraction` of `total` images, else None.

        `listed`: where all of them are listed.
        """
        if self.count <= max_bad_fraction * total:
            return None
        return (
            f"{self.count} of {total} images are bad ({self.count / total:.1%}, max_bad_fraction is {max_bad_fraction:.1%}), "
            f"the first is {self.first[0].source}: {CODE.sub('', self.first[0].reason)}; all are listed in {listed}"
        )

    def _compress(self) -> None:
        rows = [reject.model_dump() for reject in sorted(self._waiting, key=_by_source)]
        if rows:
            self._parquet.write_table(pa.Table.from_pylist(rows, schema=REJECT_SCHEMA))
        self._waiting = []


def csv_uri(uri: str) -> str:
    """Of a list that `write_for_people` published as `uri`."""
    return f"{uri.removesuffix('.parquet')}.csv"


def _csv_pieces(content: pa.Buffer) -> Iterator[bytes]:
    yield _csv_lines([REJECT_SCHEMA.names])
    for batch in pq.ParquetFile(pa.BufferReader(content)).iter_batches():
        yield _csv_lines([map(_as_text, row.values()) for row in batch.to_pylist()])


def _csv_lines(rows: Iterable[Iterable[str]]) -> bytes:
    lines = io.StringIO()
    csv.writer(lines).writerows(rows)
    return lines.getvalue().encode()


def _as_text(value: str) -> str:
    """Names are text from strangers: no control characters, and nothing that a spreadsheet takes for a formula."""
    shown = one_line(value)
    return f"'{shown}" if shown.startswith(("=", "+", "-", "@")) else shown


def _by_source(reject: Reject) -> tuple[str, str]:
    return reject.source, reject.image_id


def read_rejects(uri: str) -> list[Reject]:
    """Raises FileNotFoundError when the file is absent."""
    return storage.read_models(uri, Reject)
