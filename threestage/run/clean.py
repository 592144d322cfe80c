"""What a run left, by kind, and its removal: working files that nothing reads any more, or all that the run wrote.

Checkpoints and Ray Train's folder serve a stage until it is done: its marker, which a rerun asks for, stays. The listing
stays with the pseudo-masks: pool.parquet names its files, and a run that reuses this one reads them.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pyarrow.fs as pafs

from threestage.config import STAGES
from threestage.data import storage
from threestage.data.split import saved_split
from threestage.errors import InputError, Warn
from threestage.mlflow_sync.run_sync import ATTEMPT_NAME, RECORD, RUN_NAME
from threestage.run.continuation import CONTINUED_NAME
from threestage.run_folder import lease
from threestage.run_folder.events import EVENTS_NAME
from threestage.run_folder.reuse import CONFIG_NAME, PAGE_NAME, REUSED

RECORDS = "models, results and records"
RUN_FILES = (
    "split.json",
    RUN_NAME,
    ATTEMPT_NAME,
    REUSED,
    CONTINUED_NAME,
    "pool.parquet",
    "results.json",
    "pictures.png",
    CONFIG_NAME,
    PAGE_NAME,
    EVENTS_NAME,
)
PARTS = {"listing": "listing", "predictions": "pseudo-masks", RECORD: RECORDS} | {
    f"pseudo_masks{n}": "pseudo-masks" for n, _ in enumerate(STAGES, 1)
}
OF_STAGES = {"checkpoints": "checkpoints", "ray_train": "Ray Train's"}
OTHER = "not the run's"
KEPT_OF_A_SET = ("done.json", "index.parquet", "rejects.parquet", "rejects.csv")
MASKS_OF_SET = "/*.parquet"


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


def what_is_left(run: str, everything: bool = False, pseudo_masks: bool = False) -> Leftover:
    """The kinds of files below a run's folder, and what of it would go: working files of finished stages, `pseudo_masks` that
    no stage of it needs any more, or `everything` that the run has written. Files of other making stay in any case, as do those
    of other runs that this one reuses.

    Raises InputError when the folder holds no run.
    """
    run = storage.absolute(run)
    _refuse_no_run(run)
    sizes = _sizes(run)
    done: set[str] = {stage for stage in STAGES if f"{stage}/done.json" in sizes}
    found: dict[tuple[str, bool], list[str]] = {}
    for path in sizes:
        kind, working = _kind(path, done)
        working = working or (pseudo_masks and _is_spent_mask(path, sizes))
        found.setdefault((kind, working or (everything and kind != OTHER)), []).append(path)
    kinds = [
        FileKind(name, len(paths), sum(sizes[path] for path in paths), removed)
        for (name, removed), paths in sorted(found.items())
    ]
    deleted = {_whole(path, everything) for (_, removed), paths in found.items() if removed for path in paths}
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


def _is_spent_mask(path: str, sizes: Mapping[str, int]) -> bool:
    """Whether it holds pseudo-masks of a set that the stage after it, if there is one, has learnt from."""
    top, _, name = path.partition("/")
    if PARTS.get(top) != "pseudo-masks" or name in KEPT_OF_A_SET or f"{top}/done.json" not in sizes:
        return False
    after = f"stage{int(top.removeprefix('pseudo_masks')) + 1}"
    return f"{after}/done.json" in sizes or ("results.json" in sizes and f"{after}/inputs.json" not in sizes)


def _whole(path: str, everything: bool) -> str:
    """What goes as a whole where a file goes: a stage's part, a stage's file, the masks of a set, a set, a file of the run."""
    top, *below = path.split("/")
    if top.startswith("pseudo_masks") and not everything:
        return top + MASKS_OF_SET
    return "/".join([top, *below[:1]]) if top in STAGES else top


def clean(
    run: str, everything: bool, agreed: Callable[[Leftover], bool], warn: Warn, pseudo_masks: bool = False
) -> tuple[Leftover, bool]:
    """Remove what is left of a run if `agreed` says so of it; returns that, and whether it was removed.

    No driver can begin meanwhile. Raises InputError when one works on the run, or the folder holds no run.
    """
    _refuse_no_run(storage.absolute(run))
    with lease.held(run, warn):
        left = what_is_left(run, everything, pseudo_masks)
        removed = bool(left.deleted) and agreed(left)
        if removed:
            _remove(left.folder, left.deleted)
    return left, removed


def _remove(folder: str, deleted: Sequence[str]) -> None:
    for name in sorted(
        deleted, key=lambda name: name == "split.json"
    ):  # the last: so that the rest can be removed by a rerun
        if name.endswith(MASKS_OF_SET):
            _remove_masks(storage.join(folder, name.removesuffix(MASKS_OF_SET)), folder)
        else:
            storage.delete(storage.join(folder, name), within=folder)
    if not storage.is_s3(folder):
        for stage in STAGES:
            with contextlib.suppress(OSError):  # not empty
                os.rmdir(storage.join(folder, stage))


def _remove_masks(part: str, run: str) -> None:
    """The masks of a set. Its marker says so first, and keeps the set's figures: a rerun predicts it only if a stage needs it."""
    marker = storage.join(part, "done.json")
    storage.write_json(marker, storage.read_json(marker, dict[str, Any]) | {"masks_removed": True})
    names = {storage.join(part, name) for name in KEPT_OF_A_SET}
    with ThreadPoolExecutor(storage.DELETES_AT_ONCE) as threads:
        list(threads.map(lambda uri: storage.delete(uri, run), set(storage.list_files(part)) - names))


def _sizes(folder: str) -> dict[str, int]:
    """Path below the folder → bytes, of all its files but the lease. A link is a file, wherever it leads."""
    if storage.is_s3(folder):
        files, path = storage.filesystem(folder)
        infos = files.get_file_info(pafs.FileSelector(path, allow_not_found=True, recursive=True))
        below = {info.path.removeprefix(path + "/"): info.size for info in infos if info.type == pafs.FileType.File}
    else:
        below = dict(_local_sizes(folder))
    return {name: size for name, size in below.items() if name != lease.NAME}


def unused_for(folder: str) -> float:
    """Seconds since anything below a folder was written, by the clocks of this machine and of its store."""
    if storage.is_s3(folder):
        files, path = storage.filesystem(folder)
        infos = files.get_file_info(pafs.FileSelector(path, allow_not_found=True, recursive=True))
        newest = max((info.mtime_ns or 0 for info in infos), default=0) / 1e9
    else:
        paths = [os.path.join(above, name) for above, _, names in os.walk(folder) for name in names]
        newest = max((os.lstat(path).st_mtime for path in paths), default=0.0)
    return time.time() - newest


def _local_sizes(folder: str) -> Iterator[tuple[str, int]]:
    for above, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(above, name))]
        for path in (os.path.join(above, name) for name in [*names, *links]):
            with contextlib.suppress(FileNotFoundError):
                yield os.path.relpath(path, folder), os.lstat(path).st_size
