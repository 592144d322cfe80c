"""Why: holes, parts and corners that touch are what polygons lose."""

import numpy as np
import pytest

from tests.label_masks import random_mask, random_size
from threestage.labels.outlines import outlines, polygons_of
from threestage.labels.rasterise import Bytes, fill_ring


def drawn(mask: Bytes, simplify: float = 0) -> Bytes:
    """How many polygons cover each pixel."""
    count = np.zeros(mask.shape, np.uint8)
    for ring in polygons_of(mask.astype(bool), simplify):
        patch = fill_ring(ring, mask.shape)
        rows, columns = patch.inside.shape
        count[patch.top : patch.top + rows, patch.left : patch.left + columns] += patch.inside
    return count


@pytest.mark.parametrize("seed", range(15))
def test_polygons_give_the_mask_back(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = random_mask(rng, random_size(rng, 60), 2) == 1
    assert (drawn(mask) == mask).all()


def test_a_hole_with_an_island_and_corners_that_touch() -> None:
    mask = np.ones((9, 9), np.uint8)
    mask[1:8, 1:8] = 0
    mask[3:6, 3:6] = 1
    mask[4, 4] = 0
    assert len(polygons_of(mask > 0)) == 2 and (drawn(mask) == mask).all()
    touching = np.eye(3, dtype=np.uint8)
    assert len(outlines(touching > 0)) == 3 and (drawn(touching) == touching).all()


def test_no_pixel_has_no_outline() -> None:
    assert polygons_of(np.zeros((3, 4), bool)) == []


def test_simplified_outlines_have_fewer_corners_and_stay_near() -> None:
    rows, columns = np.mgrid[:200, :200]
    disc = (np.hypot(rows - 100, columns - 100) < 80) & (np.hypot(rows - 100, columns - 100) > 30)
    exact, loose = polygons_of(disc)[0], polygons_of(disc, 1)[0]
    assert len(loose) < len(exact) / 5
    kept = drawn(disc, 1).astype(bool)
    assert (kept & disc).sum() / (kept | disc).sum() > 0.97
