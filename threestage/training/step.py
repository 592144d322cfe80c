"""What one worker computes in one step, whole or in pieces."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from threestage.training import losses

TERMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "supervised_loss": losses.supervised_loss,
    "consistency_loss": losses.consistency_loss,
    "pseudo_mask_loss": losses.pseudo_mask_loss,
}
AUXILIARY_TERM = "pseudo_mask_loss"  # the only one that sees the auxiliary head


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


class StepSource(Protocol):
    """A stage: what each of its steps computes."""

    @property
    def waited(self) -> float:
        """Seconds that `draw` has waited for data so far."""

    def draw(self, step: int) -> StepInputs:
        """The worker's inputs of a step; called once for each, in order."""


def piece_sums(network: nn.Module, inputs: StepInputs, piece: slice) -> dict[str, Tensor]:
    """Each term's cross-entropy, summed over the pixels of some of the images."""
    main, auxiliary = network(inputs.image[piece], with_auxiliary=AUXILIARY_TERM in inputs.targets)
    sums = {}
    for name, target in inputs.targets.items():
        part = target[piece]
        logits = auxiliary if name == AUXILIARY_TERM else main
        sums[name] = TERMS[name](logits[: len(part)], part)
    return sums


def pieces(images: int, accumulate: int) -> Iterator[slice]:
    """`images` cut into at most `accumulate` pieces of nearly one size."""
    number = min(images, accumulate)
    for piece in range(number):
        yield slice(images * piece // number, images * (piece + 1) // number)
