"""A folder of this machine that only its user may enter, for what would else lie open or predictable in /tmp."""

import os
import stat
from pathlib import Path

from threestage.errors import InputError

TEMPORARY = "/tmp"


def private_folder(within: str | None = None) -> Path:
    """threestage-UID in TMPDIR, else in /tmp, or `within` a folder; made if it is not there.

    Raises InputError when somebody else has made it.
    """
    folder = _path(within)
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise InputError(f"{folder}: is not a folder of yours alone; remove it, or chmod 700", "run/private-folder")
    return folder


def reserve_compile_cache() -> None:
    """Name a private folder for torch.compile's code; torch's own choice in /tmp could be written by another user first. Before
    threads begin (mlflow_sync.connection.reserve_variables says why); nothing is made."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(_path() / "torchinductor"))


def _path(within: str | None = None) -> Path:
    return Path(f"{within or os.environ.get('TMPDIR') or TEMPORARY}/threestage-{os.getuid()}")
