"""Whole-image, single-scale evaluation with one exact confusion matrix, shared out over the workers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from threestage.data.batches import SampleSet, samples_of
from threestage.data.records import Manifest, SplitName, labelled_rows, load_manifest
from threestage.errors import InputError
from threestage.models.export import ModelCard
from threestage.models.network import Network
from threestage.pseudo_masks import predict_images
from threestage.training.metrics import confusion_matrix, mean_iou, per_class_iou, pixel_accuracy
from threestage.training.worker import default_device

BATCH = 8  # images per forward pass, of one size


def evaluate(
    network: nn.Module,
    samples: SampleSet,
    num_classes: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    sum_over_workers: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Tensor:
    """Confusion matrix (C,C) int64 on the CPU over all samples, each counted once.

    Batches are cut from the whole set and dealt out to the workers, so that the result does not depend on their number.
    """
    network.eval()
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    for start in range(rank * BATCH, len(samples), world_size * BATCH):
        decoded = [samples.decoded(i) for i in range(start, min(start + BATCH, len(samples)))]
        for index, class_ids, _, _ in predict_images(network, [d.image for d in decoded], BATCH, device):
            mask = torch.from_numpy(decoded[index].maps["mask"])
            confusion += confusion_matrix(mask, class_ids, num_classes)
    return sum_over_workers(confusion.to(device)).cpu()


def summarise(confusion: Tensor, classes: tuple[str, ...]) -> dict[str, object]:
    """mean_iou, pixel_accuracy and per_class_iou, all in [0,1]; a class that does not occur is None."""
    ious = per_class_iou(confusion).tolist()
    return {
        "mean_iou": mean_iou(confusion),
        "pixel_accuracy": pixel_accuracy(confusion),
        "per_class_iou": {name: None if iou != iou else iou for name, iou in zip(classes, ious, strict=True)},
    }


def evaluate_model(network: Network, card: ModelCard, dataset: str, split: SplitName) -> dict[str, Any]:
    """The figures of `summarise`, the confusion matrix and the number of images, for one split of a data set.

    Raises InputError where the split has no masks, or the data set's classes are not the model's.
    """
    manifest = load_manifest(dataset)
    if manifest.classes != card.classes:
        raise InputError(f"{dataset} has the classes {list(manifest.classes)}, the model knows {list(card.classes)}")
    samples = SampleSet(samples_of(labelled_rows(dataset, manifest, split).to_pydict()), card.downscale)
    if len(samples) == 0:
        raise InputError(
            f"{dataset}: no image of split {split!r} has a mask; those that have: {_labelled_splits(manifest)}"
        )
    device = default_device()
    confusion = evaluate(network.to(device), samples, len(card.classes), device)
    return {**summarise(confusion, card.classes), "confusion_matrix": confusion.tolist(), "images": len(samples)}


def _labelled_splits(manifest: Manifest) -> str:
    return ", ".join(split for split, counts in manifest.counts.items() if counts.labelled) or "none"
