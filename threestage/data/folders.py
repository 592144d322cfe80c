"""A folder on this machine, walked so that no link leads out of it: who may put files there must not choose what is read."""

import os
import stat
from collections.abc import Iterator
from typing import NamedTuple

from threestage.errors import InputError

NOT_INSIDE = -1
"""In place of a file's bytes: it is a link that leads out of the folder, or no plain file. It must not be opened."""
WHY_NOT_INSIDE = "is a link that leads out of its folder, or no plain file: copy the image there"


class Entry(NamedTuple):
    """A file: its path below the folder, its bytes or NOT_INSIDE, the time of its last change in ns."""

    path: str
    size: int
    changed_ns: int


def walk(folder: str) -> Iterator[str]:
    """Paths of the files below a folder, in the order that S3 would give; hidden folders are left out, and links to folders
    inside, whose files have paths of their own. InputError for a link to a folder outside, and a name that is not UTF-8."""
    yield from _walk(folder, os.path.realpath(folder), "")


def entry(folder: str, path: str) -> Entry | None:
    """A file that `walk` has given; None when it went away, or is a link to nothing."""
    whole = os.path.join(folder, path)
    try:
        found = os.stat(whole)
    except FileNotFoundError:
        return None
    plain = stat.S_ISREG(found.st_mode) and (not os.path.islink(whole) or _inside(whole, os.path.realpath(folder)))
    return Entry(path, found.st_size if plain else NOT_INSIDE, found.st_mtime_ns)


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
        names = sorted(entry.name + "/" * entry.is_dir() for entry in entries if not _is_link_to_folder(entry, root))
    try:
        "".join(names).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{folder}: the name of a file is not UTF-8 ({error}); rename it") from None
    return names


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
