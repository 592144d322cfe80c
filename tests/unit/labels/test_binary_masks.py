"""Why: only the names of binary masks say whose they are."""

import pytest

from threestage.labels.binary_masks import split_name

IDS = {"a", "a_b", "in/a"}


@pytest.mark.parametrize(
    ("stem", "found"),
    [
        ("car/a", ("a", "car")),
        ("car/in/a", ("in/a", "car")),
        ("a/car", ("a", "car")),
        ("in/a/car", ("in/a", "car")),
        ("a-car", ("a", "car")),
        ("in/a_two words", ("in/a", "two words")),
        ("a_b_car", ("a_b", "car")),
        ("a", None),
        ("b_car", None),
    ],
)
def test_names(stem: str, found: tuple[str, str] | None) -> None:
    assert split_name(stem, IDS) == found
