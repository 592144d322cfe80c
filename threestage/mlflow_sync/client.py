"""Runs in MLflow: the stages of a run and the trials of a sweep, each nested in a parent, found again by their tags.

MLflow's asynchronous logging is not used: it drops a batch that a server did not take (3.17), and after an outage all must be
there once. So whatever is not known to be there is sent again, and the store drops a point that it has.
"""

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import yaml

import threestage
from threestage.errors import InputError
from threestage.hosts import refuse_foreign_source
from threestage.mlflow_sync.connection import (
    CONNECT_S,
    TRANSFER_S,
    MetricPoint,
    clean_tags,
    confirmed_uri,
    key_of,
    metric_points,
    mlflow_session,
    model_name_of,
    params_of,
    quietly,
    quoted,
    redact,
    redact_tree,
    shortened,
    sqlite_path,
)
from threestage.mlflow_sync.model_registry import (
    COMPLETE,
    DIGEST,
    NO_PROGRAM,
    PACKED_FOLDER,
    RUN_KEY,
    STAGE,
    WEIGHTS,
    Models,
    file_tags,
    read_model_folder,
    readable_tags,
)
from threestage.mlflow_sync.promotion import DECISION, MEAN_IOU
from threestage.mlflow_sync.records import (
    RegisteredVersion,
    RegistrySettings,
    StageRecord,
    StageRows,
    Status,
    TrialRecord,
    TrialStatus,
)

ATTEMPT, TRIAL = "threestage.attempt", "threestage.trial"
WHOLE_RUN, ONE_TRIAL = "run", "trial"
DESCRIPTION = "mlflow.note.content"
CURVES = (MEAN_IOU, "supervised_loss", "consistency_loss", "pseudo_mask_loss")  # of a run, over the steps of all stages
KIND = {"mlflow.experimentKind": "custom_model_development"}  # the pages for training runs, not those for GenAI
PER_CALL = {"params": 100, "tags": 100, "metrics": 1000}  # what MLflow takes in one call
DATA_DIGEST_LENGTH, MAX_DESCRIPTION = 36, 5000


def open_registry(settings: RegistrySettings) -> "Registry":
    """Connect, and create or migrate the store and the experiment: call it once, on the driver, before workers start.

    A sqlite store keeps its artifacts in `mlartifacts` beside it. Raises InputError, naming the URI, within seconds
    when the store does not answer.
    """
    uri = confirmed_uri(settings.tracking_uri, settings.host_from)
    path = sqlite_path(uri)
    location = None if path is None else (path.parent / "mlartifacts").as_uri()
    client = _client(uri)
    with mlflow_session(uri, CONNECT_S):
        experiment_id = _experiment_id(client, uri, settings.experiment, location)
    return Registry(uri, client, experiment_id, settings)


def open_models(settings: RegistrySettings) -> Models:
    """Connect to what is registered, to read it: nothing is created. Raises InputError like open_registry, and where a
    sqlite store is not there."""
    uri = confirmed_uri(settings.tracking_uri, settings.host_from)
    path = sqlite_path(uri)
    if path is not None and not path.exists():
        raise InputError(
            f"tracking store {uri}: there is none; name yours with --tracking-uri or MLFLOW_TRACKING_URI",
            "mlflow/no-store",
        )
    return Models(uri, _client(uri), settings.experiment)


def _client(uri: str) -> Any:
    with mlflow_session(uri, CONNECT_S):
        from mlflow import MlflowClient
    with mlflow_session(uri, CONNECT_S):  # again: the import has set the levels of MLflow's loggers
        return MlflowClient(uri, registry_uri=uri)


def _experiment_id(client: Any, uri: str, name: str, artifact_location: str | None) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifact_location, tags=KIND))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)
    location = found.artifact_location
    refuse_foreign_source(f"registry.experiment={name}", location, uri, lambda: [location])
    if found.lifecycle_stage != "active":
        raise InputError(
            f"registry.experiment={name}: was deleted in MLflow; restore it there, or choose another name",
            "mlflow/deleted-experiment",
        )
    return str(found.experiment_id)


class _Experiment:
    """The runs of one experiment: found or made, and what is logged in them."""

    def __init__(self, client: Any, experiment_id: str) -> None:
        self._client, self._experiment_id = client, experiment_id

    def _find_or_create(
        self,
        identity: Mapping[str, str],
        parent: str | None,
        run_name: str,
        fits: Callable[[Any], bool] = lambda run: True,
    ) -> Any:
        """The run with these tags; of several (a create call was answered late, and repeated) the complete one."""
        conditions = " and ".join(f"tags.`{key}` = {quoted(value)}" for key, value in identity.items())
        found = self._client.search_runs([self._experiment_id], conditions, order_by=["attributes.start_time ASC"])
        fitting = [run for run in found if fits(run)]
        if fitting:
            return min(fitting, key=lambda run: COMPLETE not in run.data.tags)
        nested = {} if parent is None else {"mlflow.parentRunId": parent}
        tags = {**identity, **nested, "threestage.version": threestage.__version__}
        return self._client.create_run(self._experiment_id, tags=tags, run_name=run_name)

    def _log(
        self,
        run: Any,
        config: Mapping[str, Any] = {},
        tags: Mapping[str, Any] = {},
        points: Sequence[MetricPoint] = (),
    ) -> None:
        """Params, tags and metrics that the run has not. A param cannot change: one that an earlier call logged keeps its value
        (config.yaml has the present one). A point's time is the run's start plus its milliseconds, whenever it is sent."""
        from mlflow.entities import Metric, Param, RunTag

        there, start = run.data, run.info.start_time
        entities: dict[str, list[Any]] = {
            "params": [Param(key, value) for key, value in params_of(config).items() if key not in there.params],
            "tags": [RunTag(key, value) for key, value in clean_tags(tags).items() if there.tags.get(key) != value],
            "metrics": [Metric(key, value, start + order, step) for key, value, step, order in points],
        }
        for kind, found in entities.items():
            for first in range(0, len(found), PER_CALL[kind]):
                self._client.log_batch(run.info.run_id, **{kind: found[first : first + PER_CALL[kind]]})

    def _set_status(self, run: Any, status: TrialStatus) -> None:
        if run.info.status == status:
            return
        if status in get_args(Status):
            self._client.set_terminated(run.info.run_id, status)
        else:
            self._client.update_run(run.info.run_id, status)

    def _end_stages(self, parent_id: str, status: Status) -> None:
        """Stages that still run: they ended with the run, or, in one that is finished, were given up and trained anew."""
        nested = f"tags.`mlflow.parentRunId` = '{parent_id}' and tags.`{STAGE}` LIKE 'stage%'"
        for run in self._client.search_runs([self._experiment_id], f"{nested} and attributes.status = 'RUNNING'"):
            self._client.set_terminated(run.info.run_id, "KILLED" if status == "FINISHED" else status)


class Registry(_Experiment):
    """The mirror of runs in one experiment of one store. Every method may raise InputError, like open_registry."""

    def __init__(self, uri: str, client: Any, experiment_id: str, settings: RegistrySettings) -> None:
        self.uri = uri
        self.models = Models(uri, client, settings.experiment)
        super().__init__(client, experiment_id)
        self._model_name, self._settings = settings.model_name, settings

    def record_rows(self, stage: StageRows) -> None:
        """Send rows of a stage that still trains to its run, nested in its parent. A row that is there changes nothing."""
        stage = replace(stage, run_key=redact(stage.run_key))
        with mlflow_session(self.uri):
            parent = self._open_parent(stage)
            self._set_status(parent, "RUNNING")
            run = self._stage_run(parent, stage, None)
            self._set_status(run, "RUNNING")
            self._log(run, stage.config, points=metric_points(stage.rows, {}))

    def record_stage(self, record: StageRecord) -> RegisteredVersion:
        """Record a finished stage as a run nested in its parent, and register its model with the stage's name as alias.

        Idempotent: the same record again changes nothing, and completes what a killed call left. A stage that was
        trained again gets a run and a version of its own.
        """
        record = replace(record, run_key=redact(record.run_key))
        files = read_model_folder(record.model_dir)
        digest = hashlib.sha256(files[WEIGHTS]).hexdigest()
        if digest != record.lineage["model_digest"]:
            raise InputError(
                f"{record.model_dir}: its weights are not those that {record.stage} of this run ended with; "
                "put them back, or run again with another --out",
                "models/changed-file",
            )
        name = self._model_name or model_name_of(record.run_name)
        with mlflow_session(self.uri):
            parent = self._open_parent(record)
            run = self._stage_run(parent, record, digest)
            version = self.models.version_of_run(run.info.run_id, name)
            if version is not None and COMPLETE in run.data.tags:
                return _registered(version, record.stage, version.tags.get(DECISION, ""))
            self._describe(run, parent, record, digest)
        if version is None:
            version = self._register(run, name, record, digest, files)
        with mlflow_session(self.uri):
            decision = self.models.set_aliases(version, record.stage, self._settings)
            self._client.set_terminated(run.info.run_id, "FINISHED")
            self._client.set_tag(run.info.run_id, COMPLETE, "true")
        return _registered(version, record.stage, decision)

    def open_sweep(self, sweep_key: str, sweep_name: str, params: Mapping[str, Any]) -> str:
        """Begin a sweep's parent run, or go on with it; close_run ends it. Returns its id. Idempotent."""
        with mlflow_session(self.uri):
            run = self._parent_run(redact(sweep_key), sweep_name)
            self._log(run, params)
            self._set_status(run, "RUNNING")
        return str(run.info.run_id)

    def record_trial(self, parent_id: str, record: TrialRecord) -> None:
        """Bring a trial's run, nested in its sweep's, up to the record."""
        identity = {RUN_KEY: redact(record.sweep_key), STAGE: ONE_TRIAL, TRIAL: str(record.number)}
        with mlflow_session(self.uri):
            run = self._find_or_create(identity, parent_id, f"{record.sweep_name}-trial-{record.number}")
            points = [(MEAN_IOU, value, step, order) for order, (step, value) in enumerate(record.curve)]
            self._log(run, record.params, record.tags, points)
            self._set_status(run, record.status)

    def close_run(
        self,
        run_key: str,
        status: Status,
        summary: Mapping[str, float],
        artifacts: Mapping[str, str] | None = None,
        run_name: str | None = None,
        description: str | None = None,
    ) -> str:
        """End the parent run: its final values, description and files (name in the run → URI). Returns its id. Idempotent."""
        from threestage.data import storage

        with tempfile.TemporaryDirectory() as temporary:
            for name, uri in (artifacts or {}).items():
                path = Path(temporary, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(storage.read_bytes(uri))
            with mlflow_session(self.uri, TRANSFER_S):
                run = self._parent_run(redact(run_key), run_name)
                finals = {key_of(key): float(value) for key, value in summary.items()}
                changed = [key for key, value in finals.items() if repr(run.data.metrics.get(key)) != repr(value)]
                now = int(time.time() * 1000) - run.info.start_time
                tags = {} if description is None else {DESCRIPTION: description}
                self._log(run, tags=tags, points=[(key, finals[key], 0, now) for key in changed])
                if artifacts:
                    self._client.log_artifacts(run.info.run_id, temporary)
                self._end_stages(run.info.run_id, status)
                self._client.set_terminated(run.info.run_id, status)
        return str(run.info.run_id)

    # ---- Runs

    def _parent_run(self, run_key: str, run_name: str | None) -> Any:
        return self._find_or_create({RUN_KEY: run_key, STAGE: WHOLE_RUN}, None, run_name or run_key)

    def _open_parent(self, stage: StageRows) -> Any:
        parent = self._parent_run(stage.run_key, stage.run_name)
        before = stage.steps_before
        rows = [{key: value for key, value in row.items() if key in ("step", *CURVES)} for row in stage.rows]
        moved = [(key, value, before + step, before + order) for key, value, step, order in metric_points(rows, {})]
        self._log(parent, stage.config, points=moved)
        return parent

    def _stage_run(self, parent: Any, stage: StageRows, digest: str | None) -> Any:
        """The run of one training of a stage: `digest` of its weights, None as long as it has none."""
        identity = {RUN_KEY: stage.run_key, STAGE: stage.stage, ATTEMPT: stage.attempt}
        return self._find_or_create(
            identity,
            parent.info.run_id,
            f"{stage.run_name}-{stage.stage}",
            lambda run: run.data.tags.get(DIGEST) in (None, digest),
        )

    def _describe(self, run: Any, parent: Any, record: StageRecord, digest: str) -> None:
        """Config, description, tags, data set and metrics of a stage's run; the data set of its parent."""
        run_id, config = run.info.run_id, redact_tree(record.config)
        self._client.set_tag(run_id, DIGEST, digest)
        data = record.lineage["data"]
        tags = readable_tags(record) | {"data": f"{data['name']}, version {data['version']}"}
        if MEAN_IOU in record.summary:
            validation = record.lineage["validation"]
            on = f"{validation['images']} images of {validation['name']}"
            tags[DESCRIPTION] = f"**mean IoU {record.summary[MEAN_IOU]:.3f}** on {on}, after the last step"
        self._log(run, record.config, tags, metric_points(record.rows, record.summary))
        self._client.log_text(run_id, yaml.safe_dump(config, sort_keys=False, allow_unicode=True), "config.yaml")
        self._client.log_text(run_id, json.dumps(redact_tree(record.lineage), indent=1), "lineage.json")
        if data_set := _data_set(config, record.tags.get("data_digest")):
            for described in (run_id, parent.info.run_id):
                self._client.log_inputs(described, [data_set])

    def _register(self, run: Any, name: str, record: StageRecord, digest: str, files: Mapping[str, bytes]) -> Any:
        from threestage.mlflow_sync.packing import model_card_of, pack_model

        with tempfile.TemporaryDirectory() as temporary:
            packed = Path(temporary, "packed")
            with quietly():
                contents = pack_model(files, packed, record, name)
            with mlflow_session(self.uri, TRANSFER_S):
                self._client.log_artifacts(run.info.run_id, str(packed), PACKED_FOLDER)
                source = f"{run.info.artifact_uri}/{PACKED_FOLDER}"
                description = shortened(model_card_of(packed), MAX_DESCRIPTION)
                tags = file_tags(digest, *contents)
                return self.models.create(name, source, run.info.run_id, record, tags, description)


def _registered(version: Any, alias: str, decision: str) -> RegisteredVersion:
    no_program = version.tags.get(NO_PROGRAM)
    return RegisteredVersion(version.name, int(version.version), version.run_id, alias, decision, no_program)


def _data_set(config: Mapping[str, Any], digest: str | None) -> Any:
    """As an input of a run; None without its digest."""
    from mlflow.entities import Dataset, DatasetInput

    if not digest:
        return None
    root = str(dict(config.get("data") or {}).get("root", ""))
    name, source = root.rstrip("/").rpartition("/")[2] or "data", json.dumps({"uri": root})
    return DatasetInput(Dataset(name, digest[:DATA_DIGEST_LENGTH], "threestage", source), [])
