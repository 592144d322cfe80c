"""Which mask belongs to which image, by their names alone."""

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})
MASK_SUFFIXES = frozenset({".png", ".bmp", ".tif", ".tiff"})
PICTURE_SUFFIXES = IMAGE_SUFFIXES | {".gif", ".jfif", ".jpe", ".jp2", ".j2k", ".jxl", ".heic", ".heif", ".avif"} | {
    ".pgm", ".ppm", ".pnm", ".pbm", ".tga", ".psd", ".svg"
}  # fmt: skip
"""Of pictures, whether they are read or not."""


class Paths(dict[str, str]):
    """Path below a folder → URI."""

    _alike: dict[str, list[str]] | None = None

    def find(self, path: str) -> str | None:
        """The URI of a path, or of the only one that has the same letters in another Unicode form (NFC, NFD)."""
        if path in self:
            return self[path]
        if self._alike is None:
            self._alike = alike(self)
        found = self._alike.get(nfc(path), [])
        return self[found[0]] if len(found) == 1 else None


@dataclass
class Pairs:
    """`masks`: image id → path of its mask. `problems`: image id → why its mask cannot be taken. `orphans`: path of a mask
    → why it is no image's."""

    masks: dict[str, str] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    orphans: dict[str, str] = field(default_factory=dict)


def nfc(text: str) -> str:
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def alike(names: Iterable[str]) -> dict[str, list[str]]:
    """The names by their Unicode form NFC: those in one list look the same."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(nfc(name), []).append(name)
    return found


def code_points(name: str) -> str:
    """The letters of a name that are not ASCII, e.g. U+0065 U+0301 of an é in two parts."""
    letters = [
        char + name[place + 1]
        if char.isascii() and unicodedata.combining(name[place + 1 : place + 2] or " ")
        else char * (not char.isascii() and not unicodedata.combining(char))
        for place, char in enumerate(name)
    ]
    return " ".join(f"U+{ord(char):04X}" for char in "".join(letters))


def stems(paths: Iterable[str], suffixes: Collection[str]) -> dict[str, list[str]]:
    """Paths of the files with such suffixes, in either case, by their paths without suffix."""
    found: dict[str, list[str]] = {}
    for path in paths:
        suffix = PurePosixPath(path).suffix
        if suffix.lower() in suffixes:
            found.setdefault(path.removesuffix(suffix), []).append(path)
    return found


def pair(image_ids: Collection[str], masks: Mapping[str, str], mask_suffix: str) -> Pairs:
    """Give each image the mask whose path without suffix is the image's id and `mask_suffix`. `masks`: path → URI.

    Names that are equal come first, then names that look the same and have one Unicode form each.
    """
    pairs = Pairs()
    rest = _without_end(stems(masks, MASK_SUFFIXES), mask_suffix, pairs)
    partners = _partners(image_ids, rest)
    for image_id, key in partners.items():
        paths = rest.pop(key)
        pairs.masks[image_id] = paths[0]
        if len(paths) > 1:
            pairs.problems[image_id] = (
                f"has two masks, {masks[paths[0]]} and {masks[paths[1]]}: keep one [mask/unpaired]"
            )
    lonely = [image_id for image_id in image_ids if image_id not in partners]
    unread = _without_end(stems(masks, PICTURE_SUFFIXES - MASK_SUFFIXES), mask_suffix)
    for image_id, key in _partners(lonely, unread).items():
        uri = masks[unread[key][0]]
        pairs.problems[image_id] = (
            f"its mask {uri} is not read: save it as PNG ({', '.join(sorted(MASK_SUFFIXES))} are) [data/mask-format]"
        )
    twins, end = alike(image_ids), suffix_rule(map(nfc, lonely), map(nfc, rest))
    for key, paths in rest.items():
        twin = twins.get(nfc(key), [None])[0]
        reason = f"; rename it without {end}" if end else ""
        if twin is not None:
            reason = f"; its name looks like that of {twin}: {code_points(key)} here, {code_points(twin)} there"
        pairs.orphans |= dict.fromkeys(paths, f"mask without an image{reason} [mask/unpaired]")
    return pairs


def _without_end(found: Mapping[str, list[str]], end: str, pairs: Pairs | None = None) -> dict[str, list[str]]:
    """Cut the end off the stems. Masks without it are orphans."""
    kept = {stem.removesuffix(end): paths for stem, paths in found.items() if stem.endswith(end)}
    if pairs is not None:
        others = (path for stem, paths in found.items() if not stem.endswith(end) for path in paths)
        pairs.orphans |= dict.fromkeys(others, f"mask whose name does not end with {end} [mask/unpaired]")
    return kept


def _partners(image_ids: Iterable[str], keys: Mapping[str, object]) -> dict[str, str]:
    """Image id → key."""
    ids = list(image_ids)
    found = {image_id: image_id for image_id in ids if image_id in keys}
    of_keys = alike(key for key in keys if key not in found)
    for name, twins in alike(image_id for image_id in ids if image_id not in found).items():
        if len(twins) == 1 and len(of_keys.get(name, ())) == 1:
            found[twins[0]] = of_keys[name][0]
    return found


UPLOADED = re.compile(r"(.*/)?[0-9a-f]{8}-([^/]+)", re.DOTALL)
"""The name that Label Studio gives to an uploaded image: eight hexadecimal digits before its own."""


def by_last_part(image_ids: Iterable[str]) -> dict[str, list[str]]:
    """Image ids by what follows their last slash, in Unicode form NFC."""
    found: dict[str, list[str]] = {}
    for image_id in image_ids:
        found.setdefault(nfc(image_id).rsplit("/", 1)[-1], []).append(image_id)
    return found


def named_images(name: str, by_last: Mapping[str, list[str]]) -> list[str]:
    """The image ids that the path or file name of an image in an export fits: the same one, else one of the two is the end of
    the other. `by_last`: see `by_last_part`."""
    path = nfc(name.replace("\\", "/")).removeprefix("./")
    suffix = PurePosixPath(path).suffix
    stem = path.removesuffix(suffix) if suffix.lower() in PICTURE_SUFFIXES else path
    there = by_last.get(stem.rsplit("/", 1)[-1], [])
    same = [image_id for image_id in there if nfc(image_id) == stem]
    ends = [i for i in there if f"/{stem}".endswith(f"/{nfc(i)}") or f"/{nfc(i)}".endswith(f"/{stem}")]
    uploaded = UPLOADED.fullmatch(path)
    return same or ends or (named_images(f"{uploaded[1] or ''}{uploaded[2]}", by_last) if uploaded else [])


def suffix_rule(image_ids: Iterable[str], mask_stems: Iterable[str]) -> str | None:
    """The end that makes every mask's name from an image's; None without masks, or when there is no such end."""
    ids, names = set(image_ids), list(mask_stems)
    if not names:
        return None
    ends = [names[0][cut:] for cut in range(len(names[0]) - 1, 0, -1) if names[0][:cut] in ids]
    return next((end for end in ends if all(_is_image_and(name, end, ids) for name in names)), None)


def common_end(names: Collection[str]) -> str | None:
    """The end that turns most names into others of them, of images and masks side by side."""
    there = set(names)
    ends = Counter(name[cut:] for name in there for cut in range(1, len(name)) if name[:cut] in there)
    return ends.most_common(1)[0][0] if ends else None


def _is_image_and(name: str, end: str, ids: Collection[str]) -> bool:
    return name.endswith(end) and name.removesuffix(end) in ids
