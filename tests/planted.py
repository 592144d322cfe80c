"""Faults of annotators, planted into masks: what `threestage suspects` must find. By a generator, so a test can repeat them."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from threestage import IGNORE_INDEX

Mask = npt.NDArray[np.uint8]
LEAST_SHARE = 0.01
"""Of an image's pixels: a class with fewer is not worth a fault."""


def swap(mask: Mask, random: np.random.Generator) -> Mask:
    """Two classes of the image have changed places; where there is one only, it is another class."""
    first, *others = random.permutation(_classes(mask)).tolist()
    second = others[0] if others else (first + 1) % (int(mask[mask != IGNORE_INDEX].max()) + 2)
    return np.select([mask == first, mask == second], [np.uint8(second), np.uint8(first)], mask)


def omission(mask: Mask, random: np.random.Generator) -> Mask:
    """A class of the image, not its commonest, was forgotten: the commonest one is there."""
    commonest, *others = sorted(_classes(mask), key=lambda one: -int((mask == one).sum()))
    return np.where(mask == random.choice(others), np.uint8(commonest), mask) if others else mask


def shift(mask: Mask, random: np.random.Generator) -> Mask:
    """The mask lies 8 to 15 % of the sides beside the image."""
    rows, columns = (round(side * random.uniform(0.08, 0.15)) * int(random.choice([-1, 1])) for side in mask.shape)
    height, width = mask.shape
    at = np.clip(np.arange(height) - rows, 0, height - 1), np.clip(np.arange(width) - columns, 0, width - 1)
    return mask[np.ix_(*at)]


FAULTS: Mapping[str, Callable[[Mask, np.random.Generator], Mask]] = {"swap": swap, "omission": omission, "shift": shift}


def planted(masks: Sequence[Mask], share: float, seed: int) -> tuple[list[Mask], dict[int, str]]:
    """The masks, a share of them with one fault each, and which have which."""
    random = np.random.default_rng(seed)
    chosen = random.permutation(len(masks))[: round(share * len(masks))].tolist()
    faults = {number: str(random.choice(list(FAULTS))) for number in sorted(chosen)}
    found = [FAULTS[faults[n]](mask, random) if n in faults else mask for n, mask in enumerate(masks)]
    return found, {n: kind for n, kind in faults.items() if (found[n] != masks[n]).any()}


def average_precision(scores: Sequence[float], faulty: set[int]) -> float:
    """Mean of the precision at each faulty image, the highest score first."""
    ranks = [place for place, number in enumerate(np.argsort(-np.asarray(scores), kind="stable")) if number in faulty]
    return float(np.mean([(n + 1) / (rank + 1) for n, rank in enumerate(ranks)]))


def _classes(mask: Mask) -> list[int]:
    counts = np.bincount(mask.ravel(), minlength=256)[:IGNORE_INDEX]
    large = np.flatnonzero(counts >= LEAST_SHARE * mask.size)
    return large.tolist() or [int(counts.argmax())]
