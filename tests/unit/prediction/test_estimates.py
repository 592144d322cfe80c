"""Why: users decide by these figures whether to trust masks that nobody checks."""

import base64

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.narrow_resnet import NAME
from tests.refusals import refused
from threestage.models.network import build_network
from threestage.models.settings import NetworkSettings
from threestage.prediction.estimates import Calibration, Estimator, expected_counts
from threestage.prediction.pool_features import FEATURE_SIZE
from threestage.prediction.tta import TTASettings, predict_in_windows, predict_with_tta
from threestage.training.metrics import class_counts, confusion_matrix, iou_of_counts

SETTINGS = NetworkSettings(encoder=NAME, batch_norm="live", dilations=(1,))


def calibration(shares: tuple[float, ...] = (0.5, 0.3, 0.2), temperature: float = 1.0, rows: int = 4) -> Calibration:
    features = np.random.default_rng(0).normal(0, 0.1, (rows, FEATURE_SIZE)).astype(np.float16)
    return Calibration(
        images=6,
        mean_iou=0.5,
        temperature=temperature,
        shares=shares,
        reference=base64.b64encode(features.tobytes()).decode(),
        near=1.0,
        far=1.5,
        validation_drift=0.1,
    )


def test_the_expected_counts_are_those_of_masks_drawn_from_the_probabilities() -> None:
    random = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(1, 3, 64, 64, generator=random)
    drawn = torch.multinomial(logits.softmax(1).flatten(2)[0].T, 400, replacement=True, generator=random).T
    predicted = logits.argmax(1).flatten()
    confusion = sum(confusion_matrix(mask, predicted, 3) for mask in drawn)
    assert isinstance(confusion, Tensor)
    counted = class_counts(confusion) / confusion.sum()
    assert torch.allclose(expected_counts(logits, 1)[0], counted.float(), atol=1e-3)


def test_a_lower_temperature_makes_the_expected_iou_higher() -> None:
    logits = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    low, high = (float(iou_of_counts(expected_counts(logits, t)[0]).mean()) for t in (0.5, 2))
    assert low > high + 0.1


def sums(true: list[float], right: list[float], drift: float = 0.0, images: int = 1) -> np.ndarray:
    return np.array([*right, *true, *true, drift, images])


def test_classes_that_an_image_hardly_shows_do_not_count() -> None:
    estimator = Estimator(calibration(shares=(0.5, 0.5, 0.0)))
    found = estimator.of(sums(true=[80, 19, 1], right=[40, 9.5, 0], drift=6, images=4))
    assert found.mean_iou == pytest.approx(1 / 3, abs=0.01) and (found.drift, found.images) == (1.5, 4)
    only_first = estimator.of(sums(true=[95, 5, 0], right=[95, 0, 0]))
    assert only_first.mean_iou == 1, "0.05 of the pixels is less than a fifth of 0.5"
    assert Estimator(calibration(shares=(0.0, 0.0, 0.0))).of(sums([1, 1, 1], [1, 1, 1])).mean_iou is None


@pytest.mark.parametrize("way", ["whole", "windows", "views"])
def test_every_image_of_a_batch_has_its_own_figures(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("threestage.prediction.tta.VIEW_PIXELS", 64 * 96)  # views of one image at a time
    network = build_network(SETTINGS, num_classes=3).eval()
    pixels = torch.randint(0, 256, (3, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    protocol = TTASettings(flip=True, scales=(1.0, 0.5)) if way == "views" else TTASettings()
    estimator = Estimator(calibration())

    def measured(images: Tensor) -> Tensor:
        with torch.inference_mode(), estimator.measure(network) as measure:
            if way == "windows":
                predict_in_windows(network, images, protocol, 16, 64 * 32)
            else:
                predict_with_tta(network, images, protocol, 16)
        return measure(len(images), 64 * 96)

    together, alone = measured(pixels), torch.cat([measured(image) for image in pixels.split(1)])
    assert torch.allclose(together, alone, atol=1e-2, rtol=1e-4)
    assert together[:, 3:6].sum(1).tolist() == pytest.approx([64 * 96] * 3, rel=1e-4)
    assert not network._forward_hooks and not network.encoder.last._forward_hooks


def test_an_image_like_a_training_image_does_not_drift() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Identity()

    class Pixels(nn.Module):
        """Its features are the mean colours, its logits the colours."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder = Encoder()

        def forward(self, image: Tensor) -> tuple[Tensor, None]:
            return self.encoder.last(image), None

    from threestage.prediction.pool_features import projected

    known, other = torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 1, 0])
    reference = projected(known[None]).numpy().astype(np.float16).tobytes()
    stored = calibration().model_copy(
        update={"reference": base64.b64encode(reference).decode(), "near": 0.0, "far": 0.5}
    )
    estimator, network = Estimator(stored), Pixels()
    with estimator.measure(network) as measure:
        network(torch.stack([known, other])[:, :, None, None].expand(2, 3, 8, 8))
    near, far = (estimator.of(row).drift for row in measure(2, 64).numpy())
    assert near == pytest.approx(0, abs=0.01) and far > 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", 2),
        ("near", 1.5),
        ("temperature", 0),
        ("reference", "AAAA"),
        ("reference", ""),
        ("reference", "é"),
        ("reference", base64.b64encode(b"\xff" * 2 * FEATURE_SIZE).decode()),
        ("shares", [0.5, 0.5]),
        ("validation_drift", float("nan")),
    ],
)
def test_a_damaged_file_is_named(key: str, value: object) -> None:
    import json

    tree = calibration().model_dump(mode="json") | {key: value}
    with refused("models/damaged-calibration", "somewhere"):
        Calibration.parse(json.dumps(tree).encode(), "somewhere", 3)
    whole = calibration()
    assert Calibration.parse(whole.model_dump_json().encode(), "somewhere", 3) == whole
