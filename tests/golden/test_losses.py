"""Each loss against numbers worked out by hand: a sign, a mean or a weight that slips is invisible in training curves."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from threestage.training.losses import (
    consistency_loss,
    cross_entropy_sum,
    keep_confident,
    pseudo_mask_loss,
    supervised_loss,
    total_loss,
    valid_pixels,
)
from threestage.training.step import StepInputs, micro_batches, piece_sums


def logits_for(probabilities: list[list[float]]) -> Tensor:
    """(1,C,1,W) logits whose softmax is the given probability of each class (rows) in each pixel (columns)."""
    return torch.tensor(probabilities).log()[None, :, None, :]


class Given(nn.Module):
    """A network that answers with logits made beforehand, in order."""

    def __init__(self, main: Tensor, auxiliary: Tensor) -> None:
        super().__init__()
        self.main, self.auxiliary, self.given = main, auxiliary, 0

    def forward(self, image: Tensor, with_auxiliary: bool) -> tuple[Tensor, Tensor]:
        rows = slice(self.given, self.given + len(image))
        self.given += len(image)
        return self.main[rows], self.auxiliary[rows]


def test_supervised_loss_is_the_sum_of_minus_log_p_over_valid_pixels() -> None:
    logits = logits_for([[0.5, 0.25, 0.9], [0.5, 0.75, 0.1]])
    mask = torch.tensor([[[0, 1, 255]]], dtype=torch.uint8)
    assert supervised_loss(logits, mask).item() == pytest.approx(-math.log(0.5) - math.log(0.75))
    assert valid_pixels(mask).item() == 2


def test_nothing_valid_is_zero_and_not_nan() -> None:
    logits = logits_for([[0.5], [0.5]]).requires_grad_()
    mask = torch.full((1, 1, 1), 255)
    loss = total_loss({"l": cross_entropy_sum(logits, mask)}, {"l": valid_pixels(mask)}, {"l": 1.0}, 1)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None and logits.grad.abs().sum() == 0


def test_threshold_keeps_what_reaches_it() -> None:
    class_ids = torch.tensor([[[1, 1, 1, 1]]], dtype=torch.uint8)
    confidence = torch.tensor([[[0, 178, 179, 255]]], dtype=torch.uint8)
    assert keep_confident(class_ids, confidence, 0.7).tolist() == [[[255, 255, 1, 1]]]
    assert keep_confident(class_ids, confidence.float() / 255, 0.7).tolist() == [[[255, 255, 1, 1]]]
    assert keep_confident(class_ids, confidence, 0.0).tolist() == [[[1, 1, 1, 1]]]
    assert keep_confident(class_ids, confidence, 1.0).tolist() == [[[255, 255, 255, 1]]], "what is certain reaches 1"
    two = torch.tensor([[[0, 1, 1, 1]]], dtype=torch.uint8)
    assert keep_confident(two, confidence, 0.7).tolist() == [[[255, 255, 1, 1]]], (
        "of every class, unless a rule is given"
    )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_weighted_total_by_hand(accumulate: int) -> None:
    """One labelled and one unlabelled pixel, two classes: L = 0.5 L_sup + 0.25 L_con + 0.25 L_pm, whole or in pieces."""
    main = torch.cat([logits_for([[0.8], [0.2]]), logits_for([[0.4], [0.6]])])
    auxiliary = torch.cat([logits_for([[0.5], [0.5]]), logits_for([[0.1], [0.9]])])
    targets = {
        "supervised_loss": torch.tensor([[[0]]]),
        "consistency_loss": torch.tensor([[[0]], [[1]]]),
        "pseudo_mask_loss": torch.tensor([[[255]], [[0]]]),
    }
    weights = {"supervised_loss": 0.5, "consistency_loss": 0.25, "pseudo_mask_loss": 0.25}
    inputs = StepInputs(torch.zeros(2, 3, 1, 1), targets, weights, ("a", "b"))
    counts = {name: valid_pixels(target) for name, target in targets.items()}
    network, loss = Given(main, auxiliary), 0.0
    for piece in micro_batches(2, accumulate):
        loss += total_loss(piece_sums(network, inputs, piece), counts, weights, 1).item()
    assert loss == pytest.approx(
        0.5 * -math.log(0.8) + 0.25 * (-math.log(0.8) - math.log(0.6)) / 2 + 0.25 * -math.log(0.1)
    )


def test_two_workers_average_to_the_loss_of_one() -> None:
    """3 valid pixels on one rank and 1 on the other: the mean of both ranks' losses is the mean over 4 pixels."""
    a, b = torch.randn(1, 3, 1, 3), torch.randn(1, 3, 1, 3)
    target_a, target_b = torch.tensor([[[0, 1, 2]]]), torch.tensor([[[2, 255, 255]]])
    counts = {"l": valid_pixels(target_a) + valid_pixels(target_b)}
    sums = [{"l": cross_entropy_sum(x, t)} for x, t in ((a, target_a), (b, target_b))]
    per_rank = [total_loss(each, counts, {"l": 1.0}, 2) for each in sums]
    whole = torch.nn.functional.cross_entropy(torch.cat([a, b]), torch.cat([target_a, target_b]), ignore_index=255)
    assert torch.stack(per_rank).mean().item() == pytest.approx(whole.item(), rel=1e-6)


def test_pieces_cover_the_batch_once() -> None:
    for images in range(1, 9):
        for accumulate in range(1, 10):
            cut = [list(range(images))[piece] for piece in micro_batches(images, accumulate)]
            assert [i for piece in cut for i in piece] == list(range(images))
            assert len(cut) == min(images, accumulate) and all(cut)


def test_a_pixel_counts_for_its_weight() -> None:
    logits, target = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    target[0, 0] = 255
    weight = torch.randint(0, 256, (2, 4, 5), dtype=torch.uint8)
    each = F.cross_entropy(logits, target, ignore_index=255, reduction="none")
    torch.testing.assert_close(cross_entropy_sum(logits, target, weight), (each * weight / 255).sum())
    whole = torch.full_like(weight, 255)
    torch.testing.assert_close(cross_entropy_sum(logits, target, whole), cross_entropy_sum(logits, target))


@pytest.mark.parametrize("loss", [supervised_loss, consistency_loss, pseudo_mask_loss])
def test_each_term_takes_weights(loss: Callable[..., Tensor]) -> None:
    logits, target = logits_for([[0.5, 0.25], [0.5, 0.75]]), torch.tensor([[[0, 1]]])
    weight = torch.tensor([[[51, 0]]], dtype=torch.uint8)
    assert loss(logits, target, weight).item() == pytest.approx(-math.log(0.5) / 5)


@pytest.mark.parametrize(
    ("given", "computed"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_the_loss_is_computed_in_float32_at_least(given: torch.dtype, computed: torch.dtype) -> None:
    logits = logits_for([[0.5], [0.5]]).to(given)
    assert cross_entropy_sum(logits, torch.tensor([[[0]]])).dtype == computed


@pytest.mark.parametrize("as_bytes", [False, True])
def test_thresholds_follow_what_the_batch_shows(as_bytes: bool) -> None:
    """Class 0 has mean confidence 0.9, class 1 0.6, all pixels 0.75; what is 255 counts for nothing."""
    class_ids = torch.tensor([[[0, 0, 1, 1, 255]]], dtype=torch.uint8)
    confidence = torch.tensor([[[0.96, 0.84, 0.7, 0.5, 0.0]]])
    if as_bytes:
        confidence = (confidence * 255).round().to(torch.uint8)
    assert keep_confident(class_ids, confidence, 0.8, "fixed").tolist() == [[[0, 0, 255, 255, 255]]]
    assert keep_confident(class_ids, confidence, 0.8, "dynamic").tolist() == [[[0, 0, 1, 255, 255]]], "0.8 · 0.75 = 0.6"
    assert keep_confident(class_ids, confidence, 0.95, "dynamic").tolist() == [[[0, 0, 255, 255, 255]]], "0.71"
    assert keep_confident(class_ids, confidence, 0.95, "per_class").tolist() == [[[0, 255, 1, 255, 255]]], (
        "0.95 for class 0, 0.95 · 0.6 / 0.9 = 0.63 for class 1"
    )


def test_a_batch_without_a_pixel_has_no_threshold() -> None:
    class_ids = torch.full((1, 2, 2), 255, dtype=torch.uint8)
    for rule in ("dynamic", "per_class"):
        assert keep_confident(class_ids, torch.ones(1, 2, 2), 0.5, rule).tolist() == class_ids.tolist()
