"""What a run left, by kind, and its removal: working files that nothing reads any more, or all that the run wrote.

Checkpoints and Ray Train's folder serve a stage until it is done: its marker, which a rerun asks for, stays. The listing
stays with the pseudo-masks: pool.parquet names its files, and a run that reuses this one reads them.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import pyarrow.fs as pafs

from threestage.config import STAGES
from threestage.data import storage
from threestage.data.split import saved_split
from threestage.errors import InputError, Warn
from threestage.mlflow_sync.run_sync import ATTEMPT_NAME, RECORD, RUN_NAME
from threestage.run_folder import lease
from threestage.run_folder.reuse import CONFIG_NAME, PAGE_NAME, REUSED

RECORDS = "models, results and records"
RUN_FILES = (
    "split.json",
    RUN_NAME,
    ATTEMPT_NAME,
    REUSED,
    "pool.parquet",
    "results.json",
    "pictures.png",
    CONFIG_NAME,
    PAGE_NAME,
)
PARTS = {"listing": "listing", RECORD: RECORDS} | {f"pseudo_masks{n}": "pseudo-masks" for n, _ in enumerate(STAGES, 1)}
OF_STAGES = {"checkpoints": "checkpoints", "ray_train": "Ray Train's"}
OTHER = "not the run's"


class FileKind(NamedTuple):
    """Files of one kind. `goes`: they are to be removed, the others stay."""

    name: str
    files: int
    bytes: int
    will_delete: bool


class Leftover(NamedTuple):
    """What a run left. `gone`: the files and folders that are to be removed; `folder`: in which."""

    folder: str
    kinds: list[FileKind]
    deleted: list[str]


def what_is_left(run: str, everything: bool = False) -> Leftover:
    """The kinds of files below a run's folder, and what of it would go: working files of finished stages, or `everything`
    that the run has written. Files of other making stay in any case, as do those of other runs that this one reuses.

    Raises InputError when the folder holds no run.
    """
    run = storage.absolute(run)
    _refuse_no_run(run)
    sizes = _sizes(run)
    done: set[str] = {stage for stage in STAGES if f"{stage}/done.json" in sizes}
    found: dict[tuple[str, bool], list[str]] = {}
    for path in sizes:
        kind, working = _kind(path, done)
        found.setdefault((kind, working or (everything and kind != OTHER)), []).append(path)
    kinds = [
        FileKind(name, len(paths), sum(sizes[path] for path in paths), removed)
        for (name, removed), paths in sorted(found.items())
    ]
    deleted = {_whole(path) for (_, removed), paths in found.items() if removed for path in paths}
    return Leftover(run, kinds, sorted(deleted))


def _refuse_no_run(folder: str) -> None:
    if not storage.exists(storage.join(folder, "split.json")):
        sweep = storage.exists(storage.join(folder, "sweep.json"))
        hint = "it is a sweep: name one of its runs" if sweep else "give the --out of a run"
        raise InputError(f"{folder}: no run is there, it has no split.json; {hint}", "run/no-run")
    saved_split(storage.join(folder, "split.json"))


def _kind(path: str, done: set[str]) -> tuple[str, bool]:
    """What a file is, by its path below the run, and whether it is of no use any more."""
    top, _, below = path.partition("/")
    if top in STAGES and below:
        part = OF_STAGES.get(below.partition("/")[0])
        return (f"{part} ({top})", top in done) if part else (RECORDS, False)
    if top in PARTS and below:
        return PARTS[top], False
    return (RECORDS if path in RUN_FILES else OTHER), False


def _whole(path: str) -> str:
    """The folder that goes as a whole where a file in it goes: a stage's part, a stage's file, a set, a file of the run."""
    top, *below = path.split("/")
    return "/".join([top, *below[:1]]) if top in STAGES else top


def clean(run: str, everything: bool, agreed: Callable[[Leftover], bool], warn: Warn) -> tuple[Leftover, bool]:
    """Remove what is left of a run if `agreed` says so of it; returns that, and whether it was removed.

    No driver can begin meanwhile. Raises InputError when one works on the run, or the folder holds no run.
    """
    _refuse_no_run(storage.absolute(run))
    with lease.held(run, warn):
        left = what_is_left(run, everything)
        removed = bool(left.deleted) and agreed(left)
        if removed:
            _remove(left.folder, left.deleted)
    return left, removed


def _remove(folder: str, deleted: Sequence[str]) -> None:
    for name in sorted(
        deleted, key=lambda name: name == "split.json"
    ):  # the last: so that the rest can be removed by a rerun
        storage.delete(storage.join(folder, name), within=folder)
    if not storage.is_s3(folder):
        for stage in STAGES:
            with contextlib.suppress(OSError):  # not empty
                os.rmdir(storage.join(folder, stage))


def _sizes(folder: str) -> dict[str, int]:
    """Path below the folder → bytes, of all its files but the lease. A link is a file, wherever it leads."""
    if storage.is_s3(folder):
        files, path = storage.filesystem(folder)
        infos = files.get_file_info(pafs.FileSelector(path, allow_not_found=True, recursive=True))
        below = {info.path.removeprefix(path + "/"): info.size for info in infos if info.type == pafs.FileType.File}
    else:
        below = dict(_local_sizes(folder))
    return {name: size for name, size in below.items() if name != lease.NAME}


def _local_sizes(folder: str) -> Iterator[tuple[str, int]]:
    for above, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(above, name))]
        for path in (os.path.join(above, name) for name in [*names, *links]):
            with contextlib.suppress(FileNotFoundError):
                yield os.path.relpath(path, folder), os.lstat(path).st_size
