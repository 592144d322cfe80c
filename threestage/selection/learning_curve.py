"""The learning curve of a model: mean IoU against the number of labels, as a power law with an interval.

With n labels, of which there are N at most, the error 1 − mean IoU is e·((1 − r) + r·(n/N)^−b): e at N, of which labels can
remove the share r (Hestness et al., "Deep Learning Scaling is Predictable, Empirically", 2017). A run differs from the curve by
noise whose deviation falls with the root of the labels. Few points do not decide r and b, so all values of a grid are weighed by
how likely they make the points, and the interval is that of a further run.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from threestage.settings import Settings

REMOVABLE = np.linspace(0.1, 1, 10)
EXPONENTS = np.geomspace(0.1, 2, 10)
DEVIATIONS = np.geomspace(0.003, 0.06, 9)
LEVELS, WIDTH = 33, 0.12
"""Values of the mean IoU at N: so many, so far around what was measured."""
SAMPLES = 20_000
SHARE = 0.8
"""Of runs that the interval holds."""

Floats = npt.NDArray[np.float64]


class ForecastScore(Settings):
    """The mean IoU of a run with so many labels: the middle, and the bounds of SHARE."""

    labels: int
    mean_iou: float
    low: float
    high: float


@dataclass(frozen=True)
class LearningCurve:
    """`most`: N. Samples of the posterior (S,) each: mean IoU at N, r, b, and the noise's deviation at N."""

    most: int
    level: Floats
    removable: Floats
    exponent: Floats
    deviation: Floats

    @classmethod
    def fit(cls, labels: Sequence[int], scores: Sequence[float]) -> "LearningCurve":
        """From runs with these numbers of labels, the largest among them."""
        most, at = max(labels), np.array(scores)
        top = at[np.array(labels) == most].mean()
        levels = np.clip(np.linspace(top - WIDTH, top + WIDTH, LEVELS), 0, 1)
        grid = [axis.ravel() for axis in np.meshgrid(levels, REMOVABLE, EXPONENTS, DEVIATIONS, indexing="ij")]
        likelihood = np.zeros(grid[0].size)
        for number, score in zip(labels, at, strict=True):
            deviation = grid[3] * _spread(number, most)
            misses = (score - _mean(grid[0], grid[1], grid[2], number / most)) / deviation
            likelihood -= misses**2 / 2 + np.log(deviation)
        weights = np.exp(likelihood - likelihood.max())
        chosen = np.random.default_rng(0).choice(len(weights), SAMPLES, p=weights / weights.sum())
        return cls(most, *(axis[chosen] for axis in grid))

    def at(self, labels: int) -> ForecastScore:
        noise = np.random.default_rng(1).standard_normal(SAMPLES) * self.deviation * _spread(labels, self.most)
        scores = _mean(self.level, self.removable, self.exponent, labels / self.most) + noise
        low, middle, high = np.clip(np.quantile(scores, [(1 - SHARE) / 2, 0.5, (1 + SHARE) / 2]), 0, 1).tolist()
        return ForecastScore(labels=labels, mean_iou=middle, low=low, high=high)


def _mean(level: Floats, removable: Floats, exponent: Floats, ratio: float) -> Floats:
    return 1 - (1 - level) * (1 - removable + removable * ratio**-exponent)


def _spread(labels: int, most: int) -> float:
    return float((most / labels) ** 0.5)
