"""A folder on this machine, walked so that no link leads out of it: who may put files there must not choose what is read."""

import os
import stat
from collections.abc import Iterator
from typing import NamedTuple

from threestage.errors import InputError

NOT_INSIDE, NOT_UTF8 = -1, -2
WHY_NOT = {
    NOT_INSIDE: "is a link that leads out of its folder, or no plain file: copy the image there",
    NOT_UTF8: "its name, or that of its folder, is not UTF-8: rename it",
}
"""In place of a file's bytes: why it must not be opened, or cannot be."""


class Entry(NamedTuple):
    """A file: its path below the folder; its bytes, or a key of WHY_NOT; the times in ns of its last change, as its owner has
    set it, and as the file system has noted it."""

    path: str
    size: int
    changed_ns: int
    noted_ns: int = 0


def walk(folder: str) -> Iterator[str]:
    """Paths of the files below a folder, in the order that S3 would give; hidden folders are left out, and links to folders
    inside, whose files have paths of their own. InputError for a link to a folder outside."""
    yield from _walk(folder, os.path.realpath(folder), "")


def entry(folder: str, path: str) -> Entry | None:
    """A file that `walk` has given; None when it went away, or is a link to nothing."""
    if path != readable(path):
        return Entry(readable(path), NOT_UTF8, 0)
    whole = os.path.join(folder, path)
    try:
        found = os.stat(whole)
    except FileNotFoundError:
        return None
    plain = stat.S_ISREG(found.st_mode) and (not os.path.islink(whole) or _inside(whole, os.path.realpath(folder)))
    return Entry(path, found.st_size if plain else NOT_INSIDE, found.st_mtime_ns, found.st_ctime_ns)


def readable(path: str) -> str:
    """A path as text: bytes that are not UTF-8 as escapes."""
    return path.encode(errors="surrogateescape").decode(errors="backslashreplace")


def refuse_link_out(folder: str, path: str) -> None:
    """Raises InputError where a file below a folder is, or lies behind, a link that leads out of it: it must not be sent."""
    whole = os.path.join(folder, path)
    if not _inside(whole, os.path.realpath(folder)):
        raise InputError(
            f"{whole}: a link to {os.path.realpath(whole)}, which is outside of {folder}: remove it, or copy the file there",
            "data/link",
        )


def _walk(folder: str, root: str, below: str) -> Iterator[str]:
    for name in _names(os.path.join(folder, below), root):
        if not name.endswith("/"):
            yield below + name
        elif not name.startswith("."):
            yield from _walk(folder, root, below + name)


def _names(folder: str, root: str) -> list[str]:
    """Sorted names in a folder, those of folders with a slash."""
    with os.scandir(folder) as entries:
        return sorted(entry.name + "/" * entry.is_dir() for entry in entries if not _is_link_to_folder(entry, root))


def _is_link_to_folder(entry: os.DirEntry[str], root: str) -> bool:
    """Whether it is one, to a folder inside `root`. Raises InputError when it leads out."""
    if not entry.is_symlink() or not entry.is_dir():
        return False
    if entry.name.startswith(".") or _inside(entry.path, root):
        return True
    raise InputError(
        f"{entry.path}: a link to {os.path.realpath(entry.path)}, which is outside of {root}: remove it, and give that folder "
        "by itself or copy it",
        "data/link",
    )


def _inside(path: str, root: str) -> bool:
    return f"{os.path.realpath(path)}/".startswith(f"{root.rstrip('/')}/")
