"""The three losses of one step, as sums and counts so that any number of workers and pieces gives the same mean.

Stage 1:     L = L_sup                                               (method.md, "Stage 1")
Stage 2, 3:  L = w_sup · L_sup + w_con · L_con + w_pm · L_pm          (method.md, "Stage 2")
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from threestage import IGNORE_INDEX


def cross_entropy_sum(logits: Tensor, target: Tensor) -> Tensor:
    """Sum of -log softmax(logits)[target], in nats, over the pixels whose target is not 255.

    logits: (N,C,H,W) of any float type, computed in float32 at least; target: (N,H,W) class ids of any integer type.
    A batch without a valid pixel gives 0, never NaN.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, target.long(), ignore_index=IGNORE_INDEX, reduction="sum")


def valid_pixels(target: Tensor) -> Tensor:
    """Number of pixels of (N,H,W) that count, float64 on the device: sums over any number of workers stay exact."""
    return (target != IGNORE_INDEX).sum().double()


def supervised_loss(main_logits: Tensor, mask: Tensor) -> Tensor:
    """L_sup = CE(g(x_l), y_l); (N,C,H,W) against (N,H,W). Void and padding (255) do not count."""
    return cross_entropy_sum(main_logits, mask)


def consistency_loss(main_logits: Tensor, teacher_class: Tensor) -> Tensor:
    """L_con = CE([g(x_l); g(A x_u)], [argmax T(x_l); W argmax T(x_u)]), both stacked along N."""
    return cross_entropy_sum(main_logits, teacher_class)


def pseudo_mask_loss(auxiliary_logits: Tensor, pseudo_mask: Tensor) -> Tensor:
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
    sums: Mapping[str, Tensor], counts: Mapping[str, Tensor], weights: Mapping[str, float], world_size: int
) -> Tensor:
    """The scalar to differentiate: Σ w · sum / count · world_size, over this worker's sums and the global counts.

    DDP averages gradients over the workers, hence the factor `world_size`; with one worker each term is its plain mean.
    The sums may be those of a piece of the batch: gradients of all pieces add up to that of the whole.
    """
    terms = [weights[name] * world_size * total / counts[name].clamp(min=1) for name, total in sums.items()]
    return torch.stack(terms).sum()
