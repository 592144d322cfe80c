"""Scores on labelled images: while training exact pixel counts (single scale), shared out over the workers;
of a finished model everything, under any protocol."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from threestage import IGNORE_INDEX
from threestage.data import storage
from threestage.data.bands import Bands
from threestage.data.batches import SampleSet, send
from threestage.data.parallel import ahead
from threestage.data.records import Manifest, SplitName, labelled_rows, load_manifest
from threestage.data.samples import Decoded, TableSamples
from threestage.errors import InputError
from threestage.models.export import ModelCard
from threestage.models.network import size_multiple
from threestage.models.settings import InferenceSettings
from threestage.prediction.pseudo_masks import batches_by_size, best_class
from threestage.prediction.tta import TTASettings, check_protocol, predict_with_tta, protocol_for, window_logits
from threestage.training.metrics import (
    RELIABILITY_BINS,
    absent_class_shares,
    boundary_f_scores,
    class_counts,
    confusion_matrix,
    expected_calibration_error,
    mean_iou,
    per_class_iou,
    pixel_accuracy,
    reliability_counts,
)
from threestage.training.worker import default_device

CHUNK = 8  # images that are decoded together, and given to one worker
BATCH = 8  # images per forward pass, of one size
IMAGE_COUNTS = "image_counts.parquet"  # in a stage's folder
COUNTS_FORMAT = b"1"
COUNTS = ("right", "true", "predicted")


class Evaluation(NamedTuple):
    """Pixels, int64 on the CPU: the confusion matrix (C,C) of all images, and `class_counts` (N,3,C) of each image."""

    confusion: Tensor
    images: Tensor


class WorkerShare(NamedTuple):
    """Which worker of how many evaluates, and how they add up what they counted."""

    rank: int = 0
    world_size: int = 1
    sum: Callable[[Tensor], Tensor] = lambda tensor: tensor


@torch.inference_mode()
def evaluate(
    network: nn.Module,
    samples: SampleSet,
    num_classes: int,
    device: torch.device,
    share: WorkerShare = WorkerShare(),
    batch_size: int = BATCH,
    dtype: torch.dtype = torch.float32,
    inference: InferenceSettings = InferenceSettings(),
) -> Evaluation:
    """Counts over all samples, each counted once; `dtype`: that of autocast; `inference`: whole images, or windows.

    Chunks are cut from the whole set and dealt out to the workers, so that the result does not depend on their number.
    """
    network.eval()
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    counts = torch.zeros(len(samples), len(COUNTS), num_classes, dtype=torch.int64, device=device)

    def class_ids(images: Tensor) -> tuple[Tensor]:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return (best_class(window_logits(network, images.float() / 255, inference)),)

    for places, images, masks in _batches(samples, batch_size, share.rank, share.world_size):
        (found,) = fitting(class_ids, send(images, device))
        each = [confusion_matrix(*pair, num_classes) for pair in zip(send(masks, device), found, strict=True)]
        counts[send(torch.tensor(places), device)] = class_counts(torch.stack(each))
        confusion += torch.stack(each).sum(0)
    return Evaluation(share.sum(confusion).cpu(), share.sum(counts).cpu())


def write_image_counts(folder: str, image_ids: Sequence[str], counts: Tensor) -> None:
    """Keep the counts (N,3,C) of each image of a stage's last evaluation, for comparisons without another forward pass."""
    columns = {name: counts[:, place].tolist() for place, name in enumerate(COUNTS)}
    schema = pa.schema(
        {"image_id": pa.string(), **dict.fromkeys(COUNTS, pa.list_(pa.int64()))}, {"format": COUNTS_FORMAT}
    )
    storage.write_table(storage.join(folder, IMAGE_COUNTS), pa.table({"image_id": image_ids, **columns}, schema))


def read_image_counts(folder: str) -> tuple[list[str], Tensor] | None:
    """The ids and counts (N,3,C) that `write_image_counts` kept; None where there are none, or none of a known format."""
    uri = storage.join(folder, IMAGE_COUNTS)
    try:
        table = storage.read_table(uri)
        if (table.schema.metadata or {}).get(b"format") != COUNTS_FORMAT:
            return None
        counts = np.stack([np.array(table.column(name).to_pylist(), np.int64) for name in COUNTS], axis=1)
    except (FileNotFoundError, ValueError, KeyError):
        return None
    return table.column("image_id").to_pylist(), torch.from_numpy(counts)


def fitting(ask: Callable[[Tensor], tuple[Tensor, ...]], images: Tensor) -> tuple[Tensor, ...]:
    """What `ask` says of a batch, image by image where the batch does not fit into the device's memory."""
    try:
        return ask(images)
    except torch.OutOfMemoryError:
        if len(images) == 1:
            raise
    parts = [ask(image) for image in images.split(1)]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def summarise(confusion: Tensor, classes: tuple[str, ...]) -> dict[str, object]:
    """mean_iou, pixel_accuracy and per_class_iou, all in [0,1]; a class without true pixels is None. absent_classes: share of
    the pixels predicted as each of these, where there are any."""
    ious, absent = per_class_iou(confusion).tolist(), absent_class_shares(confusion).tolist()
    return {
        "mean_iou": mean_iou(confusion),
        "pixel_accuracy": pixel_accuracy(confusion),
        "per_class_iou": {name: None if iou != iou else iou for name, iou in zip(classes, ious, strict=True)},
        "absent_classes": {name: share for name, share in zip(classes, absent, strict=True) if share > 0},
    }


def evaluate_model(
    network: nn.Module,
    card: ModelCard,
    dataset: str,
    split: SplitName,
    protocol: TTASettings = TTASettings(),
    show: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Everything that `threestage evaluate` reports of one split of a data set, as JSON; see `Scores.summary`.

    Raises InputError where the split has no masks, the data set's classes are not the model's, or the protocol does not
    suit the network.
    """
    protocol = protocol_for(protocol, card.inference)
    check_protocol(protocol, card.network)
    manifest = load_manifest(dataset)
    _refuse_other_data(dataset, manifest, card)
    samples = SampleSet(TableSamples(labelled_rows(dataset, manifest, split)), card.downscale, bands=card.bands)
    if len(samples) == 0:
        raise InputError(
            f"{dataset}: no image of split {split!r} has a mask; those that have: {_labelled_splits(manifest)}",
            "evaluate/no-masks",
        )
    device = default_device()
    network.to(device).eval()
    scores, multiple = Scores(card.classes, device), size_multiple(card.network)
    for _, images, masks in _batches(samples, BATCH):
        ask = partial(predict_with_tta, network, protocol=protocol, multiple=multiple)
        class_ids, confidence, _ = fitting(ask, send(images, device))
        scores.add(send(masks, device), class_ids, confidence)
        show(scores.images, len(samples))
    return {"stage": card.stage, "protocol": protocol.describe(), "images": scores.images, **scores.summary()}


def _refuse_other_data(dataset: str, manifest: Manifest, card: ModelCard) -> None:
    """Raise InputError where a data set has other classes or bands than the model."""
    if manifest.classes != card.classes:
        raise InputError(
            f"{dataset} has the classes {list(manifest.classes)}, the model knows {list(card.classes)}: give a data set with "
            "the model's classes",
            "evaluate/other-classes",
        )
    if (manifest.bands and manifest.bands.count) != (card.bands and card.bands.count):
        raise InputError(
            f"{dataset}: its images have {_bands_text(manifest.bands)}, the model's {_bands_text(card.bands)}; give a data set "
            "of such images",
            "evaluate/other-bands",
        )


def _bands_text(bands: Bands | None) -> str:
    return "8-bit RGB" if bands is None else f"{bands.count} bands"


def _batches(
    samples: SampleSet, batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """As `decoded_batches`, with the masks (N,H,W) uint8."""
    for places, images, decoded in decoded_batches(samples, batch_size, rank, world_size):
        yield places, images, torch.from_numpy(np.stack([one.maps["mask"] for one in decoded]))


def decoded_batches(
    samples: SampleSet, batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[list[int], Tensor, list[Decoded]]]:
    """A worker's images (N,3,H,W) uint8 with their places among the samples, and all that is decoded of them; those of one size
    together, the next ones decoded in a thread."""
    starts = range(rank * CHUNK, len(samples), world_size * CHUNK)
    chunks = ([samples.decoded(i) for i in range(start, min(start + CHUNK, len(samples)))] for start in starts)
    with closing(ahead(chunks)) as decoded:
        for start, chunk in zip(starts, decoded, strict=True):
            for chosen, images in batches_by_size([one.image for one in chunk], batch_size):
                yield [start + i for i in chosen], images, [chunk[i] for i in chosen]


class Scores:
    """What is summed up over predicted images, on their device."""

    def __init__(self, classes: tuple[str, ...], device: torch.device) -> None:
        self._classes = classes
        number = len(classes)
        self._confusion = torch.zeros(number, number, dtype=torch.int64, device=device)
        self._boundary = torch.zeros(number, 2, dtype=torch.float64, device=device)  # sum of F, images
        self._reliability = torch.zeros(RELIABILITY_BINS, 3, dtype=torch.float64, device=device)
        self.images = 0

    def add(self, mask: Tensor, class_ids: Tensor, confidence: Tensor) -> None:
        """Masks and predicted ids (N,H,W) uint8 with their confidence (N,H,W) in [0,1]."""
        self.images += len(mask)
        self._confusion += confusion_matrix(mask, class_ids, len(self._classes))
        boundary = boundary_f_scores(mask, class_ids, len(self._classes))
        self._boundary += torch.stack([boundary.nansum(0), boundary.isfinite().sum(0).double()], dim=1)
        valid = mask != IGNORE_INDEX
        self._reliability += reliability_counts(confidence[valid], (mask == class_ids)[valid])

    def summary(self) -> dict[str, Any]:
        """All shares are in [0,1]; None stands for what does not occur.

        Those of `summarise`; `boundary_f`: mean over the classes of `per_class_boundary_f`, the mean over the images in
        which a class has a boundary; `expected_calibration_error` and `reliability`, a row of pixels, mean confidence
        and accuracy for each bin of confidence; `confusion_matrix`: pixels, rows true, columns predicted.
        """
        confusion, reliability = self._confusion.cpu(), self._reliability.cpu()
        boundary = (self._boundary[:, 0] / self._boundary[:, 1]).cpu()
        rows = [(int(n), c / n if n else None, right / n if n else None) for n, c, right in reliability.tolist()]
        figures: dict[str, Any] = summarise(confusion, self._classes)
        return {
            **figures,
            "mean_iou": _known(figures["mean_iou"]),
            "pixel_accuracy": _known(figures["pixel_accuracy"]),
            "boundary_f": _known(float(boundary.nanmean())),
            "per_class_boundary_f": dict(zip(self._classes, map(_known, boundary.tolist()), strict=True)),
            "expected_calibration_error": _known(expected_calibration_error(reliability)),
            "reliability": [dict(zip(("pixels", "confidence", "accuracy"), row, strict=True)) for row in rows],
            "classes": list(self._classes),
            "confusion_matrix": confusion.tolist(),
        }


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _labelled_splits(manifest: Manifest) -> str:
    return ", ".join(split for split, counts in manifest.counts.items() if counts.labelled) or "none"
