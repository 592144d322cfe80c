"""Why: with one class left, every prediction is right, and a mean IoU of 1.000 says nothing."""

import pytest

from tests.refusals import refused
from threestage.data.class_pixels import check_class_pixels

NAMES = ("ground", "thing", "other")


def test_every_class_without_a_pixel_is_named() -> None:
    assert check_class_pixels("ds", NAMES, [1, 2, 3], "3 masks") is None
    warning = check_class_pixels("ds", NAMES, [5, 9, 0], "3 masks")
    assert warning is not None and "of other in 3 masks" in warning and "thing" not in warning


@pytest.mark.parametrize(("pixels", "present"), [([7, 0, 0], "only class ground"), ([0, 0, 0], "no class")])
def test_fewer_than_two_classes_are_refused(pixels: list[int], present: str) -> None:
    with refused("data/one-class", present, "thing, other", "use this map"):
        check_class_pixels("ds", NAMES, pixels, "3 masks", fix="use this map")
