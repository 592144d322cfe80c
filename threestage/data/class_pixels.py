"""Which classes have labelled pixels. A class that no mask shows cannot be learned, and one class alone is no task."""

from collections.abc import Collection, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from threestage.data import storage
from threestage.data.classes import ClassMap, Lookup, Unknown
from threestage.data.formats import SPLITS, SourceItem
from threestage.data.image_validation import BadFile, check_mask
from threestage.data.records import DECODER_ERRORS, Manifest, decode_mask, files_with_masks, open_image
from threestage.errors import InputError

LEAST_CLASSES = 2
SAMPLE = 64  # masks
SOURCE_SAMPLE = 16
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


def sampled_pixels(root: str, manifest: Manifest, but: Collection[str], classes: int) -> npt.NDArray[np.int64]:
    """(classes,) labelled pixels in at most SAMPLE masks of a data set, the latest first, less those of the images `but`."""
    pixels, seen = np.zeros(256, np.int64), set(but)
    files = [file for split in SPLITS for file in reversed(files_with_masks(manifest, split))]
    for file in files:
        for group in storage.read_groups(storage.join(root, file.path), ["image_id", "mask"]):
            for row in group.to_pylist():
                if row["mask"] is not None and row["image_id"] not in seen:
                    seen.add(row["image_id"])
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
