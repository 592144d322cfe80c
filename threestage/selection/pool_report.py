"""`threestage next --pool-report`: images of the pool that it may do without, as lists for `data.exclude`.

OUT/near_copies.txt   ids of images that are near-copies of another one, which stays
OUT/unlike.txt        ids of images that lie farther from every labelled image than these lie from each other
OUT/pool.csv          the same images with their distances, one a line

Near-copies are found by the signs of the features along random directions (Charikar, "Similarity Estimation Techniques from
Rounding Algorithms", 2002): in an order by these bits near-copies stand close together. Several orders are looked at. Memory is
that of the features, half a kilobyte an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from threestage.data import storage
from threestage.selection.candidates import CandidateFiles, Floats
from threestage.selection.choice import nearest
from threestage.selection.image_lists import write_csv, write_ids

NEAR_COPY = 0.1
"""Of the usual distance of two images of the pool: nearer ones are near-copies."""
BITS, ORDERS, NEIGHBOURS = 62, 4, 32
DIFFERENT = 12
"""Bits that differ: near-copies have fewer, about three."""
BITS_OF_BYTE = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.uint8)
PAIRS = 10_000
AT_ONCE = 65_536
COLUMNS = ("image_id", "source", "kind", "distance", "usual", "of")


@dataclass(frozen=True)
class PoolReport:
    """How many images are near-copies of another, and how many are unlike every labelled one."""

    near_copies: int
    unlike: int


def write_pool_report(out: str, files: CandidateFiles) -> PoolReport:
    """Look at the whole pool, labelled images too, which are never named. Writes the lists into the folder `out`."""
    pool = _Pool.read(files)
    copies, unlike = pool.near_copies(), pool.unlike()
    rows = [*copies, *unlike]
    names = _names(files, pool, {row for one in rows for row in (one.row, one.of) if row is not None})
    table = [
        {"image_id": names[one.row][0], "source": names[one.row][1], "kind": one.kind, "distance": round(one.distance, 4),
         "usual": round(one.usual, 4), "of": "" if one.of is None else names[one.of][0]}
        for one in rows
    ]  # fmt: skip
    write_csv(storage.join(out, "pool.csv"), COLUMNS, table)
    for kind, found in (("near_copies", copies), ("unlike", unlike)):
        write_ids(storage.join(out, f"{kind}.txt"), [names[one.row][0] for one in found])
    return PoolReport(len(copies), len(unlike))


@dataclass(frozen=True)
class _Named:
    """A row of the pool, of `kind`: how far it lies from the row `of`, or from the nearest label, and what is usual."""

    row: int
    kind: str
    distance: float
    usual: float
    of: int | None = None


@dataclass(frozen=True)
class _Pool:
    """N images in the order of the files: where they stand, whether they are covered, and their features (N,D) float16."""

    file: npt.NDArray[np.int64]
    row: npt.NDArray[np.int64]
    covered: npt.NDArray[np.bool_]
    features: npt.NDArray[np.float16]

    @classmethod
    def read(cls, files: CandidateFiles) -> "_Pool":
        parts = [
            (part.file, part.row, np.full(len(part), covered), part.features.astype(np.float16))
            for both in files.read()
            for part, covered in zip(both, (False, True), strict=True)
        ]
        return cls(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def near_copies(self) -> list[_Named]:
        """Each with an image that stays: a labelled one before others, then the earlier one."""
        usual = self._usual_distance()
        first, second, distances = self._close_pairs(NEAR_COPY * usual)
        copy_of, distance = dict[int, int](), dict[int, float]()
        for a, b, far in sorted(zip(first.tolist(), second.tolist(), distances.tolist(), strict=True)):
            keeps, goes = (b, a) if self.covered[b] and not self.covered[a] else (a, b)
            if not self.covered[goes] and keeps not in copy_of and goes not in copy_of:
                copy_of[goes], distance[goes] = keeps, far
        return [_Named(goes, "near-copy", distance[goes], usual, keeps) for goes, keeps in copy_of.items()]

    def unlike(self) -> list[_Named]:
        """The farthest first. Of images like the labelled ones about one in as many as there are labels is named."""
        labelled = self.features[self.covered].astype(np.float32)
        if len(labelled) < 2:
            return []
        usual = max(float(nearest(labelled[n : n + 1], np.delete(labelled, n, 0))[0]) for n in range(len(labelled)))
        found = list[_Named]()
        for start in range(0, len(self.features), AT_ONCE):
            some = slice(start, start + AT_ONCE)
            far = nearest(self.features[some].astype(np.float32), labelled)
            rows = np.flatnonzero((far > usual) & ~self.covered[some])
            found += [_Named(start + row, "unlike", float(far[row]), usual) for row in rows.tolist()]
        return sorted(found, key=lambda one: -one.distance)

    def _usual_distance(self) -> float:
        """The median over random pairs."""
        pairs = np.random.default_rng(0).integers(0, len(self.features), (PAIRS, 2))
        distances = self._distances(pairs[:, 0], pairs[:, 1])[pairs[:, 0] != pairs[:, 1]]
        return float(np.median(distances)) if len(distances) else 0.0

    def _distances(self, first: npt.NDArray[np.int64], second: npt.NDArray[np.int64]) -> Floats:
        between = self.features[first].astype(np.float32) - self.features[second].astype(np.float32)
        return np.sqrt((between**2).sum(1))

    def _close_pairs(self, limit: float) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Floats]:
        """Pairs of rows, the smaller first, that are nearer than a limit, with their distances."""
        found = list[npt.NDArray[np.int64]]()
        for number in range(ORDERS):
            signs = self._signs(number)
            order = np.argsort(signs, kind="stable")
            signs = signs[order]
            for step in range(1, min(NEIGHBOURS, len(order) - 1) + 1):
                alike = np.flatnonzero(_bits(signs[step:] ^ signs[:-step]) <= DIFFERENT)
                for start in range(0, len(alike), AT_ONCE):
                    some = alike[start : start + AT_ONCE]
                    pairs = np.sort(np.stack([order[some], order[some + step]], 1), 1)
                    found.append(pairs[self._distances(pairs[:, 0], pairs[:, 1]) < limit])
        pairs = np.unique(np.concatenate(found), axis=0) if found else np.zeros((0, 2), np.int64)
        return pairs[:, 0], pairs[:, 1], self._distances(pairs[:, 0], pairs[:, 1])

    def _signs(self, number: int) -> npt.NDArray[np.int64]:
        """BITS signs of each row as a number, the same for equal features."""
        directions = np.random.default_rng(number).standard_normal((self.features.shape[1], BITS)).astype(np.float32)
        centre = self.features[:AT_ONCE].astype(np.float32).mean(0)
        powers = 2 ** np.arange(BITS, dtype=np.int64)
        parts = [
            ((self.features[start : start + AT_ONCE].astype(np.float32) - centre) @ directions > 0) @ powers
            for start in range(0, len(self.features), AT_ONCE)
        ]
        return np.concatenate(parts)


def _bits(numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """How many bits are set in each."""
    found = np.zeros(len(numbers), np.uint8)
    for part in numbers.view(np.uint8).reshape(len(numbers), 8).T:
        found += BITS_OF_BYTE[part]
    return found


def _names(files: CandidateFiles, pool: _Pool, rows: set[int]) -> dict[int, tuple[str, str]]:
    """Id and source of rows of the pool."""
    wanted = dict[int, list[int]]()
    for row in sorted(rows):
        wanted.setdefault(int(pool.file[row]), []).append(row)
    found = dict[int, tuple[str, str]]()
    for file, some in wanted.items():
        table: Sequence[dict[str, Any]] = (
            storage.read_table(files.uris[file], ["image_id", "source"]).take(pool.row[some]).to_pylist()
        )
        found |= {row: (one["image_id"], one["source"] or "") for row, one in zip(some, table, strict=True)}
    return found
