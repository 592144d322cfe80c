"""Windows, flips and scales against what they must equal: the whole image, a mean written as a loop, a mirrored network."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tests.refusals import refused
from threestage.config import validated
from threestage.data.raster import window_starts
from threestage.models.network import build_network
from threestage.models.settings import InferenceSettings, NetworkSettings
from threestage.prediction import pseudo_masks
from threestage.prediction.tta import (
    TTASettings,
    check_protocol,
    fitting_window,
    predict_in_windows,
    predict_probabilities,
    predict_with_tta,
    protocol_for,
    scaled_size,
    window_logits,
)

CLASSES = 4


class Toy(nn.Module):
    """Sees 5×5 pixels, and knows left from right; counts what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.randn(CLASSES, 3, 5, 5, generator=torch.Generator().manual_seed(0))
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, image: Tensor) -> tuple[Tensor, None]:
        self.sizes.append(tuple(image.shape[-2:]))
        return F.conv2d(image, self.weight, padding=2), None


def images(number: int = 2, height: int = 23, width: int = 31) -> Tensor:
    return torch.randint(0, 256, (number, 3, height, width), generator=torch.Generator().manual_seed(1)).byte()


def test_the_default_is_what_pseudo_masks_are_made_with() -> None:
    settings = NetworkSettings(encoder="test_resnet", batch_norm="live", dilations=(1, 2))
    network = build_network(settings, CLASSES).eval()
    expected = pseudo_masks.predict(network, images())
    for mine, theirs in zip(predict_with_tta(network, images(), TTASettings(), 8), expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("window", [(23, 31), (64, 64), (23, 999)])
def test_a_window_that_covers_the_image_is_the_image(window: tuple[int, int]) -> None:
    whole = predict_with_tta(Toy(), images(), TTASettings(), 1)
    network = Toy()
    for mine, theirs in zip(predict_with_tta(network, images(), TTASettings(window=window), 1), whole, strict=True):
        assert torch.equal(mine, theirs)
    assert network.sizes == [(23, 31)]


def test_overlaps_are_averaged() -> None:
    image = images().float() / 255
    protocol = TTASettings(window=(10, 16), stride=(7, 9))
    network = Toy()
    logits = window_logits(network, image, protocol)
    total, count = np.zeros(logits.shape), np.zeros(logits.shape)
    for top in (0, 7, 13):
        for left in (0, 9, 15):
            place = np.s_[:, :, top : top + 10, left : left + 16]
            total[place] += network(image[place])[0].numpy()
            count[place] += 1
    assert count.max() == 6 and count.min() == 1
    np.testing.assert_allclose(logits, total / count, rtol=1e-5, atol=1e-5)
    assert set(network.sizes) == {(10, 16)}


@pytest.mark.parametrize("sides", [(64, 64), (40, 96), (97, 35)])
def test_hann_weights_leave_no_seam(sides: tuple[int, int]) -> None:
    """Zeros around a window change what the network sees near its border: plain means keep a part of that as seams."""
    image = images(1, *sides).float() / 255
    whole = Toy()(image)[0]

    def off(overlap: str) -> Tensor:
        """By how much the logits of windows are others than the whole image's, away from the image's own border."""
        protocol = TTASettings.model_validate({"window": (32, 32), "stride": (16, 16), "overlap": overlap})
        return (window_logits(Toy(), image, protocol) - whole).abs()[..., 2:-2, 2:-2]

    plain, weighted = off("mean"), off("hann")
    assert plain.max() > 0.25 * whole.abs().mean(), "there are seams to take away"
    assert weighted.max() < 0.25 * plain.max()
    assert weighted.mean() < 0.1 * plain.mean()


@pytest.mark.parametrize("sides", [(23, 31), (31, 23)])
def test_hann_weights_of_an_image_that_is_too_large(sides: tuple[int, int]) -> None:
    protocol, picture = TTASettings(window=(12, 10), stride=(7, 5), overlap="hann"), images(1, *sides)
    expected = predict_with_tta(Toy(), picture, protocol, 1)
    for mine, theirs in zip(predict_in_windows(Toy(), picture, protocol, 1, 200), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_plain_means_are_recorded_as_ever() -> None:
    """A digest of older predictions holds no `overlap`."""
    old = '{"window":[8,8],"stride":null,"flip":false,"scales":[1.0]}'
    assert TTASettings(window=(8, 8)).model_dump_json() == old
    hann = TTASettings(window=(8, 8), overlap="hann")
    assert TTASettings.model_validate_json(hann.model_dump_json()) == hann
    assert "averaged with Hann weights" in hann.describe()
    with refused("predict/stride", "overlap=hann"):
        validated(TTASettings, {"overlap": "hann"})


def test_a_models_own_windows_are_taken_unless_others_are_asked_for() -> None:
    model = InferenceSettings(window=(16, 16), overlap="hann")
    taken = protocol_for(TTASettings(flip=True), model)
    assert (taken.window, taken.overlap, taken.flip) == ((16, 16), "hann", True)
    asked = TTASettings(window=(32, 32))
    assert protocol_for(asked, model) == asked
    assert protocol_for(TTASettings(), InferenceSettings()) == TTASettings()


def test_windows_of_an_image_smaller_in_one_direction() -> None:
    network = Toy()
    logits = window_logits(network, images().float(), TTASettings(window=(40, 16)))
    assert logits.shape == (2, CLASSES, 23, 31) and network.sizes == [(23, 16)] * 3


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60))
def test_windows_cover_a_side_without_gaps_or_overhang(side: int, window: int, stride: int) -> None:
    stride = min(stride, window)
    starts = window_starts(side, window, stride)
    assert starts[0] == 0 and starts == sorted(set(starts))
    assert {pixel for start in starts for pixel in range(start, min(start + window, side))} == set(range(side))
    assert all(start + window <= side for start in starts) or starts == [0]
    assert len(starts) == 1 + max(0, -(-(side - window) // stride)), "no window too many"


def test_flips_and_scales_are_a_mean_of_probabilities() -> None:
    network, image = Toy(), images().float() / 255
    protocol = TTASettings(flip=True, scales=(0.5, 1, 1.5))
    expected = torch.zeros(2, CLASSES, 23, 31, dtype=torch.float64)
    for size in ((12, 16), (23, 31), (36, 48)):  # multiples of 4, but for the image itself
        view = F.interpolate(image, size=size, mode="bilinear") if size != (23, 31) else image
        for flipped in (False, True):
            logits = network(view.flip(3))[0].flip(3) if flipped else network(view)[0]
            expected += F.interpolate(logits, size=(23, 31), mode="bilinear").softmax(1).double() / 6
    probabilities = predict_probabilities(network, images(), protocol, 4)
    torch.testing.assert_close(probabilities.double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(2, 23, 31))
    class_ids, confidence, entropy = predict_with_tta(network, images(), protocol, 4)
    assert torch.equal(class_ids.long(), probabilities.argmax(1))
    torch.testing.assert_close(confidence, probabilities.amax(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropy, -(probabilities * probabilities.log()).sum(1), rtol=1e-3, atol=1e-4)


def test_large_images_are_taken_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    protocol = TTASettings(flip=True, scales=(1, 2))
    together, network = predict_with_tta(Toy(), images(3), protocol, 1), Toy()
    monkeypatch.setattr("threestage.prediction.tta.VIEW_PIXELS", 4 * 23 * 31)
    for mine, theirs in zip(predict_with_tta(network, images(3), protocol, 1), together, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert len(network.sizes) == 12


@pytest.mark.parametrize("sides", [(23, 31), (31, 23), (5, 64), (64, 5)])
@pytest.mark.parametrize("flip", [False, True])
def test_an_image_that_is_too_large_is_predicted_in_the_windows_of_the_protocol(
    sides: tuple[int, int], flip: bool
) -> None:
    """The same as with the logits of the whole image in memory; with several views a window's are averaged first."""
    protocol = TTASettings(window=(12, 10), stride=(7, 5), flip=flip)
    picture = images(1, *sides)
    class_ids, confidence, entropy = predict_in_windows(Toy(), picture, protocol, 1, 200)
    assert class_ids.dtype == torch.uint8 and class_ids.shape == confidence.shape == entropy.shape == (1, *sides)
    if not flip:
        for mine, theirs in zip(
            (class_ids, confidence, entropy), predict_with_tta(Toy(), picture, protocol, 1), strict=True
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
        return
    total, count = torch.zeros(1, CLASSES, *sides), torch.zeros(sides)
    for top in window_starts(sides[0], 12, 7):
        for left in window_starts(sides[1], 10, 5):
            place = (..., slice(top, top + 12), slice(left, left + 10))
            total[place] += predict_probabilities(Toy(), picture[place], TTASettings(flip=True), 1)
            count[place[1:]] += 1
    best = (total / count).max(dim=1)
    assert (best.indices == class_ids).float().mean() > 0.999
    torch.testing.assert_close(best.values, confidence, rtol=1e-4, atol=1e-5)


def test_without_windows_of_its_own_a_large_image_is_cut_into_some_that_fit() -> None:
    network = Toy()
    class_ids, *_ = predict_in_windows(network, images(1, 100, 60), TTASettings(), 8, 1200)
    assert len(network.sizes) > 4 and max(height * width for height, width in network.sizes) <= 1200
    whole = predict_with_tta(Toy(), images(1, 100, 60), TTASettings(), 8)[0]
    assert (class_ids == whole).float().mean() > 0.85, "they differ where a window ends, 2 pixels deep"


@given(st.integers(1, 70_000), st.integers(1, 70_000), st.sampled_from([1, 8, 14, 32]), st.integers(2**16, 2**30))
def test_windows_fit_with_their_band(height: int, width: int, multiple: int, most: int) -> None:
    window = fitting_window((height, width), multiple, most)
    assert all(side % multiple == 0 and 0 < side <= 2048 for side in window)
    long = 0 if height >= width else 1
    assert max(window) <= multiple or window[0] * window[1] + window[long] * min(height, width) / 3 <= most


def test_with_flips_a_mirrored_image_gives_the_mirrored_answer() -> None:
    protocol = TTASettings(flip=True, window=(16, 16), stride=(8, 5))
    there = predict_probabilities(Toy(), images(), protocol, 1)
    # side 31: windows from the left begin at 0, 5, 10 and 15, as they do from the right
    back = predict_probabilities(Toy(), images().flip(3), protocol, 1).flip(3)
    torch.testing.assert_close(there, back, rtol=1e-4, atol=1e-5)


def test_a_certain_network_has_no_entropy() -> None:
    class Certain(Toy):
        def forward(self, image: Tensor) -> tuple[Tensor, None]:
            return 1e4 * super().forward(image)[0], None

    _, confidence, entropy = predict_with_tta(Certain(), images(), TTASettings(flip=True), 1)
    assert entropy.isfinite().all() and confidence.isfinite().all() and confidence.max() == 1


def test_sizes_of_scaled_views() -> None:
    assert scaled_size((23, 31), 1, 8) == (23, 31)
    assert scaled_size((720, 960), 0.75, 8) == (544, 720)
    assert scaled_size((5, 100), 0.1, 14) == (14, 14)


def test_it_says_what_it_does() -> None:
    assert TTASettings().describe() == "whole image, single scale"
    assert TTASettings(scales=(2,)).describe() == "whole image, scale 2"
    assert TTASettings(window=(512, 1024), stride=(256, 512), flip=True, scales=(0.75, 1)).describe() == (
        "windows of 512x1024 every 256x512 pixels (logits averaged), scales 0.75, 1, flipped too (probabilities averaged)"
    )
    assert TTASettings(window=(9, 10)).step == (6, 7)


def test_what_cannot_be_is_refused() -> None:
    wrong: dict[str, Any]
    for wrong, code, named in (
        ({"stride": (4, 4)}, "predict/stride", "stride=4x4"),
        ({"window": (8, 8), "stride": (8, 9)}, "predict/stride", "windows of 8x8"),
        ({"window": (0, 8)}, "config/invalid-value", "window.0=0:"),
        ({"scales": ()}, "config/invalid-value", "scales=():"),
        ({"scales": (1, -1)}, "config/invalid-value", "scales.1=-1:"),
    ):
        with refused(code, named):
            validated(TTASettings, wrong)


def test_windows_must_suit_the_network() -> None:
    convolutional = NetworkSettings(encoder="resnet18", output_stride=16)
    for window in ((320, 480), (321, 481), None):
        check_protocol(TTASettings(window=window), convolutional)
    with refused("network/size-multiple", "window=500x30:", "resnet18", 16, "496,32"):
        check_protocol(TTASettings(window=(500, 30)), convolutional)
