"""What one worker computes in one step, whole or in pieces."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from threestage.training import losses

TERMS: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "supervised_loss": losses.supervised_loss,
    "dice_loss": losses.dice_loss,
    "consistency_loss": losses.consistency_loss,
    "feature_loss": losses.consistency_loss,
    "pseudo_mask_loss": losses.pseudo_mask_loss,
}
AUXILIARY_TERM = "pseudo_mask_loss"  # the only one that sees the auxiliary head, where the network has one


class FeatureDropout(NamedTuple):
    """The last images of a step lose channels of their features: each channel with a chance (UniMatch's second stream), or,
    `complementary`, the images' two halves, which show the same pictures, what the other keeps (UniMatch V2)."""

    images: int
    probability: float
    complementary: bool = False

    def within(self, piece: slice, images: int) -> "FeatureDropout":
        """The same of a piece of the step's images."""
        return self._replace(images=max(0, piece.stop - max(piece.start, images - self.images)))


@dataclass(frozen=True)
class StepInputs:
    """The views of a step and what they are to become, on the worker's device."""

    image: Tensor
    """(N,3,h,w) float in [0,1], the labelled images first"""
    targets: dict[str, Tensor]
    """by term: (n,h,w) class ids of the first n ≤ N images, 255 where a pixel does not count"""
    weights: dict[str, float]
    """by term"""
    image_ids: tuple[str, ...]
    pixel_weights: dict[str, Tensor] = field(default_factory=dict)
    """by term, where pixels count for less than one: (n,h,w) uint8, 255 is a whole pixel"""
    feature_dropout: FeatureDropout | None = None
    divisors: dict[str, Tensor] = field(default_factory=dict)
    """by term, where its sum is not divided by its valid pixels: what it is divided by, float64"""
    hard_share: float = 1.0
    """of the supervised term's pixels, see `losses.hard_pixel_sum`"""


class StepSource(Protocol):
    """A stage: what each of its steps computes."""

    @property
    def waited(self) -> float:
        """Seconds that `draw` has waited for data so far."""

    def draw(self, step: int) -> StepInputs:
        """The worker's inputs of a step; called once for each, in order."""


def piece_sums(network: nn.Module, inputs: StepInputs, piece: slice) -> dict[str, Tensor]:
    """Each term's cross-entropy, summed over the pixels of some of the images."""
    image, dropout = inputs.image[piece], inputs.feature_dropout
    dropped = {} if dropout is None else {"dropout": dropout.within(piece, len(inputs.image))}
    main, auxiliary = network(image, with_auxiliary=AUXILIARY_TERM in inputs.targets, **dropped)
    sums = {}
    for name, target in inputs.targets.items():
        part = target[piece]
        weight = inputs.pixel_weights.get(name)
        logits = auxiliary if name == AUXILIARY_TERM and auxiliary is not None else main
        given = logits[: len(part)], part, None if weight is None else weight[piece]
        hard = name == "supervised_loss" and inputs.hard_share < 1
        sums[name] = losses.hard_pixel_sum(*given, inputs.hard_share) if hard else TERMS[name](*given)
    return sums


def micro_batches(images: int, accumulate: int) -> Iterator[slice]:
    """`images` cut into at most `accumulate` pieces of nearly one size."""
    number = min(images, accumulate)
    for piece in range(number):
        yield slice(images * piece // number, images * (piece + 1) // number)
