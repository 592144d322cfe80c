"""Calibration of `threestage.prediction.estimates` when a stage ends: the temperature with which the expected IoU is right on the
validation images, and how far they are from training images. It is stored with the model."""

import base64
import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from threestage.data.batches import SampleSet, send
from threestage.data.pool import PoolFile
from threestage.data.records import MAX_IMAGE_PIXELS
from threestage.data.samples import Decoding, Sample, decode_sample, pool_samples
from threestage.evaluation import WorkerShare, decoded_batches, fitting
from threestage.models.network import Network
from threestage.models.settings import InferenceSettings
from threestage.prediction.estimates import Calibration, distance_to_nearest, expected_counts
from threestage.prediction.pool_features import FEATURE_SIZE, forward_means, projected
from threestage.prediction.tta import window_logits
from threestage.training.metrics import iou_of_counts

TEMPERATURES = np.geomspace(0.5, 4, 13)
REFERENCE_IMAGES = 256
SAMPLED_FILES = 16
LEAST_SPREAD = 1e-4
LARGEST = 2**22
"""Pixels of a training image; larger ones are no reference, since a pass over them may not fit into the memory."""


@dataclass(frozen=True)
class Calibrator:
    """Asks a network about images, each worker about its share; every worker gets all answers."""

    network: Network
    device: torch.device
    share: WorkerShare
    batch_size: int
    dtype: torch.dtype
    inference: InferenceSettings

    def calibrate(self, validation: SampleSet, counts: Tensor, training: SampleSet) -> Calibration | None:
        """`counts`: `class_counts` of the validation images (N,3,C). None where they show no class, or no image could be asked
        about."""
        expected, features = self._measured(validation, counts.shape[-1])
        reference = self._measured(training, counts.shape[-1])[1]
        truth = iou_of_counts(counts.sum(0))
        shown = truth.isfinite()
        if not (len(features) and len(reference) and shown.any()):
            return None
        mean_iou = float(truth.nanmean())
        temperature = fitted_temperature(iou_of_counts(expected)[:, shown].mean(1).numpy(), mean_iou)
        place = int(np.abs(np.log(TEMPERATURES / temperature)).argmin())
        true = torch.where(shown, expected[place, 1], 0.0)
        stored = reference.to(torch.float16)
        distances = distance_to_nearest(features, stored.float()).numpy()
        near, far = _spread(distances)
        return Calibration(
            images=len(features),
            mean_iou=mean_iou,
            temperature=temperature,
            shares=tuple((true / expected[place, 1].sum()).tolist()),
            reference=base64.b64encode(stored.numpy().tobytes()).decode(),
            near=near,
            far=far,
            validation_drift=_drift_within(stored.float(), distances),
        )

    def _measured(self, samples: SampleSet, classes: int) -> tuple[Tensor, Tensor]:
        """On the CPU: expected counts (T,3,C) of all images together, in pixels, with each of TEMPERATURES; features (N,D).
        Images that do not fit into the memory are left out."""
        width = len(TEMPERATURES) * 3 * classes
        found = torch.zeros(len(samples), width + FEATURE_SIZE, dtype=torch.float64, device=self.device)
        for places, images, _ in decoded_batches(samples, self.batch_size, self.share.rank, self.share.world_size):
            try:
                (values,) = fitting(self._ask, send(images, self.device))
            except torch.OutOfMemoryError:
                continue
            found[send(torch.tensor(places), self.device)] = values
        sums = self.share.sum(found).float().cpu()
        counts, features = sums.tensor_split([width], dim=1)
        asked = features.any(1)
        return counts[asked].double().sum(0).view(-1, 3, classes), features[asked]

    @torch.inference_mode()
    def _ask(self, images: Tensor) -> tuple[Tensor]:
        """Images (N,3,H,W) uint8 → the values of `_measured` (N,K)."""

        def values(pooled: Tensor, logits: Tensor) -> Tensor:
            return torch.cat([*(expected_counts(logits, float(t)).flatten(1) for t in TEMPERATURES), pooled], 1)

        with forward_means(self.network, values) as means:
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                window_logits(self.network, images.float() / 255, self.inference)
            found = means(len(images))
        classes = self.network.num_classes
        counts, pooled = found.tensor_split([len(TEMPERATURES) * 3 * classes], dim=1)
        return (torch.cat([counts * math.prod(images.shape[-2:]), projected(pooled)], 1).double(),)


def _spread(distances: np.ndarray) -> tuple[float, float]:
    """Median and 95th percentile, which are never the same."""
    near, far = float(np.median(distances)), float(np.quantile(distances, 0.95))
    return near, max(far, near + LEAST_SPREAD)


def _drift_within(reference: Tensor, distances: np.ndarray) -> float:
    """The mean of the distances of the validation images to the reference, in the spread of its own images' distances."""
    if len(reference) < 2:
        return 0.0
    apart = torch.cdist(reference, reference).fill_diagonal_(math.inf).min(1).values
    near, far = _spread(apart.numpy())
    return float((distances.mean() - near) / (far - near))


def fitted_temperature(expected: np.ndarray, mean_iou: float) -> float:
    """The temperature with which the expected mean IoU (T,), that of each of TEMPERATURES, is the measured one. It falls while
    the temperature rises; where none fits, the nearest."""
    falling = np.minimum.accumulate(expected)
    return float(np.exp(np.interp(-mean_iou, -falling, np.log(TEMPERATURES))))


def training_sample(
    labelled: SampleSet, pool: Sequence[PoolFile], decoding: Decoding, excluded: frozenset[str]
) -> SampleSet:
    """At most REFERENCE_IMAGES images that a stage learns from: of the pool where it has one, else the labelled ones.

    Pool images that cannot be used or are larger than LARGEST are left out.
    """
    if not pool:
        return SampleSet(labelled.samples[:REFERENCE_IMAGES], *decoding._replace(max_pixels=MAX_IMAGE_PIXELS))
    files = pool[:: math.ceil(len(pool) / SAMPLED_FILES)]
    most = math.ceil(REFERENCE_IMAGES / len(files))
    first = (file.without(list(range(most, file.rows))) for file in files)
    found = [sample for file in first for sample in itertools.islice(_usable(file, decoding, excluded), most)]
    return SampleSet(found[:REFERENCE_IMAGES], *decoding)


def _usable(file: PoolFile, decoding: Decoding, excluded: frozenset[str]) -> Iterator[Sample]:
    limited = decoding._replace(max_pixels=min(LARGEST * decoding.downscale**2, decoding.max_pixels))
    for chunk in pool_samples(file, None, lambda reject: None, excluded=excluded):
        for sample in chunk:
            with contextlib.suppress(ValueError):  # the prediction of the pool has reported it
                if 0 not in decode_sample(sample, *limited).image.shape:
                    yield sample
