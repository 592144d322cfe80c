"""Why: on a CPU Pillow makes the views; what it does has to be what a device does, to the pixel."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from threestage.augment import geometry, photometry, pil_warp

SOURCE, SIZE = (23, 31), (17, 29)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 250, shape, np.uint8)


def thetas() -> list[tuple[geometry.Size, torch.Tensor]]:
    """Output sizes and transforms: turned, sheared, scaled, shifted out of the source on every side, mirrored."""
    found = []
    for turn in (-170.0, -31.0, 8.0, 90.0):
        found.append((SOURCE, torch.tensor([geometry.chain([geometry.rotate(turn, SOURCE)])])))
    for x, y in ((0.2, 0.0), (0.0, -0.3), (0.1, 0.1)):
        found.append((SOURCE, torch.tensor([geometry.chain([geometry.shear(x, y, SOURCE)])])))
    for top, left in ((0, 0), (5, 1), (-3, 4), (2, -6), (11, 9), (-40, 0), (0, 90)):
        for zoom in (1.0, 0.7, 1.9):
            a, b, c, d = (torch.tensor([float(value)]) for value in (top, left, SIZE[0] * zoom, SIZE[1] * zoom))
            window = geometry.window(a, b, c, d, SOURCE)
            for flipped in (False, True):
                found.append((SIZE, geometry.compose(window, geometry.horizontal_flip(torch.tensor([flipped])))))
    return found


def test_pillow_moves_every_pixel_from_where_a_device_does() -> None:
    labels, image = noise(*SOURCE), noise(*SOURCE, 3)
    for size, theta in thetas():
        (numbers,) = geometry.fixed_point(theta, size, SOURCE).tolist()
        expected = geometry.warp_labels(torch.from_numpy(labels)[None], theta, size)[0]
        assert np.array_equal(np.asarray(pil_warp.moved(labels, numbers, size, 255)), expected)
        planes = geometry.warp_labels(torch.from_numpy(image).permute(2, 0, 1)[None].contiguous(), theta, size)[0]
        assert np.array_equal(np.asarray(pil_warp.moved(image, numbers, size, 255)), planes.permute(1, 2, 0))


def test_a_move_leaves_other_rows_and_takes_any_number_of_maps() -> None:
    flip = geometry.fixed_point(geometry.horizontal_flip(torch.tensor([True])), SOURCE, SOURCE).tolist()[0]
    maps = torch.from_numpy(noise(2, 3, *SOURCE))
    move = pil_warp.Move({1: flip}, SOURCE, True)
    assert torch.equal(move(maps), torch.stack((maps[0], maps[1].flip(-1))))
    assert torch.equal(move(maps[:, 0]), move(maps)[:, 0])


@pytest.mark.parametrize("factor", [0.1, 0.28, 1.0, 1.72])
def test_enhancers_are_pillows(factor: float) -> None:
    for image in (noise(19, 26, 3), np.asarray(Image.fromarray(noise(4, 5, 3)).resize((40, 30)))):
        for ours, theirs in ((pil_warp.sharpness, ImageEnhance.Sharpness), (pil_warp.color, ImageEnhance.Color)):
            assert np.array_equal(
                np.asarray(ours(image, factor)), np.asarray(theirs(Image.fromarray(image)).enhance(factor))
            )


def test_operations_in_a_row_are_those_of_a_device() -> None:
    image = np.asarray(Image.fromarray(noise(4, 5, 3)).resize((40, 30))) // 2 + 30
    valid = np.ones(image.shape[:2], bool)
    valid[:, 33:] = False
    planes, names = torch.from_numpy(image).permute(2, 0, 1), sorted(photometry.PHOTOMETRIC)
    for first in names:
        for second in names:
            steps = [(first, 0.3), (second, 0.7), (first, 0.9)]
            low, span = photometry.level_range(planes[None], torch.from_numpy(valid)[None])
            there, table = planes, photometry.stretch(low, span)[0]
            for name, m in steps:
                there, table = photometry.operate(name, m, there, torch.from_numpy(valid), table)
            there = photometry.look_up(photometry.unstretch(low, span, table[None])[0], there)
            here = np.asarray(pil_warp.after_operations(image, valid, steps)).astype(int)
            differences = np.abs(here - there.permute(1, 2, 0).numpy())[valid]
            # One level where colours are blended; what follows may stretch it.
            assert differences.mean() < 0.6, steps
            if not {"color", "sharpness"} & {first, second}:
                assert differences.max() == 0, steps


def test_a_flat_image_and_one_without_a_valid_pixel_survive() -> None:
    flat = np.full((6, 7, 3), 77, np.uint8)
    for valid in (None, np.zeros((6, 7), bool)):
        for name in ("autocontrast", "equalize"):
            assert np.array_equal(np.asarray(pil_warp.after_operations(flat, valid, [(name, 0.5)])), flat)


def test_a_picture_too_small_for_neighbours_is_not_sharpened() -> None:
    for shape in ((1, 5, 3), (5, 1, 3), (2, 2, 3)):
        assert np.array_equal(pil_warp.sharpness(noise(*shape), 0.3), noise(*shape))
