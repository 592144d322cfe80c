"""What a few paired differences of mean IoU say: their mean, its t-interval and its bootstrap interval."""

import math
import statistics
from collections.abc import Sequence

import numpy as np

T_975 = {
    1: 12.706,
    2: 4.303,
    3: 3.182,
    4: 2.776,
    5: 2.571,
    6: 2.447,
    7: 2.365,
    8: 2.306,
    9: 2.262,
    10: 2.228,
    11: 2.201,
}
"""The 97.5 % point of Student's t by degrees of freedom."""
RESAMPLES = 10_000


def t_interval(differences: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of 2 to 12 differences."""
    mean, count = statistics.fmean(differences), len(differences)
    half = T_975[count - 1] * statistics.stdev(differences) / math.sqrt(count)
    return mean - half, mean + half


def bootstrap_interval(differences: Sequence[float]) -> tuple[float, float]:
    """95 % percentile interval of the mean, of resampled differences."""
    values = np.asarray(differences)
    means = values[np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def describe(differences: Sequence[float]) -> str:
    """Every difference in points, their mean, and both intervals where there are two differences at least."""
    listed = ", ".join(f"{100 * value:+.1f}" for value in differences)
    if len(differences) < 2:
        return f"{listed} points"
    intervals = " and ".join(
        f"{name} {100 * low:+.1f} to {100 * high:+.1f}"
        for name, (low, high) in (("t", t_interval(differences)), ("bootstrap", bootstrap_interval(differences)))
    )
    return f"{listed}; mean {100 * statistics.fmean(differences):+.1f} points (95 %: {intervals})"
