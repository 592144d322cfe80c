"""What a data set holds already, by image id, for an ingest that extends it: a compact index below root/index.

root/index/<digest of the manifest>/<n>.npy     entries of the ids whose hash begins with the bits of n, sorted by hash
root/index/<digest of the manifest>/index.json  how many bits, written last

Making it reads the ids and digests (no image) of every file of the data set, and takes two times 42 bytes of memory for
each of its images: 8 GB at 10⁸. A process that looks ids up keeps the last 64 parts that it has read, half a GiB at most;
the shards of a listing are sorted by the same hash, so each of them needs a few.
"""

import hashlib
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field

from threestage.data import storage
from threestage.data.formats import SPLITS
from threestage.data.publish import Known, row_digests
from threestage.data.records import DataFile, Manifest
from threestage.errors import InputError

# A hash of 64 bits: two ids in 10⁸ share one with a probability of 3·10⁻⁴, and then one of the images is refused.
ENTRY = np.dtype([("key", "<u8"), ("split", "u1"), ("labelled", "?"), ("image", "V16"), ("mask", "V16")])
PART_ENTRIES = 2**18
THREADS = 8

Entries = npt.NDArray[np.void]


def build_index(root: str, manifest: Manifest) -> str:
    """The folder of the index of a data set, which is made unless it is there."""
    folder = storage.join(root, "index", manifest.digest[:16])
    if not storage.exists(storage.join(folder, "index.json")):
        entries = _sorted_entries(root, manifest)
        bits = (len(entries) // PART_ENTRIES).bit_length()
        starts = [part << (64 - bits) for part in range(1, 2**bits)]
        ends = np.searchsorted(entries["key"], np.array(starts, np.uint64))
        for number, part in enumerate(np.split(entries, ends)):
            storage.write_bytes(_part_uri(folder, number), _saved(part))
        storage.write_json(storage.join(folder, "index.json"), {"bits": bits})
    return folder


def look_up(folder: str | None, ids: Sequence[str]) -> dict[str, Known]:
    """What an index holds of the ids, by id; nothing where there is no index. InputError when it was deleted meanwhile."""
    if folder is None or not ids:
        return {}
    try:
        return _look_up(folder, ids)
    except FileNotFoundError:
        raise _overtaken(folder) from None


def _look_up(folder: str, ids: Sequence[str]) -> dict[str, Known]:
    bits = _bits(folder)
    keys = np.array([id_hash(image_id) for image_id in ids], np.uint64)
    parts = keys >> np.uint64(64 - bits) if bits else np.zeros(len(keys), np.uint64)
    found: dict[str, Known] = {}
    for number in np.unique(parts):
        part = _part(folder, int(number))
        members = np.flatnonzero(parts == number)
        places = np.searchsorted(part["key"], keys[members])
        for member, place in zip(members.tolist(), places.tolist(), strict=True):
            if place < len(part) and part["key"][place] == keys[member]:
                found[ids[member]] = _known(part[place])
    return found


def parts_of(folder: str) -> Iterator[Entries]:
    """All entries of an index, one part in memory at a time. InputError when it was deleted meanwhile."""
    try:
        for number in range(2 ** _bits(folder)):
            yield _loaded(folder, number)
    except FileNotFoundError:
        raise _overtaken(folder) from None


def _overtaken(folder: str) -> InputError:
    return InputError(
        f"{folder}: another ingest has changed the data set meanwhile; run this one again", "data/concurrent-ingest"
    )


def _sorted_entries(root: str, manifest: Manifest) -> Entries:
    """Sorted by key, one for each id: a mask that came later wins."""
    files = sorted(manifest.files, key=lambda file: file.kind == "labels")
    entries = np.empty(sum(file.rows for file in files), ENTRY)
    ends = np.cumsum([file.rows for file in files])
    with ThreadPoolExecutor(THREADS) as pool:
        for file, end, rows in zip(files, ends, pool.map(lambda file: entries_of(root, file), files), strict=True):
            entries[end - file.rows : end] = rows
    entries = entries[np.argsort(entries["key"], kind="stable")]
    last = np.append(entries["key"][1:] != entries["key"][:-1], True)
    return entries[last[: len(entries)]]


def entries_of(root: str, file: DataFile) -> Entries:
    """The entries of a file's rows, in their order; reads no image."""
    split = SPLITS.index(file.split)
    nothing = bytes(16)
    return np.array(
        [
            (id_hash(image_id), split, mask is not None, bytes.fromhex(image), bytes.fromhex(mask) if mask else nothing)
            for image_id, image, mask in row_digests(root, file)
        ],
        ENTRY,
    )


def _known(entry: np.void) -> Known:
    mask = bytes(entry["mask"]).hex() if entry["labelled"] else None
    return Known(SPLITS[entry["split"]], bytes(entry["image"]).hex(), mask)


def id_hash(image_id: str) -> int:
    """The first 8 bytes of its SHA-256."""
    return int.from_bytes(hashlib.sha256(image_id.encode()).digest()[:8], "big")


def _saved(part: Entries) -> bytes:
    stream = io.BytesIO()
    np.save(stream, part, allow_pickle=False)
    return stream.getvalue()


def _part_uri(folder: str, number: int) -> str:
    return storage.join(folder, f"{number}.npy")


@lru_cache(maxsize=4)
def _bits(folder: str) -> int:
    return int(storage.read_value(storage.join(folder, "index.json"), "bits", Annotated[int, Field(ge=0, le=48)]))


@lru_cache(maxsize=64)
def _part(folder: str, number: int) -> Entries:
    return _loaded(folder, number)


def _loaded(folder: str, number: int) -> Entries:
    uri = _part_uri(folder, number)
    try:
        part: Entries = np.load(io.BytesIO(storage.read_bytes(uri)), allow_pickle=False)
    except (ValueError, EOFError):
        part = np.empty((), ENTRY)
    if part.dtype != ENTRY or part.ndim != 1:
        raise InputError(f"{uri}: is damaged; delete {folder}, which is made again", "data/damaged-file")
    return part
