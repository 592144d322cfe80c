"""The three losses of one step, as sums and counts so that any number of workers gives the same mean.

Stage 1:     L = L_sup                                               (method.md, "Stage 1")
Stage 2, 3:  L = w_sup · L_sup + w_con · L_con + w_pm · L_pm          (method.md, "Stage 2")
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from threestage import IGNORE_INDEX


class LossSum(NamedTuple):
    """A loss before its mean is taken: both are scalars on the device."""

    total: Tensor  # sum of the cross-entropy over the valid pixels, in nats
    pixels: Tensor  # number of valid pixels, float32


def cross_entropy_sum(logits: Tensor, target: Tensor) -> LossSum:
    """Sum of -log softmax(logits)[target] over the pixels whose target is not 255.

    logits: (N,C,H,W) of any float type, computed in float32; target: (N,H,W) class ids of any integer type.
    A batch without a valid pixel gives (0, 0), never NaN.
    """
    total = F.cross_entropy(logits.float(), target.long(), ignore_index=IGNORE_INDEX, reduction="sum")
    return LossSum(total, (target != IGNORE_INDEX).sum().float())


def supervised_loss(main_logits: Tensor, mask: Tensor) -> LossSum:
    """L_sup = CE(g(x_l), y_l); (N,C,H,W) against (N,H,W). Void and padding (255) do not count."""
    return cross_entropy_sum(main_logits, mask)


def consistency_loss(main_logits: Tensor, teacher_class: Tensor) -> LossSum:
    """L_con = CE([g(x_l); g(A x_u)], [argmax T(x_l); W argmax T(x_u)]), both stacked along N."""
    return cross_entropy_sum(main_logits, teacher_class)


def pseudo_mask_loss(auxiliary_logits: Tensor, pseudo_mask: Tensor) -> LossSum:
    """L_pm = CE([ĝ(x_l); ĝ(A x_u)], [ŷ_l; W ŷ_u]), both stacked along N; only the auxiliary head sees ŷ."""
    return cross_entropy_sum(auxiliary_logits, pseudo_mask)


def keep_confident(class_ids: Tensor, confidence: Tensor, confidence_threshold: float) -> Tensor:
    """Class ids (N,H,W) uint8 with 255 where the confidence is below the threshold; 0 keeps every pixel.

    confidence: (N,H,W), either a probability or its uint8 form (255 = certain).
    """
    if confidence_threshold == 0:
        return class_ids
    least = confidence_threshold * (255 if confidence.dtype == torch.uint8 else 1)
    return class_ids.masked_fill(confidence < least, IGNORE_INDEX)


def total_loss(
    terms: Mapping[str, LossSum],
    weights: Mapping[str, float],
    sum_over_workers: Callable[[Tensor], Tensor],
    world_size: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The scalar to differentiate on this worker, and each term's mean over the valid pixels of the global batch.

    DDP averages gradients over the workers, so each worker's sum is divided by the global count and multiplied by
    `world_size`; with one worker that is the plain mean.
    """
    sums = torch.stack([torch.stack([term.total.detach(), term.pixels]) for term in terms.values()])
    totals, counts = sum_over_workers(sums).clamp(min=0).unbind(dim=1)
    counts = counts.clamp(min=1)
    loss = torch.stack(
        [
            weights[name] * term.total * world_size / count
            for (name, term), count in zip(terms.items(), counts, strict=True)
        ]
    ).sum()
    means = dict(zip(terms, totals / counts, strict=True))
    return loss, means
