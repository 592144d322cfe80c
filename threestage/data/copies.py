"""Images that a data set has more than once: the same bytes under several ids, across splits or with other masks."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, islice

import numpy as np
import numpy.typing as npt
from PIL import Image

from threestage.data.publish import Entries, entries_of, id_hash, index_parts, map_ahead, row_digests
from threestage.data.records import DataFile
from threestage.errors import InputError

SHOWN = 5
THREADS = 8
NEW = np.dtype([("image", "<u8"), ("id", "<u8"), ("file", "<u4")])

Pair = tuple[int, int]
"""Hashes of two image ids."""


@dataclass
class Copies:
    """Pairs of images of the same bytes: how many there are, and the first few. `across`: in several splits; `within`: in
    one; `contradicting`: with different masks."""

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("contradicting", "across", "within"), 0))
    first: dict[str, list[Pair]] = field(default_factory=lambda: {"contradicting": [], "across": [], "within": []})

    def add(self, kind: str, pair: Pair) -> None:
        self.counts[kind] += 1
        if len(self.first[kind]) < SHOWN:
            self.first[kind].append(pair)


def check_copies(root: str, index: str | None, held: Sequence[DataFile], added: Sequence[DataFile]) -> list[str]:
    """Notes about the images that were added and are copies of others, with names. `held`: the files behind `index`.

    Raises InputError when two images of the same bytes have different masks. Memory: 28 bytes for each row added, and 42
    for each copy; one part of the index at a time.
    """
    copies = find_copies(root, index, added)
    names = _names(root, {key for pairs in copies.first.values() for pair in pairs for key in pair}, [*added, *held])

    def shown(kind: str) -> str:
        text = ", ".join(f"{names[one]} and {names[other]}" for one, other in copies.first[kind])
        return text + ", …" * (copies.counts[kind] > SHOWN)

    if copies.counts["contradicting"]:
        raise InputError(
            f"{root}: {copies.counts['contradicting']} pairs of images have the same bytes and different masks: "
            f"{shown('contradicting')}; keep one image of each pair, or give both the same mask",
            "data/contradicting-masks",
        )
    notes = []
    if copies.counts["across"]:
        notes.append(
            f"{root}: {copies.counts['across']} images are in two splits, so that scores are too good: {shown('across')}; "
            "remove one of each"
        )
    if copies.counts["within"]:
        notes.append(f"{root}: {copies.counts['within']} images are copies of others: {shown('within')}")
    return notes


def find_copies(root: str, index: str | None, added: Sequence[DataFile]) -> Copies:
    """Pairs of images of the same bytes, at least one of which was added."""
    copies = Copies()
    new = _new_rows(root, added)
    same = new["image"][1:] == new["image"][:-1]
    candidates = set(new["image"][1:][same].tolist())
    ids = np.sort(new["id"])
    held = [part for part in map(partial(_copied, new["image"], ids), index_parts(index) if index else ()) if len(part)]
    candidates.update(image for part in held for image in _image_keys(part).tolist())
    if not candidates:
        return copies
    keys = np.array(sorted(candidates), np.uint64)
    files = [added[number] for number in np.unique(new["file"][_among(new["image"], keys)])]
    rows = [entries_of(root, file) for file in files]
    every = np.concatenate([*held, *(part[_among(_image_keys(part), keys)] for part in rows)])
    every = every[np.argsort(_image_keys(every), kind="stable")]
    for _, group in groupby(every, key=lambda entry: bytes(entry["image"])):
        _compare(list(group), copies)
    return copies


def _compare(group: Sequence[np.void], copies: Copies) -> None:
    """Of images of the same bytes: each against the first, and each labelled one against the first labelled one."""
    first = group[0]
    labelled = next((entry for entry in group if entry["labelled"]), None)
    for entry in group[1:]:
        if labelled is not None and entry["labelled"] and bytes(entry["mask"]) != bytes(labelled["mask"]):
            copies.add("contradicting", (int(labelled["key"]), int(entry["key"])))
        else:
            copies.add(
                "within" if entry["split"] == first["split"] else "across", (int(first["key"]), int(entry["key"]))
            )


def _new_rows(root: str, added: Sequence[DataFile]) -> npt.NDArray[np.void]:
    """Sorted by image."""
    new = np.empty(sum(file.rows for file in added), NEW)
    ends = np.cumsum([file.rows for file in added])
    for number, rows in enumerate(map_ahead(partial(entries_of, root), added, THREADS)):
        part = new[ends[number] - len(rows) : ends[number]]
        part["image"], part["id"], part["file"] = _image_keys(rows), rows["key"], number
    new.sort(order="image")
    return new


def _image_keys(entries: Entries) -> npt.NDArray[np.uint64]:
    """The first 8 bytes of each image's digest."""
    return np.frombuffer(entries["image"].tobytes(), "<u8")[::2]


def _copied(images: npt.NDArray[np.uint64], ids: npt.NDArray[np.uint64], part: Entries) -> Entries:
    """The entries of a part that have a new image's bytes, and that no new row replaces."""
    return part[_among(_image_keys(part), images) & ~_among(part["key"], ids)]


def _among(values: npt.NDArray[np.uint64], keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Which of the values are among the keys, which are sorted."""
    if not len(keys):
        return np.zeros(len(values), bool)
    return keys[np.searchsorted(keys, values).clip(max=len(keys) - 1)] == values


def _names(root: str, keys: set[int], files: Iterable[DataFile]) -> dict[int, str]:
    """The image ids, with their splits, of some hashes of ids; stops when all are found."""
    found: dict[int, str] = {}
    waiting = iter(files)
    with ThreadPoolExecutor(THREADS) as pool:
        while keys - found.keys() and (some := list(islice(waiting, 4 * THREADS))):
            for names in pool.map(partial(_names_in, root, keys), some):
                found |= names
    return found


def _names_in(root: str, keys: set[int], file: DataFile) -> dict[int, str]:
    ids = (image_id for image_id, _, _ in row_digests(root, file))
    return {key: f"{image_id} ({file.split})" for image_id in ids if (key := id_hash(image_id)) in keys}


SIDE = 16  # of the grid of grey differences that an image is compared by
ALIKE = 0.9  # cosine; CamVid's 37,000 pairs of train and val have 0.62 at most, its neighbouring frames at rest 0.95
AT_ONCE = 256  # images compared with all others in one product

Gradients = npt.NDArray[np.float32]


def gradients(image: npt.NDArray[np.uint8]) -> Gradients:
    """Horizontal and vertical differences of the grey image (H,W,3) at SIDE × SIDE, of length 1; zero for one plain colour."""
    small = Image.fromarray(image).convert("L").resize((SIDE + 1, SIDE + 1), Image.Resampling.BOX)
    grey = np.asarray(small, np.float32)
    found = np.concatenate([(grey[:-1, 1:] - grey[:-1, :-1]).ravel(), (grey[1:, :-1] - grey[:-1, :-1]).ravel()])
    return np.asarray(found / max(float(np.linalg.norm(found)), 1.0), np.float32)


def near_copies(these: Sequence[Gradients], those: Sequence[Gradients]) -> Iterator[tuple[int, int]]:
    """(number of one of these, number of the image most like it among those) for each that has a near-copy there."""
    if not these or not those:
        return
    others = np.stack(those)
    for start in range(0, len(these), AT_ONCE):
        likeness = np.stack(these[start : start + AT_ONCE]) @ others.T
        for place in np.flatnonzero(likeness.max(1) >= ALIKE):
            yield start + int(place), int(likeness[place].argmax())


def warning(
    labelled_ids: Sequence[str],
    labelled: Sequence[Gradients],
    validation_ids: Sequence[str],
    validation: Sequence[Gradients],
) -> str | None:
    """A warning about near-copies of labelled images among the validation images; None without any."""
    found = list(near_copies(validation, labelled))
    if not found:
        return None
    first, its_copy = found[0]
    return (
        f"{len(found)} of {len(validation)} validation images nearly equal a labelled one ({validation_ids[first]} and "
        f"{labelled_ids[its_copy]} first): scores on them say little about new images; set data.group to keep images of one "
        "scene on one side"
    )
