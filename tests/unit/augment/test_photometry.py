"""Why: the strong view is the paper's only if each operation does to a whole batch what PIL does to one image."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from threestage.augment import photometry

SIZE = (37, 53)
MAGNITUDES = [level / 10 for level in range(1, 10)]
FACTORS = [0.1 + 1.8 * m for m in MAGNITUDES]
AS_IT_IS = torch.arange(256).expand(3, -1)


def natural(seed: int) -> Tensor:
    """A smooth random scene with a little noise, over a part of the 256 levels."""
    generator = torch.Generator().manual_seed(seed)
    scene = torch.rand(1, 3, 5, 7, generator=generator)
    image = torch.nn.functional.interpolate(scene, SIZE, mode="bilinear")[0] * 170 + 10 * seed
    return (image + 8 * torch.randn(image.shape, generator=generator)).round().clamp(0, 255).byte()


IMAGES = [natural(seed) for seed in range(9)]
ALL = torch.ones(SIZE, dtype=torch.bool)
NONE = torch.zeros(SIZE, dtype=torch.bool)


def by_pil(image: Tensor, operation: Callable[..., Image.Image], *amount: object) -> Tensor:
    done = operation(Image.fromarray(image.permute(1, 2, 0).numpy()), *amount)
    return torch.from_numpy(np.array(done)).permute(2, 0, 1)


def looked_up(table: Tensor, image: Tensor) -> Tensor:
    return photometry.look_up(table.expand(3, -1).byte(), image)


def histogram(image: Tensor, valid: Tensor = ALL) -> Tensor:
    return photometry.histogram(image, valid)


def assert_levels(ours: Tensor, theirs: Tensor, within: int) -> None:
    assert ours.dtype == torch.uint8
    assert (ours.int() - theirs.int()).abs().max() <= within


OURS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "Color": photometry.color,
    "Sharpness": photometry.sharpness,
    "Brightness": lambda image, factor: looked_up(photometry.brightness(factor), image),
    "Contrast": lambda image, factor: looked_up(photometry.contrast(histogram(image), factor), image),
}


@pytest.mark.parametrize("name", OURS)
def test_enhancers_agree_with_pil(name: str) -> None:
    for image, factor in zip(IMAGES, FACTORS, strict=True):
        theirs = by_pil(image, lambda picture, by: getattr(ImageEnhance, name)(picture).enhance(by), factor)
        assert_levels(OURS[name](image, factor), theirs, within=1)


def test_solarize_and_posterize_agree_with_pil_exactly() -> None:
    for image, m, bits in zip(IMAGES, MAGNITUDES, (1, 2, 3, 4, 5, 6, 7, 8, 2), strict=True):
        theirs = by_pil(image, ImageOps.solarize, 256 - int(256 * m))
        assert_levels(looked_up(photometry.solarize(256 - 256 * m), image), theirs, within=0)
        theirs = by_pil(image, ImageOps.posterize, bits)
        assert_levels(looked_up(photometry.posterize(bits), image), theirs, within=0)


def test_autocontrast_and_equalize_agree_with_pil() -> None:
    for image in IMAGES:
        ours = looked_up(photometry.autocontrast(histogram(image)), image)
        assert_levels(ours, by_pil(image, ImageOps.autocontrast), within=1)
        ours = looked_up(photometry.equalize(histogram(image)), image)
        assert_levels(ours, by_pil(image, ImageOps.equalize), within=0)


def test_statistics_leave_out_pixels_that_are_not_valid() -> None:
    valid = ALL.clone()
    valid[:, 30:] = False
    mask = Image.fromarray(valid.byte().numpy() * 255)
    for image in IMAGES:
        counts = histogram(image, valid)
        assert counts.sum(1).tolist() == [int(valid.sum())] * 3
        theirs = by_pil(image, ImageOps.equalize, mask)
        assert_levels(looked_up(photometry.equalize(counts), image)[:, valid], theirs[:, valid], within=0)
        theirs = by_pil(image, lambda picture: ImageOps.autocontrast(picture, mask=mask))
        assert_levels(looked_up(photometry.autocontrast(counts), image), theirs, within=1)
        alone = photometry.histogram(image[..., :30], ALL[:, :30])
        assert torch.equal(photometry.contrast(counts, 0.3), photometry.contrast(alone, 0.3))


def test_a_flat_image_and_one_without_a_valid_pixel_survive() -> None:
    flat = torch.full((3, *SIZE), 77, dtype=torch.uint8)
    for valid in (ALL, NONE):
        counts = histogram(flat, valid)
        for table in (photometry.autocontrast(counts), photometry.equalize(counts)):
            assert torch.equal(looked_up(table, flat), flat)
        assert torch.equal(looked_up(photometry.contrast(counts, 1.0), flat), flat)
        low, span = photometry.level_range(flat[None], valid[None])
        table = photometry.stretch(low, span)
        assert torch.equal(table, AS_IT_IS[None])
        assert torch.equal(photometry.unstretch(low, span, table), AS_IT_IS[None].byte())


def test_one_table_for_several_operations_is_the_operations_one_after_the_other() -> None:
    image = IMAGES[3]
    steps = [photometry.solarize(100), photometry.equalize(histogram(image)), photometry.posterize(3)]
    table, stepwise = AS_IT_IS, image
    for step in steps:
        table, stepwise = photometry.compose(table, step), looked_up(step, stepwise)
        assert torch.equal(looked_up(table, image), stepwise)
        assert torch.equal(photometry.relabelled(histogram(image), table), histogram(stepwise))


def test_a_table_is_looked_up_as_torch_would_on_another_device() -> None:
    tables = torch.randint(256, (9, 3, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    gathered = tables.gather(2, torch.stack(IMAGES).flatten(2).long()).view(9, 3, *SIZE)
    assert torch.equal(photometry.look_up_all(list(tables), IMAGES), gathered)
    for image in (IMAGES[0].mT, IMAGES[0].expand(3, *SIZE)[:, ::2, ::3]):  # planes that do not lie in one piece
        assert torch.equal(looked_up(photometry.solarize(99), image), torch.where(image < 99, image, 255 - image))


def test_the_stretch_spreads_the_valid_levels_and_is_undone() -> None:
    image, valid = torch.stack(IMAGES), ALL.expand(9, *SIZE).clone()
    valid[:, :4] = False
    low, span = photometry.level_range(image, valid)
    shown = image.movedim(1, 0)[:, valid].view(3, 9, -1).int()
    assert torch.equal(low.flatten().int(), shown.amin((0, 2)))
    assert torch.equal((low + span).flatten().int(), shown.amax((0, 2)))
    table = photometry.stretch(low, span)
    stretched = photometry.look_up_all(list(table.byte()), list(image))
    shown = stretched.movedim(1, 0)[:, valid].view(3, 9, -1)
    assert (shown.amin((0, 2)) == 0).all() and (shown.amax((0, 2)) == 255).all()
    back = photometry.look_up_all(list(photometry.unstretch(low, span, table)), list(image))
    assert torch.equal(back.movedim(1, 0)[:, valid], image.movedim(1, 0)[:, valid])
