"""Segmentation heads: `head(low, deep)` gives logits at a feature map's resolution."""

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from threestage.errors import InputError

if TYPE_CHECKING:
    from threestage.models.settings import NetworkSettings


class Channels(Protocol):
    """An encoder's channel counts."""

    low_channels: int | None
    channels: int


class DeepLabV2Head(nn.Module):
    """Sum of dilated 3×3 classifiers on the last map (DeepLabV2's ASPP-L; the paper's head, Section IV).

    deep (N,D,h,w) → logits (N,C,h,w). Weights N(0, 0.01), no bias at the start.
    """

    def __init__(self, channels: int, num_classes: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.classifiers = nn.ModuleList(
            nn.Conv2d(channels, num_classes, 3, padding=dilation, dilation=dilation) for dilation in dilations
        )
        self.classifiers.apply(_initialise_classifier)

    def forward(self, low: Tensor | None, deep: Tensor) -> Tensor:
        logits: Tensor = self.classifiers[0](deep)
        for classifier in self.classifiers[1:]:
            logits = logits + classifier(deep)
        return logits


class DeepLabV3PlusHead(nn.Module):
    """DeepLabV3+'s decoder (segmentation_models_pytorch's layers) and a 1×1 classifier.

    low (N,L,H/4,W/4), deep (N,D,h,w) → logits (N,C,H/4,W/4), any image size. Dilations 12, 24, 36. No dropout, so a
    step can be replayed. Its batch norm is live and sees one value per image: a training batch needs two images, which
    checks/preflight.py makes sure of. InputError where that package is not installed.
    """

    def __init__(self, low_channels: int, channels: int, num_classes: int, width: int) -> None:
        super().__init__()
        try:
            from segmentation_models_pytorch.decoders.deeplabv3.decoder import DeepLabV3PlusDecoder
        except ImportError as error:
            raise InputError(
                f"network.head=deeplabv3plus needs segmentation-models-pytorch ({error}): pip install it, or set network.head to "
                "deeplabv2 or linear",
                "network/missing-package",
            ) from None
        decoder = DeepLabV3PlusDecoder(
            encoder_channels=(0, 0, low_channels, channels),
            encoder_depth=3,
            out_channels=width,
            atrous_rates=(12, 24, 36),
            output_stride=16,
            aspp_separable=True,
            aspp_dropout=0.0,
        )
        self.context, self.detail, self.fusion = decoder.aspp, decoder.block1, decoder.block2
        self.classifier = nn.Conv2d(width, num_classes, 1)
        _initialise_classifier(self.classifier)

    def forward(self, low: Tensor | None, deep: Tensor) -> Tensor:
        assert low is not None
        context = F.interpolate(self.context(deep), size=low.shape[-2:], mode="bilinear", align_corners=True)
        logits: Tensor = self.classifier(self.fusion(torch.cat([context, self.detail(low)], dim=1)))
        return logits


class LinearHead(nn.Module):
    """One 1×1 classifier on the last map: enough on a vision transformer's features. deep (N,D,h,w) → (N,C,h,w)."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        _initialise_classifier(self.classifier)

    def forward(self, low: Tensor | None, deep: Tensor) -> Tensor:
        logits: Tensor = self.classifier(deep)
        return logits


def make_head(settings: "NetworkSettings", channels: Channels, num_classes: int) -> nn.Module:
    """The head that `settings.head` names; InputError if the encoder lacks the map that it takes."""
    if settings.head == "deeplabv2":
        return DeepLabV2Head(channels.channels, num_classes, settings.dilations)
    if settings.head == "linear":
        return LinearHead(channels.channels, num_classes)
    if channels.low_channels is None:
        raise InputError(
            f"network.head: deeplabv3plus takes a map at stride 4, which network.encoder {settings.encoder!r} lacks; "
            "set network.head to deeplabv2 or linear",
            "network/no-map-at-stride-4",
        )
    return DeepLabV3PlusHead(channels.low_channels, channels.channels, num_classes, settings.head_width)


def _initialise_classifier(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d) and module.bias is not None:
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)
