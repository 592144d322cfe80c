"""What stage 1, 2 and 3 do in one step: views, targets and their weights (method.md). Switches that the paper does not have are
off in its presets."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from threestage import IGNORE_INDEX
from threestage.augment.draws import Draws, generator
from threestage.augment.mixing import draw_mixing
from threestage.augment.views import View, network_input, strong_view, weak_view
from threestage.config import Config, ConsistencySettings
from threestage.data.batches import Batch, Share, Timed
from threestage.pseudo_masks import PseudoMaskSettings, best_class, quantise
from threestage.training import losses
from threestage.training.loop import laid_out
from threestage.training.schedule import ramp_up
from threestage.training.step import FeatureDropout, StepInputs


class Feed(NamedTuple):
    """Batches on the device, and which rows of the global batch they are."""

    batches: Timed
    share: Share

    def draws(self, random: torch.Generator) -> Draws:
        return Draws(random, self.share.first, self.share.total)


class Target(NamedTuple):
    """What pixels are to become, and how much each counts."""

    class_ids: Tensor
    """(N,h,w) uint8, 255 where a pixel does not count"""
    weight: Tensor | None
    """(N,h,w) uint8, 255 is a whole pixel; None: all are"""


class SupervisedSteps:
    """Stage 1: CE(g(x_l), y_l); with `stage1.strong_view` the strong view of each image is learnt beside the weak one."""

    def __init__(self, config: Config, labelled: Feed) -> None:
        self._config = config
        self._labelled = labelled

    @property
    def waited(self) -> float:
        return self._labelled.batches.seconds

    def draw(self, step: int) -> StepInputs:
        config, batch = self._config, next(self._labelled.batches)
        draws = self._labelled.draws(generator(config.seed, "stage1", "augment", step))
        view = weak_view(batch.image, batch.size, config.augment, draws)
        image, mask = view.image, view.warp(batch.maps["mask"])
        if config.stage1.strong_view:
            strong = strong_view(view, config.augment.strong, draws)
            image, mask = torch.cat([image, strong.image]), torch.cat([mask, strong.warp(mask)])
        image = network_input(laid_out(image, config.training))
        return StepInputs(image, {"supervised_loss": mask}, {"supervised_loss": 1.0}, batch.image_ids)


class ThreeTaskSteps:
    """Stages 2 and 3: w_sup · L_sup + w_con · L_con + w_pm · L_pm. A term of weight 0 is not computed."""

    def __init__(self, stage: str, config: Config, teacher: nn.Module, labelled: Feed, unlabelled: Feed) -> None:
        self._stage, self._config, self._teacher = stage, config, teacher
        self._labelled, self._unlabelled = labelled, unlabelled
        self._ramp_up_steps = config.consistency.ramp_up * config.stage(stage).steps  # type: ignore[arg-type]

    @property
    def waited(self) -> float:
        return self._labelled.batches.seconds + self._unlabelled.batches.seconds

    def draw(self, step: int) -> StepInputs:
        config, random = self._config, generator(self._config.seed, self._stage, "augment", step)
        batch_l, batch_u = next(self._labelled.batches), next(self._unlabelled.batches)
        draws_l, draws_u = self._labelled.draws(random), self._unlabelled.draws(random)
        weak_l = weak_view(batch_l.image, batch_l.size, config.augment, draws_l)
        weak_u = weak_view(batch_u.image, batch_u.size, config.augment, draws_u)
        views = [student_view(weak_u, config, draws_u) for _ in range(config.consistency.strong_views)]
        dropout = config.consistency.feature_dropout
        if dropout > 0:
            views.append(StudentView(weak_u.image, lambda labels: labels))
        targets = {"supervised_loss": Target(weak_l.warp(batch_l.maps["mask"]), None)}
        if config.consistency.weight > 0:
            said = teacher_targets(self._teacher, weak_l, weak_u, config.consistency)
            targets["consistency_loss"] = as_seen(said, views)
        if config.pseudo_mask.weight > 0:
            said = pseudo_mask_targets(batch_l, batch_u, weak_l, weak_u, config.pseudo_mask)
            targets["pseudo_mask_loss"] = as_seen(said, views[:1])
        weights = {
            "supervised_loss": config.supervised.weight,
            "consistency_loss": config.consistency.weight * ramp_up(step, self._ramp_up_steps),
            "pseudo_mask_loss": config.pseudo_mask.weight,
        }
        return StepInputs(
            network_input(laid_out(torch.cat([weak_l.image, *(view.image for view in views)]), config.training)),
            {name: target.class_ids for name, target in targets.items()},
            {name: weights[name] for name in targets},
            batch_l.image_ids + batch_u.image_ids,
            {name: target.weight for name, target in targets.items() if target.weight is not None},
            FeatureDropout(len(weak_u.image), config.consistency.feature_dropout)
            if config.consistency.feature_dropout > 0
            else None,
        )


class StudentView(NamedTuple):
    """Of unlabelled images: what the student sees, and what becomes of label maps of the weak view."""

    image: Tensor
    """(N,3,h,w) uint8"""
    warp: Callable[[Tensor], Tensor]
    """(N,h,w) → the same, uint8"""


def student_view(weak_u: View, config: Config, draws: Draws) -> StudentView:
    """A x_u, and with `consistency.cutmix` boxes of it from another image."""
    view, chance = strong_view(weak_u, config.augment.strong, draws), config.consistency.cutmix
    if chance == 0:
        return StudentView(view.image, view.warp)
    count, size = len(view.image), (view.image.shape[-2], view.image.shape[-1])
    mixing = draw_mixing(count, size, chance, draws, view.image.device)
    return StudentView(mixing(view.image), lambda labels: mixing(view.warp(labels)))


@torch.no_grad()
def teacher_targets(teacher: nn.Module, weak_l: View, weak_u: View, settings: ConsistencySettings) -> Target:
    """argmax T([x_l; x_u]) on the weak views, 255 on padding and below the threshold. One forward pass; hard labels are
    warped afterwards, not probabilities."""
    logits, _ = teacher(network_input(torch.cat([weak_l.image, weak_u.image])))
    padding = ~torch.cat([weak_l.valid, weak_u.valid])
    if settings.confidence_threshold == 0 and not settings.weight_by_confidence:
        return Target(best_class(logits).to(torch.uint8).masked_fill(padding, IGNORE_INDEX), None)
    confidence, best = logits.float().softmax(dim=1).max(dim=1)
    class_ids = best.to(torch.uint8).masked_fill(padding, IGNORE_INDEX)
    kept = losses.keep_confident(class_ids, confidence, settings.confidence_threshold, settings.threshold_rule)
    return Target(kept, quantise(confidence) if settings.weight_by_confidence else None)


def pseudo_mask_targets(
    batch_l: Batch, batch_u: Batch, weak_l: View, weak_u: View, settings: PseudoMaskSettings
) -> Target:
    """[ŷ_l; ŷ_u] on the weak views, 255 below the threshold; the main head never learns those of labelled images."""
    pairs = ((batch_l, weak_l), (batch_u, weak_u))
    class_ids, confidence = (
        torch.cat([view.warp(batch.maps[name]) for batch, view in pairs]) for name in ("pseudo_mask", "confidence")
    )
    kept = losses.keep_confident(class_ids, confidence, settings.confidence_threshold, settings.threshold_rule)
    if settings.head == "main":
        kept = kept.clone()
        kept[: len(weak_l.image)] = IGNORE_INDEX
    return Target(kept, confidence if settings.weight_by_confidence else None)


def as_seen(weak: Target, views: Sequence[StudentView]) -> Target:
    """[y_l; W y_u …] from [y_l; y_u]: W is each view's geometry (and mixing) in turn."""
    unlabelled = len(views[0].image)

    def moved(labels: Tensor) -> Tensor:
        return torch.cat([labels[:-unlabelled], *(view.warp(labels[-unlabelled:]) for view in views)])

    return Target(moved(weak.class_ids), None if weak.weight is None else moved(weak.weight))
