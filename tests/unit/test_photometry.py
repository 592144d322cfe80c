"""Why: the strong view is the paper's only if each operation does to a whole batch what PIL does to one image."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from threestage.augment import photometry

SIZE = (37, 53)
MAGNITUDES = torch.arange(1, 10) / 10


def natural(seed: int) -> Tensor:
    """A smooth random scene with a little noise, over a part of the 256 levels."""
    generator = torch.Generator().manual_seed(seed)
    scene = torch.rand(1, 3, 5, 7, generator=generator)
    image = torch.nn.functional.interpolate(scene, SIZE, mode="bilinear")[0] * 170 + 10 * seed
    return (image + 8 * torch.randn(image.shape, generator=generator)).round().clamp(0, 255)


BATCH = torch.stack([natural(seed) for seed in range(9)])
ALL = torch.ones(9, *SIZE, dtype=torch.bool)


def as_pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.byte().permute(1, 2, 0).numpy())


def by_pil(function: Callable[[Image.Image, float], Image.Image], amounts: Tensor) -> Tensor:
    done = [function(as_pil(image), amount) for image, amount in zip(BATCH, amounts.tolist(), strict=True)]
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in done]).float()


def assert_levels(ours: Tensor, theirs: Tensor, within: int) -> None:
    assert torch.equal(ours, ours.round())
    assert ours.min() >= 0
    assert ours.max() <= 255
    assert (ours - theirs).abs().max() <= within


@pytest.mark.parametrize("name", ["Color", "Brightness", "Sharpness"])
def test_enhancers_agree_with_pil(name: str) -> None:
    factors = 0.1 + 1.8 * MAGNITUDES
    theirs = by_pil(lambda image, factor: getattr(ImageEnhance, name)(image).enhance(factor), factors)
    assert_levels(getattr(photometry, name.lower())(BATCH, factors), theirs, within=1)


def test_contrast_agrees_with_pil() -> None:
    factors = 0.1 + 1.8 * MAGNITUDES
    theirs = by_pil(lambda image, factor: ImageEnhance.Contrast(image).enhance(factor), factors)
    assert_levels(photometry.contrast(BATCH, factors, ALL), theirs, within=1)


def test_solarize_and_posterize_agree_with_pil_exactly() -> None:
    thresholds = 256 - 256 * MAGNITUDES
    theirs = by_pil(lambda image, level: ImageOps.solarize(image, 256 - int(256 - level)), thresholds)
    assert_levels(photometry.solarize(BATCH, thresholds), theirs, within=0)
    bits = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8, 2])
    theirs = by_pil(lambda image, kept: ImageOps.posterize(image, int(kept)), bits)
    assert_levels(photometry.posterize(BATCH, bits), theirs, within=0)


def test_autocontrast_and_equalize_agree_with_pil() -> None:
    none = torch.zeros(9)
    assert_levels(photometry.autocontrast(BATCH, ALL), by_pil(lambda image, _: ImageOps.autocontrast(image), none), 1)
    assert_levels(photometry.equalize(BATCH, ALL), by_pil(lambda image, _: ImageOps.equalize(image), none), 0)


def test_statistics_leave_out_pixels_that_are_not_valid() -> None:
    valid = ALL.clone()
    valid[:, :, 30:] = False
    mask = Image.fromarray(valid[0].byte().numpy() * 255)
    none = torch.zeros(9)
    theirs = by_pil(lambda image, _: ImageOps.equalize(image, mask), none)
    assert torch.equal(photometry.equalize(BATCH, valid)[:, :, valid[0]], theirs[:, :, valid[0]])
    theirs = by_pil(lambda image, _: ImageOps.autocontrast(image, mask=mask), none)
    assert_levels(photometry.autocontrast(BATCH, valid), theirs, within=1)
    alone = photometry.contrast(BATCH[..., :30], MAGNITUDES, ALL[..., :30])
    assert torch.equal(photometry.contrast(BATCH, MAGNITUDES, valid)[..., :30], alone)


def test_a_flat_image_and_one_without_a_valid_pixel_survive() -> None:
    flat = torch.full((1, 3, 8, 9), 77.0)
    for valid in (torch.ones(1, 8, 9, dtype=torch.bool), torch.zeros(1, 8, 9, dtype=torch.bool)):
        assert torch.equal(photometry.autocontrast(flat, valid), flat)
        assert torch.equal(photometry.equalize(flat, valid), flat)
        assert photometry.contrast(flat, torch.ones(1), valid).isfinite().all()


def test_a_batch_is_its_images_one_by_one() -> None:
    for result, alone in (
        (photometry.equalize(BATCH, ALL), [photometry.equalize(BATCH[i : i + 1], ALL[:1]) for i in range(9)]),
        (
            photometry.contrast(BATCH, MAGNITUDES, ALL),
            [photometry.contrast(BATCH[i : i + 1], MAGNITUDES[i : i + 1], ALL[:1]) for i in range(9)],
        ),
    ):
        assert torch.equal(result, torch.cat(alone))
