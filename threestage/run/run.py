"""A run as its user starts it: the pipeline, its copy in MLflow, its pictures and page. The commands call `run`."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from typing import Any

from threestage.checks.store import check_store, check_writable
from threestage.config import Config, load, refuse_unconfirmed_hosts
from threestage.data import storage
from threestage.data.ingest import IngestSettings, ingest
from threestage.data.outages import tries
from threestage.data.outputs import DEMO_MARK, RUN, claim, mark
from threestage.data.records import MANIFEST_NAME, SplitName, load_manifest
from threestage.data.split import Split
from threestage.data.storage_errors import refuse_unwritable
from threestage.data.synthetic import CLASSES, write_scenes
from threestage.errors import InputError, StageFailure, Stopped, Warn, reason_of
from threestage.mlflow_sync.client import open_registry
from threestage.mlflow_sync.connection import reserve_variables, resolve_uri
from threestage.mlflow_sync.records import RegisteredVersion, Status
from threestage.mlflow_sync.run_sync import RunSync, has_begun, keep_outcome, keep_settings
from threestage.models.program import without_program
from threestage.private_folder import reserve_compile_cache
from threestage.report.report import write_report
from threestage.report.validation_images import write_pictures
from threestage.run import pipeline
from threestage.run.backend import Backend, RunCallbacks, ignore
from threestage.run.event_log import noted
from threestage.run.local_backend import LocalBackend
from threestage.run.outcome import StageOutcome
from threestage.run_folder import lease
from threestage.run_folder.folder import RunFolder
from threestage.run_folder.reuse import CONFIG_NAME, PAGE_NAME
from threestage.termination import Terminated, sigterm_stops

DEMO_SCENES: dict[SplitName, int] = {"train": 600, "val": 200, "test": 200}
OWN_DATA = "for images of your own, use `threestage run own_images --set data.root=DATA`"


def run(
    config: Config,
    out: str,
    local: bool,
    on: RunCallbacks,
    reuse: str | None = None,
    continue_from: str | None = None,
) -> dict[str, Any]:
    """Run the three stages, in this process (`local`: nothing is registered) or on Ray with a copy in MLflow.

    `reuse` is the folder of a run whose finished stages serve this one as far as they would be computed the same;
    `continue_from` that of a run whose champion this one starts from.
    Writes results.json, pictures.png and report.html into `out`; returns the results, with the versions `registered`.
    """
    check_places(config, out, local)
    return run_checked(config, out, local, on, reuse, continue_from)


def check_places(config: Config, out: str, local: bool) -> None:
    """Raises InputError where a place of the run may not be used; before anything is read or written there."""
    if not local:
        refuse_unconfirmed_hosts(config)
    check_store(config, out)
    claim(storage.absolute(out), RUN)  # a busy store passes the check above


def run_checked(
    config: Config,
    out: str,
    local: bool,
    on: RunCallbacks,
    reuse: str | None = None,
    continue_from: str | None = None,
) -> dict[str, Any]:
    """`run` after `check_places`."""
    config, out = config.with_absolute_paths(), storage.absolute(out)
    _warn_of_the_demos_network(config, on.on_warning)
    reserve_variables()
    reserve_compile_cache()
    if not local:
        from threestage.ray_backend.connect import reserve_ray_variables, with_gpus

        config = with_gpus(config)
        reserve_ray_variables(config.cluster)
    registered: list[RegisteredVersion] = []
    before = lease.last_holder(out)
    with sigterm_stops(), lease.held(out, on.on_warning) as held, contextlib.ExitStack() as recording:
        on = recording.enter_context(noted(config, out, held, before, 1 if local else config.cluster.devices, on))
        if local:
            recorded = _recorded(out, _settings(config), on)
        else:
            recorded = recording.enter_context(_sent_to_mlflow(config, out, held, on, registered))
        with _backend(config, out, local, recorded) as backend:
            results = pipeline.run(config, out, backend, recorded, reuse, continue_from)
        for attempt in tries("the run's pictures", on.on_warning):
            with attempt, refuse_unwritable(out):
                write_pictures(config, out)
        _write_page(out, on.on_warning)
    return results | {"registered": [asdict(version) for version in registered]}


def side_run(config: Config, out: str, split: Split, local: bool, on: RunCallbacks) -> None:
    """Run a run that serves another command: it has the split that is given, no copy in MLflow and no page. Raises as `run` does;
    the same call continues."""
    config, out = config.with_absolute_paths(), storage.absolute(out)
    reserve_variables()
    reserve_compile_cache()
    if not local:
        from threestage.ray_backend.connect import reserve_ray_variables

        reserve_ray_variables(config.cluster)
    folder = RunFolder.at(out)
    if not storage.exists(folder.part("split.json")):
        folder.write_split(config, split)
    with sigterm_stops(), lease.held(out, on.on_warning), _backend(config, out, local, on) as backend:
        pipeline.run(config, out, backend, _recorded(out, _settings(config), on))


def _backend(config: Config, out: str, local: bool, on: RunCallbacks) -> AbstractContextManager[Backend]:
    if local:
        return contextlib.nullcontext(LocalBackend(config, on))
    from threestage.ray_backend.train import on_cluster

    return on_cluster(config, out, on)


@contextlib.contextmanager
def _sent_to_mlflow(
    config: Config, out: str, held: lease.Lease, on: RunCallbacks, registered: list[RegisteredVersion]
) -> Iterator[RunCallbacks]:
    """The callbacks of a run that is sent to MLflow while it works; at its end `registered` gets its versions."""
    registry = None if has_begun(out) else open_registry(config.registry)
    if registry is not None:  # a run that is continued has been warned
        threading.Thread(target=_warn_without_program, args=(config, on.on_warning), daemon=True).start()
    settings = _settings(config, resolve_uri(config.registry.tracking_uri))
    mirror = RunSync(out, settings, config.registry, registry, on.on_warning)
    status: Status = "FAILED"
    refused = False  # then what is in the folder may be another run's
    try:
        yield _recorded(out, settings, on, mirror.notify)
        status = "FINISHED"
    except InputError:
        refused = not mirror.notified
        raise
    except (KeyboardInterrupt, Terminated, Stopped):
        status = "KILLED"
        raise
    finally:
        if held.lost is None and not refused:
            registered += mirror.close(status)
        else:
            mirror.abandon()


def _warn_without_program(config: Config, warn: Warn) -> None:
    """Say early, beside the training, what the registered models will lack."""
    with contextlib.suppress(InputError):  # the pipeline refuses such settings itself
        if warning := without_program(config.network):
            warn(warning)


def _settings(config: Config, tracking_uri: str | None = None) -> dict[str, Any]:
    tree = config.model_dump(mode="json")
    tree["registry"]["tracking_uri"] = tracking_uri or config.registry.tracking_uri
    return tree


def _recorded(
    out: str, settings: Mapping[str, Any], on: RunCallbacks, then: Callable[[], None] = ignore
) -> RunCallbacks:
    """The callbacks of a run whose settings and outcomes are written into its folder; `then` is called after each."""
    written = storage.exists(storage.join(out, CONFIG_NAME))

    def save_settings(stage: str, row: Mapping[str, float]) -> None:
        """When the first stage has really begun: before, they may be refused."""
        nonlocal written
        if not written:
            # tried again with the next row: whether the place takes writes is for the checkpoints to say
            with contextlib.suppress(OSError):
                keep_settings(out, settings)
                written = True
        on.on_metrics(stage, row)
        then()

    def save_outcome(outcome: StageOutcome) -> None:
        keep_settings(out, settings)
        keep_outcome(out, outcome)
        on.on_stage_done(outcome)
        then()

    return replace(on, on_metrics=save_settings, on_stage_done=save_outcome)


def _write_page(out: str, warn: Warn) -> None:
    """A page that cannot be written does not fail a run that is finished."""
    try:
        write_report(out)
    except (InputError, StageFailure, OSError) as error:
        warn(
            f"the run is finished but {PAGE_NAME} could not be written: {reason_of(error)}; try `threestage report {out}`"
        )


def demo_config(out: str, seed: int, overrides: list[str]) -> Config:
    """Make the demo's scenes and data set below `out`, unless they are there; returns the demo's configuration.

    Raises:
        InputError: other data than the scenes are asked for, or lie there.
    """
    data = storage.join(out, "data")
    config = load("demo", [f"data.root={data}", f"seed={seed}", *overrides])
    for key, given, own in (("root", config.data.root, data), ("unlabelled", config.data.unlabelled, None)):
        if given != own:
            raise InputError(
                f"--set data.{key}={given}: the demo trains on its own scenes; {OWN_DATA}", "demo/other-data"
            )
    check_writable(config, out)
    scenes = storage.join(out, "scenes")
    if storage.exists(storage.join(data, MANIFEST_NAME)):
        if not _holds_scenes(data):
            raise InputError(
                f"{data}: holds another data set than the demo's scenes; give another --out, or {OWN_DATA}",
                "demo/other-data",
            )
    else:
        claim(out, RUN)
        mark(out, DEMO_MARK, "threestage demo")
        write_scenes(scenes, DEMO_SCENES, seed)
        ingest(
            scenes, data, IngestSettings(format="camvid", class_map=storage.join(scenes, "class_map.yaml"), name="demo")
        )
    return config


def _holds_scenes(root: str) -> bool:
    return load_manifest(root).classes == CLASSES


def _warn_of_the_demos_network(config: Config, warn: Warn) -> None:
    if config.name == "demo" and not _holds_scenes(config.data.root):
        warn(f"{config.data.root}: the preset demo trains a tiny network from scratch, made for its scenes; {OWN_DATA}")
