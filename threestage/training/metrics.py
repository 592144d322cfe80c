"""Exact segmentation metrics from one confusion matrix (rows true, columns predicted)."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from threestage import IGNORE_INDEX

RELIABILITY_BINS = 15


def confusion_matrix(mask: Tensor, prediction: Tensor, num_classes: int) -> Tensor:
    """Pixel counts (C,C) int64 of true class (row) against predicted class (column); 255 in `mask` never counts.

    Both are integer tensors of one shape; predictions lie in 0..C-1.
    """
    pairs = mask.int() * num_classes + prediction  # those of void pixels come after all others
    counts = value_counts(pairs, (IGNORE_INDEX + 1) * num_classes)[: num_classes**2]
    return counts.long().reshape(num_classes, num_classes)


def value_counts(values: Tensor, length: int) -> Tensor:
    """How often each of 0..length-1 occurs, (length,) float64; a device is not waited for."""
    if values.device.type == "cpu":
        return torch.bincount(values.flatten(), minlength=length).double()
    return torch.histc(values.double(), length, 0, length)  # bincount would wait


def class_counts(confusion: Tensor) -> Tensor:
    """All that the IoU needs of matrices (…,C,C): pixels (…,3,C) of each class that are right, true and predicted."""
    return torch.stack([confusion.diagonal(dim1=-2, dim2=-1), confusion.sum(-1), confusion.sum(-2)], dim=-2)


def iou_of_counts(counts: Tensor) -> Tensor:
    """Intersection over union (…,C) float64 in [0,1] of `class_counts` (…,3,C); NaN for a class without true pixels, whether
    predicted or not."""
    right, true, predicted = counts.double().unbind(-2)
    return torch.where(true > 0, right / (true + predicted - right), math.nan)


def per_class_iou(confusion: Tensor) -> Tensor:
    """The same of a matrix (C,C): (C,)."""
    return iou_of_counts(class_counts(confusion))


MEAN_IOU_RULE = "over the classes with true pixels in these images"


def mean_iou(confusion: Tensor) -> float:
    """Mean of the per-class IoU over the classes with true pixels, in [0,1]; NaN when nothing was counted. Pixels predicted
    as another class lower the IoU of the class that they are."""
    return float(per_class_iou(confusion).nanmean())


def absent_class_shares(confusion: Tensor) -> Tensor:
    """Share of the counted pixels (C,) float64 in [0,1] predicted as each class without true pixels; 0 for the others."""
    predicted = confusion.sum(0).double() / confusion.sum()
    return torch.where(confusion.sum(1) > 0, 0.0, predicted)


def pixel_accuracy(confusion: Tensor) -> float:
    """Share of the counted pixels that are right, in [0,1]."""
    return float(confusion.diagonal().sum().double() / confusion.sum())


def reliability_counts(confidence: Tensor, correct: Tensor, bins: int = RELIABILITY_BINS) -> Tensor:
    """Per bin of equal width over [0,1], (bins,3) float64: pixels, sum of their confidence, correct pixels.

    Confidence (…) float in [0,1] and correct (…) bool hold valid pixels only. A confidence on a border belongs to the upper
    bin, 1 to the last. Counts of parts add up to those of the whole.
    """
    confidence, correct = confidence.flatten().double(), correct.flatten().double()
    place = (confidence * bins).long().clamp(0, bins - 1)
    weights = (torch.ones_like(confidence), confidence, correct)
    return torch.stack([torch.bincount(place, weight, minlength=bins) for weight in weights], dim=1)


def expected_calibration_error(counts: Tensor) -> float:
    """ECE = Σ_b |Σ confidence − correct| / Σ pixels over the bins of `reliability_counts`, in [0,1]; NaN when nothing was
    counted (Guo et al. 2017, equation 3)."""
    pixels, confidence, correct = counts.unbind(dim=1)
    return float((confidence - correct).abs().sum() / pixels.sum())


BOUNDARY_TOLERANCE = 0.0075


def boundary_tolerance(height: int, width: int) -> int:
    """Pixels by which a boundary may be off: 0.75 % of the image's diagonal, rounded up, at least 1."""
    return max(1, math.ceil(BOUNDARY_TOLERANCE * math.hypot(height, width)))


def boundary_f_scores(mask: Tensor, prediction: Tensor, num_classes: int) -> Tensor:
    """Boundary F-score (N,C) float64 in [0,1] of every image and class, from class ids (N,H,W); NaN where the class has no
    boundary in the mask and none in the prediction.

    A pixel is on the boundary of a class when it, or its neighbour to the right, below or right below, but not both of
    them, is of the class. A pixel that is void (255 in the mask) or touches void, corners too, is on no boundary, in the
    prediction either; nor does the image's border make one. Precision P is the share of the predicted boundary's pixels
    within `boundary_tolerance` (Euclidean: a disk) of the true boundary of that class, recall R that of the true
    boundary's within it of the predicted one; F = 2PR/(P+R), and 0 where one of the boundaries is empty.

    Boundary and F are those of Perazzi et al., "A Benchmark Dataset and Evaluation Methodology for Video Object
    Segmentation", CVPR 2016, and of its tool (DAVIS, `seg2bmap`, `db_eval_boundary`); class by class and with 0.75 % of
    the diagonal (DAVIS: 0.8 %) as in Csurka et al., "What is a good evaluation measure for semantic segmentation?",
    BMVC 2013. Unlike DAVIS, a class without any boundary is not counted as 1 but left out.
    """
    radius = boundary_tolerance(*mask.shape[-2:])
    void = (mask == IGNORE_INDEX)[:, None].float()
    usable = F.max_pool2d(void, kernel_size=3, stride=1, padding=1)[:, 0] == 0
    scores = torch.full((len(mask), num_classes), math.nan, dtype=torch.float64, device=mask.device)
    for class_id in torch.cat([mask.unique(), prediction.unique()]).unique().tolist():
        if class_id < num_classes:
            true, found = (class_boundary(ids == class_id) & usable for ids in (mask, prediction))
            scores[:, class_id] = _boundary_f(true, found, radius)
    return scores


def class_boundary(member: Tensor) -> Tensor:
    """(N,H,W) bool, the pixels of a class → those on its boundary, see `boundary_f_scores`."""
    boundary = torch.zeros_like(member)
    boundary[:, :, :-1] |= member[:, :, :-1] ^ member[:, :, 1:]
    boundary[:, :-1] |= member[:, :-1] ^ member[:, 1:]
    boundary[:, :-1, :-1] |= member[:, :-1, :-1] ^ member[:, 1:, 1:]
    return boundary


def dilate(member: Tensor, radius: int) -> Tensor:
    """(N,H,W) bool → the pixels at most `radius` pixels (Euclidean) from one that is set.

    The disk is a column of pixels for each horizontal offset: the columns grow while the offset shrinks.
    """
    width = member.shape[-1]
    grown, reach = member, 0
    result = torch.zeros_like(member)
    for offset in range(min(radius, width - 1), -1, -1):
        while reach < math.isqrt(radius**2 - offset**2):
            taller = grown.clone()
            taller[:, 1:] |= grown[:, :-1]
            taller[:, :-1] |= grown[:, 1:]
            grown, reach = taller, reach + 1
        result[:, :, offset:] |= grown[:, :, : width - offset]
        result[:, :, : width - offset] |= grown[:, :, offset:]
    return result


def _boundary_f(true: Tensor, found: Tensor, radius: int) -> Tensor:
    """(N,) float64 of two boundaries (N,H,W) bool."""
    pixels = [boundary.sum((1, 2)).double() for boundary in (true, found)]
    recalled = (true & dilate(found, radius)).sum((1, 2)) / pixels[0].clamp_min(1)
    precise = (found & dilate(true, radius)).sum((1, 2)) / pixels[1].clamp_min(1)
    score = 2 * precise * recalled / (precise + recalled).clamp_min(torch.finfo(torch.float64).tiny)
    return score.where(pixels[0] + pixels[1] > 0, math.nan)
