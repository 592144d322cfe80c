"""Exact segmentation metrics from one confusion matrix (rows true, columns predicted)."""

import torch
from torch import Tensor

from threestage import IGNORE_INDEX


def confusion_matrix(mask: Tensor, prediction: Tensor, num_classes: int) -> Tensor:
    """Pixel counts (C,C) int64 of true class (row) against predicted class (column); 255 in `mask` never counts.

    Both are integer tensors of one shape; predictions lie in 0..C-1.
    """
    valid = mask != IGNORE_INDEX
    pairs = mask[valid].long() * num_classes + prediction[valid].long()
    return torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def per_class_iou(confusion: Tensor) -> Tensor:
    """Intersection over union (C,) float64 in [0,1]; NaN for a class that is neither there nor predicted."""
    intersection = confusion.diagonal().double()
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    return intersection / union


def mean_iou(confusion: Tensor) -> float:
    """Mean of the per-class IoU over the classes that occur, in [0,1]; NaN when nothing was counted."""
    return float(per_class_iou(confusion).nanmean())


def pixel_accuracy(confusion: Tensor) -> float:
    """Share of the counted pixels that are right, in [0,1]."""
    return float(confusion.diagonal().sum().double() / confusion.sum())
