"""Why: one wrong sign, half pixel or H/W in a theta trains every stage on labels that no longer lie on their pixels."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from threestage.augment import geometry

few = settings(max_examples=15, deadline=None, derandomize=True)
sizes = st.tuples(st.integers(2, 40), st.integers(2, 40))
angles = st.floats(-180, 180)
factors = st.floats(-0.5, 0.5)


def one(value: float) -> Tensor:
    return torch.tensor([float(value)])


def theta_of(*steps: geometry.Matrix) -> Tensor:
    return torch.tensor([geometry.chain(steps)])


def moved(angle: float, factor: float, size: geometry.Size) -> Tensor:
    return theta_of(geometry.rotate(angle, size), geometry.shear(factor, 0, size))


def pixel_map(theta: Tensor, size: geometry.Size, source: geometry.Size, points: Tensor) -> Tensor:
    """Oracle in float64: output points (P,2) = (x, y) in pixels from the corner → source points."""
    ends = [torch.tensor([s[1], s[0]], dtype=torch.float64) for s in (size, source)]
    normal = 2 * points.double() / ends[0] - 1
    matrix = theta[0].double()
    return (normal @ matrix[:, :2].T + matrix[:, 2] + 1) / 2 * ends[1]


def picture(size: geometry.Size, seed: int = 0, classes: int = 6) -> Tensor:
    return torch.randint(classes, (1, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@few
@given(sizes)
def test_identity_keeps_every_label(size: geometry.Size) -> None:
    labels = picture(size)
    warped = geometry.warp_labels(labels, geometry.identity(1), size)
    assert warped.dtype == torch.uint8
    assert torch.equal(warped, labels)


@few
@given(sizes)
def test_two_flips_cancel_and_one_is_torch_flip(size: geometry.Size) -> None:
    labels, flip = picture(size), geometry.horizontal_flip(torch.tensor([True]))
    assert torch.equal(geometry.warp_labels(labels, flip, size), labels.flip(2))
    assert torch.equal(geometry.warp_labels(labels, geometry.compose(flip, flip), size), labels)
    assert torch.equal(geometry.horizontal_flip(torch.tensor([False])), geometry.identity(1))


@few
@given(sizes, angles, factors)
def test_a_transform_and_its_inverse_compose_to_identity(size: geometry.Size, angle: float, factor: float) -> None:
    theta = moved(angle, factor, size)
    square = torch.cat((theta, torch.tensor([[[0.0, 0.0, 1.0]]])), dim=1)
    inverse = torch.linalg.inv(square.double())[:, :2].float()
    for both in (geometry.compose(theta, inverse), geometry.compose(inverse, theta)):
        assert torch.allclose(both, geometry.identity(1), atol=1e-3)


@few
@given(sizes, angles, st.floats(-9, 9))
def test_compose_applies_the_inner_first(size: geometry.Size, angle: float, shift: float) -> None:
    steps = geometry.rotate(angle, size), geometry.translate(shift, 0, size)
    outer, inner = theta_of(steps[0]), theta_of(steps[1])
    points = torch.tensor([[0.5, 0.5], [1.5, 0.5]])
    stepwise = pixel_map(outer, size, size, pixel_map(inner, size, size, points))
    for both in (geometry.compose(outer, inner), theta_of(*steps)):
        assert torch.allclose(pixel_map(both, size, size, points), stepwise, atol=1e-3)


@few
@given(sizes, angles)
def test_rotation_is_rigid_on_a_crop_that_is_not_square(size: geometry.Size, angle: float) -> None:
    points = torch.tensor([[0.0, 0.0], [size[1], 0.0], [0.0, size[0]], [size[1] / 3, size[0] / 5]])
    turned = pixel_map(theta_of(geometry.rotate(angle, size)), size, size, points)
    before, after = torch.cdist(points, points), torch.cdist(turned, turned).float()
    assert torch.allclose(before, after, atol=1e-3)


@few
@given(sizes, sizes, angles, factors, st.integers(0, 99))
def test_warping_brings_no_new_class_and_255_exactly_outside(
    size: geometry.Size, source: geometry.Size, angle: float, factor: float, seed: int
) -> None:
    labels, theta = picture(source, seed), moved(angle, factor, source)
    warped = geometry.warp_labels(labels, theta, size)
    inside = geometry.inside(theta, size, source)
    assert set(warped.unique().tolist()) <= {*labels.unique().tolist(), 255}
    assert torch.equal(warped == 255, ~inside)
    assert torch.equal(inside, geometry.warp_mask(torch.ones(1, *source, dtype=torch.bool), theta, size))


@few
@given(sizes, sizes, angles, factors)
def test_nearest_reads_the_pixel_that_holds_the_point(
    size: geometry.Size, source: geometry.Size, angle: float, factor: float
) -> None:
    theta = moved(angle, factor, source)
    index, inside = geometry.nearest_index(theta, size, source)
    rows, columns = torch.meshgrid(torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5, indexing="ij")
    points = pixel_map(theta, size, source, torch.stack((columns, rows), dim=2).reshape(-1, 2))
    clear = ((points - points.round()).abs() > 0.01).all(1)  # nearer to an edge, float32 may choose either side
    within = ((points > 0) & (points < torch.tensor([source[1], source[0]]))).all(1)
    assert torch.equal(inside.flatten()[clear], within[clear])
    read = points.floor().long()
    assert torch.equal(index.flatten()[clear & within], (read[:, 1] * source[1] + read[:, 0])[clear & within])


@few
@given(st.tuples(st.integers(8, 40), st.integers(8, 40)), st.data())
def test_a_whole_pixel_window_is_a_slice(source: geometry.Size, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, source[0])), data.draw(st.integers(1, source[1]))
    top, left = data.draw(st.integers(0, source[0] - size[0])), data.draw(st.integers(0, source[1] - size[1]))
    theta = geometry.window(one(top), one(left), one(size[0]), one(size[1]), source)
    labels = picture(source)
    expected = labels[:, top : top + size[0], left : left + size[1]]
    assert torch.equal(geometry.warp_labels(labels, theta, size), expected)


def test_the_image_and_its_labels_go_through_the_same_geometry() -> None:
    size, source = (31, 45), (37, 50)
    labels, theta = picture(source), moved(20, 0.2, source)
    image = labels[:, None].float()
    warped = geometry.sample_image(image, theta, size, "nearest", fill=255.0)
    assert torch.equal(warped[:, 0], geometry.warp_labels(labels, theta, size).float())


def test_maps_of_one_theta_share_an_index_and_each_sample_has_its_own_theta() -> None:
    size = (9, 12)
    maps = torch.stack((picture(size, 1)[0], picture(size, 2)[0]))[None].repeat(2, 1, 1, 1)
    theta = torch.cat((geometry.identity(1), geometry.horizontal_flip(torch.tensor([True]))))
    index, inside = geometry.nearest_index(theta, size, size)
    warped = geometry.gather_labels(maps, index, inside)
    assert warped.dtype == torch.uint8
    assert torch.equal(warped[0], maps[0])
    assert torch.equal(warped[1], maps[1].flip(2))


@few
@given(sizes, sizes, st.floats(0.3, 2), st.floats(-9, 9), st.booleans())
def test_columns_and_rows_apart_give_the_same_index(
    size: geometry.Size, source: geometry.Size, zoom: float, shift: float, flip: bool
) -> None:
    crop = geometry.window(one(shift), one(-shift), one(size[0] * zoom), one(size[1] * zoom), source)
    theta = geometry.compose(crop, geometry.horizontal_flip(torch.tensor([flip])))
    valid_size = torch.tensor([[source[0] - 1, source[1] - 1]])
    for ours, general in zip(
        geometry.nearest_index(theta, size, source, valid_size, upright=True),
        geometry.nearest_index(theta, size, source, valid_size),
        strict=True,
    ):
        assert torch.equal(ours, general)


def test_only_the_rows_of_a_move_move() -> None:
    size = (9, 12)
    maps = torch.cat([picture(size, seed) for seed in range(3)])
    index, _ = geometry.nearest_index(geometry.horizontal_flip(torch.tensor([True, True])), size, size)
    flipped = geometry.Move((0, 2), index)
    for values in (maps, list(maps)):
        assert torch.equal(flipped(values), torch.stack((maps[0].flip(1), maps[1], maps[2].flip(1))))
        assert torch.equal(geometry.Move()(values), maps)
    pictures = maps[:, None].expand(-1, 3, -1, -1)
    assert torch.equal(flipped(pictures)[:, 2], flipped(maps))


def test_labels_are_ignored_and_pixels_filled_where_not_valid() -> None:
    values, valid = torch.arange(256, dtype=torch.uint8).view(1, 16, 16), torch.rand(1, 16, 16) > 0.5
    assert torch.equal(geometry.ignored(values, valid), values.masked_fill(~valid, 255))
    image = torch.stack((values, values.flip(1)), dim=1)
    assert torch.equal(geometry.ignored(image, valid), image.masked_fill(~valid[:, None], 255))
    assert torch.equal(geometry.filled(image, valid, 128), image.masked_fill(~valid[:, None], 128))


def test_valid_size_cuts_off_the_padding_below_and_to_the_right() -> None:
    inside = geometry.inside(geometry.identity(2), (6, 8), (6, 8), torch.tensor([[6, 8], [4, 5]]))
    assert inside[0].all()
    assert inside[1, :4, :5].all()
    assert inside[1].sum() == 20


def test_bilinear_halves_by_the_mean_and_never_blends_with_padding() -> None:
    image = torch.full((1, 1, 4, 8), 9.0)
    image[..., :4] = torch.arange(16.0).view(4, 4)
    valid_size = torch.tensor([[4, 4]])
    half = geometry.window(one(0), one(0), one(4), one(8), (4, 8))
    sampled = geometry.sample_image(image, half, (2, 4), "bilinear", -1.0, valid_size)
    assert torch.allclose(sampled[0, 0], torch.tensor([[2.5, 4.5, -1, -1], [10.5, 12.5, -1, -1]]))
    twice = geometry.sample_image(image, half, (8, 16), "bilinear", -1.0, valid_size)
    assert torch.allclose(twice[0, 0, :2, 7], torch.tensor([3.0, 4.0]))
    assert (twice[..., 8:] == -1).all()


SMOOTH = torch.nn.functional.interpolate(torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(0)), (60, 90))
AS_PIL = Image.fromarray((SMOOTH[0] * 255).byte().permute(1, 2, 0).numpy())


def share_equal(theta: Tensor, expected: Tensor) -> float:
    image = torch.from_numpy(np.asarray(AS_PIL).copy()).permute(2, 0, 1)[None].float()
    ours = geometry.sample_image(image, theta, (60, 90), "nearest", 0.0)
    return (ours == expected).all(1).float().mean().item()


def as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float()


@pytest.mark.parametrize("degrees", [27.0, -12.0])
def test_rotate_turns_as_torchvision_and_pil_do(degrees: float) -> None:
    theta = theta_of(geometry.rotate(degrees, (60, 90)))
    ours = TF.rotate(as_tensor(AS_PIL), degrees, InterpolationMode.NEAREST)
    assert share_equal(theta, ours) > 0.99
    assert share_equal(theta, as_tensor(AS_PIL.rotate(degrees))) > 0.99


def test_shear_and_translate_match_torchvision_and_pil() -> None:
    size, image = (60, 90), as_tensor(AS_PIL)
    shear = [math.degrees(math.atan(0.24)), 0.0]
    theirs = TF.affine(image, 0, [0, 0], 1.0, shear, InterpolationMode.NEAREST, center=[0, 0])
    assert share_equal(theta_of(geometry.shear(0.24, 0, size)), theirs) > 0.99
    by_pil = AS_PIL.transform(AS_PIL.size, Image.Transform.AFFINE, (1, 0, 0, -0.18, 1, 0))
    assert share_equal(theta_of(geometry.shear(0, -0.18, size)), as_tensor(by_pil)) > 0.99
    moved_by = TF.affine(image, 0, [7, -4], 1.0, [0.0, 0.0], InterpolationMode.NEAREST)
    assert share_equal(theta_of(geometry.translate(7, -4, size)), moved_by) == 1.0
