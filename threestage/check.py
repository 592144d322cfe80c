"""Everything that can be found out about a run in seconds, before it takes a GPU: `threestage check`, and a run's start."""

import contextlib
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

from threestage.config import Config
from threestage.data import storage, store_check
from threestage.data.records import load_manifest
from threestage.data.sets import labelled_set, validation_set
from threestage.data.split import Split, make_split
from threestage.data.store_check import Outcome, Probe
from threestage.errors import InputError
from threestage.preflight import check_run
from threestage.tracking import redact, resolve_uri, sqlite_path, talking_to


def check(config: Config, out: str, local: bool) -> Iterator[Outcome]:
    """First whether every place can be used, then, if so, whether the input fits the settings. Changes nothing.

    Without `local`, MLflow's store is among the places.
    """
    storage.configure(config.storage)
    config, out = config.with_absolute_paths(), storage.absolute(out)
    probes = [*places(config, out), *([] if local else [_tracking(config)])]
    outcomes = store_check.try_all(probes)
    yield from merged(outcomes)
    if all(outcome.problem is None for outcome in outcomes):
        yield store_check.try_one(Probe("input", config.data.root, lambda: _check_input(config, out)))


def check_store(config: Config, out: str) -> None:
    """Raises InputError within seconds when a place of the run cannot be reached, read or written.

    A store that is only busy passes: the run waits for it.
    """
    storage.configure(config.storage)
    config, out = config.with_absolute_paths(), storage.absolute(out)
    _refuse_unusable(places(config, out))


def check_writable(out: str) -> None:
    """The same for a folder that is about to be written, before there is a configuration."""
    _refuse_unusable([store_check.writable("--out", storage.absolute(out))])


def _refuse_unusable(probes: Sequence[Probe]) -> None:
    wrong = [outcome for outcome in store_check.try_all(probes) if outcome.problem and not outcome.busy]
    if wrong:
        raise InputError("; ".join(f"{outcome.name}: {outcome.problem}" for outcome in merged(wrong)))


def places(config: Config, out: str) -> list[Probe]:
    """Every place that the configuration names, and what the run does there."""
    probes = [store_check.data_set("data.root", config.data.root)]
    if config.data.unlabelled is not None:
        probes.append(store_check.images("data.unlabelled", config.data.unlabelled))
    if config.network.weights is not None:
        probes.append(store_check.file("network.weights", config.network.weights))
    return [*probes, store_check.writable("--out", out)]


def merged(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """One line for places that fail for the same reason."""
    lines: dict[str, Outcome] = {}
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
    uri = resolve_uri(config.registry.tracking_uri)
    return Probe("registry.tracking_uri", redact(uri), lambda: _reach_tracking(uri))


def _reach_tracking(uri: str) -> None:
    """The store answers; a database in a file that a run would make can be made."""
    path = sqlite_path(uri)
    if path is None or path.exists():
        with talking_to(uri):
            pass
        if path is not None:
            _refuse_read_only(path)
        return
    store_check.writable("registry.tracking_uri", str(path.parent)).try_it()


def _refuse_read_only(path: Path) -> None:
    """Raises InputError for a database that cannot be written."""
    try:
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=5)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.rollback()
    except sqlite3.Error as error:
        raise InputError(f"tracking store {path}: {error}; mend registry.tracking_uri (MLFLOW_TRACKING_URI)") from error


def _check_input(config: Config, out: str) -> None:
    """What a run refuses before it trains: too few labels, batches, class ids, weights that do not fit."""
    root, downscale = config.data.root, config.data.downscale
    manifest = load_manifest(root)
    saved = storage.join(out, "split.json")
    if storage.exists(saved):
        split = Split.model_validate(storage.read_json(saved)["split"])
    else:
        split = make_split(root, manifest, config.data)
    labelled = labelled_set(root, manifest, split, downscale, None)
    check_run(config, manifest, labelled, validation_set(root, manifest, split, downscale))
