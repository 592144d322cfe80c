"""Each loss against numbers worked out by hand: a sign, a mean or a weight that slips is invisible in training curves."""

import math

import pytest
import torch
from torch import Tensor

from threestage.stages import three_losses
from threestage.training.losses import cross_entropy_sum, keep_confident, supervised_loss, total_loss


def logits_for(probabilities: list[list[float]]) -> Tensor:
    """(1,C,1,W) logits whose softmax is the given probability of each class (rows) in each pixel (columns)."""
    return torch.tensor(probabilities).log()[None, :, None, :]


def alone(tensor: Tensor) -> Tensor:
    return tensor


def test_supervised_loss_is_the_sum_of_minus_log_p_over_valid_pixels() -> None:
    logits = logits_for([[0.5, 0.25, 0.9], [0.5, 0.75, 0.1]])
    total, count = supervised_loss(logits, torch.tensor([[[0, 1, 255]]], dtype=torch.uint8))
    assert total.item() == pytest.approx(-math.log(0.5) - math.log(0.75))
    assert count.item() == 2


def test_nothing_valid_is_zero_and_not_nan() -> None:
    logits = logits_for([[0.5], [0.5]]).requires_grad_()
    term = cross_entropy_sum(logits, torch.full((1, 1, 1), 255))
    loss, means = total_loss({"supervised_loss": term}, {"supervised_loss": 1.0}, alone, 1)
    loss.backward()
    assert loss.item() == 0 and means["supervised_loss"].item() == 0
    assert logits.grad is not None and logits.grad.abs().sum() == 0


def test_threshold_keeps_what_reaches_it() -> None:
    class_ids = torch.tensor([[[1, 1, 1, 1]]], dtype=torch.uint8)
    confidence = torch.tensor([[[0, 178, 179, 255]]], dtype=torch.uint8)
    assert keep_confident(class_ids, confidence, 0.7).tolist() == [[[255, 255, 1, 1]]]
    assert keep_confident(class_ids, confidence.float() / 255, 0.7).tolist() == [[[255, 255, 1, 1]]]
    assert keep_confident(class_ids, confidence, 0.0).tolist() == [[[1, 1, 1, 1]]]


def test_weighted_total_by_hand() -> None:
    """One labelled and one unlabelled pixel, two classes: L = 0.5 L_sup + 0.25 L_con + 0.25 L_pm."""
    main = torch.cat([logits_for([[0.8], [0.2]]), logits_for([[0.4], [0.6]])])
    auxiliary = torch.cat([logits_for([[0.5], [0.5]]), logits_for([[0.1], [0.9]])])
    mask = torch.tensor([[[0]]])
    terms = three_losses(main, auxiliary, mask, torch.tensor([[[0]], [[1]]]), torch.tensor([[[255]], [[0]]]))
    weights = {"supervised_loss": 0.5, "consistency_loss": 0.25, "pseudo_mask_loss": 0.25}
    loss, means = total_loss(terms, weights, alone, 1)
    assert means["supervised_loss"].item() == pytest.approx(-math.log(0.8))
    assert means["consistency_loss"].item() == pytest.approx((-math.log(0.8) - math.log(0.6)) / 2)
    assert means["pseudo_mask_loss"].item() == pytest.approx(-math.log(0.1))
    assert loss.item() == pytest.approx(
        0.5 * -math.log(0.8) + 0.25 * (-math.log(0.8) - math.log(0.6)) / 2 + 0.25 * -math.log(0.1)
    )


def test_two_workers_average_to_the_loss_of_one() -> None:
    """3 valid pixels on one rank and 1 on the other: the mean of both ranks' losses is the mean over 4 pixels."""
    a, b = torch.randn(1, 3, 1, 3), torch.randn(1, 3, 1, 3)
    target_a, target_b = torch.tensor([[[0, 1, 2]]]), torch.tensor([[[2, 255, 255]]])
    terms = [{"l": cross_entropy_sum(x, t)} for x, t in ((a, target_a), (b, target_b))]
    everything = torch.stack([torch.stack(tuple(t["l"])) for t in terms]).sum(0, keepdim=True)
    per_rank = [total_loss(t, {"l": 1.0}, lambda _: everything, 2)[0] for t in terms]
    whole = torch.nn.functional.cross_entropy(torch.cat([a, b]), torch.cat([target_a, target_b]), ignore_index=255)
    assert torch.stack(per_rank).mean().item() == pytest.approx(whole.item(), rel=1e-6)
