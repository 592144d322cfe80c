"""What a model says of its predictions without labels: which mean IoU they probably have, and how far the images are from those
that it was trained on.

Expected IoU: where probabilities are right as often as they say, a pixel predicted as class c adds p_c to the expected
intersection of c, and any pixel adds p_c to its expected true pixels. The temperature that makes them so is the one with which
the mean IoU of the validation images comes out.

Drift: the distance from an image's encoder features to those of the nearest training image, 0 for the median of the validation
images and 1 for their 95th percentile.

`threestage.calibration` measures both when a stage ends.
"""

import base64
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor, nn

from threestage.data import storage
from threestage.errors import InputError, StageFailure
from threestage.prediction.pool_features import FEATURE_SIZE, forward_means, projected
from threestage.settings import Settings
from threestage.training.metrics import iou_of_counts

CALIBRATION = "calibration.json"
"""In a model's folder. Models of older versions have none."""
SAMPLED_PIXELS = 2**14
"""Of an image, evenly spaced, whose probabilities are looked at."""
PRESENT = 0.2
"""A class counts where its expected share of the pixels is at least so much of its share on the validation images."""
DRIFT_WARNING = 0.5
"""Drift of a job above which its user is warned: half as far as the validation images that are farthest."""
Fraction = Annotated[float, Field(ge=0, le=1)]


class Calibration(Settings):
    """`images`: validation images, of which the model has `mean_iou`. `shares`: expected share of each class on them, 0 where
    they do not show it: it does not count. `reference`: features of training images, float16 (R,FEATURE_SIZE) as Base64. `near`,
    `far`: median and 95th percentile of the distances of the validation images to them. `validation_drift`: the mean of these
    distances, in the spread of the distances of the training images to each other."""

    format: Literal[1] = 1
    images: int = Field(ge=1)
    mean_iou: Fraction
    temperature: float = Field(gt=0, le=100)
    shares: tuple[Fraction, ...]
    reference: str
    near: float = Field(ge=0, le=100)
    far: float = Field(ge=0, le=100)
    validation_drift: float = Field(allow_inf_nan=False)

    @model_validator(mode="after")
    def _usable(self) -> "Calibration":
        if self.near >= self.far or not (len(self.features) and np.isfinite(self.features).all()):
            raise InputError(
                f"near={self.near:g}, far={self.far:g}: no features, or no spread", "models/damaged-calibration"
            )
        return self

    @property
    def features(self) -> np.ndarray:
        """(R,FEATURE_SIZE) float32."""
        return np.frombuffer(base64.b64decode(self.reference), np.float16).reshape(-1, FEATURE_SIZE).astype(np.float32)

    @classmethod
    def parse(cls, content: bytes, where: str, num_classes: int) -> "Calibration":
        """From the bytes of a model folder's file. Raises InputError, which begins with `where`."""
        try:
            found = cls.model_validate_json(content)
            if len(found.shares) == num_classes:
                return found
            reason = f"{len(found.shares)} classes, the model has {num_classes}"
        except ValidationError as error:
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc'])) or 'all of it'}: {first['msg']}"
        raise InputError(
            f"{where}: {CALIBRATION} is damaged ({reason}); bring it back from a copy, or delete it to predict without estimates",
            "models/damaged-calibration",
        )


def write_calibration(folder: str, calibration: Calibration | None) -> None:
    """Into a model's folder, where there is one."""
    if calibration is not None:
        storage.write_bytes(storage.join(folder, CALIBRATION), calibration.model_dump_json().encode())


class Estimate(Settings):
    """Of one image, or of several together. `mean_iou` is None where no class counts."""

    images: int
    mean_iou: float | None
    drift: float


Measure = Callable[[int, int], Tensor]
"""How many images were just predicted, and of how many pixels each → (N,K): what `Estimator.of` takes, of each image."""


class Estimator:
    """What a calibration says of images. Their measurements are sums, so those of many images are the sum of theirs."""

    def __init__(self, calibration: Calibration) -> None:
        self._calibration = calibration
        self._reference = torch.from_numpy(calibration.features)

    @contextmanager
    def measure(self, network: nn.Module) -> Iterator[Measure]:
        """Watches the forward passes of one batch."""
        classes = len(self._calibration.shares)

        def values(pooled: Tensor, logits: Tensor) -> Tensor:
            return torch.cat([expected_counts(logits, self._calibration.temperature).flatten(1), pooled], 1)

        def measured(images: int, pixels: int) -> Tensor:
            counts, pooled = means(images).tensor_split([3 * classes], dim=1)
            drift = self._drift(projected(pooled))
            return torch.cat([counts * pixels, drift[:, None], torch.ones_like(drift)[:, None]], 1)

        with forward_means(network, values) as means:
            yield measured

    def of(self, sums: np.ndarray) -> Estimate:
        """Of images whose measurements (K,) were added up."""
        *counts, drift, images = sums.tolist()
        right, true, predicted = np.array(counts, np.float64).reshape(3, -1)
        needed = np.array(self._calibration.shares)
        present = (needed > 0) & (true >= PRESENT * needed * max(true.sum(), 1e-9))
        ious = iou_of_counts(torch.from_numpy(np.stack([right, true, predicted]))).numpy()[present]
        return Estimate(
            images=round(images), mean_iou=float(np.nanmean(ious)) if len(ious) else None, drift=drift / images
        )

    def _drift(self, features: Tensor) -> Tensor:
        distance = distance_to_nearest(features, self._reference.to(features.device))
        near, far = self._calibration.near, self._calibration.far
        return (distance - near) / (far - near)


class JobEstimate:
    """Of the images of a job so far. Raises InputError where `max_drift` is asked of a model that cannot say it."""

    def __init__(self, estimator: Estimator | None, max_drift: float | None) -> None:
        if max_drift is not None and estimator is None:
            raise InputError(
                f"--max-drift={max_drift:g}: the model has no {CALIBRATION}, an older threestage trained it; leave the option "
                "out, or train it again",
                "predict/no-calibration",
            )
        self._estimator, self._max_drift = estimator, max_drift
        self._sums: np.ndarray | None = None

    def add(self, measured: Sequence[float]) -> None:
        """The sum over more images. Raises StageFailure where the images drift too far."""
        if measured:
            self._sums = np.array(measured) + (0 if self._sums is None else self._sums)
        estimate, most = self.estimate, self._max_drift
        if most is not None and estimate is not None and estimate.drift > most:
            raise StageFailure(f"{_drift_text(estimate)}, or raise --max-drift={most:g}", "predict/drift")

    @property
    def estimate(self) -> Estimate | None:
        return None if self._estimator is None or self._sums is None else self._estimator.of(self._sums)

    def warnings(self) -> list[str]:
        estimate = self.estimate
        return [] if estimate is None or estimate.drift <= DRIFT_WARNING else [_drift_text(estimate)]


def _drift_text(estimate: Estimate) -> str:
    return (
        f"drift {estimate.drift:.2f} over {estimate.images} images (0: the median validation image, 1: one of the 5 % that are "
        "farthest from the training images): look at some predictions before you use them"
    )


def distance_to_nearest(features: Tensor, reference: Tensor) -> Tensor:
    """(N,D), (R,D) → (N,): the distance to the nearest of the reference."""
    return torch.cdist(features, reference).min(1).values


def expected_counts(logits: Tensor, temperature: float) -> Tensor:
    """Logits (N,C,H,W) → shares of the pixels (N,3,C) that are expected to be right as each class, expected to be of it, and that
    are predicted as it: `class_counts`, expected."""
    step = max(1, math.isqrt(logits.shape[2] * logits.shape[3] // SAMPLED_PIXELS))
    probabilities = (logits[..., ::step, ::step].float() / temperature).softmax(1).flatten(2)
    best = probabilities.max(1, keepdim=True)
    chosen = best.indices == torch.arange(logits.shape[1], device=logits.device)[:, None]
    right = (best.values * chosen).mean(2)
    return torch.stack([right, probabilities.mean(2), chosen.float().mean(2)], 1)
