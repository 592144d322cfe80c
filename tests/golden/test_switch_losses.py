"""The losses and schedules of the switches beyond the paper, against numbers worked out by hand or by a plain loop."""

import math

import pytest
import torch
import torch.nn.functional as F

from threestage.training.losses import (
    cross_entropy_sum,
    dice_loss,
    hard_pixel_sum,
    hard_pixels,
    images_with_pixels,
    total_loss,
)
from threestage.training.schedule import EmaSettings, ema_decay


def some_logits(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    logits, target = torch.randn(3, 4, 5, 6, generator=random), torch.randint(0, 4, (3, 5, 6), generator=random)
    target[torch.rand(target.shape, generator=random) < 0.3] = 255
    target[2] = 255
    return logits, target


def test_hard_pixels_are_those_of_highest_loss_of_each_image() -> None:
    logits, target = some_logits()
    expected, count = 0.0, 0
    for one, mask in zip(logits, target, strict=True):
        losses = sorted(
            F.cross_entropy(one[None], mask[None], ignore_index=255, reduction="none")[0][mask != 255].tolist()
        )
        kept = math.ceil(0.3 * len(losses))
        expected, count = expected + sum(losses[len(losses) - kept :]), count + kept
    assert hard_pixel_sum(logits, target, None, 0.3).item() == pytest.approx(expected, rel=1e-5)
    assert hard_pixels(target, 0.3).sum().item() == count
    assert hard_pixel_sum(logits, target, None, 1.0).item() == pytest.approx(
        cross_entropy_sum(logits, target).item(), rel=1e-5
    )


def test_dice_by_hand() -> None:
    """Two pixels: class 0 with probability 3/4, class 1 with 1/4; one void pixel that must not count."""
    logits = torch.tensor([[[[math.log(3), math.log(3), 9.0]], [[0.0, 0.0, 0.0]], [[-99.0, -99.0, -99.0]]]])
    target = torch.tensor([[[0, 1, 255]]])
    first, second = 2 * 0.75 / (1.5 + 1), 2 * 0.25 / (0.5 + 1)
    assert dice_loss(logits, target).item() == pytest.approx(1 - (first + second) / 2, abs=1e-6)
    both = torch.cat([target, torch.full_like(target, 255)])
    assert dice_loss(logits.expand(2, -1, -1, -1), both).item() == pytest.approx(1 - (first + second) / 2, abs=1e-6)
    assert images_with_pixels(both).item() == 1


def test_a_term_is_divided_by_what_it_is_told() -> None:
    """normaliser=all: the kept pixels' sum over all pixels, 3 of 8 here."""
    sums = {"consistency_loss": torch.tensor(6.0)}
    assert total_loss(sums, {"consistency_loss": torch.tensor(8.0)}, {"consistency_loss": 0.5}, 1).item() == 0.375


def test_an_ema_that_warms_up_is_a_mean_at_first() -> None:
    settings = EmaSettings(decay=((0, 0.996),), warm_up=True)
    assert [ema_decay(step, settings) for step in (0, 1, 3)] == [0, 0.5, 0.75]
    assert ema_decay(10_000, settings) == 0.996
    assert ema_decay(0, EmaSettings(decay=((0, 0.996),))) == 0.996
