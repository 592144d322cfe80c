"""Faults of a data set as a whole: classes with few labelled pixels or none, and images that it has more than once.

A class that no mask shows cannot be learned, and one class alone is no task. The same bytes under several ids lie across
splits, or have other masks; near-copies make scores too good.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

import numpy as np
import numpy.typing as npt
from PIL import Image

from threestage.data import storage
from threestage.data.bands import shown_bands
from threestage.data.classes import ClassMap, Lookup, Unknown
from threestage.data.formats import SPLITS, SourceItem
from threestage.data.image_validation import BadFile, check_mask
from threestage.data.parallel import map_ahead
from threestage.data.publish import Entries, entries_of_files, id_hash, index_parts, row_digests
from threestage.data.records import (
    DECODER_ERRORS,
    DataFile,
    Manifest,
    SizeStatistics,
    decode_mask,
    files_with_masks,
    open_image,
)
from threestage.errors import InputError

LEAST_CLASSES = 2
SAMPLE = 64  # masks
SOURCE_SAMPLE = 16
TINY = 0.001  # share of the labelled pixels
OTHER_SIZE = 1.25  # factor between two sides
FEW_IDS = 8
FIX = (
    "correct the class map and ingest again (for masks of 0 and 255: `ids: [0]` for the background, `ids: [255]` for the "
    "foreground, and no 255 under `ignore`)"
)


def check_class_pixels(
    where: str, names: Sequence[str], pixels: Sequence[int], seen: str, fix: str = FIX
) -> str | None:
    """A warning that names the classes without a labelled pixel, None when every class has one.

    Args:
        where: what the message begins with, such as the data set's root.
        names, pixels: of the classes, in the order of their ids.
        seen: where the pixels were counted, such as "12 labelled masks".
        fix: what to do about it.
    Raises:
        InputError: fewer than two classes have a labelled pixel.
    """
    present = [name for name, count in zip(names, pixels, strict=True) if count]
    absent = ", ".join(name for name, count in zip(names, pixels, strict=True) if not count)
    if len(present) < LEAST_CLASSES:
        found = f"only class {present[0]} has" if present else "no class has"
        missing = f" ({absent}: none)" if absent else ""
        raise InputError(
            f"{where}: {found} a labelled pixel in {seen}{missing}, and training needs two classes: {fix}",
            "data/one-class",
        )
    return f"{where}: no labelled pixel of {absent} in {seen}: label images that show it, or {fix}" if absent else None


def note_rare_classes(root: str, shown: Sequence[tuple[str, int, int]], labelled: int) -> list[str]:
    """Notes that name classes in one image only, and those with a tiny share of the labelled pixels.

    shown: name, pixels and images of each class in all `labelled` masks of the data set.
    """
    once = [name for name, _, images in shown if images == 1 < labelled]
    total = sum(pixels for _, pixels, _ in shown)
    tiny = [f"{name} {pixels / total:.2%}" for name, pixels, images in shown if images > 1 and pixels < TINY * total]
    notes = []
    if once:
        notes.append(
            f"{root}: one image only shows {', '.join(once)}: such a class is trained or validated, not both; label more "
            "images that show it, or merge it with another class in the class map"
        )
    if tiny:
        notes.append(
            f"{root}: few of the labelled pixels are {', '.join(tiny)}: check its ids or colours in the class map, or label "
            "more images that show it"
        )
    return notes


Extent = tuple[tuple[int, int], tuple[int, int]]
"""Least and most pixels in height, and in width."""


def note_other_sizes(root: str, labelled: Extent, sizes: SizeStatistics) -> list[str]:
    """A note where all labelled images have one size and others differ from it by OTHER_SIZE or more. `sizes`: of all images."""
    (height, most_height), (width, most_width) = labelled
    if (height, width) != (most_height, most_width):
        return []
    sides = ((height, sizes.min_height, sizes.max_height), (width, sizes.min_width, sizes.max_width))
    if not any(side >= OTHER_SIZE * least or most >= OTHER_SIZE * side for side, least, most in sides):
        return []
    return [
        f"{root}: all labelled images are {width} wide and {height} high, the others {sizes.min_width} to "
        f"{sizes.max_width} and {sizes.min_height} to {sizes.max_height}: objects may have another size there; label some "
        "of the others, or ingest images of one size"
    ]


def sampled_pixels(root: str, manifest: Manifest, but: Collection[str], classes: int) -> npt.NDArray[np.int64]:
    """(classes,) labelled pixels in at most SAMPLE masks of a data set, the latest first, less those of the images `but`."""
    pixels, seen = np.zeros(256, np.int64), set(but)
    files = [file for split in SPLITS for file in reversed(files_with_masks(manifest, split))]
    for file in files:
        for group in storage.read_groups(storage.join(root, file.path), ["image_id", "mask"]):
            for row in group.to_pylist():
                if row["image_id"] in seen or (row["mask"] is None and file.kind == "images"):
                    continue
                seen.add(row["image_id"])
                if row["mask"] is not None:
                    pixels += np.bincount(decode_mask(row["mask"]).ravel(), minlength=256)
            if len(seen) - len(but) >= SAMPLE:
                return pixels[:classes]
    return pixels[:classes]


class _Ids(Lookup):
    """A look-up that keeps the ids it was asked for."""

    def __init__(self, class_map: ClassMap, name: str) -> None:
        super().__init__(class_map, name)
        self.found: set[int] = set()

    def __call__(self, values: npt.NDArray[np.integer]) -> npt.NDArray[np.uint8] | Unknown:
        if values.ndim == 2:
            self.found |= set(np.unique(values).tolist())
        return super().__call__(values)


def fix_for(class_map: ClassMap, map_name: str, items: Iterable[SourceItem]) -> str:
    """How to correct a class map that leaves classes without pixels: from the ids in a sample of the masks, the map that
    reads them where there are two, which is the usual case of a foreground on a background."""
    found = sorted(_source_ids(class_map, map_name, items))
    if not found or len(found) > FEW_IDS:
        return FIX
    fix, ids = "correct the class map and ingest again", f"the masks hold the ids {', '.join(map(str, found))}"
    if len(found) != LEAST_CLASSES or len(class_map.classes) > LEAST_CLASSES:
        return f"{fix} ({ids})"
    return f"{fix}: {ids}, and this map reads them: {_map_of(class_map, found)}"


def _source_ids(class_map: ClassMap, map_name: str, items: Iterable[SourceItem]) -> set[int]:
    lookup = _Ids(class_map, map_name)
    masks = [item.mask_uri for item in items if item.mask_uri and not item.problem][:SOURCE_SAMPLE]
    for uri in masks:
        try:
            data = storage.read_bytes(uri)
            with open_image(data) as image:
                size = (image.height, image.width)
            check_mask(data, lookup, size, uri)
        except (BadFile, *DECODER_ERRORS):
            continue  # it is among the rejects already
    return lookup.found


def _map_of(class_map: ClassMap, found: Sequence[int]) -> str:
    """Two classes, each with one of the two ids: those of the map that has it, else what is left, else a background."""
    owners = {i: entry.name for entry in class_map.classes for i in entry.ids if i in found}
    left = [entry.name for entry in class_map.classes if entry.name not in owners.values()]
    names = [owners.get(i) or (left.pop(0) if left else "background") for i in found]
    colours = {entry.name: list(entry.colour) for entry in class_map.classes}
    entries = (
        f"{{name: {n}, colour: {colours.get(n, [0, 0, 0])}, ids: [{i}]}}" for n, i in zip(names, found, strict=True)
    )
    return f"`classes: [{', '.join(entries)}]` without `ignore`"


# ---- Copies of the same bytes

SHOWN = 5

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

    Raises InputError when two images of the same bytes have different masks. Memory: 42 bytes
    for each row added and for each copy; one part of the index at a time.
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
    new = entries_of_files(root, added)
    images, ids = np.sort(_image_keys(new)), np.sort(new["key"])
    copies, held = Copies(), list[Entries]()
    for part in index_parts(index) if index else ():  # less the rows that new ones replace
        held.append(part[_among(_image_keys(part), images) & ~_among(part["key"], ids)])
    every = np.concatenate([*held, new])
    every = every[np.argsort(_image_keys(every), kind="stable")]
    _, places, counts = np.unique(_image_keys(every), return_inverse=True, return_counts=True)
    for _, group in groupby(every[counts[places] > 1], key=lambda entry: bytes(entry["image"])):
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


def _image_keys(entries: Entries) -> npt.NDArray[np.uint64]:
    """The first 8 bytes of each image's digest."""
    return np.frombuffer(entries["image"].tobytes(), "<u8")[::2]


def _among(values: npt.NDArray[np.uint64], keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Which of the values are among the keys, which are sorted."""
    if not len(keys):
        return np.zeros(len(values), bool)
    return keys[np.searchsorted(keys, values).clip(max=len(keys) - 1)] == values


def _names(root: str, keys: set[int], files: Iterable[DataFile]) -> dict[int, str]:
    """The image ids, with their splits, of some hashes of ids; stops when all are found."""
    found: dict[int, str] = {}
    for names in map_ahead(partial(_names_in, root, keys), files if keys else ()):
        found |= names
        if keys <= found.keys():
            break
    return found


def _names_in(root: str, keys: set[int], file: DataFile) -> dict[int, str]:
    ids = (image_id for image_id, _, _ in row_digests(root, file))
    return {key: f"{image_id} ({file.split})" for image_id in ids if (key := id_hash(image_id)) in keys}


# ---- Near-copies

SIDE = 16  # of the grid of grey differences that an image is compared by
ALIKE = 0.9  # cosine; CamVid's 37,000 pairs of train and val have 0.62 at most, its neighbouring frames at rest 0.95
AT_ONCE = 256  # images compared with all others in one product

Gradients = npt.NDArray[np.float32]


def gradients(image: npt.NDArray[np.uint8]) -> Gradients:
    """Horizontal and vertical differences of the grey image (H,W,C) at SIDE × SIDE, of length 1; zero for one plain colour."""
    small = Image.fromarray(shown_bands(image)).convert("L").resize((SIDE + 1, SIDE + 1), Image.Resampling.BOX)
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


def note_near_copies(
    labelled_ids: Sequence[str],
    labelled: Sequence[Gradients],
    validation_ids: Sequence[str],
    validation: Sequence[Gradients],
) -> str | None:
    """A note about near-copies of labelled images among the validation images; None without any."""
    found = list(near_copies(validation, labelled))
    if not found:
        return None
    first, its_copy = found[0]
    return (
        f"{len(found)} of {len(validation)} validation images nearly equal a labelled one ({validation_ids[first]} and "
        f"{labelled_ids[its_copy]} first): scores on them say little about new images; set data.group to keep images of one "
        "scene on one side"
    )
