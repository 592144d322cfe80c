"""An ONNX model for the tests of this folder: torch.onnx takes seconds, so the smallest network is exported once."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.made_once import made_once
from threestage.data.records import load_manifest
from threestage.models.export import ModelCard
from threestage.models.heads import LinearHead
from threestage.models.network import Network, build_network
from threestage.models.settings import NetworkSettings
from threestage.models.trunks import Encoder, StagedTrunk


def small_network(classes: int, channels: int = 3) -> Network:
    """Three convolutions at a stride of 4, in place of an encoder of timm's."""
    from tests.narrow_resnet import NAME

    settings = NetworkSettings(encoder=NAME, head="linear", output_stride=32, batch_norm="live", channels=channels)
    network = build_network(settings, classes, seed=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        trunk = StagedTrunk([("first", nn.Conv2d(channels, 8, 3, 2, 1)), ("act", nn.ReLU())], None)
        network.encoder = Encoder(trunk, nn.Conv2d(8, 8, 3, 2, 1), (8,))
        network.main_head = LinearHead(8, classes)
        nn.init.normal_(network.main_head.classifier.weight)
    return network.eval()


def card_for(dataset: Path) -> ModelCard:
    manifest = load_manifest(str(dataset))
    settings = small_network(2).settings
    return ModelCard(network=settings, classes=manifest.classes, colours=manifest.colours, downscale=1, stage="stage3")


@pytest.fixture(scope="session")
def onnx_model(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Of `small_network`, with the classes of `scenes`."""
    from threestage.models.onnx_model import onnx_of

    def make(folder: Path) -> None:
        card = card_for(scenes)
        (folder / "model.onnx").write_bytes(onnx_of(small_network(len(card.classes)), card))

    return (made_once(tmp_path_factory, "onnx", make) / "model.onnx").read_bytes()
