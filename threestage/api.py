"""threestage in Python: `import threestage as ts`, then `ts.ingest`, `ts.train` and `ts.load`.

    data = ts.ingest("photos", masks="masks", unlabelled="more_photos")
    run = ts.train(data, budget="60m")
    run.best.predict("photo.jpg").overlay().save("overlay.png")

Wrong input raises `threestage.errors.InputError`, a stage that fails `StageFailure`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rich.console import Console

from threestage.cli.init import project_name
from threestage.cli.progress import StageProgress
from threestage.config import changed
from threestage.data.classes import Colour
from threestage.data.ingest import IngestReport
from threestage.data.ingest import ingest as ingest_here
from threestage.mlflow_sync.records import RegistrySettings
from threestage.prediction.image_model import Model, Prediction
from threestage.prediction.predict import read_model
from threestage.report.data_set_preview import write_preview
from threestage.run.backend import RunCallbacks
from threestage.run.budget import resolve
from threestage.run.own_images import OwnImages
from threestage.run.run import run as run_stages

__all__ = ["IngestedImages", "Model", "Prediction", "TrainedRun", "ingest", "load", "train"]


@dataclass(frozen=True)
class IngestedImages:
    """Images that were ingested. `reports`: what was added and left out, of the labelled images first."""

    own: OwnImages
    reports: Sequence[IngestReport]

    @property
    def root(self) -> str:
        return self.own.data


@dataclass(frozen=True)
class TrainedRun:
    """A finished run: its folder, and what results.json holds."""

    out: str
    results: Mapping[str, Any]

    @cached_property
    def best(self) -> Model:
        """The model that the run delivers: of the stage that scored best on the validation images."""
        return load(self.out)


def ingest(
    images: str,
    masks: str,
    unlabelled: str | None = None,
    *,
    out: str | None = None,
    classes: str | None = None,
    ignore: Sequence[Colour] = (),
) -> IngestedImages:
    """Check images and masks and keep the good ones as a data set below `out`, the later run's folder (runs/IMAGES), with a
    picture of the labels, data/preview.png.

    Args:
        images, masks, unlabelled: folders or prefixes; `masks` may be the export of a labelling tool.
        classes: a class map; without it each value or colour becomes a class, but for the colours in `ignore`.
    """
    own = OwnImages(images, masks, out or f"runs/{project_name(images)}", unlabelled, classes, tuple(ignore))
    reports = own.make_data_set(ingest_here)
    write_preview(own.data)
    return IngestedImages(own, reports)


def train(
    data: IngestedImages,
    *,
    budget: str | None = None,
    local: bool = True,
    settings: Mapping[str, Any] = {},
) -> TrainedRun:
    """Run the stages and return the finished run; a repeated call continues.

    Args:
        budget: a time in place of steps, such as "60m".
        local: in this process; else on Ray, with the models registered in MLflow.
        settings: dotted keys and values, such as {"stage1.steps": 1000}.
    """
    out = data.own.out
    config = changed(data.own.config(project_name(out), []), settings)
    bought = resolve(config, out, budget, local, [f"{key}=" for key in settings])
    config = config if bought is None else bought.applied(config)
    with StageProgress(config, Console()) as progress:
        on = RunCallbacks(progress.on_metrics, progress.warn, progress.on_progress)
        return TrainedRun(out, run_stages(config, out, local, on))


def load(model: str, tracking_uri: str | None = None) -> Model:
    """A model of the registry (models:/NAME@champion), or of a folder: a model's, a stage's or a run's (its best)."""
    return Model.of(read_model(model, RegistrySettings(tracking_uri=tracking_uri)), model)
