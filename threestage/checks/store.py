"""Can a place be reached, read and written? Asked of all places at once, and answered within seconds.

The usual file systems retry for minutes, so that a run outlives an outage; here a wrong address must show at once.
"""

import contextlib
import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import pyarrow.fs as pafs

from threestage.checks.result import Probe, merged, try_all
from threestage.config import Config
from threestage.data import storage
from threestage.data.listing import first_image
from threestage.data.outputs import RUN, Output, claim
from threestage.data.records import MANIFEST_NAME
from threestage.data.storage_errors import complaint
from threestage.errors import InputError, joined
from threestage.mlflow_sync.connection import confirmed_uri, mlflow_session, redact, resolve_uri, sqlite_path
from threestage.mlflow_sync.records import RegistrySettings

T = TypeVar("T")
RETRIES, CONNECT_S, ANSWER_S = 1, 2.0, 3.0
BUSY_S, BUSY_PAUSE_S = 5.0, 0.5
PROBE_NAME = ".threestage-check-"
PROBE = b"written by threestage check"


class _Place(NamedTuple):
    files: pafs.FileSystem
    path: str
    on_s3: bool


def data_set(name: str, uri: str) -> Probe:
    """A data set is there and its manifest can be read."""
    place = _place(uri)
    return Probe(name, uri, lambda: _read_manifest(name, uri, place))


def probe_images(name: str, uri: str) -> Probe:
    """A data set, or a folder or prefix with an image below it."""
    place = _place(uri)
    return Probe(name, uri, lambda: _find_image(name, uri, place))


def file(name: str, uri: str) -> Probe:
    """A file is there and can be read."""
    place = _place(uri)
    return Probe(name, uri, lambda: _read_byte(name, uri, place))


def writable(name: str, uri: str) -> Probe:
    """A small file can be written below the place, read back and deleted; nothing of it stays."""
    place = _place(uri)
    return Probe(name, uri, lambda: _write_read_delete(name, uri, place))


# ---- What is tried


def _place(uri: str) -> _Place:
    """With a file system that gives up soon. To be made before the requests: pyarrow's makes a new one wait for them."""
    files, path = storage.filesystem(uri)
    if storage.is_s3(uri):
        files = storage.s3_filesystem(files.chosen, RETRIES, CONNECT_S, ANSWER_S)
    return _Place(files, path, storage.is_s3(uri))


def _read_manifest(name: str, uri: str, place: _Place) -> None:
    _reach(place, place.path)
    manifest = storage.join(uri, MANIFEST_NAME)
    content = _read(place.files, storage.join(place.path, MANIFEST_NAME))
    if content is None:
        raise InputError(
            f"{manifest}: no data set there; make one with `threestage ingest`, or correct {name}", "data/no-data-set"
        )
    storage.parse_json(content, manifest)


def _find_image(name: str, uri: str, place: _Place) -> None:
    _reach(place, place.path)
    if _read(place.files, storage.join(place.path, MANIFEST_NAME)) is None and first_image(uri) is None:
        raise InputError(f"{uri}: no image below it, and it is no data set either; correct {name}", "data/no-images")


def _read_byte(name: str, uri: str, place: _Place) -> None:
    _reach(place, os.path.dirname(place.path))
    if _read(place.files, place.path, 1) is None:
        raise InputError(f"{uri}: no file there; correct {name}", "storage/not-found")


def _write_read_delete(name: str, uri: str, place: _Place) -> None:
    _reach(place, place.path)
    folder = place.path if place.on_s3 else _nearest_folder(name, place.path)
    probe = storage.join(folder, PROBE_NAME + secrets.token_hex(8))
    _patiently(lambda: _write(place.files, probe))
    try:
        if _read(place.files, probe) != PROBE:
            raise InputError(
                f"{uri}: what is written there does not come back; correct {name} or storage.endpoint",
                "storage/not-kept",
            )
    except BaseException:
        with contextlib.suppress(Exception):
            _delete(place, probe)
        raise
    _delete(place, probe)


def _nearest_folder(name: str, path: str) -> str:
    """The folder itself, or the one above that a run would make it in."""
    folder = path
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder):
        raise InputError(f"{path}: {folder} is a file; give another {name}", "storage/not-a-folder")
    return folder


def _reach(place: _Place, folder: str) -> None:
    """Raises the OSError of an address, credentials, a region or a bucket that is wrong.

    It lists what is not there: an error of a listing names its reason, those of a HEAD request do not.
    """
    if place.on_s3:
        below = storage.join(folder, PROBE_NAME + secrets.token_hex(8))
        with contextlib.suppress(FileNotFoundError):
            _patiently(lambda: place.files.get_file_info(pafs.FileSelector(below)))


def _read(files: pafs.FileSystem, path: str, length: int = storage.MAX_JSON_BYTES) -> bytes | None:
    """The first bytes of a file; None when it is absent."""

    def read() -> bytes | None:
        try:
            if isinstance(files, pafs.LocalFileSystem):
                storage.refuse_special_file(path)
            with files.open_input_file(path) as stream:
                return bytes(stream.read(length))
        except FileNotFoundError:
            return None

    return _patiently(read)


def _write(files: pafs.FileSystem, path: str) -> None:
    with files.open_output_stream(path) as stream:
        stream.write(PROBE)


def _delete(place: _Place, path: str) -> None:
    """On S3 by s3fs: pyarrow would leave an empty object in the name of the folder."""
    if not place.on_s3:
        place.files.delete_file(path)
        return
    bucket, _, key = path.partition("/")
    storage.ask_s3("delete_object", bucket, Key=key)


def _patiently(action: Callable[[], T]) -> T:
    """The action, repeated for some seconds while the store is busy."""
    give_up = time.monotonic() + BUSY_S
    while True:
        try:
            return action()
        except OSError as error:
            if not complaint(None, error).busy or time.monotonic() > give_up:
                raise
        time.sleep(BUSY_PAUSE_S)


def check_store(config: Config, out: str, output: Output = RUN) -> None:
    """Raises InputError within seconds when a place of the run cannot be reached, read or written, or `out` holds something
    other than such an output.

    A store that is only busy passes: the run waits for it.
    """
    storage.configure(config.storage)
    config, out = config.with_absolute_paths(), storage.absolute(out)
    _refuse_unusable(places(config, out, output))


def check_writable(config: Config, out: str) -> None:
    """The same for `out` alone, before the data set of the configuration is made."""
    storage.configure(config.storage)
    _refuse_unusable([writable("--out", storage.absolute(out))])


def _refuse_unusable(probes: Sequence[Probe]) -> None:
    wrong = [result for result in try_all(probes) if result.problem and not result.busy]
    if wrong:
        raise joined([InputError(f"{one.name}: {one.problem}", one.code) for one in merged(wrong)], "check/places")


def places(config: Config, out: str, output: Output = RUN) -> list[Probe]:
    """Every place that the configuration names, and what the run does there."""
    optional: tuple[tuple[Callable[[str, str], Probe], str, str | None], ...] = (
        (probe_images, "data.unlabelled", config.data.unlabelled),
        (file, "data.labelled", config.data.labelled_list),
        (file, "data.group", config.data.group_list),
        (file, "data.exclude", config.data.exclude),
        (file, "network.weights", config.network.weights),
    )
    given = [probe(name, place) for probe, name, place in optional if place is not None]
    folder = writable("--out", out)

    def try_out() -> None:
        folder.try_it()  # first: a store that is away is found out sooner
        claim(out, output)

    return [data_set("data.root", config.data.root), *given, folder._replace(try_it=try_out)]


def tracking(settings: RegistrySettings) -> Probe:
    """MLflow's store."""
    return Probe("registry.tracking_uri", redact(resolve_uri(settings.tracking_uri)), lambda: _reach_tracking(settings))


def _reach_tracking(settings: RegistrySettings) -> None:
    """The store answers; a database in a file that a run would make can be made."""
    uri = confirmed_uri(settings.tracking_uri, settings.host_from)
    path = sqlite_path(uri)
    if path is None or path.exists():
        with mlflow_session(uri):
            pass
        if path is not None:
            _refuse_read_only(path)
        return
    writable("registry.tracking_uri", str(path.parent)).try_it()


def _refuse_read_only(path: Path) -> None:
    """Raises InputError for a database that cannot be written."""
    try:
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=5)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.rollback()
    except sqlite3.Error as error:
        raise InputError(
            f"tracking store {path}: {error}; correct registry.tracking_uri (MLFLOW_TRACKING_URI)",
            "mlflow/not-writable",
        ) from error
