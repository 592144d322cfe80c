"""A run in MLflow. The run's folder is the record, and what it holds is sent: in the background while the run goes on, or
afterwards by `threestage sync`.

run.json               names the run in MLflow for ever
config.json            the settings
record/stage1.json     a finished stage (run/outcome.py), and which training of it that is
stage1/checkpoints/attempt.json    names one training of a stage
"""

import uuid
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from threestage.config import STAGES, Config, StageName
from threestage.data import safe_walk, storage
from threestage.data.outputs import RUN, is_marked
from threestage.errors import InputError, Warn, reason_of
from threestage.mlflow_sync.client import Registry, open_registry
from threestage.mlflow_sync.connection import END_S, Background, redact, redact_tree, reserve_variables, resolve_uri
from threestage.mlflow_sync.records import RegisteredVersion, RegistrySettings, StageRecord, StageRows, Status
from threestage.models.export import CARD, WEIGHTS
from threestage.prediction.estimates import CALIBRATION
from threestage.run.outcome import StageOutcome
from threestage.run_folder import lease
from threestage.run_folder.records import Results, RunSettings, StageMarker, StageResult
from threestage.run_folder.reuse import CONFIG_NAME, PAGE_NAME, parts_elsewhere, resolve_part
from threestage.training.checkpoint import Checkpoints, checkpoint_folder
from threestage.verdict import best_stage, verdict_text

RECORD, RUN_NAME, ATTEMPT_NAME = "record", "run.json", "attempt.json"
BETWEEN_S, RETRY_S = 10.0, 30.0
STOPPED_S = 10.0  # a run that was asked to end waits so long for MLflow
FILES = ("results.json", "pictures.png", PAGE_NAME, "split.json")


class _Recorded(StageOutcome):
    """A stage in record/. `attempt`: which training of it that was."""

    attempt: str


def keep_settings(out: str, settings: Mapping[str, Any]) -> None:
    """Write the run's settings, `config.Config` as plain JSON, down without secrets."""
    storage.write_json(storage.join(out, CONFIG_NAME), redact_tree(settings))


def keep_outcome(out: str, outcome: StageOutcome) -> None:
    """Write down that a stage is finished, for MLflow to be told whenever it can be."""
    uri = storage.join(out, RECORD, f"{outcome.stage}.json")
    before = storage.read_json(uri, _Recorded) if storage.exists(uri) else None
    if before is not None and before.lineage.model_digest == outcome.lineage.model_digest:
        attempt = before.attempt
    else:
        attempt = _attempt(storage.join(out, outcome.stage)) or outcome.lineage.model_digest
    storage.write_json(uri, {**outcome.model_dump(mode="json"), "attempt": attempt})


def has_begun(out: str) -> bool:
    """Whether the run was to be in MLflow before."""
    return storage.exists(storage.join(out, RUN_NAME))


class Sender:
    """Sends what a run's folder holds and MLflow does not. Sending again, from another process too, changes nothing."""

    def __init__(self, registry: Registry, out: str, settings: Mapping[str, Any]) -> None:
        self.versions: dict[StageName, RegisteredVersion] = {}
        self._registry, self._out, self._settings = registry, out, settings
        self._steps: dict[str, int] = {}  # the last that was sent, by attempt
        self._steps_before = 0  # of the stages that were sent

    @cached_property
    def _key(self) -> str:
        return _named(storage.join(self._out, RUN_NAME), "run_key")

    def send(self) -> None:
        """InputError when MLflow does not answer."""
        assert self._key  # written down before anything is sent
        for stage in STAGES:
            if stage in self.versions:
                continue
            found = _outcome(self._out, stage)
            if found is None:
                self._send_rows(stage)
                return
            record = self._record(*found)
            self.versions[stage] = self._registry.record_stage(record)
            self._steps_before += int(record.rows[-1]["step"]) if record.rows else 0

    @property
    def complete(self) -> bool:
        """Whether the run has ended and all its stages are sent."""
        uri = storage.join(self._out, "results.json")
        return storage.exists(uri) and set(storage.read_json(uri, Results)["stages"]) <= set(self.versions)

    def finish(self, status: Status) -> None:
        """End the run, with its files and its final values."""
        rejects = [f"pseudo_masks{n}/rejects.parquet" for n in (1, 2, 3)]
        uris = {name: storage.join(self._out, name) for name in (*FILES, *rejects)}
        files = {name: uri for name, uri in uris.items() if storage.exists(uri)}
        _refuse_links_out(self._out, files)
        summary, description = dict[str, float](), None
        if "results.json" in files:
            results = storage.read_json(files["results.json"], Results)
            summary = {f"{stage}/mean_iou": values["mean_iou"] for stage, values in results["stages"].items()}
            description = describe(results) if results["stages"] else None
        self._registry.close_run(self._key, status, summary, files, str(self._settings["name"]), description)

    def _send_rows(self, stage: StageName) -> None:
        """Those that a checkpoint holds: what comes after it may be trained again."""
        folder = storage.join(self._out, stage)
        rows = Checkpoints(checkpoint_folder(folder)).rows()
        if not rows:
            return
        attempt = _named(storage.join(checkpoint_folder(folder), ATTEMPT_NAME), "attempt")
        new = [row for row in rows if row["step"] > self._steps.get(attempt, 0)]
        if new:
            self._registry.record_rows(
                StageRows(
                    run_name=str(self._settings["name"]),
                    run_key=self._key,
                    stage=stage,
                    attempt=attempt,
                    config=self._settings_of(stage),
                    rows=new,
                    steps_before=self._steps_before,
                )
            )
            self._steps[attempt] = int(new[-1]["step"])

    def _record(self, outcome: StageOutcome, attempt: str) -> StageRecord:
        folder = resolve_part(self._out, outcome.stage)
        _refuse_links_out(folder, [f"model/{name}" for name in (WEIGHTS, CARD, CALIBRATION)])
        return StageRecord(
            run_name=str(self._settings["name"]),
            run_key=self._key,
            stage=outcome.stage,
            attempt=attempt,
            config=self._settings_of(outcome.stage),
            rows=storage.read_json(storage.join(folder, "result.json"), StageResult)["history"],
            model_dir=storage.join(folder, "model"),
            summary=outcome.summary,
            tags=outcome.tags,
            lineage=outcome.lineage.model_dump(mode="json"),
            steps_before=self._steps_before,
        )

    def _settings_of(self, stage: StageName) -> dict[str, Any]:
        config: Config = storage.shaped(self._settings, Config, storage.join(self._out, CONFIG_NAME))
        return config.for_stage(stage).model_dump(mode="json")


def describe(results: Mapping[str, Any]) -> str:
    """A run in a few words, as Markdown: its best score, those of the stages, and whether the unlabelled images paid."""
    stages = results["stages"]
    best = best_stage(stages)
    others = ", ".join(f"{stage} {values['mean_iou']:.3f}" for stage, values in stages.items())
    text = f"**mean IoU {stages[best]['mean_iou']:.3f}** by {best} on validation images ({others})"
    return "\n\n".join(filter(None, [text, verdict_text(results)]))


class RunSync:
    """Keeps MLflow up with a run that goes on; nothing waits for it. `notified`: whether there was anything to send.

    `registry` is None where it did not answer yet. `warn` is called from a thread, once each time that MLflow is lost.
    """

    def __init__(
        self, out: str, settings: Mapping[str, Any], where: RegistrySettings, registry: Registry | None, warn: Warn
    ) -> None:
        self._out, self._settings, self._where, self._warn = out, settings, where, warn
        self._sender = None if registry is None else Sender(registry, out, settings)
        self.notified = False
        self._abandoned = False
        self._background = Background("run-mirror", self._send, self._say_lost, BETWEEN_S, RETRY_S)

    def notify(self) -> None:
        """There may be something new in the run's folder; returns at once."""
        self.notified = True
        self._background.notify()

    def close(self, status: Status) -> list[RegisteredVersion]:
        """Send what is left and end the run. Returns the versions; where MLflow does not answer, a warning says how the
        rest can be sent."""
        try:
            self._background.close(lambda: self._finish(status), STOPPED_S if status == "KILLED" else END_S)
        except Exception as error:
            self._warn(
                f"the run is not all in MLflow: {reason_of(error)}; `threestage sync {self._out}` sends the rest"
            )
        return [] if self._sender is None else list(self._sender.versions.values())

    def abandon(self) -> None:
        """Send nothing more: the run is another driver's."""
        self._abandoned = True

    def _finish(self, status: Status) -> None:
        self._send()
        self._connected().finish(status)

    def _connected(self) -> Sender:
        if self._sender is None:
            self._sender = Sender(open_registry(self._where), self._out, self._settings)
        return self._sender

    def _send(self) -> None:
        if not self._abandoned:
            self._connected().send()

    def _say_lost(self, error: Exception) -> None:
        self._warn(f"the run continues without MLflow and retries: {reason_of(error)}")


def sync(run: str, tracking_uri: str | None = None, warn: Warn = print) -> list[RegisteredVersion]:
    """Send what a run's folder holds and MLflow does not: of a run that MLflow did not see the end of, or of a local one.

    `tracking_uri`: another store than the run's. Returns the versions of its stages. InputError where the folder holds no
    run or one that goes on, and when MLflow does not answer.
    """
    out = storage.absolute(run)
    uri = storage.join(out, CONFIG_NAME)
    if not storage.exists(uri):
        raise InputError(
            f"{run}: holds no {CONFIG_NAME}, so it is no run, or one that has not begun to train", "run/no-run"
        )
    settings = {"name": out.rsplit("/", 1)[-1], **storage.read_json(uri, RunSettings)}
    if not is_marked(out, RUN):
        raise InputError(
            f"{run}: has a {CONFIG_NAME} and no split.json of a run; give the --out of a run", "data/foreign-folder"
        )
    reserve_variables()
    with lease.held(out, warn):
        sender = Sender(open_registry(registry_of(settings, tracking_uri, uri)), out, settings)
        sender.send()
        sender.finish("FINISHED" if sender.complete else "KILLED")  # nobody drives it: the lease is ours
    return list(sender.versions.values())


def registry_of(settings: Mapping[str, Any], tracking_uri: str | None, file: str) -> RegistrySettings:
    """Where a run was recorded, from `settings`, which `file` (config.json) holds; `tracking_uri` instead, if it is given.

    A password was left out of config.json: MLFLOW_TRACKING_URI counts, where it names the same store with one.
    """
    where: RegistrySettings = storage.shaped(settings.get("registry") or {}, RegistrySettings, file)
    here = resolve_uri(None)
    if tracking_uri is None and where.tracking_uri == redact(here):
        tracking_uri = here
    if tracking_uri is None:
        return where.with_host_from(file)
    return where.model_copy(update={"tracking_uri": tracking_uri})


def _outcome(out: str, stage: StageName) -> tuple[StageOutcome, str] | None:
    """The record of a stage that is finished and was not trained again since, and which training of it that was.

    Raises InputError where the stage is another run's, which has lost it or trained it again.
    """
    uri, folder = storage.join(out, RECORD, f"{stage}.json"), resolve_part(out, stage)
    if not storage.exists(uri):
        return None
    saved, marker = storage.read_json(uri, _Recorded), storage.join(folder, "done.json")
    if storage.exists(marker) and storage.read_json(marker, StageMarker)["model_digest"] == saved.lineage.model_digest:
        return saved, saved.attempt
    if stage in parts_elsewhere(out):
        raise InputError(
            f"{folder}: {out} reuses it, and it is gone or was trained again; bring it back", "run/reused-gone"
        )
    return None


def _refuse_links_out(folder: str, sent: Iterable[str]) -> None:
    """Whoever made the run's folder must not choose which other file is sent."""
    if not storage.is_s3(folder):
        for name in sent:
            safe_walk.refuse_link_out(folder, name)


def _attempt(folder: str) -> str | None:
    uri = storage.join(checkpoint_folder(folder), ATTEMPT_NAME)
    return str(storage.read_value(uri, "attempt", str)) if storage.exists(uri) else None


def _named(uri: str, key: str) -> str:
    """A name that lasts: made once, then read."""
    if not storage.exists(uri):
        storage.write_json(uri, {key: uuid.uuid4().hex})
    return str(storage.read_value(uri, key, str))
