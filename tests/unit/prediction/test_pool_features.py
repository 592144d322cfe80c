"""Why: images are chosen by these rows; they must say of an image what its logits and its encoder say."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.narrow_resnet import NAME
from threestage.data.pool import PoolRow
from threestage.models.network import build_network
from threestage.models.settings import NetworkSettings
from threestage.prediction.pool_features import FEATURE_SIZE, PoolFeatures, mean_margin, projected
from threestage.prediction.tta import predict_in_windows


def test_the_margin_is_the_mean_of_the_two_best() -> None:
    logits = torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.4, 0.2]]).log()[:, :, None, None].expand(2, 3, 400, 400)
    assert mean_margin(logits).tolist() == pytest.approx([0.5, 0.0], abs=1e-6)
    assert mean_margin(torch.zeros(2, 1, 4, 4)).tolist() == [1, 1]


def test_distances_survive_the_projection() -> None:
    features = torch.rand(20, 1280, generator=torch.Generator().manual_seed(0))
    small, whole = torch.cdist(projected(features), projected(features)), torch.cdist(*2 * (F.normalize(features),))
    apart = ~torch.eye(20, dtype=torch.bool)
    assert float((small[apart] / whole[apart] - 1).abs().max()) < 0.35


@pytest.mark.parametrize("in_windows", [False, True])
def test_a_batch_is_measured(in_windows: bool) -> None:
    settings = NetworkSettings(encoder=NAME, batch_norm="live", dilations=(1,))
    network = build_network(settings, num_classes=3).eval()
    pixels = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    writer = PoolFeatures(3)
    with torch.inference_mode(), writer.measure(network) as measured:
        if in_windows:
            class_ids, _, entropy = predict_in_windows(network, pixels, writer.protocol, 16, 64 * 32)
        else:
            class_ids, _, entropy = writer.predict(network, pixels)
    values = measured(entropy)
    assert values is not None and values.shape == (2, 2 + FEATURE_SIZE)
    assert ((values[:, 0] > 0) & (values[:, 0] <= 1)).all() and ((values[:, 1] > 0) & (values[:, 1] < 1)).all()
    assert not network._forward_hooks and not network.encoder.last._forward_hooks
    row = PoolRow("a", "a.jpg", b"")
    source, shares = writer.encode(row, pixels[0].numpy(), class_ids[0].numpy(), class_ids[0].numpy())
    assert source == "a.jpg" and isinstance(shares, bytes)
    expected = np.bincount(class_ids[0].numpy().ravel(), minlength=3) / (64 * 96)
    assert np.frombuffer(shares, np.float32).tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    _, _, feature = writer.measured_columns(values[0].numpy())
    assert isinstance(feature, bytes) and np.frombuffer(feature, np.float16).shape == (FEATURE_SIZE,)
    if not in_windows:
        with torch.inference_mode():
            maps = network.encoder.last(*network.encoder.trunk(network._normalise_and_pad(pixels.float() / 255)).third)
        assert torch.allclose(values[:, 2:], projected(maps.mean((2, 3))), atol=1e-4)
