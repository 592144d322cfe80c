"""A table that the processes of a node hold once: a file of Arrow in the user's private folder, mapped into each of them.

The first process reads and writes it, the others wait for that. When all have mapped it the file loses its name, so that
nothing is left, whatever kills them: the kernel keeps it as long as one of them lives.
"""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa

from threestage.errors import Warn
from threestage.private_folder import private_folder

ROWS_OF_A_BATCH = 64
FORGOTTEN_S = 3600.0
"""Files of others are removed after so long: of a group that was killed before all had mapped theirs."""


def node_table(key: str, processes: int, make: Callable[[], pa.Table], warn: Warn) -> pa.Table:
    """What `make` returns, made by one of the `processes` of this node that call this with the same key, which names the content.

    Where the folder takes no file, it warns and each process makes its own.
    """
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    folder = private_folder() / "tables"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"{name}.arrow"
    with _locked(folder / f"{name}.lock") as mapped:
        if not path.exists():
            mapped.touch()
            _remove_forgotten(folder, mapped.stat().st_mtime)
            table = make()
            try:
                _write(table, path)
            except OSError as error:
                warn(f"{folder}: {error.strerror or error}; each worker of this node holds its own labelled images")
                return table
            mapped.write_bytes(b"")
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        mapped.write_bytes(mapped.read_bytes() + b".")
        if len(mapped.read_bytes()) >= processes:
            path.unlink()
            mapped.unlink()
    return table


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[Path]:
    """Only one process at a time is inside. The file's content counts who has mapped the table."""
    while True:
        with open(path, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):  # else its holder removed it
                yield path
                return


def _write(table: pa.Table, path: Path) -> None:
    unfinished = path.with_suffix(".tmp")
    try:
        with pa.OSFile(str(unfinished), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            for start in range(0, len(table), ROWS_OF_A_BATCH):
                writer.write_table(table.slice(start, ROWS_OF_A_BATCH).combine_chunks())
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
    os.replace(unfinished, path)


def _remove_forgotten(folder: Path, now: float) -> None:
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if path.suffix != ".lock" and now - path.stat().st_mtime > FORGOTTEN_S:
                path.unlink()
