"""The boundary F-score against its definition, written pixel by pixel, and against figures worked out by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from threestage.training.metrics import boundary_f_scores, boundary_tolerance, class_boundary, dilate

IGNORED = 255


def oracle_boundary(ids: np.ndarray, mask: np.ndarray, class_id: int) -> list[tuple[int, int]]:
    """DAVIS's seg2bmap, less what is void or touches it."""
    height, width = ids.shape
    found = []
    for y in range(height):
        for x in range(width):
            around = mask[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
            others = [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
            inside = [(v, u) for v, u in others if v < height and u < width]
            here = ids[y, x] == class_id
            if any((ids[v, u] == class_id) != here for v, u in inside) and not (around == IGNORED).any():
                found.append((y, x))
    return found


def oracle(mask: np.ndarray, prediction: np.ndarray, class_id: int, tolerance: float) -> float:
    true, found = (oracle_boundary(ids, mask, class_id) for ids in (mask, prediction))
    if not true and not found:
        return math.nan
    if not true or not found:
        return 0.0

    def share_near(pixels: list[tuple[int, int]], others: list[tuple[int, int]]) -> float:
        return sum(min(math.dist(p, q) for q in others) <= tolerance for p in pixels) / len(pixels)

    precision, recall = share_near(found, true), share_near(true, found)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def blobs(seed: int, height: int, width: int, classes: int, void: float) -> tuple[np.ndarray, np.ndarray]:
    """A mask of rectangles, and a prediction that is nearly it."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), np.uint8)
    for _ in range(5):
        top, left = rng.integers(0, height), rng.integers(0, width)
        mask[top : top + rng.integers(1, 20), left : left + rng.integers(1, 20)] = rng.integers(0, classes)
    prediction = np.roll(mask, rng.integers(-3, 4, 2), (0, 1))
    noise = rng.random(mask.shape) < 0.01
    prediction[noise] = rng.integers(0, classes, noise.sum())
    mask[rng.random(mask.shape) < void] = IGNORED
    return mask, prediction


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 40), st.sampled_from([0.0, 0.01, 0.2, 1.0]))
def test_against_the_definition(seed: int, height: int, width: int, void: float) -> None:
    pairs = [blobs(seed + i, height, width, 4, void) for i in range(2)]
    masks, predictions = (torch.from_numpy(np.stack(ids)) for ids in zip(*pairs, strict=True))
    scores = boundary_f_scores(masks, predictions, 4)
    assert scores.shape == (2, 4) and scores.dtype == torch.float64
    expected = [[oracle(mask, found, c, boundary_tolerance(height, width)) for c in range(4)] for mask, found in pairs]
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-12)


def test_against_the_definition_with_a_wider_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("threestage.training.metrics.BOUNDARY_TOLERANCE", 0.08)
    mask, prediction = blobs(3, 36, 48, 4, 0.002)
    prediction = np.roll(prediction, 4, 1)
    scores = boundary_f_scores(torch.from_numpy(mask[None]), torch.from_numpy(prediction[None]), 4)[0]
    expected = [oracle(mask, prediction, c, 5) for c in range(4)]
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-12)
    assert boundary_tolerance(36, 48) == 5 and any(0 < score < 1 for score in expected)


@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(1, 30), st.integers(0, 12))
@settings(deadline=None, max_examples=60)
def test_dilation_by_a_disk(seed: int, height: int, width: int, radius: int) -> None:
    member = np.random.default_rng(seed).random((2, height, width)) < 0.02
    y, x = np.mgrid[:height, :width]
    expected = np.zeros_like(member)
    for n, v, u in zip(*np.nonzero(member), strict=True):
        expected[n] |= (y - v) ** 2 + (x - u) ** 2 <= radius**2
    assert np.array_equal(dilate(torch.from_numpy(member), radius).numpy(), expected)


def test_the_tolerance() -> None:
    assert [boundary_tolerance(*size) for size in ((64, 64), (100, 100), (720, 960), (1024, 2048))] == [1, 2, 9, 18]


def test_by_hand() -> None:
    """Class 1 fills the right half; the prediction is one column off, then five. Tolerance: 1 pixel."""
    mask = torch.zeros(1, 10, 20, dtype=torch.uint8)
    mask[:, :, 10:] = 1
    near, far, none = mask.roll(1, 2), mask.roll(5, 2), torch.zeros_like(mask)
    near[:, :, 0], far[:, :, :5] = 0, 0
    assert class_boundary(mask == 1)[0].nonzero()[:, 1].unique().tolist() == [9]
    assert boundary_f_scores(mask, mask, 3)[0, :2].tolist() == [1, 1]
    assert boundary_f_scores(mask, near, 3)[0, :2].tolist() == [1, 1]
    assert boundary_f_scores(mask, far, 3)[0, :2].tolist() == [0, 0]
    assert boundary_f_scores(mask, none, 3)[0, :2].tolist() == [0, 0]
    assert boundary_f_scores(mask, mask, 3)[0, 2].isnan()
    half = mask.clone()
    half[:, 5:] = mask.roll(5, 2)[:, 5:]  # the upper half is right, the lower one five columns off, with a step between
    half[:, 5:, :5] = 0
    score = boundary_f_scores(mask, half, 3)[0, 1].item()
    precision, recall = 6 / 15, 6 / 10  # found: 5 in the true column, 5 along the step (one of them near), 5 below it
    assert 0 < score < 1 and score == pytest.approx(oracle(mask[0].numpy(), half[0].numpy(), 1, 1))
    assert score == pytest.approx(2 * precision * recall / (precision + recall))


def test_what_touches_void_is_no_boundary() -> None:
    mask = torch.zeros(1, 10, 20, dtype=torch.uint8)
    mask[:, :, 10:] = 1
    prediction = mask.clone()
    mask[:, :, 9:11] = IGNORED
    assert boundary_f_scores(mask, prediction, 2).isnan().all()
    assert boundary_f_scores(torch.full_like(mask, IGNORED), prediction, 2).isnan().all()
