"""How much a model contradicts the masks of images that it has not learnt.

The surprise of a pixel is −log of the probability that the model gives its label. An image's score is the mean over its
labelled pixels of the squared surprise, less what is usual for pixels of that label: a class that the model seldom knows
does not make an image suspect. A confident contradiction counts a hundred times as much as a doubt.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from threestage import IGNORE_INDEX
from threestage.selection.held_out import Bytes, HeldOut

LEVELS = 256
CONTRADICTED = math.log(10)
"""The surprise of a contradicted pixel: the model holds its label for less likely than a tenth."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Contradiction:
    """Of one image. `share`: of its labelled pixels, those that are contradicted. `labelled`, `predicted`: class ids of the
    commonest contradiction, None where there is none, and `pair_share` its share of the labelled pixels."""

    image_id: str
    source: str
    score: float
    share: float
    labelled: int | None = None
    predicted: int | None = None
    pair_share: float = 0.0


def usual_surprise(images: Iterable[HeldOut], num_classes: int) -> Floats:
    """(C,): mean squared surprise of the pixels that have a label."""
    sums, pixels = np.zeros(num_classes), np.zeros(num_classes)
    for image in images:
        known = image.mask != IGNORE_INDEX
        labels = image.mask[known]
        sums += np.bincount(labels, image.surprise[known] ** 2, num_classes)
        pixels += np.bincount(labels, minlength=num_classes)
    return sums / np.maximum(pixels, 1)


def contradiction_of(image: HeldOut, usual: Floats) -> Contradiction:
    known = image.mask != IGNORE_INDEX
    labels = image.mask[known]
    if not len(labels):
        return Contradiction(image.image_id, image.source, -float(usual.max()), 0.0)
    score = (image.surprise[known] ** 2 - usual[labels]).mean()
    against = contradicted(image)
    pairs = np.bincount(image.mask[against].astype(np.int64) * LEVELS + image.class_ids[against])
    if not len(pairs):
        return Contradiction(image.image_id, image.source, float(score), 0.0)
    labelled, predicted = divmod(int(pairs.argmax()), LEVELS)
    share, of_pair = against.sum() / len(labels), pairs.max() / len(labels)
    return Contradiction(image.image_id, image.source, float(score), float(share), labelled, predicted, float(of_pair))


def contradicted(image: HeldOut) -> npt.NDArray[np.bool_]:
    """(H,W): pixels with a label that the model holds for unlikely."""
    return (image.mask != IGNORE_INDEX) & (image.surprise > CONTRADICTED)


def most_contradicted(found: Iterable[Contradiction]) -> Sequence[Contradiction]:
    """The most suspect first."""
    return sorted(found, key=lambda one: (-one.score, one.image_id))


def contradicted_only(image: HeldOut) -> Bytes:
    """(H,W): the model's class where it contradicts the label, else 255."""
    return np.where(contradicted(image), image.class_ids, np.uint8(IGNORE_INDEX))
