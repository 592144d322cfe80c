"""Why: a run length that is off by one moves every pixel behind it."""

import numpy as np
import pytest

from tests.label_masks import random_mask, random_size
from tests.refusals import refused
from threestage.data.headers import BadImage
from threestage.labels.rle import brush_code, brush_mask, coco_counts, coco_text, counts_of, mask_of


@pytest.mark.parametrize("seed", range(10))
def test_codes_give_the_mask_back(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = random_size(rng, 70)
    mask = random_mask(rng, (height, width), 3) == 1
    for order in ("rows", "columns"):
        assert (mask_of(counts_of(mask, order), height, width, order) == mask).all()
    counts = counts_of(mask, "columns")
    assert coco_counts(coco_text(counts)).tolist() == counts.tolist()
    assert (brush_mask(brush_code(mask), height, width) == mask).all()


def test_codes_are_those_of_the_tools() -> None:
    """By hand, and by pycocotools and label-studio-sdk (tests/fresh/test_label_tools.py holds more)."""
    mask = np.array([[0, 1, 1], [0, 0, 1]], bool)
    assert counts_of(mask, "columns").tolist() == [2, 1, 1, 2] and coco_text(counts_of(mask, "columns")) == "2111"
    assert counts_of(mask, "rows").tolist() == [1, 2, 2, 1]
    assert brush_code(np.ones((1, 1), bool)) == [0, 0, 0, 4, 57, 27, 252, 127, 224]


def test_a_literal_of_label_studio_is_read() -> None:
    """Its own encoder writes values that differ one after another: bit 0, kind, length, the values."""
    bits = (
        f"{8:032b}{7:05b}{2:04b}{3:04b}{7:04b}{15:04b}"
        + "000111"
        + "".join(f"{v:08b}" for v in (1, 2, 3, 0, 9, 9, 9, 9))
    )
    code = int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")
    assert brush_mask(list(code), 1, 2).tolist() == [[False, True]]


@pytest.mark.parametrize(
    "counts", [[1, 2], [-1, 7], [1.5, 4.5], [3] * 20, [[6]], [2**62, 2**62], [2**62] * 3 + [2**62 + 6]]
)
def test_counts_that_do_not_cover_the_image_are_refused(counts: list[int]) -> None:
    with refused("mask/run-length", error=BadImage):
        mask_of(counts, 2, 3, "rows")


@pytest.mark.parametrize("text", ["", "P", "é", "o" * 20 + "0", "1\n"])
def test_texts_that_are_cut_are_refused(text: str) -> None:
    with refused("mask/run-length", error=BadImage):
        coco_counts(text)


@pytest.mark.parametrize("code", [[], [300], [0] * 8, [255] * 30, [0, 0, 0, 24, 57, 27, 252], 10**11])
def test_brushes_that_are_cut_are_refused(code: list[int]) -> None:
    with refused("mask/run-length", error=BadImage):
        brush_mask(code, 2, 3)
