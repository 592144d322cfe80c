"""The files of a run's pool: found beside stage 1, fixed once a stage has learnt from them."""

import hashlib
from collections.abc import Callable, Collection

from threestage.checks.preflight import check_pool
from threestage.config import Config
from threestage.data import storage
from threestage.data.listing import Each, holds_data_set, list_images
from threestage.data.parallel import in_daemon_thread
from threestage.data.pool import (
    PoolFile,
    data_set_files,
    digest_of_ids,
    less_excluded,
    listed_pool,
    load_pool,
    pool_excluded,
    pool_source,
    rows_of,
    write_pool,
)
from threestage.data.records import Manifest, load_manifest
from threestage.errors import InputError, Warn, reason_of
from threestage.run_folder.folder import RunFolder

LISTED_ROWS_PER_FILE = 512
NAME = "pool.parquet"


def find_in_background(
    config: Config, folder: RunFolder, manifest: Manifest, each: Each, warn: Warn, kept: Collection[str] = ()
) -> Callable[[], list[PoolFile]]:
    """Find the files in a thread, while stage 1, which needs none, trains; returns what waits for them. `kept`: labelled images,
    which `data.exclude` does not leave out."""
    excluded = excluded_ids(config.data.exclude) - frozenset(kept)

    def find() -> list[PoolFile]:
        try:
            return find_pool(config, folder, manifest, each, warn, excluded)
        except BaseException as error:
            warn(f"the run will stop after stage 1, its pool cannot be found: {reason_of(error)}")
            raise

    return in_daemon_thread(find).result  # a run that fails does not wait for a long listing


def excluded_ids(uri: str | None) -> frozenset[str]:
    """Of the file that `data.exclude` names, one a line. Raises InputError where there is no such file."""
    try:
        return frozenset() if uri is None else frozenset(storage.read_lines(uri))
    except FileNotFoundError:
        raise InputError(
            f"data.exclude={uri}: no such file; give a file with an image id a line, or null", "storage/not-found"
        ) from None


def find_pool(
    config: Config,
    folder: RunFolder,
    manifest: Manifest,
    each: Each,
    warn: Warn,
    excluded: frozenset[str] = frozenset(),
) -> list[PoolFile]:
    """The pool that stage 2 began with; before it begins, what is there now (a rerun takes new images in).

    Raises InputError when there are fewer images than a step needs. `each` runs the parts of a listing.
    """
    if NAME in folder.reused_parts:
        return _reused(config, folder.part(NAME), excluded)
    uri = folder.part(NAME)
    files = data_set_files(config.data.root, manifest)
    first = "stage1" if config.stage1.unlabelled_batch > 0 else "stage2"
    if RunFolder(folder.out).has_started(first) and storage.exists(uri):
        return _begun_with(config, folder.out, first, files, warn, excluded)
    if (more := config.data.unlabelled) is not None:
        if holds_data_set(more):
            files += data_set_files(more, load_manifest(more), own=False)
        else:
            listing = storage.join(folder.out, "listing", hashlib.sha256(more.encode()).hexdigest()[:16])
            list_images(more, listing, LISTED_ROWS_PER_FILE, each)
            files += listed_pool(listing)
    files = list({file.name: file for file in reversed(files)}.values())[::-1]  # a file is named by what is in it
    files = less_excluded(files, excluded)
    check_pool(config, rows_of(files))
    write_pool(uri, files, config.data.unlabelled, excluded)
    return files


def _reused(config: Config, uri: str, excluded: frozenset[str]) -> list[PoolFile]:
    """The pool of the run whose pseudo-masks are reused."""
    if pool_excluded(uri) != digest_of_ids(excluded):
        raise InputError(
            f"{uri}, which this run reuses, was made with another data.exclude than {config.data.exclude}: set it to that of "
            "the other run, or leave --reuse out and give another --out",
            "run/other-settings",
        )
    if (unlabelled := pool_source(uri)) != config.data.unlabelled:
        raise InputError(
            f"{uri}, which this run reuses, was made with data.unlabelled={unlabelled}, this run has "
            f"{config.data.unlabelled}: set it to that, or leave --reuse out and give another --out",
            "run/other-settings",
        )
    files = load_pool(uri)
    check_pool(config, rows_of(files))
    return files


def _begun_with(
    config: Config, out: str, first: str, files: list[PoolFile], warn: Warn, excluded: frozenset[str]
) -> list[PoolFile]:
    """The pool that the stage `first` has learnt from. `files`: those of the data set now."""
    uri = storage.join(out, NAME)
    pool, unlabelled = load_pool(uri), pool_source(uri)
    if pool_excluded(uri) != digest_of_ids(excluded):
        raise InputError(
            f"{uri} was made with another list of data.exclude than {config.data.exclude} is now: give another --out, set it "
            f"back, or delete {storage.join(out, first)} and the stages after it",
            "run/other-settings",
        )
    if unlabelled != config.data.unlabelled:
        raise InputError(
            f"{uri} was made with data.unlabelled={unlabelled}, this run has {config.data.unlabelled}: give another --out, "
            f"set it back, or delete {storage.join(out, first)} and the stages after it",
            "run/other-settings",
        )
    if not {file.uri for file in files} <= {file.uri for file in pool}:
        warn(
            f"{config.data.root} has new images: this run continues with the pool that {first} began with; to take them "
            f"in, delete {storage.join(out, first)} and the stages after it"
        )
    return pool
