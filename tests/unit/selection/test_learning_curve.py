"""Why: budgets for labels are decided by the interval, so it must hold what comes as often as it says, and not be idly wide."""

import numpy as np
import pytest

from threestage.selection.learning_curve import LearningCurve

LABELS = (11, 11, 11, 23, 23, 46)


def true_curve(random: np.random.Generator) -> tuple[list[float], float]:
    """Runs on a curve of any shape, and one with twice the labels."""
    ceiling, exponent = random.uniform(0.55, 0.95), random.uniform(0.3, 1.2)
    lost, deviation = random.uniform(0.05, 0.3), random.uniform(0.005, 0.02)

    def run(labels: int) -> float:
        return ceiling - lost * (labels / 11) ** -exponent + random.normal(0, deviation * (46 / labels) ** 0.4)

    return [run(labels) for labels in LABELS], run(92)


def test_the_interval_holds_eight_of_ten() -> None:
    random, inside, widths = np.random.default_rng(0), 0, list[float]()
    for _ in range(60):
        scores, truth = true_curve(random)
        found = LearningCurve.fit(LABELS, scores).at(92)
        inside += found.low <= truth <= found.high
        widths.append(found.high - found.low)
    assert 42 <= inside <= 56
    assert np.mean(widths) < 0.08


def test_more_labels_are_forecast_better_and_less_surely() -> None:
    curve = LearningCurve.fit(LABELS, [0.40, 0.41, 0.39, 0.46, 0.47, 0.52])
    twice, eightfold = curve.at(92), curve.at(368)
    assert 0.52 < twice.mean_iou < eightfold.mean_iou < 1
    assert eightfold.high - eightfold.low > twice.high - twice.low
    assert curve.at(92) == twice, "the same points give the same forecast"


def test_a_flat_curve_stays_flat() -> None:
    found = LearningCurve.fit(LABELS, [0.60, 0.60, 0.60, 0.60, 0.60, 0.60]).at(92)
    assert found.mean_iou == pytest.approx(0.60, abs=0.02)
