"""The images of a pool as arrays, file by file, so that memory does not depend on how many there are."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from threestage.data import storage
from threestage.data.parallel import map_ahead
from threestage.data.pool import FETCH_THREADS
from threestage.seeds import derive_seed

Floats = npt.NDArray[np.float32]
COLUMNS = ("image_id", "class_shares", "entropy", "margin", "feature")


@dataclass(frozen=True)
class Candidates:
    """N images. `file`, `row`: where they stand; `order`: a random number in [0,1); the rest as in `feature_schema`:
    class shares (N,C), features (N,D)."""

    file: npt.NDArray[np.int64]
    row: npt.NDArray[np.int64]
    order: npt.NDArray[np.float64]
    entropy: Floats
    margin: Floats
    class_shares: Floats
    features: Floats

    def __len__(self) -> int:
        return len(self.row)

    def take(self, chosen: npt.NDArray[Any]) -> Self:
        """Some of them, by their indices or a mask."""
        return type(self)(*(getattr(self, field.name)[chosen] for field in fields(self)))

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


@dataclass(frozen=True)
class CandidateFiles:
    """Files of `feature_schema`. `covered`: ids of images that are labelled, or validate. `seed`: of `order`."""

    uris: Sequence[str]
    covered: pa.Array
    seed: int

    def read(self) -> Iterator[tuple[Candidates, Candidates]]:
        """Of each file the images that may be chosen, and those that are covered, both in the file's order."""
        return map_ahead(self._read_file, range(len(self.uris)), FETCH_THREADS)

    def _read_file(self, file: int) -> tuple[Candidates, Candidates]:
        table = storage.read_table(self.uris[file], COLUMNS)
        rows = np.flatnonzero(pc.is_valid(table.column("feature")).to_numpy())
        random = np.random.default_rng(derive_seed(self.seed, self.uris[file].rsplit("/", 1)[-1]))
        order = random.random(len(table))[rows]
        table = table.take(rows)
        found = Candidates(
            file=np.full(len(rows), file),
            row=rows,
            order=order,
            entropy=np.nan_to_num(table.column("entropy").to_numpy()),
            margin=np.nan_to_num(table.column("margin").to_numpy()),
            class_shares=_matrix(table.column("class_shares"), np.float32),
            features=np.nan_to_num(_matrix(table.column("feature"), np.float16)),
        )
        covered = pc.is_in(table.column("image_id"), value_set=self.covered).to_numpy()
        return found.take(~covered), found.take(covered)


def _matrix(column: pa.ChunkedArray, kind: Any) -> Floats:
    """A row for each value of a column of bytes."""
    width = column.type.byte_width // np.dtype(kind).itemsize
    return np.frombuffer(b"".join(column.to_pylist()), kind).astype(np.float32).reshape(len(column), width)
