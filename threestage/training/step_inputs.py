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
from threestage.config import Config, ConsistencySettings, SupervisedSettings
from threestage.data.batches import Batch, BatchSlice, TimedIterator
from threestage.prediction.pseudo_masks import PseudoMaskSettings, best_class, quantise
from threestage.training import losses
from threestage.training.loop import to_memory_format
from threestage.training.schedule import ramp_up
from threestage.training.step import FeatureDropout, StepInputs

COMPLEMENTARY_CHANCE = 0.5
"""Of a channel to be lost in the first of two strong views, and kept in the second (UniMatch V2)."""


class BatchStream(NamedTuple):
    """Batches on the device, and which rows of the global batch they are."""

    batches: TimedIterator
    share: BatchSlice
    class_weights: Tensor | None = None
    """(256,) uint8 by class id, 255 is a whole pixel: what a labelled pixel counts; None: all the same"""

    def draws(self, random: torch.Generator) -> Draws:
        return Draws(random, self.share.first, self.share.total)


class Target(NamedTuple):
    """What pixels are to become, and how much each counts."""

    class_ids: Tensor
    """(N,h,w) uint8, 255 where a pixel does not count"""
    weight: Tensor | None
    """(N,h,w) uint8, 255 is a whole pixel; None: all are"""
    of: Tensor | None = None
    """(N,h,w) uint8, 255 where a pixel is not among those that the sum is divided by; None: those of `class_ids`"""

    def map(self, move: Callable[[Tensor], Tensor]) -> "Target":
        """Every map moved alike."""
        weight, of = (None if part is None else move(part) for part in (self.weight, self.of))
        return Target(move(self.class_ids), weight, of)


class Terms:
    """The terms of a step, added one by one: targets, weights, and what each sum is divided by."""

    def __init__(self) -> None:
        self.targets: dict[str, Tensor] = {}
        self.weights: dict[str, float] = {}
        self.pixel_weights: dict[str, Tensor] = {}
        self.divisors: dict[str, Tensor] = {}

    def add(self, name: str, target: Target, weight: float) -> None:
        self.targets[name], self.weights[name] = target.class_ids, weight
        if target.weight is not None:
            self.pixel_weights[name] = target.weight
        if target.of is not None:
            self.divisors[name] = losses.valid_pixels(target.of)

    def add_supervised(self, mask: Tensor, feed: BatchStream, settings: SupervisedSettings, weight: float) -> None:
        """L_sup of labelled views whose masks are `mask` (n,h,w), and the Dice loss of the same."""
        class_weight = None if feed.class_weights is None else feed.class_weights[mask.long()]
        self.add("supervised_loss", Target(mask, class_weight), weight)
        if class_weight is not None:
            counted = class_weight.double() * (mask != IGNORE_INDEX)
            self.divisors["supervised_loss"] = counted.sum() / 255
        if settings.hard_share < 1:
            self.divisors["supervised_loss"] = losses.hard_pixels(mask, settings.hard_share).sum()
        if settings.dice > 0:
            self.targets["dice_loss"], self.weights["dice_loss"] = mask, settings.dice
            self.divisors["dice_loss"] = losses.images_with_pixels(mask)


class SupervisedSteps:
    """Stage 1: CE(g(x_l), y_l); with `stage1.strong_view` the strong view of each image is learnt beside the weak one."""

    def __init__(self, config: Config, labelled: BatchStream) -> None:
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
        terms = Terms()
        terms.add_supervised(mask, self._labelled, config.supervised, 1.0)
        return _inputs(config, terms, [image], batch.image_ids)


class ThreeTaskSteps:
    """Stages 2 and 3: w_sup · L_sup + w_con · L_con + w_pm · L_pm; a stage 1 that sees the pool: the same without L_pm. A term
    of weight 0 is not computed."""

    def __init__(
        self, stage: str, config: Config, teacher: nn.Module, labelled: BatchStream, unlabelled: BatchStream
    ) -> None:
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
        if config.consistency.feature_dropout > 0:
            views.append(StudentView(weak_u.image, lambda labels: labels))

        # the labelled images: weak, and strong beside it
        terms, images, mask = Terms(), [weak_l.image], weak_l.warp(batch_l.maps["mask"])
        if config.stage1.strong_view if self._stage == "stage1" else config.supervised.strong_view:
            strong_l = strong_view(weak_l, config.augment.strong, draws_l)
            images, mask = [weak_l.image, strong_l.image], torch.cat([mask, strong_l.warp(mask)])
        terms.add_supervised(mask, self._labelled, config.supervised, config.supervised.weight)

        # the unlabelled ones: what the teacher and the pseudo-masks say, as each view shows it
        strong_labelled = len(mask) - len(weak_l.image)
        if config.consistency.weight > 0:
            weak = teacher_targets(self._teacher, weak_l, weak_u, config.consistency)
            seen, ramp = warp_targets(weak, views, strong_labelled), ramp_up(step, self._ramp_up_steps)
            apart, unlabelled = config.consistency.feature_weight, len(weak_u.image)
            of_strong_views = seen if apart is None else seen.map(lambda labels: labels[:-unlabelled])
            terms.add("consistency_loss", of_strong_views, config.consistency.weight * ramp)
            if apart is not None:
                terms.add("feature_loss", only_last(seen, unlabelled), apart * ramp)
        if config.pseudo_mask.weight > 0 and self._stage != "stage1":
            weak = pseudo_mask_targets(batch_l, batch_u, weak_l, weak_u, config.pseudo_mask)
            terms.add("pseudo_mask_loss", warp_targets(weak, views[:1], strong_labelled), config.pseudo_mask.weight)
        images += [view.image for view in views]
        ids = batch_l.image_ids + batch_u.image_ids
        return _inputs(config, terms, images, ids, _feature_dropout(config.consistency, len(weak_u.image)))


def _inputs(
    config: Config,
    terms: Terms,
    images: list[Tensor],
    image_ids: tuple[str, ...],
    feature_dropout: FeatureDropout | None = None,
) -> StepInputs:
    return StepInputs(
        network_input(to_memory_format(torch.cat(images), config.training)), terms.targets, terms.weights, image_ids,
        terms.pixel_weights, feature_dropout, terms.divisors, config.supervised.hard_share,
    )  # fmt: skip


def _feature_dropout(settings: ConsistencySettings, unlabelled: int) -> FeatureDropout | None:
    if settings.complementary_dropout:
        return FeatureDropout(2 * unlabelled, COMPLEMENTARY_CHANCE, True)
    return FeatureDropout(unlabelled, settings.feature_dropout) if settings.feature_dropout > 0 else None


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
    if settings.confidence_threshold == 0 and not settings.weight_by_confidence and settings.labelled:
        return Target(best_class(logits).to(torch.uint8).masked_fill(padding, IGNORE_INDEX), None)
    confidence, best = logits.float().softmax(dim=1).max(dim=1)
    class_ids = best.to(torch.uint8).masked_fill(padding, IGNORE_INDEX)
    if not settings.labelled:
        class_ids[: len(weak_l.image)] = IGNORE_INDEX
    kept = losses.keep_confident(class_ids, confidence, settings.confidence_threshold, settings.threshold_rule)
    weight = quantise(confidence) if settings.weight_by_confidence else None
    return Target(kept, weight, class_ids if settings.normaliser == "all" else None)


def pseudo_mask_targets(
    batch_l: Batch, batch_u: Batch, weak_l: View, weak_u: View, settings: PseudoMaskSettings
) -> Target:
    """[ŷ_l; ŷ_u] on the weak views, 255 below the threshold; the main head never learns those of labelled images."""
    pairs = ((batch_l, weak_l), (batch_u, weak_u))
    class_ids, confidence = (
        torch.cat([view.warp(batch.maps[name]) for batch, view in pairs]) for name in ("pseudo_mask", "confidence")
    )
    if settings.head == "main":
        class_ids = class_ids.clone()
        class_ids[: len(weak_l.image)] = IGNORE_INDEX
    kept = losses.keep_confident(class_ids, confidence, settings.confidence_threshold, settings.threshold_rule)
    weight = confidence if settings.weight_by_confidence else None
    return Target(kept, weight, class_ids if settings.normaliser == "all" else None)


def warp_targets(weak: Target, views: Sequence[StudentView], strong_labelled: int = 0) -> Target:
    """[y_l; W y_u …] from [y_l; y_u]: W is each view's geometry (and mixing) in turn. Between them stand `strong_labelled`
    images that learn their masks only."""
    unlabelled = len(views[0].image)

    def moved(labels: Tensor) -> Tensor:
        between = labels.new_full((strong_labelled, *labels.shape[1:]), IGNORE_INDEX)
        return torch.cat([labels[:-unlabelled], between, *(view.warp(labels[-unlabelled:]) for view in views)])

    return weak.map(moved)


def only_last(seen: Target, count: int) -> Target:
    """The targets of the last `count` images alone."""

    def last(labels: Tensor) -> Tensor:
        return torch.cat([torch.full_like(labels[:-count], IGNORE_INDEX), labels[-count:]])

    return seen.map(last)
