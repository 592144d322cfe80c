"""Which images to label next: those of the highest worth, one after another.

An image's worth is the product of what a strategy looks at: how unsure the model is of it, how rare the classes are that
it sees there, and how far the image lies from the nearest one that is labelled or chosen already. The last is greedy
k-centre (Sener and Savarese, "Active Learning for Convolutional Neural Networks: A Core-Set Approach", ICLR 2018).

Distances only fall while images are chosen. So one pass over the pool keeps the KEPT images of the highest worth, and the
choice among them is exact until the best of them is worth less than an image that was not kept; then comes another pass.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from threestage.selection.candidates import CandidateFiles, Candidates, Floats

KEPT = 20_000
CENTRES_AT_ONCE = 1024
LEAST_SHARE = 1e-3
"""A class with a smaller share of the labelled images is no rarer than this."""
BINS = 1000

Worth = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Strategy:
    """What the worth is a product of; of nothing: a random number."""

    uncertainty: Literal["entropy", "margin"] | None = None
    rarity: bool = False
    distance: bool = False


StrategyName = Literal["combined", "random", "entropy", "margin", "coreset"]
STRATEGIES: Mapping[StrategyName, Strategy] = {
    "combined": Strategy("entropy", rarity=True, distance=True),
    "random": Strategy(),
    "entropy": Strategy("entropy"),
    "margin": Strategy("margin"),
    "coreset": Strategy(distance=True),
}


@dataclass(frozen=True)
class Survey:
    """Of the whole pool. `images`: that may be chosen. `centres`: features of the covered ones. `class_shares`: (C,) of their
    pixels. `entropies`: how many images have an entropy of each of BINS."""

    images: int
    centres: Floats
    class_shares: Floats
    entropies: npt.NDArray[np.int64]

    @property
    def rarities(self) -> Floats:
        """(C,), 1 for a class that has all pixels."""
        return (np.maximum(self.class_shares, LEAST_SHARE) ** -0.5).astype(np.float32)

    def share_below(self, entropy: float) -> float:
        """Of the images that may be chosen, those whose entropy is lower."""
        return float(self.entropies[: _bin(np.array([entropy]))[0]].sum() / max(1, self.images))


def survey(files: CandidateFiles) -> Survey:
    images, entropies = 0, np.zeros(BINS, np.int64)
    centres, shares = list[Floats](), list[Floats]()
    for candidates, covered in files.read():
        images += len(candidates)
        entropies += np.bincount(_bin(candidates.entropy), minlength=BINS)
        centres.append(covered.features)
        shares.append(covered.class_shares)
    all_shares = np.concatenate(shares)
    mean = all_shares.mean(0) if len(all_shares) else np.full(all_shares.shape[1], 1 / all_shares.shape[1], np.float32)
    return Survey(images, np.concatenate(centres), mean, entropies)


def _bin(entropy: Floats) -> npt.NDArray[np.int64]:
    return np.clip((entropy * BINS).astype(np.int64), 0, BINS - 1)


@dataclass(frozen=True)
class Choice:
    """An image: where it stands, and its distance to the nearest one that was labelled or chosen before; 1 where none was."""

    file: int
    row: int
    worth: float
    distance: float


def choose_images(files: CandidateFiles, of_pool: Survey, strategy: Strategy, count: int) -> list[Choice]:
    """At most `count` images, the best first; where worths are the same, in a random order."""
    chosen, centres = list[Choice](), of_pool.centres
    count = min(count, of_pool.images)
    while len(chosen) < count:
        kept = _Kept.of_pool(files, of_pool, strategy, centres, chosen)
        while len(chosen) < count and (found := kept.best()) is not None:
            chosen.append(found[0])
            centres = np.concatenate([centres, found[1]])
    return chosen


class _Kept:
    """The images of the highest worth, in its order. `bound`: what those that were not kept are worth at most."""

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy
        self._images: list[Candidates] = []
        self._bases: list[Worth] = []  # without the distance
        self._distances: list[Floats] = []
        self._bound = -1.0

    @classmethod
    def of_pool(
        cls, files: CandidateFiles, of_pool: Survey, strategy: Strategy, centres: Floats, chosen: Sequence[Choice]
    ) -> "_Kept":
        """One pass over the pool."""
        kept, taken = cls(strategy), dict[int, list[int]]()
        for choice in chosen:
            taken.setdefault(choice.file, []).append(choice.row)
        for number, (images, _) in enumerate(files.read()):
            images = images.take(~np.isin(images.row, taken.get(number, ())))
            kept._add(images, _base(images, of_pool, strategy), nearest(images.features, centres))
            if sum(map(len, kept._images)) > 2 * KEPT:
                kept._prune()
        kept._prune()
        return kept

    def best(self) -> tuple[Choice, Floats] | None:
        """Take the image that is worth most, with its feature (1,D); None where an image that was not kept may be worth more."""
        images, distances = self._images[0], self._distances[0]
        worth = self._worth(self._bases[0], distances)
        place = int(worth.argmax()) if len(worth) else -1
        if place < 0 or worth[place] < max(self._bound, 0):
            return None
        feature = images.features[place : place + 1]
        choice = Choice(int(images.file[place]), int(images.row[place]), float(worth[place]), float(distances[place]))
        self._bases[0][place] = -1.0  # is taken
        self._distances[0] = np.minimum(distances, nearest(images.features, feature))
        return choice, feature

    def _worth(self, base: Worth, distances: Floats) -> Worth:
        return np.where(base < 0, -1.0, base * distances) if self._strategy.distance else base

    def _add(self, images: Candidates, base: Worth, distances: Floats) -> None:
        inside = self._worth(base, distances) >= self._bound
        self._images.append(images.take(inside))
        self._bases.append(base[inside])
        self._distances.append(distances[inside])

    def _prune(self) -> None:
        images = Candidates.joined(self._images)
        base, distances = np.concatenate(self._bases), np.concatenate(self._distances)
        worth = self._worth(base, distances)
        best = np.lexsort((images.order, -worth))
        if len(best) > KEPT:
            self._bound = max(self._bound, float(worth[best[KEPT]]))
        best = best[:KEPT]
        self._images, self._bases, self._distances = [images.take(best)], [base[best]], [distances[best]]


def _base(images: Candidates, of_pool: Survey, strategy: Strategy) -> Worth:
    """Their worth without the distance."""
    worth = np.ones(len(images))
    if strategy == Strategy():
        worth = images.order
    if strategy.uncertainty == "entropy":
        worth = worth * images.entropy
    if strategy.uncertainty == "margin":
        worth = worth * (1 - images.margin)
    if strategy.rarity:
        worth = worth * (images.class_shares @ of_pool.rarities)
    return np.maximum(worth, 0)


def nearest(features: Floats, centres: Floats) -> Floats:
    """Features (N,D) and centres (M,D) → (N,): distance to the nearest centre; 1 without centres."""
    if not len(centres) or not len(features):
        return np.ones(len(features), np.float32)
    lengths = (features**2).sum(1)
    best = np.full(len(features), np.inf, np.float32)
    for start in range(0, len(centres), CENTRES_AT_ONCE):
        some = centres[start : start + CENTRES_AT_ONCE]
        squared = lengths[:, None] + (some**2).sum(1) - 2 * features @ some.T
        best = np.minimum(best, squared.min(1))
    return np.sqrt(np.maximum(best, 0))
