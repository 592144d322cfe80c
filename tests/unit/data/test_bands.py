"""Why: a scale that is measured in one way and applied in another teaches a network one sensor and asks it about another."""

import numpy as np
import pytest
from pydantic import ValidationError

from tests.refusals import refused
from threestage.data.bands import Bands, chosen_bands, measured, sampled, shown_bands, some_pixels
from threestage.data.headers import BadImage

WIDE = Bands(count=2, low=(100, -1), high=(600, 1))


def test_low_and_high_become_0_and_255_and_what_lies_outside_is_cut_off() -> None:
    values = np.array([[[100, -1], [600, 1], [350, 0], [-9, 7], [900, np.nan], [np.inf, -np.inf]]], np.float32)
    expected = [[0, 0], [255, 255], [128, 128], [0, 255], [255, 0], [255, 0]]
    assert WIDE.levels(values).tolist() == [expected] and WIDE.levels(values).dtype == np.uint8


def test_the_used_bands_come_in_the_order_asked_for() -> None:
    plain = Bands(count=4, low=(0,) * 4, high=(255,) * 4)
    values = np.random.default_rng(0).integers(0, 256, (3, 5, 4), dtype=np.uint8)
    assert np.array_equal(plain.levels(values), values) and plain.channels == 4
    some = chosen_bands(plain, (4, 2), "set")
    assert some is not None and some.channels == 2 and np.array_equal(some.levels(values), values[:, :, [3, 1]])
    assert chosen_bands(plain, None, "set") == plain


def test_other_bands_are_refused() -> None:
    with refused("image/bands", 3, 2, error=BadImage):
        WIDE.levels(np.zeros((2, 2, 3)))
    with refused("data/no-such-band", "data.bands=[3]", "set"):
        chosen_bands(WIDE, (3,), "set")
    with refused("data/no-such-band", "data.bands=[1]", "set"):
        chosen_bands(None, (1,), "set")
    with pytest.raises(ValidationError):
        Bands(count=2, low=(0,), high=(1, 2))


def test_the_scale_is_that_of_all_images_whatever_shards_they_come_in() -> None:
    random = np.random.default_rng(0)
    images = [(random.gamma(2, 300 * (1 + n), (64, 64, 2))).astype(np.uint16) for n in range(6)]
    pixels = [some_pixels(image) for image in images]
    parts = [sampled(pixels[:1]), sampled(pixels[1:3]), sampled(pixels[3:])]
    found = measured(parts)
    assert found is not None and found == measured(parts[::-1])
    expected = np.percentile(np.concatenate(pixels), (1, 99), axis=0)
    np.testing.assert_allclose([found.low, found.high], expected, rtol=0, atol=0.02 * expected.max())


def test_eight_bits_are_kept_and_bands_without_a_number_are_told_apart() -> None:
    assert measured([]) is None
    dark = np.full((5, 3), 7, np.uint8)
    assert measured([sampled([dark])]) == Bands(count=3, low=(0, 0, 0), high=(255, 255, 255))
    numbers = np.full((5, 2), [[3.0, np.nan]])
    found = measured([sampled([numbers])])
    assert found == Bands(count=2, low=(3, 0), high=(3, 255))
    assert found.levels(numbers[None]).tolist() == [[[0, 0]] * 5]


@pytest.mark.parametrize(("bands", "shown"), [(1, [0, 0, 0]), (2, [0, 0, 0]), (3, [0, 1, 2]), (5, [0, 1, 2])])
def test_people_see_the_first_three_bands_or_the_first_as_grey(bands: int, shown: list[int]) -> None:
    pixels = np.arange(bands, dtype=np.uint8)[None, None].repeat(2, 0)
    assert shown_bands(pixels).tolist() == [[shown]] * 2
