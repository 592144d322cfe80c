"""Why: a model that leaves the project must give the same classes in a runtime that knows nothing of it."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import threestage
from tests.refusals import refused
from tests.unit.models.conftest import card_for, small_network
from threestage.data.bands import Bands
from threestage.models import onnx_model as module
from threestage.models.export import ModelCard, refuse_other_logits
from threestage.models.network import Network, build_network
from threestage.models.onnx_model import OPSET, OnnxNetwork, onnx_of, quantised, shortest_side, with_class_ids
from threestage.models.settings import NetworkSettings

SIZES = ((1, 33, 47), (3, 64, 64), (2, 101, 38))


@pytest.fixture(scope="module")
def network(scenes: Path) -> Network:
    return small_network(len(card_for(scenes).classes))


def random_image(number: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(number, 3, height, width, generator=torch.Generator().manual_seed(height))


@pytest.mark.parametrize("size", SIZES)
def test_the_logits_are_the_networks_for_any_batch_and_size(
    onnx_model: bytes, network: Network, size: tuple[int, int, int]
) -> None:
    image = random_image(*size)
    with torch.inference_mode():
        expected = network(image)[0]
    torch.testing.assert_close(OnnxNetwork(onnx_model)(image)[0], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_class_ids_are_of_the_largest_logit(onnx_model: bytes, size: tuple[int, int, int]) -> None:
    image = random_image(*size)
    found = OnnxNetwork(with_class_ids(onnx_model))(image)[0]
    assert found.dtype == torch.uint8 and found.shape == (size[0], *size[1:])
    assert torch.equal(found.long(), OnnxNetwork(onnx_model)(image)[0].argmax(dim=1))


def test_the_file_says_how_to_use_it_and_nothing_of_this_machine(onnx_model: bytes, scenes: Path) -> None:
    import onnx

    model, card = onnx.load_from_string(onnx_model), card_for(scenes)
    onnx.checker.check_model(model, full_check=True)
    assert [(each.domain, each.version) for each in model.opset_import] == [("", OPSET)]
    names = [[place.dim_param for place in value.type.tensor_type.shape.dim] for value in model.graph.input]
    assert names == [["images", "", "height", "width"]]
    found = {each.key: each.value for each in model.metadata_props}
    assert (json.loads(found["classes"]), found["downscale"], shortest_side(onnx_model)) == ([*card.classes], "1", 33)
    for text in (str(Path(threestage.__file__).parent), "site-packages", "stack_trace"):
        assert text.encode() not in onnx_model


def test_other_logits_are_refused(network: Network) -> None:
    def exported(image: torch.Tensor) -> torch.Tensor:
        return network(image)[0] + (1.0 if image.shape[-2] == 40 else 0.0)  # at the second size alone

    with pytest.raises(ValueError, match="40x68 pixels differ"):
        refuse_other_logits(exported, network, 33, 1e-4)
    refuse_other_logits(lambda image: network(image)[0] * (1 + 5e-5), network, 33, 1e-4)
    with pytest.raises(ValueError, match="differ"):
        refuse_other_logits(lambda image: network(image)[0] * torch.nan, network, 33, 1e-4)


def test_eight_bits_are_smaller_and_nearly_the_same(onnx_model: bytes) -> None:
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (48, 64, 3), dtype=np.uint8) for _ in range(4)]
    small = quantised(onnx_model, iter(images))
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    found, expected = (OnnxNetwork(content)(pixels)[0] for content in (small, onnx_model))
    assert 0 < float((found - expected).abs().max()) < 0.1 * float(expected.abs().max())
    assert b"QuantizeLinear" in small and b"QuantizeLinear" not in onnx_model


def test_without_the_extra_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec

    def find_spec(name: str, *more: Any) -> Any:
        return None if name == "onnxruntime" else found(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    with refused("models/missing-package", "onnxruntime not installed", "pip install 'threestage[onnx]'"):
        module.refuse_missing_packages()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("encoder", "head", "stride", "least"),
    [
        ("resnet18", "deeplabv2", 8, 33),
        ("resnet18d", "deeplabv2", 16, 33),
        ("mobilenetv2_100", "deeplabv3plus", 16, 33),
        ("tf_mobilenetv3_small_minimal_100", "linear", 16, 33),
        ("tf_efficientnetv2_b0", "linear", 16, 33),
        ("convnext_atto", "deeplabv3plus", 16, 33),
        ("inception_next_atto", "linear", 16, 33),
        ("regnety_002", "linear", 16, 33),
        ("vit_tiny_patch16_224", "linear", 16, 33),
        ("vit_small_patch14_dinov2", "dpt", 8, 33),
        ("vit_small_patch16_dinov3", "linear", 16, 33),
        ("pvt_v2_b0", "linear", 32, 65),
    ],
)
def test_encoders_are_exported(encoder: str, head: Any, stride: Any, least: int) -> None:
    settings = NetworkSettings(encoder=encoder, head=head, output_stride=stride, batch_norm="live")
    card = ModelCard(network=settings, classes=("a", "b"), colours=((0, 0, 0), (9, 9, 9)), downscale=1, stage="stage3")
    network = build_network(settings, 2, seed=1).eval()
    content = onnx_of(network, card)
    assert shortest_side(content) == least
    image = random_image(1, least + 4, 143)
    with torch.inference_mode():
        torch.testing.assert_close(OnnxNetwork(content)(image)[0], network(image)[0], rtol=1e-4, atol=1e-5)


def test_a_model_of_four_bands_says_what_they_are(scenes: Path) -> None:
    import onnx

    bands = Bands(count=5, low=(0,) * 5, high=(9000,) * 5, used=(1, 2, 3, 5))
    network = small_network(2, channels=4)
    card = card_for(scenes).model_copy(
        update={"network": network.settings, "bands": bands, "classes": ("a", "b"), "colours": ((0, 0, 0), (9, 9, 9))}
    )
    content = onnx_of(network, card)  # which compares the logits
    (image,) = onnx.load_from_string(content).graph.input
    assert image.type.tensor_type.shape.dim[1].dim_value == 4
    found = {each.key: each.value for each in onnx.load_from_string(content).metadata_props}
    assert Bands.model_validate_json(found["bands"]) == bands
