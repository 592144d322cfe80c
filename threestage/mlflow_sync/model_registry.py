"""Registered versions: listing, pulling, aliases, the champion, and the way from a version to its teachers and pupils."""

import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from threestage.errors import InputError, Warn, did_you_mean
from threestage.hosts import refuse_foreign_source
from threestage.mlflow_sync.connection import (
    MAX_PARAM,
    MAX_TAG,
    TRANSFER_S,
    clean_tags,
    mlflow_session,
    quoted,
    redact,
    redact_tree,
    shortened,
)
from threestage.mlflow_sync.promotion import CHAMPION, DRIFT, MEAN_IOU, VALIDATION, Promotion, score_of
from threestage.mlflow_sync.records import RegistrySettings, StageRecord
from threestage.plain_text import escape_control_chars
from threestage.run_folder.lineage import Lineage

RUN_KEY, STAGE, DIGEST, COMPLETE = (f"threestage.{key}" for key in ("run_key", "stage", "model_digest", "complete"))
LINEAGE, TEACHER = (f"threestage.{key}" for key in ("lineage", "teacher_digest"))
FILES, NO_PROGRAM = "threestage.files", "threestage.no_program"
DETAILS = "threestage.details"
READABLE = ("encoder", "labelled")
PACKED_FOLDER = "model"
IN_PACKED = f"artifacts/{PACKED_FOLDER}/"
WEIGHTS, CARD, CALIBRATION = "model.safetensors", "model.json", "calibration.json"
PROGRAM = "program.pt2"
PULLED = ("lineage.json", WEIGHTS, CARD, CALIBRATION, PROGRAM, "README.md")  # first what marks the folder


def _to_stderr(text: str) -> None:
    print(f"warning: {escape_control_chars(text)}", file=sys.stderr)


class _Lookups:
    """Versions of one store, found by name, alias, tag or lineage."""

    def __init__(self, uri: str, client: Any, experiment: str) -> None:
        self.uri = uri
        self._client = client
        self._experiment = experiment

    def _find(self, model_uri: str) -> Any:
        from mlflow.exceptions import MlflowException

        wanted = re.fullmatch(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))", model_uri)
        if wanted is None:
            raise InputError(
                f"{model_uri}: names no model; write models:/NAME@{CHAMPION} or models:/NAME/3", "mlflow/no-model"
            )
        try:
            if wanted["alias"] is not None:
                return self._client.get_model_version_by_alias(wanted["name"], wanted["alias"])
            return self._client.get_model_version(wanted["name"], wanted["version"])
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            names = {model.name for model in _pages(self._client.search_registered_models)} - {wanted["name"]}
            raise InputError(
                f"{model_uri}: is not in {redact(self.uri)}; `threestage models list` shows what is"
                + did_you_mean(wanted["name"], names),
                "mlflow/no-model",
            ) from error

    def _tagged(self, key: str, value: str) -> list[Any]:
        search = self._client.search_model_versions
        return list(_pages(lambda **page: search(f"tags.`{key}` = {quoted(value)}", **page)))

    def _teacher(self, version: Any) -> dict[str, Any] | None:
        digest = version.tags.get(TEACHER)
        if digest is None or digest == version.tags.get(DIGEST):
            return None
        found = self._tagged(DIGEST, digest)
        if not found:
            return dict(json.loads(version.tags[LINEAGE])["teacher"])
        teacher = min(found, key=lambda other: (other.tags.get(RUN_KEY) != version.tags[RUN_KEY], int(other.version)))
        return self._node(teacher) | {"teacher": self._teacher(teacher)}

    def _descendants(self, version: Any, above: list[str]) -> list[dict[str, Any]]:
        """Those of the version itself in any run; theirs, in their own runs."""
        digest = version.tags.get(DIGEST)
        if digest is None or digest in above:
            return []
        found = self._tagged(TEACHER, digest)
        if above:
            found = [pupil for pupil in found if pupil.tags.get(RUN_KEY) == version.tags.get(RUN_KEY)]
        in_order = sorted(found, key=lambda other: (other.name, int(other.version)))
        return [self._node(pupil) | {"pupils": self._descendants(pupil, [*above, digest])} for pupil in in_order]

    def _node(self, version: Any) -> dict[str, Any]:
        row = self._row(version, self._client.get_registered_model(version.name).aliases)
        return row | {"lineage": json.loads(version.tags[LINEAGE]) if LINEAGE in version.tags else None}

    def _row(self, version: Any, aliases: Mapping[str, str]) -> dict[str, Any]:
        return {
            "tracking_uri": redact(self.uri),
            "name": version.name,
            "version": int(version.version),
            "aliases": sorted(alias for alias, number in aliases.items() if int(number) == int(version.version)),
            "stage": version.tags.get(STAGE),
            "mean_iou": score_of(version),
            "validation": version.tags.get("validation"),
            "run": version.tags.get("run"),
            "run_id": version.run_id,
        }

    def _locations(self) -> list[str]:
        """Where the registry keeps files: of MLflow's default experiment, and of ours."""
        wanted = {"Default", self._experiment}
        found = [self._client.get_experiment_by_name(name) for name in sorted(wanted)]
        return [experiment.artifact_location for experiment in found if experiment is not None]

    def _download(self, source: str, name: str, destination: str) -> Path:
        """One file by its name: a listing of the store's, which may name any path, is not asked for."""
        from mlflow.artifacts import download_artifacts

        file = f"{source}/{IN_PACKED}{name}"
        return Path(download_artifacts(artifact_uri=file, dst_path=destination, tracking_uri=self.uri))


class Models(_Lookups):
    """What is registered in one store. Every method may raise InputError: a store that does not answer, or no such model."""

    def versions(self) -> list[dict[str, Any]]:
        """Every version that threestage registered in this store: by name, then newest first.

        Keys: tracking_uri, name, version, aliases, stage, mean_iou (None where it was not measured), validation, run,
        run_id.
        """
        with mlflow_session(self.uri):
            versions = [version for version in _pages(self._client.search_model_versions) if STAGE in version.tags]
            aliases = {model.name: model.aliases for model in _pages(self._client.search_registered_models)}
        rows = [self._row(version, aliases.get(version.name, {})) for version in versions]
        return sorted(rows, key=lambda row: (row["name"], -row["version"]))

    def pull(self, model_uri: str, destination: str | Path, warn: Warn = _to_stderr, program: bool = False) -> Path:
        """Fetch models:/NAME@ALIAS or models:/NAME/VERSION as a local folder that needs no MLflow (packing.py lists it).

        `program`: with the exported program, which is code. `warn` gets what could not be checked. Raises InputError where
        there is no such version, it has no program, or a file is not the one that was registered.
        """
        folder = _make_folder(destination)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".", suffix=".tmp") as temporary:
            with mlflow_session(self.uri, TRANSFER_S):
                version = self._find(model_uri)
                refuse_foreign_source(model_uri, version.source, self.uri, self._locations)
            digests = _digests_of(version)
            if program and NO_PROGRAM in version.tags:
                raise InputError(
                    f"{model_uri} has no exported program ({version.tags[NO_PROGRAM]}); leave out --program",
                    "models/no-program",
                )
            without = {PROGRAM: not program, CALIBRATION: CALIBRATION not in digests}
            names = [name for name in PULLED if not without.get(name, False)]
            with mlflow_session(self.uri, TRANSFER_S):
                fetched = {name: self._download(version.source, name, temporary) for name in names}
            _check_files(model_uri, fetched, digests)
            if unchecked := sorted(set(fetched) - set(digests)):
                warn(
                    f"{model_uri} was registered by an older threestage, with a digest of its weights alone: nothing shows "
                    f"whether {', '.join(unchecked)} were changed since; register the run's model again to have all checked"
                )
            for name in PULLED:
                if name in fetched:
                    os.replace(fetched[name], folder / name)
                else:
                    (folder / name).unlink(missing_ok=True)  # of an earlier pull: it belongs to other weights
        return folder

    def pinned(self, model_uri: str) -> str:
        """models:/NAME/VERSION of the version that a URI, such as models:/NAME@champion, names now."""
        with mlflow_session(self.uri):
            version = self._find(model_uri)
        return f"models:/{version.name}/{version.version}"

    def promote(self, model_uri: str, approved: bool = False) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Make a version the champion, whatever it scores. Returns its row, and that of the champion before.

        Raises InputError where the project asks for a person's approval and it is not `approved`.
        """
        with mlflow_session(self.uri):
            version = self._find(model_uri)
            before = Promotion(self._client, version.name).promote(version, approved)
            aliases = self._client.get_registered_model(version.name).aliases
        return self._row(version, aliases), None if before is None else self._row(before, aliases)

    def roll_back(self, model_uri: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Make the champion before models:/NAME@champion the champion again. Returns its row, and that of the present one.

        Again: the one before that. Raises InputError where none is recorded.
        """
        with mlflow_session(self.uri):
            name = self._find(model_uri).name
            back, before = Promotion(self._client, name).roll_back()
            aliases = self._client.get_registered_model(name).aliases
        return self._row(back, aliases), self._row(before, aliases)

    def lineage(self, model_uri: str) -> dict[str, Any]:
        """A version's row with its `lineage`, its `teacher` (such a tree again, up to stage 1) and its `pupils` (down to
        stage 3): versions that learnt from what it says of the pool. A teacher that is not registered has no version."""
        with mlflow_session(self.uri):
            version = self._find(model_uri)
            return self._node(version) | {"teacher": self._teacher(version), "pupils": self._descendants(version, [])}

    # ---- Registering, for client.py

    def version_of_run(self, run_id: str, name: str) -> Any:
        """The version that a run registered, or None; the first of several."""
        found = [v for v in self._client.search_model_versions(f"run_id = '{run_id}'") if v.name == name]
        return min(found, key=lambda version: int(version.version), default=None)

    def create(
        self, name: str, source: str, run_id: str, record: StageRecord, tags: Mapping[str, str], description: str
    ) -> Any:
        """A new version with the record's tags and `tags`; the name is made where it is new."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        tags = _tags(record) | dict(tags)
        return self._client.create_model_version(name, source, run_id, tags=tags, description=description)

    def set_aliases(self, version: Any, stage: str, settings: RegistrySettings) -> str:
        """Give a new version its stage's alias, and the champion's where it has earned it by the settings. Returns the decision
        in words."""
        self._client.set_registered_model_alias(version.name, stage, version.version)
        return Promotion(self._client, version.name).consider(version, settings.approve_champion, settings.max_drift)


def read_model_folder(folder: str) -> dict[str, bytes]:
    """The files of a model's folder. InputError where it is none."""
    from threestage.data import storage

    names = (WEIGHTS, CARD, *[CALIBRATION] * storage.exists(storage.join(folder, CALIBRATION)))
    try:
        return {name: storage.read_bytes(storage.join(folder, name)) for name in names}
    except FileNotFoundError as error:
        raise InputError(
            f"{folder}: is no model folder; it must hold {WEIGHTS} and {CARD}", "models/no-model"
        ) from error


def file_tags(
    digest: str, files: Mapping[str, str], no_program: str | None, validation_drift: float | None
) -> dict[str, str]:
    """The tags that say what a version's files are: the weights' digest, that of every file, why there is no program, and how far
    the validation images are from the training images."""
    tags = {DIGEST: digest, FILES: json.dumps(files)}
    if validation_drift is not None:
        tags[DRIFT] = repr(validation_drift)
    return tags if no_program is None else tags | {NO_PROGRAM: shortened(redact(no_program), MAX_TAG)}


def readable_tags(record: StageRecord) -> dict[str, str]:
    """The record's tags for people, and one with all others as JSON."""
    shown = {key: record.tags[key] for key in READABLE if key in record.tags}
    rest = {key: shortened(redact(value), MAX_PARAM) for key, value in record.tags.items() if key not in shown}
    shown["validation"] = Lineage.model_validate(record.lineage).validation.name
    return shown | {DETAILS: json.dumps(rest, ensure_ascii=False)}


def _tags(record: StageRecord) -> dict[str, str]:
    lineage = Lineage.model_validate(record.lineage)
    tags = clean_tags(readable_tags(record) | {"run": record.run_name})
    tags |= {RUN_KEY: record.run_key, STAGE: record.stage, VALIDATION: lineage.validation.digest}
    tags[LINEAGE] = json.dumps(redact_tree(lineage.model_dump(mode="json")))
    if lineage.teacher is not None:
        tags[TEACHER] = lineage.teacher.model_digest
    if MEAN_IOU in record.summary:
        tags[MEAN_IOU] = repr(float(record.summary[MEAN_IOU]))
    return tags


def _pages(search: Callable[..., Any]) -> Iterator[Any]:
    page = search()
    yield from page
    while page.token:
        page = search(page_token=page.token)
        yield from page


def _make_folder(destination: str | Path) -> Path:
    from threestage.data import storage
    from threestage.data.outputs import PULLED_MODEL, claim

    folder = storage.path_here(str(destination), "a pulled model")
    claim(str(folder), PULLED_MODEL)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{destination}: cannot be made a folder ({error.strerror}); name another", "storage/not-a-folder"
        ) from error
    return folder


def _digests_of(version: Any) -> dict[str, str]:
    """SHA-256 of the files of a version's model folder, by name, as far as its tags have them."""
    found = {WEIGHTS: version.tags[DIGEST]} if DIGEST in version.tags else {}
    for name, digest in json.loads(version.tags.get(FILES, "{}")).items():
        if name.startswith(IN_PACKED):
            found[name.removeprefix(IN_PACKED)] = digest
    return found


def _check_files(model_uri: str, files: Mapping[str, Path], digests: Mapping[str, str]) -> None:
    """InputError for a file that is missing or is not the one that was registered."""
    for name, file in files.items():
        there = file.is_file() and not file.is_symlink()
        if not there or (name in digests and hashlib.sha256(file.read_bytes()).hexdigest() != digests[name]):
            raise InputError(
                f"{model_uri}: {name} is missing or is not what was registered; register the run's model again",
                "models/changed-file",
            )
