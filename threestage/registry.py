"""MLflow: runs, metrics, model versions, aliases and pulling. The only `import mlflow` beside packed_model.py.

The run's storage is the record; the tracking store is a mirror that can be filled again. So every call here finds what
an earlier one left, completes it and repeats nothing, and an unreachable store is an InputError within seconds.
"""

import hashlib
import importlib.metadata
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import Field

import threestage
from threestage.errors import InputError
from threestage.settings import Settings
from threestage.tracking import (
    TRANSFER_S,
    MetricPoint,
    clean_tags,
    flatten,
    key_of,
    metric_points,
    model_name_of,
    quoted,
    redact,
    redact_tree,
    resolve_uri,
    sqlite_path,
    talking_to,
)

WEIGHTS, CARD = "model.safetensors", "model.json"
PACKED_FOLDER = "model"
RUN_KEY, STAGE, DIGEST, COMPLETE = (f"threestage.{key}" for key in ("run_key", "stage", "model_digest", "complete"))
TRIAL = "threestage.trial"
WHOLE_RUN, ONE_TRIAL = "run", "trial"
MEAN_IOU = "mean_iou"
METRICS_PER_CALL, PARAMS_PER_CALL, DATA_DIGEST_LENGTH = 1000, 100, 36

Status = Literal["FINISHED", "FAILED", "KILLED"]
TrialStatus = Status | Literal["SCHEDULED", "RUNNING"]


class RegistrySettings(Settings):
    """Where runs and models are recorded."""

    tracking_uri: str | None = None
    """null: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db in the current folder, which `mlflow ui` there shows."""
    experiment: str = "threestage"
    model_name: str | None = Field(default=None, pattern=r"^[^/:@]+$")
    """Of the registered model; null: the run's name."""


@dataclass(frozen=True)
class StageRecord:
    """All that is recorded of one finished stage."""

    run_name: str
    run_key: str  # names the run's folder for ever: the same key is the same run
    stage: str  # stage1 | stage2 | stage3
    config: Mapping[str, Any]
    model_dir: str  # URI of a folder with model.safetensors and model.json
    metrics: Sequence[Mapping[str, float]]  # rows of "step" and values, in order
    summary: Mapping[str, float]
    tags: Mapping[str, str]


@dataclass(frozen=True)
class TrialRecord:
    """All that is recorded of one trial of a sweep."""

    sweep_key: str  # names the sweep's folder for ever
    sweep_name: str
    number: int
    params: Mapping[str, Any]  # dotted keys
    curve: Sequence[tuple[int, float]]  # (step, mean IoU in [0,1]), rising steps
    tags: Mapping[str, str]
    status: TrialStatus


@dataclass(frozen=True)
class RegisteredVersion:
    name: str
    version: int
    run_id: str
    alias: str


# ---- Models as folders


def _read_model(folder: str) -> dict[str, bytes]:
    from threestage.data import storage

    try:
        return {name: storage.read_bytes(storage.join(folder, name)) for name in (WEIGHTS, CARD)}
    except FileNotFoundError as error:
        raise InputError(f"{folder} is no model folder: it must hold {WEIGHTS} and {CARD}") from error


def pack_model(files: Mapping[str, bytes], destination: Path) -> None:
    """Write an MLflow model at `destination`: packed_model.py as its code, `files` as its artifact "model"."""
    import mlflow.pyfunc
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    images = Schema([TensorSpec(np.dtype("uint8"), (-1, -1, -1, 3))])
    class_ids = Schema([TensorSpec(np.dtype("uint8"), (-1, -1, -1))])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, PACKED_FOLDER)
        folder.mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)
        mlflow.pyfunc.save_model(
            path=str(destination),
            python_model=str(Path(__file__).with_name("packed_model.py")),
            artifacts={"model": str(folder)},
            pip_requirements=_requirements(),
            signature=ModelSignature(inputs=images, outputs=class_ids),
        )


def _requirements() -> list[str]:
    """What the packed script imports, at this environment's versions; given, MLflow need not run it to find out."""
    pins = [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in ("mlflow", "torch", "timm")]
    return [*pins, f"threestage=={threestage.__version__}"]


# ---- The registry


def open_registry(settings: RegistrySettings) -> "Registry":
    """Connect, and create or migrate the store and the experiment: call it once, on the driver, before workers start.

    A sqlite store keeps its artifacts in `mlartifacts` beside it. Raises InputError, naming the URI, within seconds
    when the store does not answer.
    """
    uri = resolve_uri(settings.tracking_uri)
    path = sqlite_path(uri)
    location = None if path is None else (path.parent / "mlartifacts").as_uri()
    with talking_to(uri):
        from mlflow import MlflowClient
    with talking_to(uri):  # again: the import has set the levels of MLflow's loggers
        client = MlflowClient(uri, registry_uri=uri)
        experiment_id = _experiment_id(client, settings.experiment, location)
    return Registry(uri, client, experiment_id, settings.model_name)


def _experiment_id(client: Any, name: str, artifact_location: str | None) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifact_location))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)
    if found.lifecycle_stage != "active":
        raise InputError(f"registry.experiment={name} was deleted in MLflow: restore it there or choose another name")
    return str(found.experiment_id)


class Registry:
    """The mirror of runs in one experiment of one store. Every method may raise InputError, like open_registry."""

    def __init__(self, uri: str, client: Any, experiment_id: str, model_name: str | None) -> None:
        self.uri = uri
        self._client = client
        self._experiment_id = experiment_id
        self._model_name = model_name

    def record_stage(self, record: StageRecord) -> RegisteredVersion:
        """Record a stage as a run nested in its parent, and register its model with the stage's name as alias.

        Idempotent: the same record again changes nothing, and completes what a killed call left. A stage that was
        trained again (other weights) gets a run and a version of its own.
        """
        record = replace(record, run_key=redact(record.run_key))
        files = _read_model(record.model_dir)
        digest = hashlib.sha256(files[WEIGHTS]).hexdigest()
        name = self._model_name or model_name_of(record.run_name)
        with talking_to(self.uri):
            run = self._stage_run(record, digest)
            version = self._version_of(run.info.run_id, name)
            if version is None or COMPLETE not in run.data.tags:
                self._describe(run, record)
        if version is None or COMPLETE not in run.data.tags:
            with talking_to(self.uri, TRANSFER_S):
                version = version or self._register(run, name, record, digest, files)
                self._complete(run.info.run_id, name, version, record.stage)
        return RegisteredVersion(name, version, run.info.run_id, record.stage)

    def open_sweep(self, sweep_key: str, sweep_name: str, params: Mapping[str, Any]) -> str:
        """Begin a sweep's parent run, or go on with it; close_run ends it. Returns its id. Idempotent."""
        with talking_to(self.uri):
            run = self._parent_run(redact(sweep_key), sweep_name)
            self._log_params(run, params)
            self._set_status(run, "RUNNING")
        return str(run.info.run_id)

    def record_trial(self, parent_id: str, record: TrialRecord) -> str:
        """Bring a trial's run, nested in its sweep's, up to the record; sends what is new only. Returns its id."""
        identity = {RUN_KEY: redact(record.sweep_key), STAGE: ONE_TRIAL, TRIAL: str(record.number)}
        with talking_to(self.uri):
            extra = {"mlflow.parentRunId": parent_id}
            run = self._find_or_create(identity, extra, f"{record.sweep_name}-trial-{record.number}")
            self._log_params(run, record.params)
            self._set_tags(run, record.tags)
            self._log_curve(run, record.curve)
            self._set_status(run, record.status)
        return str(run.info.run_id)

    def close_run(
        self, run_key: str, status: Status, summary: Mapping[str, float], artifacts: Mapping[str, str] | None = None
    ) -> str:
        """End the parent run: its final values, and files (name in the run → URI). Returns its id. Idempotent."""
        from threestage.data import storage

        contents = {name: storage.read_bytes(uri) for name, uri in (artifacts or {}).items()}
        with talking_to(self.uri, TRANSFER_S):
            run = self._parent_run(redact(run_key), None)
            run_id = run.info.run_id
            finals = {key_of(key): float(value) for key, value in summary.items()}
            changed = {key: value for key, value in finals.items() if repr(run.data.metrics.get(key)) != repr(value)}
            self._log_metrics(run_id, [(key, value, 0, 0) for key, value in changed.items()], _now_ms())
            for name, data in contents.items():
                self._log_file(run_id, name, data)
            self._client.set_terminated(run_id, status)
        return str(run_id)

    def list_models(self) -> list[dict[str, Any]]:
        """Every version that threestage registered in this store: by name, then newest first.

        Keys: tracking_uri, name, version, aliases, stage, mean_iou (None where it was not measured), run_id.
        """
        with talking_to(self.uri):
            versions = [version for version in _pages(self._client.search_model_versions) if STAGE in version.tags]
            aliases = {model.name: model.aliases for model in _pages(self._client.search_registered_models)}
        rows = [self._row(version, aliases.get(version.name, {})) for version in versions]
        return sorted(rows, key=lambda row: (row["name"], -row["version"]))

    def pull(self, model_uri: str, destination: str | Path) -> Path:
        """Fetch models:/NAME@ALIAS or models:/NAME/VERSION as a local folder of model.safetensors and model.json.

        InputError when there is no such version, or its weights are not those that were registered.
        """
        wanted = re.fullmatch(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))", model_uri)
        if wanted is None:
            raise InputError(f"{model_uri} names no model: write models:/NAME@stage3 or models:/NAME/3")
        folder = _make_folder(destination)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            with talking_to(self.uri, TRANSFER_S):
                version = self._wanted_version(model_uri, **wanted.groupdict())
                fetched = self._download(version.source, temporary)
            _check_digest(model_uri, fetched / WEIGHTS, version.tags.get(DIGEST))
            for name in (WEIGHTS, CARD):
                os.replace(fetched / name, folder / name)
        return folder

    # ---- Runs

    def _parent_run(self, run_key: str, run_name: str | None) -> Any:
        return self._find_or_create({RUN_KEY: run_key, STAGE: WHOLE_RUN}, {}, run_name or run_key)

    def _stage_run(self, record: StageRecord, digest: str) -> Any:
        parent = self._parent_run(record.run_key, record.run_name)
        self._log_params(parent, record.config)
        identity = {RUN_KEY: record.run_key, STAGE: record.stage, DIGEST: digest}
        extra = {"mlflow.parentRunId": parent.info.run_id}
        return self._find_or_create(identity, extra, f"{record.run_name}-{record.stage}")

    def _find_or_create(self, identity: Mapping[str, str], extra: Mapping[str, str], run_name: str) -> Any:
        """The run with these tags; of several (a create call was answered late, and repeated) the complete one."""
        conditions = " and ".join(f"tags.`{key}` = {quoted(value)}" for key, value in identity.items())
        found = self._client.search_runs([self._experiment_id], conditions, order_by=["attributes.start_time ASC"])
        if found:
            return min(found, key=lambda run: COMPLETE not in run.data.tags)
        tags = {**identity, **extra, "threestage.version": threestage.__version__}
        return self._client.create_run(self._experiment_id, tags=tags, run_name=run_name)

    def _describe(self, run: Any, record: StageRecord) -> None:
        """Config, tags, data set and metrics of a stage's run.

        A point's timestamp is the run's start plus its row's number in milliseconds: the store drops a point that an
        earlier, killed call has logged.
        """
        from mlflow.entities import RunTag

        run_id = run.info.run_id
        self._log_params(run, record.config)
        self._client.log_batch(run_id, tags=[RunTag(key, value) for key, value in clean_tags(record.tags).items()])
        self._log_file(run_id, "config.yaml", _yaml(record.config))
        self._log_data_set(run_id, record)
        self._log_metrics(run_id, metric_points(record.metrics, record.summary), run.info.start_time)

    def _log_params(self, run: Any, config: Mapping[str, Any]) -> None:
        """A param cannot change: one that an earlier call logged keeps its value (config.yaml has the present one)."""
        from mlflow.entities import Param

        params = [Param(key, value) for key, value in flatten(config).items() if key not in run.data.params]
        for start in range(0, len(params), PARAMS_PER_CALL):
            self._client.log_batch(run.info.run_id, params=params[start : start + PARAMS_PER_CALL])

    def _log_metrics(self, run_id: str, points: Sequence[MetricPoint], start_ms: int) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(key, value, start_ms + order, step) for key, value, step, order in points]
        for start in range(0, len(metrics), METRICS_PER_CALL):
            self._client.log_batch(run_id, metrics=metrics[start : start + METRICS_PER_CALL])

    def _set_tags(self, run: Any, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        new = [RunTag(key, value) for key, value in clean_tags(tags).items() if run.data.tags.get(key) != value]
        if new:
            self._client.log_batch(run.info.run_id, tags=new)

    def _log_curve(self, run: Any, curve: Sequence[tuple[int, float]]) -> None:
        run_id = run.info.run_id
        history = self._client.get_metric_history(run_id, MEAN_IOU) if MEAN_IOU in run.data.metrics else []
        known = {(point.step, point.value) for point in history}
        points = [(MEAN_IOU, value, step, order) for order, (step, value) in enumerate(curve)]
        self._log_metrics(run_id, [point for point in points if (point[2], point[1]) not in known], run.info.start_time)

    def _set_status(self, run: Any, status: TrialStatus) -> None:
        if run.info.status == status:
            return
        if status in get_args(Status):
            self._client.set_terminated(run.info.run_id, status)
        else:
            self._client.update_run(run.info.run_id, status)

    def _log_data_set(self, run_id: str, record: StageRecord) -> None:
        from mlflow.entities import Dataset, DatasetInput

        digest = record.tags.get("data_digest")
        if digest:
            root = redact(str(dict(record.config.get("data") or {}).get("root", "")))
            data_set = Dataset(
                name=root.rstrip("/").rpartition("/")[2] or "data",
                digest=digest[:DATA_DIGEST_LENGTH],
                source_type="threestage",
                source=json.dumps({"uri": root}),
            )
            self._client.log_inputs(run_id, [DatasetInput(data_set, [])])

    def _log_file(self, run_id: str, name: str, data: bytes) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            self._client.log_artifacts(run_id, temporary)

    # ---- Versions

    def _version_of(self, run_id: str, name: str) -> int | None:
        found = self._client.search_model_versions(f"run_id = '{run_id}'")
        return min((int(version.version) for version in found if version.name == name), default=None)

    def _register(self, run: Any, name: str, record: StageRecord, digest: str, files: Mapping[str, bytes]) -> int:
        from mlflow.exceptions import MlflowException

        with tempfile.TemporaryDirectory() as temporary:
            pack_model(files, Path(temporary, "packed"))
            self._client.log_artifacts(run.info.run_id, str(Path(temporary, "packed")), PACKED_FOLDER)
        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        tags = clean_tags(record.tags) | {RUN_KEY: record.run_key, STAGE: record.stage, DIGEST: digest}
        if MEAN_IOU in record.summary:
            tags[MEAN_IOU] = repr(float(record.summary[MEAN_IOU]))
        source = f"{run.info.artifact_uri}/{PACKED_FOLDER}"
        return int(self._client.create_model_version(name, source, run.info.run_id, tags=tags).version)

    def _complete(self, run_id: str, name: str, version: int, alias: str) -> None:
        self._client.set_registered_model_alias(name, alias, str(version))
        self._client.set_terminated(run_id, "FINISHED")
        self._client.set_tag(run_id, COMPLETE, "true")

    def _row(self, version: Any, aliases: Mapping[str, str]) -> dict[str, Any]:
        return {
            "tracking_uri": redact(self.uri),
            "name": version.name,
            "version": int(version.version),
            "aliases": sorted(alias for alias, number in aliases.items() if int(number) == int(version.version)),
            "stage": version.tags[STAGE],
            "mean_iou": float(version.tags[MEAN_IOU]) if MEAN_IOU in version.tags else None,
            "run_id": version.run_id,
        }

    def _wanted_version(self, model_uri: str, name: str, alias: str | None, version: str | None) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            if alias is not None:
                return self._client.get_model_version_by_alias(name, alias)
            return self._client.get_model_version(name, version)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise InputError(f"{model_uri} is not in {redact(self.uri)}: `threestage models` lists what is") from error

    def _download(self, source: str, destination: str) -> Path:
        from mlflow.artifacts import download_artifacts

        packed = f"{source}/artifacts/{PACKED_FOLDER}"
        return Path(download_artifacts(artifact_uri=packed, dst_path=destination, tracking_uri=self.uri))


def _pages(search: Callable[..., Any]) -> Iterator[Any]:
    page = search()
    yield from page
    while page.token:
        page = search(page_token=page.token)
        yield from page


def _make_folder(destination: str | Path) -> Path:
    try:
        Path(destination).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{destination} cannot be made a folder ({error.strerror}): name another") from error
    return Path(destination)


def _check_digest(model_uri: str, weights: Path, expected: str | None) -> None:
    if not weights.exists() or (expected and hashlib.sha256(weights.read_bytes()).hexdigest() != expected):
        raise InputError(
            f"{model_uri}: {WEIGHTS} is missing or is not what was registered: register the run's model again"
        )


def _yaml(config: Mapping[str, Any]) -> bytes:
    return yaml.safe_dump(redact_tree(config), sort_keys=False, allow_unicode=True).encode()


def _now_ms() -> int:
    return int(time.time() * 1000)
