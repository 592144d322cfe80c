"""The three losses of one step, as sums and counts so that any number of workers and pieces gives the same mean.

Stage 1:     L = L_sup
Stage 2, 3:  L = w_sup · L_sup + w_con · L_con + w_pm · L_pm          (method.md, "The method, as implemented")
"""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from threestage import IGNORE_INDEX

ThresholdRule = Literal["fixed", "dynamic", "per_class"]
Normaliser = Literal["kept", "all"]


def cross_entropy_sum(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Sum of -log softmax(logits)[target], in nats, over the pixels whose target is not 255.

    logits: (N,C,H,W) of any float type, computed in float32 at least; target: (N,H,W) class ids of any integer type;
    weight: (N,H,W) uint8, 255ths of a pixel. A batch without a valid pixel gives 0, never NaN.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    if weight is None:
        return F.cross_entropy(wide, target.long(), ignore_index=IGNORE_INDEX, reduction="sum")
    by_pixel = F.cross_entropy(wide, target.long(), ignore_index=IGNORE_INDEX, reduction="none")
    return (by_pixel * (weight / 255)).sum()


def hard_pixel_sum(logits: Tensor, target: Tensor, weight: Tensor | None, share: float) -> Tensor:
    """`cross_entropy_sum` over the pixels of highest loss: of each image `hard_pixels` of the valid ones (OHEM, Shrivastava
    et al. 2016, by share and not by threshold, so that any number of workers learns the same pixels)."""
    by_pixel = F.cross_entropy(logits.float(), target.long(), ignore_index=IGNORE_INDEX, reduction="none").flatten(1)
    if weight is not None:
        by_pixel = by_pixel * (weight.flatten(1) / 255)
    ranked = by_pixel.sort(dim=1, descending=True).values  # pixels that do not count are 0, and last
    rank = torch.arange(ranked.shape[1], device=ranked.device)
    return torch.where(rank < hard_pixels(target, share)[:, None], ranked, 0).sum()


def hard_pixels(target: Tensor, share: float) -> Tensor:
    """(N,) float64: `share` of each image's valid pixels, rounded up."""
    return ((target != IGNORE_INDEX).flatten(1).sum(1).double() * share).ceil()


def dice_loss(main_logits: Tensor, mask: Tensor, weight: Tensor | None = None) -> Tensor:
    """Sum over the images of 1 - mean over their true classes of 2 Σ p·y / (Σ p + Σ y), sums over the image's valid pixels
    (Milletari et al. 2016 without squares). An image without valid pixels gives 0. `weight` is not used."""
    valid = (mask != IGNORE_INDEX)[:, None]
    true = (
        F.one_hot(mask.long().clamp(max=main_logits.shape[1]), main_logits.shape[1] + 1)[..., :-1].movedim(3, 1) * valid
    )
    probability = main_logits.float().softmax(1) * valid
    both, each = (probability * true).sum((2, 3)), (probability + true).sum((2, 3))
    there = (true.sum((2, 3)) > 0).float()
    score = (2 * both / each.clamp(min=1e-6) * there).sum(1) / there.sum(1).clamp(min=1)
    return ((1 - score) * (there.sum(1) > 0)).sum()


def images_with_pixels(mask: Tensor) -> Tensor:
    """Number of images of (N,H,W) with a valid pixel, float64: what `dice_loss` is divided by."""
    return (mask != IGNORE_INDEX).flatten(1).any(1).sum().double()


def valid_pixels(target: Tensor) -> Tensor:
    """Number of pixels of (N,H,W) that count, float64 on the device: sums over any number of workers stay exact."""
    return (target != IGNORE_INDEX).sum().double()


def supervised_loss(main_logits: Tensor, mask: Tensor, weight: Tensor | None = None) -> Tensor:
    """L_sup = CE(g(x_l), y_l); (N,C,H,W) against (N,H,W). Void and padding (255) do not count."""
    return cross_entropy_sum(main_logits, mask, weight)


def consistency_loss(main_logits: Tensor, teacher_class: Tensor, weight: Tensor | None = None) -> Tensor:
    """L_con = CE([g(x_l); g(A x_u)], [argmax T(x_l); W argmax T(x_u)]), both stacked along N."""
    return cross_entropy_sum(main_logits, teacher_class, weight)


def pseudo_mask_loss(auxiliary_logits: Tensor, pseudo_mask: Tensor, weight: Tensor | None = None) -> Tensor:
    """L_pm = CE([ĝ(x_l); ĝ(A x_u)], [ŷ_l; W ŷ_u]), both stacked along N; only the auxiliary head sees ŷ."""
    return cross_entropy_sum(auxiliary_logits, pseudo_mask, weight)


def keep_confident(
    class_ids: Tensor, confidence: Tensor, confidence_threshold: float, rule: ThresholdRule = "fixed"
) -> Tensor:
    """Class ids (N,H,W) uint8 with 255 where the confidence is below the threshold; 0 keeps every pixel.

    confidence: (N,H,W), either a probability or its uint8 form (255 = certain). `rule` scales the threshold by what this
    batch shows (FreeMatch, eq. 4–8, without its running means): "dynamic" by the mean confidence m of its pixels, so that
    it rises as the model becomes certain; "per_class" by m_c / max m_c, so that a class that is hard is held to less.
    """
    if confidence_threshold == 0:
        return class_ids
    least: float | Tensor = confidence_threshold * (255 if confidence.dtype == torch.uint8 else 1)
    if rule != "fixed":
        least = least * _certainty_of_batch(class_ids, confidence, rule)
    return class_ids.masked_fill(confidence < least, IGNORE_INDEX)


def _certainty_of_batch(class_ids: Tensor, confidence: Tensor, rule: ThresholdRule) -> Tensor:
    """What the threshold is multiplied by, in [0,1]: one number, or one per pixel (N,H,W)."""
    top = 255.0 if confidence.dtype == torch.uint8 else 1.0
    ids, values = class_ids.long().flatten(), confidence.float().flatten() / top
    sums, pixels = (
        values.new_zeros(256).scatter_add_(0, ids, v)[:IGNORE_INDEX] for v in (values, torch.ones_like(values))
    )
    if rule == "dynamic":
        return sums.sum() / pixels.sum().clamp(min=1)
    means = F.pad(sums / pixels.clamp(min=1), (0, 1))  # 255 keeps 0
    return (means / means.max().clamp(min=1e-6))[class_ids.long()]


def total_loss(
    sums: Mapping[str, Tensor], counts: Mapping[str, Tensor], weights: Mapping[str, float], world_size: int
) -> Tensor:
    """The scalar to differentiate: Σ w · sum / count · world_size, over this worker's sums and the global counts.

    DDP averages gradients over the workers, hence the factor `world_size`; with one worker each term is its plain mean.
    The sums may be those of a piece of the batch: gradients of all pieces add up to that of the whole.
    """
    terms = [weights[name] * world_size * total / counts[name].clamp(min=1) for name, total in sums.items()]
    return torch.stack(terms).sum()
