"""threestage in Python: `import threestage as ts`, then `ts.ingest`, `ts.train` and `ts.load`.

    data = ts.ingest("photos", masks="masks", unlabelled="more_photos")
    run = ts.train(data, budget="60m")
    run.best.predict("photo.jpg").overlay().save("overlay.png")

Wrong input raises `threestage.errors.InputError`, a stage that fails `StageFailure`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from threestage.cli.init import project_name
from threestage.cli.progress import StageProgress
from threestage.config import changed
from threestage.data import storage
from threestage.data.classes import Colour
from threestage.data.ingest import IngestReport
from threestage.data.ingest import ingest as ingest_here
from threestage.data.palette import palette_png
from threestage.data.records import decode_image, downscale_image
from threestage.mlflow_sync.records import RegistrySettings
from threestage.models.export import ModelCard
from threestage.models.network import Network
from threestage.prediction.predict import enlarged, open_model
from threestage.prediction.pseudo_masks import predict
from threestage.report.mask_images import overlay
from threestage.run.backend import RunCallbacks
from threestage.run.budget import resolve
from threestage.run.own_images import OwnImages
from threestage.run.run import run as run_stages
from threestage.training.worker import default_device

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
class Prediction:
    """Of one image: `pixels` (H,W,3), `class_ids` (H,W) and `confidence` (H,W) of 0 to 255, uint8 each."""

    pixels: np.ndarray
    class_ids: np.ndarray
    confidence: np.ndarray
    classes: tuple[str, ...]
    colours: tuple[Colour, ...]

    def overlay(self) -> Image.Image:
        """The image under the colours of its classes."""
        return Image.fromarray(overlay(self.pixels, self.class_ids, self.colours))

    def shares(self) -> dict[str, float]:
        """Class → share of the pixels."""
        counts = np.bincount(self.class_ids.reshape(-1), minlength=len(self.classes))
        return dict(zip(self.classes, (counts / self.class_ids.size).tolist(), strict=False))

    def save(self, path: str | Path) -> None:
        """The class ids as a PNG with a palette."""
        storage.write_bytes(str(path), palette_png(self.class_ids, self.colours))


@dataclass(frozen=True)
class Model:
    """A trained network, on the GPU where there is one."""

    network: Network
    card: ModelCard

    def predict(self, image: str | Path | np.ndarray) -> Prediction:
        """Of a file, an S3 URI, or pixels (H,W,3) uint8 RGB; at the image's own size."""
        pixels = decode_image(storage.read_bytes(str(image))) if isinstance(image, str | Path) else np.array(image)
        device = next(self.network.parameters()).device
        small = torch.from_numpy(downscale_image(pixels, self.card.downscale))
        found = predict(self.network, small.permute(2, 0, 1)[None].to(device))
        class_ids, confidence = (enlarged(one[0].cpu().numpy(), self.card.downscale, pixels.shape) for one in found[:2])
        return Prediction(pixels, class_ids, confidence, self.card.classes, self.card.colours)


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
    """Check images and masks and keep the good ones as a data set below `out`, the later run's folder (runs/IMAGES).

    Args:
        images, masks, unlabelled: folders or prefixes; `masks` may be the export of a labelling tool.
        classes: a class map; without it each value or colour becomes a class, but for the colours in `ignore`.
    """
    own = OwnImages(images, masks, out or f"runs/{project_name(images)}", unlabelled, classes, tuple(ignore))
    return IngestedImages(own, own.make_data_set(ingest_here))


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
    network, card = open_model(model, RegistrySettings(tracking_uri=tracking_uri))
    return Model(network.to(default_device()), card)
