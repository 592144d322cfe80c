"""Why: a view whose labels, validity or pixels come from different places teaches the student what is not so."""

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Generator, Tensor

from threestage.augment import geometry, photometry, plans, views
from threestage.augment.draws import Draws
from threestage.augment.plans import Plan, StrongSettings
from threestage.augment.views import AugmentSettings, Extent, View, strong_view, weak_view

CANVAS = (60, 80)
CROP = (32, 48)
PLAIN = StrongSettings(operations=0, cutouts=0)


@pytest.fixture(params=["by Pillow", "on a device"], autouse=True)
def made(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test is done both ways: as on a CPU, and with what a device does (here with CPU tensors)."""
    if request.param == "on a device":
        monkeypatch.setattr(views, "_by_pillow", lambda image: False)
    return str(request.param)


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def seeded(seed: int = 0) -> Draws:
    return Draws(generator(seed))


def coordinates(count: int) -> Tensor:
    """Canvases (N,3,60,80) whose channels hold the row, the column and the sample of each pixel."""
    rows = torch.arange(CANVAS[0], dtype=torch.uint8)[:, None].expand(CANVAS)
    columns = torch.arange(CANVAS[1], dtype=torch.uint8).expand(CANVAS)
    return torch.stack([torch.stack((rows, columns, torch.full_like(rows, n))) for n in range(count)])


def whole(count: int) -> Tensor:
    return torch.tensor([CANVAS] * count)


def noise(count: int, seed: int = 0) -> Tensor:
    return torch.randint(256, (count, 3, *CANVAS), dtype=torch.uint8, generator=generator(seed))


def some_view(count: int = 16, seed: int = 0) -> View:
    sizes = torch.stack((torch.arange(count) % 30 + 31, torch.arange(count) % 40 + 41), dim=1)
    return weak_view(noise(count, seed), sizes, AugmentSettings(crop_size=CROP), seeded(seed))


def levels(view: View) -> Tensor:
    return view.image.long()


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_an_unscaled_weak_view_is_an_exact_slice(flip: float) -> None:
    image = coordinates(8)
    view = weak_view(image, whole(8), AugmentSettings(crop_size=CROP, flip_probability=flip), seeded())
    corners = levels(view)[:, :2, 0, -1 if flip else 0].tolist()
    for n, (top, left) in enumerate(corners):
        expected = image[n, :, top : top + CROP[0], left : left + CROP[1]]
        assert torch.equal(view.image[n], expected.flip(2) if flip else expected)
    assert view.valid.all()
    assert len({tuple(corner) for corner in corners}) > 4  # every sample is cropped elsewhere


def test_an_image_that_drew_scale_one_keeps_its_pixels_among_scaled_ones() -> None:
    settings = AugmentSettings(crop_size=CROP, scale=(0.5, 1.5), flip_probability=0)
    view = weak_view(noise(64), whole(64), settings, seeded())
    index, inside = geometry.nearest_index(view.theta, CROP, CANVAS)
    exact = geometry.gather_pixels(noise(64), index)
    kept = (view.theta[:, 0, 0] * CANVAS[1] - CROP[1]).abs() < 1e-3
    assert 0 < kept.sum() < 20
    assert torch.equal(view.image[kept], exact[kept])
    assert torch.equal(view.valid, inside)


def test_scales_are_drawn_in_steps_over_the_whole_range() -> None:
    settings = AugmentSettings(crop_size=CROP, scale=(0.5, 1.5))
    theta = weak_view(noise(200), whole(200), settings, seeded()).theta
    drawn = CROP[0] / CANVAS[0] / theta[:, 1, 1]
    assert sorted({round(value, 2) for value in drawn.tolist()}) == [round(0.5 + 0.1 * step, 2) for step in range(11)]
    continuous = AugmentSettings(crop_size=CROP, scale=(0.5, 1.5), scale_step=0)
    assert weak_view(noise(200), whole(200), continuous, seeded()).theta[:, 1, 1].unique().numel() > 40


def test_an_image_smaller_than_the_crop_lies_inside_it_and_the_rest_is_mid_range() -> None:
    settings = AugmentSettings(crop_size=CROP, scale=(0.5, 0.5))
    image = torch.full((8, 3, *CANVAS), 255, dtype=torch.uint8)
    image[:, :, :40, :50] = 10
    view = weak_view(image, torch.tensor([[40, 50]] * 8), settings, seeded())
    assert view.valid.sum((1, 2)).tolist() == [20 * 25] * 8
    assert view.valid.any(2).sum(1).tolist() == [20] * 8
    shown = view.image[view.valid[:, None].expand_as(view.image)]
    assert (shown == 10).all()
    assert (view.image[~view.valid[:, None].expand_as(view.image)] == views.FILL).all()


def test_enlarging_never_blends_with_the_padding() -> None:
    image = torch.full((4, 3, *CANVAS), 255, dtype=torch.uint8)
    image[:, :, :21, :33] = 10
    view = weak_view(image, torch.tensor([[21, 33]] * 4), AugmentSettings(crop_size=CROP, scale=(1.3, 1.3)), seeded())
    assert view.valid.sum((1, 2)).tolist() == [27 * 43] * 4
    assert (view.image[view.valid[:, None].expand_as(view.image)] == 10).all()


def test_a_weak_view_holds_the_pixel_that_is_asked_for_anywhere_in_it() -> None:
    count, size = 300, torch.tensor([[40, 50]] * 300)
    pixel = torch.stack([torch.arange(count) % 36 + 2, torch.arange(count) % 46 + 2], 1)
    label = torch.zeros(count, 48, 64, dtype=torch.uint8)
    for one, (row, column) in zip(label, pixel.tolist(), strict=True):
        one[row - 2 : row + 3, column - 2 : column + 3] = 1
    settings = AugmentSettings(crop_size=(16, 20), scale=(0.5, 1.5))
    extent = Extent.whole(size, seeded(1))._replace(pixel=pixel)
    with_it = weak_view(noise(count)[:, :, :48, :64], extent, settings, seeded())
    shown = with_it.warp(label) == 1
    assert shown.any((1, 2)).all()
    rows, columns = shown.any(2).float().mean(0), shown.any(1).float().mean(0)
    assert rows.min() > 0.05 and columns.min() > 0.05, "not in the middle alone"
    without = weak_view(noise(count)[:, :, :48, :64], size, settings, seeded())
    assert not (without.warp(label) == 1).any((1, 2)).all()


def test_a_weak_view_moves_labels_as_it_moves_pixels() -> None:
    image = noise(8)
    sizes = whole(8) - torch.arange(8)[:, None]  # the canvas is padded, and the padding's labels must not be read
    view = weak_view(image, sizes, AugmentSettings(crop_size=(70, 78)), seeded())
    labels = image[:, 0].clamp(max=200)
    warped = view.warp(labels)
    assert warped.dtype == torch.uint8
    assert torch.equal(warped == 255, ~view.valid)
    assert torch.equal(warped[view.valid].long(), levels(view)[:, 0].clamp(max=200)[view.valid])
    assert torch.equal(view.warp(torch.stack((labels, image[:, 1]), dim=1))[:, 0], warped)


def test_a_strong_view_moves_labels_as_it_moves_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photometry, "PHOTOMETRIC", {})
    view = some_view(32)
    labels = torch.where(view.valid, levels(view)[:, 0].clamp(max=200), 255).byte()
    strong = strong_view(view, StrongSettings(cutouts=0), seeded())
    warped = strong.warp(labels)
    assert torch.equal(warped == 255, ~strong.valid)
    assert torch.equal(warped[strong.valid].long(), levels(strong)[:, 0].clamp(max=200)[strong.valid])
    assert (strong.image[~strong.valid[:, None].expand_as(strong.image)] == views.FILL).all()
    assert torch.equal(strong.valid, geometry.warp_mask(view.valid, strong.theta, CROP))
    assert strong.theta.unique(dim=0).shape[0] > 10  # every sample draws its own


def test_a_strong_view_of_a_weak_view_composes_to_one_transform_of_the_canvas() -> None:
    weak = weak_view(noise(16), whole(16), AugmentSettings(crop_size=CROP), seeded())
    strong = strong_view(weak, StrongSettings(), seeded())
    canvas = noise(16)[:, 0].clamp(max=200)
    both = geometry.warp_labels(canvas, geometry.compose(weak.theta, strong.theta), CROP)
    assert (both == strong.warp(weak.warp(canvas)))[strong.valid].float().mean() > 0.999


def test_without_operations_the_strong_view_is_the_weak_one() -> None:
    view = some_view()
    same = strong_view(view, PLAIN, seeded())
    assert torch.equal(same.image, view.image)
    assert torch.equal(same.valid, view.valid)
    never = strong_view(view, StrongSettings(probability=0, cutouts=0), seeded())
    assert torch.equal(never.image, view.image)


def test_cutouts_hide_pixels_and_keep_their_labels() -> None:
    view = weak_view(noise(8), whole(8), AugmentSettings(crop_size=CROP), seeded())
    cut = strong_view(view, StrongSettings(operations=0, cutouts=1, cutout_size=10), seeded())
    hidden = (cut.image == views.FILL).all(1)
    assert torch.equal(
        cut.image[~hidden[:, None].expand_as(cut.image)], view.image[~hidden[:, None].expand_as(cut.image)]
    )
    assert cut.valid.all()
    assert (hidden.sum((1, 2)) <= 100).all()
    assert (hidden.sum((1, 2)) >= 25).all()  # the centre lies in the crop
    assert hidden.unique(dim=0).shape[0] == 8  # every sample is cut elsewhere


def drawn(*names: str, level: int = 5) -> list[Plan]:
    return [[(name, level / 10, 1.0) for name in names]]


def test_geometric_operations_act_in_the_order_drawn() -> None:
    scene = torch.nn.functional.interpolate(torch.rand(1, 3, 6, 8, generator=generator()), (60, 90))
    picture = Image.fromarray((scene[0] * 255).byte().permute(1, 2, 0).numpy())
    stepwise = picture.rotate(15).transform(picture.size, Image.Transform.AFFINE, (1, 0.15, 0, 0, 1, 0))
    stepwise = stepwise.transform(picture.size, Image.Transform.AFFINE, (1, 0, 0, 0, 1, -5))
    image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float()
    expected = torch.from_numpy(np.array(stepwise)).permute(2, 0, 1)
    stayed = (expected > 0).any(0)  # PIL has lost what an operation moved out, though a later one moves it back
    names = ("rotate", "shear_x", "translate_y")
    for order, least, most in ((names, 0.95, 1.0), (names[::-1], 0.0, 0.9)):
        theta = plans.drawn_theta(drawn(*order), (60, 90))
        ours = geometry.sample_image(image, theta, (60, 90), "nearest", 0.0)[0]
        assert least < (ours == expected).all(0)[stayed].float().mean() <= most


def whole_view(image: Tensor, valid: Tensor | None = None) -> View:
    valid = torch.ones(len(image), *image.shape[2:], dtype=torch.bool) if valid is None else valid
    return View(image, valid, geometry.identity(len(image)))


def photometrically(view: View, *names: str, level: int = 5) -> Tensor:
    plan = drawn(*names, level=level)
    if not views._by_pillow(view.image):
        return torch.stack(views._apply_photometry(view, plan))
    valid = None if view.valid.all() else view.valid[0].numpy()
    pixels = np.ascontiguousarray(view.image[0].permute(1, 2, 0).numpy())
    return torch.from_numpy(np.array(views._after(plan[0], pixels, valid))).permute(2, 0, 1)[None]


def test_photometric_operations_act_in_the_order_drawn() -> None:
    image = noise(1)
    image[..., 0, :2] = torch.tensor([0, 255])  # so that the stretch to 8 bits changes nothing
    tables = {"solarize": photometry.solarize(128), "posterize": photometry.posterize(2)}

    def stepwise(*names: str) -> Tensor:
        shown = image[0]
        for name in names:
            shown = tables[name][shown.long()].byte() if name in tables else photometry.color(shown, 1.0)
        return shown

    assert not torch.equal(stepwise("solarize", "posterize"), stepwise("posterize", "solarize"))
    for names in (("solarize", "rotate", "posterize"), ("posterize", "identity", "solarize"), ("solarize", "color")):
        expected = stepwise(*(name for name in names if name in photometry.PHOTOMETRIC))
        assert torch.equal(photometrically(whole_view(image), *names)[0], expected)


def test_the_stretch_is_undone_and_ignores_padding() -> None:
    dim = (51 + noise(1) * 0.3).byte()
    valid = torch.ones(1, *CANVAS, dtype=torch.bool)
    valid[..., 50:] = False
    shown = photometrically(whole_view(dim.masked_fill(~valid[:, None], 230), valid), "equalize")[..., :50]
    assert shown.min() >= 51
    assert shown.max() <= 51 + 77
    assert abs(shown.float().mean() - dim.float().mean()) < 5


def test_every_operation_changes_the_picture() -> None:
    view = some_view(1)
    for name in photometry.PHOTOMETRIC:
        done = photometrically(view, name, level=9)
        if name != "autocontrast":  # of a picture that is stretched already
            assert (done.int() - view.image.int()).abs().max() > 2, name


def test_a_network_sees_numbers_from_0_to_1() -> None:
    image = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(views.network_input(image), image.float() / 255)


def test_the_index_that_a_view_keeps_is_that_of_its_theta() -> None:
    weak = weak_view(noise(16), whole(16), AugmentSettings(crop_size=CROP, scale=(0.5, 1.5)), seeded())
    strong = strong_view(weak, StrongSettings(), seeded())
    labels = noise(16)[:, 0].clamp(max=200)
    for view, source in ((weak, labels), (strong, weak.warp(labels))):
        assert torch.equal(view.warp(source), geometry.warp_labels(source, view.theta, CROP))
    stayed = [sample for sample in range(16) if torch.equal(strong.theta[sample], torch.eye(2, 3))]
    assert 0 < len(stayed) < 16
    assert torch.equal(strong.warp(weak.warp(labels))[stayed], weak.warp(labels)[stayed])


def test_a_seed_gives_the_same_views_and_another_seed_others() -> None:
    view = some_view()
    once, again, other = (strong_view(view, StrongSettings(), seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(once.image, again.image)
    assert torch.equal(once.theta, again.theta)
    assert not torch.equal(once.image, other.image)


def test_no_value_is_read_back_from_the_device_and_the_draws_do_not_depend_on_it() -> None:
    """A tensor on torch's "meta" device has no values: whatever would wait for the device fails here."""
    settings = AugmentSettings(crop_size=CROP, scale=(0.5, 1.5))
    random = generator()
    here = Draws(random)
    labels = torch.zeros(16, *CROP, dtype=torch.uint8)
    strong_view(weak_view(noise(16), whole(16), settings, here), settings.strong, here).warp(labels)
    for sizes in (whole(16), whole(16).to("meta")):
        random_there = generator()
        there = Draws(random_there)
        view = strong_view(weak_view(noise(16).to("meta"), sizes, settings, there), settings.strong, there)
        assert view.warp(labels.to("meta")).shape == labels.shape
        assert torch.equal(random.get_state(), random_there.get_state())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_makes_the_same_views() -> None:
    settings = AugmentSettings(crop_size=CROP)
    here, there = (
        strong_view(weak_view(noise(64).to(device), whole(64), settings, draws), settings.strong, draws)
        for device, draws in (("cpu", seeded()), ("cuda", seeded()))
    )
    assert_same(here, there, noise(64)[:, 0, : CROP[0], : CROP[1]])


def assert_same(here: View, there: View, labels: Tensor) -> None:
    """The same pixels, moved alike; levels differ by one at most, where colours are blended."""
    assert (here.image.int() - there.image.cpu().int()).abs().max() <= 1
    assert torch.equal(here.valid, there.valid.cpu())
    assert torch.equal(here.warp(labels), there.warp(labels.to(there.image.device)).cpu())


def test_a_device_and_pillow_make_the_same_views(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = torch.stack((torch.arange(64) % 30 + 31, torch.arange(64) % 40 + 41), dim=1)
    smooth = torch.nn.functional.interpolate(torch.rand(64, 3, 6, 8, generator=generator()) * 200, CANVAS)
    for settings in (AugmentSettings(crop_size=CROP), AugmentSettings(crop_size=CROP, scale=(0.5, 1.5))):
        made = []
        for by_pillow in (True, False):
            monkeypatch.setattr(views, "_by_pillow", lambda image, here=by_pillow: here)
            draws = seeded()
            weak = weak_view(smooth.byte(), sizes, settings, draws)
            made.append((weak, strong_view(weak, settings.strong, draws)))
        labels = noise(64)[:, 0]
        for (here, there), source in zip(
            zip(*made, strict=True), (labels, labels[:, : CROP[0], : CROP[1]]), strict=True
        ):
            assert_same(here, there, source)


@pytest.mark.parametrize("wrong", [{"crop_size": (0, 8)}, {"crop_size": (8, 8), "scale": (1.5, 0.5)}])
def test_impossible_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        AugmentSettings.model_validate(wrong)
    with pytest.raises(ValidationError):
        StrongSettings(levels=(5, 2))


def test_workers_draw_what_one_worker_draws_for_their_rows() -> None:
    settings = AugmentSettings(crop_size=CROP, scale=(0.5, 1.5))
    image, sizes = noise(6), whole(6)
    alone = seeded()
    weak = weak_view(image, sizes, settings, alone)
    whole_batch = strong_view(weak, settings.strong, alone).image
    parts = []
    for first, end in ((0, 4), (4, 6)):
        mine = Draws(generator(), first, 6)
        view = weak_view(image[first:end], sizes[first:end], settings, mine)
        parts.append(strong_view(view, settings.strong, mine).image)
    torch.testing.assert_close(torch.cat(parts), whole_batch)


def strong_of(image: Tensor, settings: StrongSettings) -> Tensor:
    """The strong view of a weak view that shows whole canvases, some of them smaller and scaled."""
    sizes = torch.tensor([CANVAS, (50, 70), CANVAS, (40, 60)] * (len(image) // 4))
    weak = weak_view(image, sizes, AugmentSettings(crop_size=CROP, scale=(0.8, 1.2)), seeded(3))
    return strong_view(weak, settings, seeded(4)).image


def test_of_more_bands_the_first_three_change_as_rgb_and_no_colour_changes_the_others() -> None:
    every = StrongSettings(operations=4, probability=1, jitter=0.5, grey=0.3, blur=0.3)
    five = torch.cat([noise(24), noise(24, seed=1)[:, :2]], 1)
    found = strong_of(five, every)
    assert torch.equal(found[:, :3], strong_of(five[:, :3].contiguous(), every))
    levels_alone = StrongSettings(operations=4, probability=1)  # jitter rounds, each channel apart
    found = strong_of(five, levels_alone)
    for band in (3, 4):
        grey = strong_of(five[:, band : band + 1].expand(-1, 3, -1, -1).contiguous(), levels_alone)
        assert torch.equal(found[:, band], grey[:, 0])
    colours = StrongSettings(operations=0, cutouts=0, grey=1)
    others = strong_of(five, colours)[:, 3:].int() - strong_of(five, PLAIN)[:, 3:].int()
    assert others.abs().max() <= 1, "torchvision's grey of three equal levels"


def test_one_band_changes_as_a_grey_picture_does() -> None:
    every, grey = StrongSettings(operations=3, probability=1), noise(12)[:, :1].contiguous()
    found = strong_of(grey, every)
    assert found.shape == (12, 1, *CROP) and torch.equal(
        found, strong_of(grey.expand(-1, 3, -1, -1).contiguous(), every)[:, :1]
    )
