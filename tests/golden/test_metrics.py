"""The confusion matrix against torchmetrics, IoU and calibration against numbers worked out by hand."""

import math

import pytest
import torch

from threestage.evaluation import summarise
from threestage.training.metrics import (
    absent_class_shares,
    confusion_matrix,
    expected_calibration_error,
    mean_iou,
    per_class_iou,
    pixel_accuracy,
    reliability_counts,
)


def test_confusion_matrix_equals_torchmetrics() -> None:
    from torchmetrics.functional.classification import (
        multiclass_confusion_matrix,
        multiclass_jaccard_index,
    )  # takes 5 s

    random = torch.Generator().manual_seed(0)
    mask = torch.randint(0, 5, (3, 20, 30), generator=random)
    mask[torch.rand(mask.shape, generator=random) < 0.1] = 255
    prediction = torch.randint(0, 5, mask.shape, generator=random)
    mine = confusion_matrix(mask.to(torch.uint8), prediction.to(torch.uint8), 5)
    assert torch.equal(mine, multiclass_confusion_matrix(prediction, mask, 5, ignore_index=255))
    oracle = multiclass_jaccard_index(prediction, mask, 5, ignore_index=255, average="none")
    torch.testing.assert_close(per_class_iou(mine).float(), oracle)


def test_a_class_that_does_not_occur_has_its_row() -> None:
    ids = torch.zeros(1, 2, 2, dtype=torch.uint8)
    assert confusion_matrix(ids, ids, 3).tolist() == [[4, 0, 0], [0, 0, 0], [0, 0, 0]]


def test_iou_by_hand() -> None:
    confusion = torch.tensor([[3, 1, 0], [2, 4, 0], [0, 0, 0]])
    ious = per_class_iou(confusion).tolist()
    assert ious[:2] == [3 / 6, 4 / 7] and math.isnan(ious[2])
    assert mean_iou(confusion) == (3 / 6 + 4 / 7) / 2
    assert pixel_accuracy(confusion) == 7 / 10


def test_a_class_without_true_pixels_is_left_out_of_the_mean() -> None:
    """Its false positives lower the class that they are, and stand in a line of their own."""
    confusion = torch.tensor([[3, 1, 1], [2, 4, 0], [0, 0, 0]])
    ious = per_class_iou(confusion).tolist()
    assert ious[:2] == [3 / 7, 4 / 7] and math.isnan(ious[2])
    assert mean_iou(confusion) == (3 / 7 + 4 / 7) / 2
    assert absent_class_shares(confusion).tolist() == [0, 0, 1 / 11]
    assert summarise(confusion, ("a", "b", "c"))["absent_classes"] == {"c": 1 / 11}


def test_reliability_by_hand() -> None:
    confidence = torch.tensor([0.0, 0.24, 0.25, 0.5, 0.99, 1.0])
    correct = torch.tensor([False, True, True, False, True, True])
    counts = reliability_counts(confidence, correct, bins=4)
    expected = [[2, 0.24, 1], [1, 0.25, 1], [1, 0.5, 0], [2, 1.99, 2]]
    torch.testing.assert_close(counts, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)
    assert expected_calibration_error(counts) == pytest.approx((0.76 + 0.75 + 0.5 + 0.01) / 6)
    assert reliability_counts(confidence[:2], correct[:2], bins=4).shape == (4, 3)
