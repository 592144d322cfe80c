"""Can a place be reached, read and written? Asked of all places at once, and answered within seconds.

The usual file systems retry for minutes, so that a run outlives an outage; here a wrong address must show at once.
"""

import contextlib
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotDone
from pathlib import Path
from typing import NamedTuple, TypeVar

import pyarrow.fs as pafs

from threestage.checks import store
from threestage.config import Config
from threestage.data import storage
from threestage.data.listing import first_image
from threestage.data.outputs import RUN, Output, claim
from threestage.data.records import MANIFEST_NAME
from threestage.data.storage_errors import Complaint, complaint
from threestage.errors import InputError, joined
from threestage.mlflow_sync.connection import confirmed_uri, mlflow_session, redact, resolve_uri, sqlite_path
from threestage.mlflow_sync.records import RegistrySettings

T = TypeVar("T")
DEADLINE_S = 9.0
RETRIES, CONNECT_S, ANSWER_S = 1, 2.0, 3.0
BUSY_S, BUSY_PAUSE_S = 5.0, 0.5
PROBE_NAME = ".threestage-check-"
PROBE = b"written by threestage check"


class Probe(NamedTuple):
    """Something to try. `name`: of the setting; `try_it` raises InputError or OSError when it does not work."""

    name: str
    value: str
    try_it: Callable[[], None]


class ProbeOutcome(NamedTuple):
    """`problem`: one line, None when all is well; `code`: its code; `busy`: it may pass by itself."""

    name: str
    value: str
    seconds: float
    problem: str | None = None
    code: str | None = None
    busy: bool = False


class _Place(NamedTuple):
    files: pafs.FileSystem
    path: str
    on_s3: bool


def try_all(probes: Sequence[Probe], deadline_s: float = DEADLINE_S) -> list[ProbeOutcome]:
    """Try them at the same time. One that is not done when the time is over has failed, and is left behind."""
    start = time.monotonic()
    futures = [_in_background(probe) for probe in probes]
    return [_wait(probe, future, start, deadline_s) for probe, future in zip(probes, futures, strict=True)]


def try_one(probe: Probe) -> ProbeOutcome:
    """Try it here, however long it takes."""
    start = time.monotonic()
    problem = Complaint("", None)
    try:
        probe.try_it()
    except InputError as error:
        problem = Complaint(" ".join(error.message.split()), error.code)
    except OSError as error:
        problem = complaint(probe.value, error)
    seconds = time.monotonic() - start
    return ProbeOutcome(probe.name, probe.value, seconds, problem.text or None, problem.code, problem.busy)


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


# ---- In the background


def _in_background(probe: Probe) -> "Future[ProbeOutcome]":
    future: Future[ProbeOutcome] = Future()

    def work() -> None:
        try:
            future.set_result(try_one(probe))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def _wait(probe: Probe, future: "Future[ProbeOutcome]", start: float, deadline_s: float) -> ProbeOutcome:
    try:
        return future.result(max(0.0, start + deadline_s - time.monotonic()))
    except NotDone:
        problem = f"{probe.value}: no answer within {deadline_s:g} s; start it, or correct {probe.name}"
        return ProbeOutcome(probe.name, probe.value, time.monotonic() - start, problem, "storage/unreachable")


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
    _refuse_unusable([store.writable("--out", storage.absolute(out))])


def _refuse_unusable(probes: Sequence[Probe]) -> None:
    wrong = [outcome for outcome in store.try_all(probes) if outcome.problem and not outcome.busy]
    if wrong:
        raise joined([InputError(f"{one.name}: {one.problem}", one.code) for one in merged(wrong)], "check/places")


def places(config: Config, out: str, output: Output = RUN) -> list[Probe]:
    """Every place that the configuration names, and what the run does there."""
    probes = [store.data_set("data.root", config.data.root)]
    if config.data.unlabelled is not None:
        probes.append(store.probe_images("data.unlabelled", config.data.unlabelled))
    if config.data.labelled_list is not None:
        probes.append(store.file("data.labelled", config.data.labelled_list))
    if config.data.group_list is not None:
        probes.append(store.file("data.group", config.data.group_list))
    if config.network.weights is not None:
        probes.append(store.file("network.weights", config.network.weights))
    writable = store.writable("--out", out)

    def try_out() -> None:
        writable.try_it()  # first: a store that is away is found out sooner
        claim(out, output)

    return [*probes, writable._replace(try_it=try_out)]


def merged(outcomes: Sequence[ProbeOutcome]) -> list[ProbeOutcome]:
    """One line for places that fail for the same reason."""
    lines: dict[str, ProbeOutcome] = {}
    for outcome in outcomes:
        key = outcome.problem or outcome.name
        before = lines.get(key)
        if before is not None:
            outcome = before._replace(
                name=f"{before.name}, {outcome.name}", seconds=max(before.seconds, outcome.seconds)
            )
        lines[key] = outcome
    return list(lines.values())


def _tracking(config: Config) -> Probe:
    settings = config.registry
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
    store.writable("registry.tracking_uri", str(path.parent)).try_it()


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
