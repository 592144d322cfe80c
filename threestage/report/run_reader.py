"""Read what a run's folder holds for its report, finished or not: stages, figures, settings, rejected images.

Nothing is computed that the run has not measured. Also logs the page to the run in MLflow.
"""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from threestage.config import STAGES, flatten
from threestage.data import storage
from threestage.data.rejects import Reject, read_rejects
from threestage.data.split import Split, saved_split
from threestage.errors import InputError, reason_of
from threestage.mlflow_sync.client import open_registry
from threestage.mlflow_sync.connection import redact, redact_tree, resolve_uri, sqlite_path
from threestage.mlflow_sync.run_sync import RUN_NAME, registry_of
from threestage.prediction.pseudo_masks import REJECTS_NAME, SetMarker, Statistics
from threestage.run_folder.records import Results, RunSettings, StageMarker, StageResult
from threestage.run_folder.reuse import CONFIG_NAME, PAGE_NAME, parts_elsewhere
from threestage.training.checkpoint import Checkpoints, checkpoint_folder
from threestage.verdict import verdict_text

# ---- The run and its stages

Row = Mapping[str, float]


@dataclass(frozen=True)
class Stage:
    """A finished stage. `statistics`: of its pseudo-masks, None where there are none; `keys`: the settings that decide what
    it computes; `validation_digest`: of the images that it was validated on."""

    number: int
    folder: str
    reused: bool
    result: Mapping[str, Any]
    statistics: Statistics | None
    keys: Mapping[str, Any]
    validation_digest: str | None
    finished: float

    @property
    def title(self) -> str:
        return f"stage {self.number}"

    @property
    def model(self) -> str:
        return storage.join(self.folder, "model")

    @property
    def history(self) -> Sequence[Row]:
        return list(self.result["history"])

    def curve(self, name: str) -> list[tuple[float, float]]:
        """(step, value) where the history has a finite value of that name."""
        found = [(row["step"], row.get(name)) for row in self.history]
        return [(step, value) for step, value in found if value is not None and math.isfinite(value)]


@dataclass(frozen=True)
class Run:
    """`data_root` is None where neither the results nor the settings name it; `rejected`: by the part of the run that
    could not use them; `missing`: sentences for the reader; `verdict`: whether the unlabelled images paid, of a finished run
    that used some; `rounds`: of labelling, of a run that continues another (run/continuation.py)."""

    uri: str
    name: str
    seed: int | None
    stages: tuple[Stage, ...]
    split: Split
    data_root: str | None
    pool_images: int | None
    settings: Mapping[str, Any]
    rejected: Mapping[str, Sequence[Reject]]
    missing: tuple[str, ...]
    finished: bool
    verdict: str | None
    rounds: Sequence[Mapping[str, Any]] = ()


def read_run(uri: str) -> Run:
    """Raises InputError where the folder holds no run."""
    uri = storage.absolute(uri)
    parts = parts_elsewhere(uri)
    if not storage.exists(storage.join(uri, "split.json")):
        raise InputError(
            f"{redact(uri)}: no run is there, it has no split.json; give the folder that a run got as --out",
            "run/no-run",
        )
    split = saved_split(storage.join(uri, "split.json"))[0]
    settings = _json(storage.join(uri, CONFIG_NAME), RunSettings) or {}
    results = _json(storage.join(uri, "results.json"), Results) or {}
    expected = STAGES[: settings.get("stages") or len(results.get("stages", ())) or len(STAGES)]
    folders: dict[str, str] = {name: parts.get(name) or storage.join(uri, name) for name in expected}
    masks = {n: parts.get(f"pseudo_masks{n}") or storage.join(uri, f"pseudo_masks{n}") for n in range(1, 4)}
    found = [_stage(n, folders[name], masks[n], name in parts) for n, name in enumerate(expected, 1)]
    stages = tuple(stage for stage in found if stage is not None)
    data = results.get("data", {})
    finished = len(stages) == len(expected) and bool(results)
    return Run(
        uri=uri,
        name=settings.get("name") or results.get("name") or uri.rsplit("/", 1)[-1],
        seed=settings.get("seed", results.get("seed")),
        stages=stages,
        split=split,
        data_root=data.get("root") or settings.get("data", {}).get("root"),
        pool_images=data.get("pool"),
        settings=redact_tree(flatten(settings)),
        rejected=_rejected(folders.values(), masks),
        missing=tuple(_missing(folders, stages)),
        finished=finished,
        verdict=verdict_text(results) if finished else None,
        rounds=results.get("rounds", ()),
    )


def _json(uri: str, shape: Any) -> Any:
    return storage.read_json(uri, shape) if storage.exists(uri) else None


def _stage(number: int, folder: str, masks: str, reused: bool) -> Stage | None:
    done = _json(storage.join(folder, "done.json"), StageMarker)
    if done is None:
        return None
    predicted = _json(storage.join(masks, "done.json"), SetMarker)
    return Stage(
        number=number,
        folder=folder,
        reused=reused,
        result=storage.read_json(storage.join(folder, "result.json"), StageResult),
        statistics=predicted and predicted["statistics"],
        keys=redact_tree(done["keys"]),
        validation_digest=done.get("validation"),
        finished=done["finished"],
    )


def _missing(folders: Mapping[str, str], stages: Sequence[Stage]) -> list[str]:
    done = {stage.number for stage in stages}
    sentences = []
    for number, folder in enumerate(folders.values(), 1):
        begun = Checkpoints(checkpoint_folder(folder)).latest()
        if number not in done and begun is not None:
            sentences.append(f"Stage {number} is not finished: its last checkpoint is of step {begun.step}.")
        elif number not in done:
            sentences.append(f"Stage {number} has not saved anything yet.")
    needed = [stage for stage in stages if stage.number < len(folders)]  # of the last one they can be switched off
    return sentences + [f"Stage {s.number} has no pseudo-masks yet." for s in needed if s.statistics is None]


def _rejected(stages: Iterable[str], masks: Mapping[int, str]) -> dict[str, Sequence[Reject]]:
    places = {f"pseudo-masks {n}": folder for n, folder in masks.items()}
    places |= {f"training stage {n}": folder for n, folder in enumerate(stages, 1)}
    files = {where: storage.join(folder, REJECTS_NAME) for where, folder in places.items()}
    found = {where: read_rejects(uri) for where, uri in files.items() if storage.exists(uri)}
    return {where: rejects for where, rejects in found.items() if rejects}


# ---- Speed of a stage


@dataclass(frozen=True)
class Throughput:
    """Of a stage's training steps, without validation and checkpoints: exact means over its history's rows, None where the
    history does not say. `data_wait_share`: of the steps' time, the mean of the workers."""

    steps_per_second: float | None
    images_per_second: float | None
    data_wait_share: float | None
    memory_bytes: float | None
    workers: float | None


def throughput(history: Sequence[Row]) -> Throughput:
    """From rows that each tell the mean time of a step since the row before."""
    steps = seconds = images = waited = 0.0
    waits, last = True, 0.0
    for row in history:
        length, last = row["step"] - last, row["step"]
        if "step_seconds" not in row:
            continue
        spent = row["step_seconds"] * length
        steps, seconds = steps + length, seconds + spent
        images += row.get("images_per_second", math.nan) * spent
        waits = waits and "data_wait_seconds" in row
        waited += row.get("data_wait_seconds", 0.0) * length
    if seconds == 0:
        return Throughput(None, None, None, None, None)
    return Throughput(
        steps_per_second=steps / seconds,
        images_per_second=None if math.isnan(images) else images / seconds,
        data_wait_share=waited / seconds if waits else None,
        memory_bytes=max((row["memory_bytes"] for row in history if "memory_bytes" in row), default=None),
        workers=history[-1].get("workers"),
    )


# ---- The page in MLflow


def log_page(run: str, page: str, finished: bool, tracking_uri: str | None = None) -> str | None:
    """Log the page at the URI `page` to the run's parent run. Returns why that was not done, or None; a run that never was in
    MLflow has nothing to tell."""
    identity = storage.join(storage.absolute(run), RUN_NAME)
    if not storage.exists(identity):
        return None
    if not finished:
        return "the page is not logged to MLflow: the run is not finished, its end will do that"
    config = storage.join(storage.absolute(run), CONFIG_NAME)
    settings = registry_of(
        storage.read_json(config, RunSettings) if storage.exists(config) else {}, tracking_uri, config
    )
    store = sqlite_path(resolve_uri(settings.tracking_uri))
    if store is not None and not os.path.exists(store):
        return f"the page is not logged to MLflow: there is no store {store}; name the run's with --tracking-uri"
    try:
        key = str(storage.read_value(identity, "run_key", str))
        open_registry(settings).close_run(key, "FINISHED", {}, {PAGE_NAME: page})
    except (InputError, OSError) as error:
        return f"the page is not logged to MLflow: {redact(reason_of(error))}"
    return None
