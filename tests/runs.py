"""Runs of the pipeline in this process and on Ray, without a lease, pictures or MLflow."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from threestage.config import Config
from threestage.errors import Warn
from threestage.run import pipeline
from threestage.run.backend import OnMetrics, OnProgress, RunCallbacks, ignore
from threestage.run.local_backend import LocalBackend
from threestage.run.outcome import StageOutcome
from threestage.run.stages import StageTask


def run_local(
    config: Config,
    out: str | Path,
    on_metrics: OnMetrics = ignore,
    warn: Warn = print,
    record: Callable[[StageOutcome], None] = ignore,
    on_progress: OnProgress = ignore,
    reuse: str | None = None,
    continue_from: str | None = None,
) -> dict[str, Any]:
    on = RunCallbacks(on_metrics, warn, on_progress, record)
    return pipeline.run(config, str(out), LocalBackend(config, on), on, reuse, continue_from)


class TrainedBy(LocalBackend):
    """Trains the stages by a function."""

    def __init__(self, config: Config, on: RunCallbacks, train: Callable[[StageTask], None]) -> None:
        super().__init__(config, on)
        self._train = train

    def train_stage(self, task: StageTask) -> None:
        self._train(task)


def run_trained_by(train: Callable[[StageTask], None], config: Config, out: str | Path, warn: Warn = print) -> None:
    on = RunCallbacks(on_warning=warn)
    pipeline.run(config, str(out), TrainedBy(config, on, train), on)


def run_on_ray(
    config: Config, out: str | Path, on_metrics: OnMetrics = ignore, warn: Warn = print, reuse: str | None = None
) -> dict[str, Any]:
    from threestage.ray_backend.train import on_cluster

    on = RunCallbacks(on_metrics, warn)
    with on_cluster(config, str(out), on) as backend:
        return pipeline.run(config, str(out), backend, on, reuse)


def copy_run(run: Path, to: Path, stages: int = 3) -> Path:
    """A copy of a run of three stages that may be changed; with fewer `stages`, what such a run has when it is started again.
    Weights are links."""
    parts = {f"{part}{number}" for number in range(1, stages + 1) for part in ("stage", "pseudo_masks")}
    kept = {"split.json", "pool.parquet", *parts}

    def left_out(folder: str, names: list[str]) -> set[str]:
        return set(names) - kept if stages < 3 and Path(folder) == run else set()

    def copy(source: str, target: str) -> None:
        (os.link if source.endswith((".pt", ".safetensors")) else shutil.copy2)(source, target)

    return Path(shutil.copytree(run, to, ignore=left_out, copy_function=copy))
