"""Images that could not be used: who, where from, why. One bad image costs itself only; too many of them fail the job."""

from collections.abc import Sequence

import pyarrow as pa

from threestage.data import storage
from threestage.settings import Settings

REJECT_SCHEMA = pa.schema([("image_id", pa.string()), ("source", pa.string()), ("reason", pa.string())])


class Reject(Settings):
    """`source`: URI of the image's file."""

    image_id: str
    source: str
    reason: str


def write_rejects(uri: str, rejects: Sequence[Reject]) -> None:
    """A Parquet file of REJECT_SCHEMA, sorted by source."""
    rows = [reject.model_dump() for reject in sorted(rejects, key=lambda reject: (reject.source, reject.image_id))]
    storage.write_table(uri, pa.Table.from_pylist(rows, schema=REJECT_SCHEMA))


def read_rejects(uri: str) -> list[Reject]:
    """Raises FileNotFoundError when the file is absent."""
    return [Reject(**row) for row in storage.read_table(uri).to_pylist()]


def too_many(rejects: Sequence[Reject], total: int, max_bad_fraction: float, listed: str) -> str | None:
    """What to tell the user when more than the share `max_bad_fraction` of `total` images is bad, else None.

    `listed`: where all of them are listed.
    """
    if len(rejects) <= max_bad_fraction * total:
        return None
    first = min(rejects, key=lambda reject: reject.source)
    return (
        f"{len(rejects)} of {total} images are bad ({len(rejects) / total:.1%}, max_bad_fraction is {max_bad_fraction:.1%}), "
        f"the first is {first.source}: {first.reason}; all are listed in {listed}"
    )
