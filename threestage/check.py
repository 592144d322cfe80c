"""Everything that can be found out about a run before it is started: `threestage check`, and a run's start."""

import contextlib
import sqlite3
import time
from collections.abc import Iterator, Sequence, Set
from functools import partial
from pathlib import Path

from threestage import lease
from threestage.budget import bought
from threestage.checks.data import classes_fit, input_fits, sides_differ
from threestage.checks.lines import Found, Line, not_tried, tried
from threestage.checks.steps import Measured, Specification, measure_here
from threestage.checks.words import duration_line, step_line
from threestage.config import Config, changed, refuse_unconfirmed_hosts
from threestage.data import storage, store_check
from threestage.data.outputs import RUN, Output, claim
from threestage.data.records import Manifest, load_manifest
from threestage.data.store_check import Outcome, Probe
from threestage.errors import InputError, joined
from threestage.models.program import without_program
from threestage.registry import RegistrySettings
from threestage.tracking import confirmed_uri, redact, resolve_uri, sqlite_path, talking_to
from threestage.training.worker import default_device


def check(
    config: Config, out: str, local: bool, address: str | None = None, budget: str | None = None
) -> Iterator[Line]:
    """Whether the places can be used, the input fits the settings, the cluster has room and its nodes reach the places; what
    memory and time a step of each stage takes. Changes nothing.

    What fails hides nothing that can be tried without it. `local`: without MLflow and a cluster. `address`: of the cluster,
    in place of `cluster.address`; the URL of a dashboard has all of this done there, by a job. `budget`: what it buys is said.
    """
    if local and address is not None:
        raise InputError(
            f"--address {address}: not with --local, which uses no cluster; leave one of them out",
            "check/local-address",
        )
    if address is not None and address.startswith(("http://", "https://")):
        if budget is not None:
            raise InputError(f"--budget {budget}: not with the URL of a dashboard; leave it out", "budget/not-by-job")
        from threestage.on_ray.check_job import check_by_job

        refuse_unconfirmed_hosts(config, elsewhere=True)
        yield from check_by_job(config, out, address)
        return
    if address is not None:
        config = changed(config, {"cluster.address": address})
    storage.configure(config.storage)
    config, out = config.with_absolute_paths(), storage.absolute(out)
    outcomes = store_check.try_all([*places(config, out), *([] if local else [_tracking(config)])])
    yield from (Line(*outcome) for outcome in merged(outcomes))
    wrong = {outcome.name for outcome in outcomes if outcome.problem}
    if "--out" not in wrong and storage.exists(storage.join(out, lease.NAME)):
        yield tried("driver", out, lambda: Found(lease.refuse_driven(out)))
    yield from _check_input(config, out, wrong)
    manifest = None if "data.root" in wrong else _manifest(config)
    yield from _check_here(config, manifest, budget) if local else _check_cluster(config, out, manifest, budget)
    if not local:  # last, since it takes longest
        yield (
            not_tried(["program"], sorted(wrong))
            if wrong
            else tried("program", config.network.encoder, lambda: _exportable(config))
        )


def _exportable(config: Config) -> Found:
    """Whether the models can be registered with their exported program."""
    try:
        return Found(f"{config.network.encoder} is exported for mlflow.pyfunc", without_program(config.network))
    except InputError:  # the line of the input says why
        return Found("", "not tried: needs input")


def _manifest(config: Config) -> Manifest | None:
    """None where it cannot be used, which the line of the input says."""
    try:
        return load_manifest(config.data.root)
    except (InputError, OSError):
        return None


def _check_input(config: Config, out: str, wrong: Set[str]) -> Iterator[Line]:
    """wrong: the places that cannot be used."""
    run, missing = None if "--out" in wrong else out, wrong & {"data.root", "data.unlabelled"}
    input_line = partial(tried, "input", config.data.root, lambda: input_fits(config, run))
    fits = not_tried(["input"], sorted(missing)) if missing else input_line()
    yield fits
    if "data.root" in wrong:
        yield not_tried(["classes", "split"], ["data.root"])
        return
    for name, find in (("classes", classes_fit), ("split", sides_differ)):
        line = tried(name, config.data.root, partial(find, config, run))
        same = line.problem is not None and line.problem == fits.problem
        yield not_tried([name], ["input"]) if same else line


def _check_cluster(config: Config, out: str, manifest: Manifest | None, budget: str | None) -> Iterator[Line]:
    from threestage.on_ray import check, check_room, entrance

    address = entrance.address_of(config.cluster)
    if address is None:
        room = tried("cluster", "", lambda: check_room.room_here(config))
        yield room
        yield from _check_here(config, manifest, budget, room.problem is None)
        return
    with contextlib.ExitStack() as connection:
        entry = tried(address[0], address[1], lambda: check.connect(*address, config.cluster, connection))
        yield entry
        if entry.problem is None:
            yield from _check_connected(config, out, manifest, budget)
        else:
            yield not_tried(["cluster", "nodes", *config.stage_names, "duration"], [address[0]])


def _check_connected(config: Config, out: str, manifest: Manifest | None, budget: str | None) -> Iterator[Line]:
    from threestage.on_ray.check_nodes import measure_there, nodes_reach, own_file
    from threestage.on_ray.check_room import room_there

    yield tried("cluster", "", lambda: room_there(config))
    yield tried("nodes", "", lambda: nodes_reach(config, out))
    if (line := own_file(config)) is not None:
        yield line
    if manifest is None:
        yield not_tried([*config.stage_names, "duration"], ["data.root"])
        return
    found = Specification(config=config, manifest=manifest, use_gpu=config.cluster.gpus_per_worker > 0)
    yield from _steps(found, measure_there(found), 1, budget)


def _check_here(
    config: Config, manifest: Manifest | None, budget: str | None, room: bool | None = None
) -> Iterator[Line]:
    """`room`: whether this machine has room for the workers; None without Ray, when the stages train in one process on what
    there is."""
    alone = room is None
    if manifest is None or room is False:
        yield not_tried([*config.stage_names, "duration"], ["data.root" if manifest is None else "cluster"])
        return
    use_gpu = default_device().type == "cuda" if alone else config.cluster.gpus_per_worker > 0
    workers = 1 if alone else config.cluster.most_workers
    found = Specification(config=config, manifest=manifest, use_gpu=use_gpu)
    yield from _steps(found, measure_here(found), workers, budget)


def _steps(found: Specification, stages: Iterator[Measured], workers: int, budget: str | None) -> Iterator[Line]:
    """`workers`: those that share the machine on which the stages are measured. `budget`: a time, whose steps are shown."""
    config, measured, start = found.config, [], time.monotonic()
    for one in stages:
        yield step_line(config, one, workers, time.monotonic() - start)
        measured.append(one)
        start = time.monotonic()
    yield duration_line(config, measured)
    if budget is not None:
        yield tried("budget", budget, lambda: Found(bought(budget, config, found.manifest, measured).describe()))


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
    _refuse_unusable([store_check.writable("--out", storage.absolute(out))])


def _refuse_unusable(probes: Sequence[Probe]) -> None:
    wrong = [outcome for outcome in store_check.try_all(probes) if outcome.problem and not outcome.busy]
    if wrong:
        raise joined([InputError(f"{one.name}: {one.problem}", one.code) for one in merged(wrong)], "check/places")


def places(config: Config, out: str, output: Output = RUN) -> list[Probe]:
    """Every place that the configuration names, and what the run does there."""
    probes = [store_check.data_set("data.root", config.data.root)]
    if config.data.unlabelled is not None:
        probes.append(store_check.images("data.unlabelled", config.data.unlabelled))
    if config.data.labelled_list is not None:
        probes.append(store_check.file("data.labelled", config.data.labelled_list))
    if config.data.group_list is not None:
        probes.append(store_check.file("data.group", config.data.group_list))
    if config.network.weights is not None:
        probes.append(store_check.file("network.weights", config.network.weights))
    writable = store_check.writable("--out", out)

    def try_out() -> None:
        writable.try_it()  # first: a store that is away is found out sooner
        claim(out, output)

    return [*probes, writable._replace(try_it=try_out)]


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
    settings = config.registry
    return Probe("registry.tracking_uri", redact(resolve_uri(settings.tracking_uri)), lambda: _reach_tracking(settings))


def _reach_tracking(settings: RegistrySettings) -> None:
    """The store answers; a database in a file that a run would make can be made."""
    uri = confirmed_uri(settings.tracking_uri, settings.host_from)
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
        raise InputError(
            f"tracking store {path}: {error}; correct registry.tracking_uri (MLFLOW_TRACKING_URI)",
            "mlflow/not-writable",
        ) from error
