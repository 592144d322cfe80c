"""A CSV list of pairs, with the columns image and mask: which mask belongs to which image.

A mask is named by its path below the folder of the list, or by its whole path or URI, which lies in that folder too. An image is
named as in the export of a labelling tool (`pairs.named_images`).
"""

import csv
import posixpath
from collections.abc import Collection, Iterator

from threestage.data import storage
from threestage.data.pairs import Pairs, Paths, by_last_part, named_images
from threestage.errors import InputError

SUFFIX = ".csv"


def is_pair_list(masks: str | None) -> bool:
    return masks is not None and masks.lower().endswith(SUFFIX)


def listed_masks(uri: str, masks: Paths) -> dict[str, str | None]:
    """What the list names as masks → its path among the files of the list's folder; None where it is not there."""
    by_uri = {place: path for path, place in masks.items()}
    found: dict[str, str | None] = {}
    for _, mask in _rows(uri):
        path = posixpath.normpath(mask.replace("\\", "/"))
        place = masks.find(path)
        found[mask] = by_uri.get(mask, None if place is None else by_uri[place])
    return found


def listed_pairs(uri: str, image_ids: Collection[str], masks: dict[str, str | None]) -> Pairs:
    """The pairs of a list. `masks`: see `listed_masks`."""
    pairs, by_last = Pairs(), by_last_part(image_ids)
    for image, mask in _rows(uri):
        fits, path = named_images(image, by_last), masks[mask]
        if len(fits) == 1 and path is None:
            pairs.problems[fits[0]] = (
                f"its mask {mask}, which {uri} names, is not below the list's folder [mask/unpaired]"
            )
        elif len(fits) == 1 and pairs.masks.get(fits[0], path) != path:
            pairs.problems[fits[0]] = (
                f"stands in {uri} with two masks, {pairs.masks[fits[0]]} and {path}: keep one [mask/unpaired]"
            )
        elif len(fits) == 1 and path is not None:
            pairs.masks[fits[0]] = path
        elif path is not None:
            why = f"fits {fits[0]} and {fits[1]}" if fits else "is not among the images"
            pairs.orphans[path] = f"mask of {image} in {uri}, which {why} [mask/unpaired]"
    return pairs


def _rows(uri: str) -> Iterator[tuple[str, str]]:
    """(image, mask) of each row. Raises InputError where there is no such list."""
    try:
        rows = csv.DictReader(storage.read_lines(uri))
    except FileNotFoundError:
        raise InputError(
            f"masks={uri}: no such file; give a .csv file with the columns image and mask", "storage/not-found"
        ) from None
    try:
        for row in rows:
            image, mask = (row.get("image") or "").strip(), (row.get("mask") or "").strip()
            if image and mask:
                yield image, mask
    except csv.Error as error:
        raise InputError(f"masks={uri}: is no .csv file ({error}); write it again", "data/pair-columns") from None
    if not {"image", "mask"} <= set(rows.fieldnames or ()):
        raise InputError(
            f"masks={uri}: its first line has the columns {rows.fieldnames or 'none'}; name them image and mask",
            "data/pair-columns",
        )
