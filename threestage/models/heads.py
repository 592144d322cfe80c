"""Segmentation heads: `head(low, deep)` gives logits at a feature map's resolution."""

import contextlib
from collections.abc import Iterator, Sequence
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
    maps: tuple[int, ...]

    @property
    def channels(self) -> int: ...


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
        with needed_package("deeplabv3plus"):
            from segmentation_models_pytorch.decoders.deeplabv3.decoder import DeepLabV3PlusDecoder
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


@contextlib.contextmanager
def needed_package(head: str) -> Iterator[None]:
    """InputError where segmentation_models_pytorch cannot be imported."""
    try:
        yield
    except ImportError as error:
        raise InputError(
            f"network.head={head} needs segmentation-models-pytorch ({error}): pip install it, or set network.head to "
            "deeplabv2 or linear",
            "network/missing-package",
        ) from None


class FPNHead(nn.Module):
    """The panoptic FPN's decoder (Kirillov et al. 2019, segmentation_models_pytorch's layers) and a 1×1 classifier.

    deep: four maps at strides 4, 8, 16 and 32, each half as large as the one before → logits (N,C,H/4,W/4). Group norm: no
    image of a batch depends on another. No dropout, so a step can be replayed. InputError where that package is not installed.
    """

    def __init__(self, maps: tuple[int, ...], num_classes: int, width: int) -> None:
        super().__init__()
        with needed_package("fpn"):
            from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder
        self.decoder = FPNDecoder(encoder_channels=list(maps), encoder_depth=4, pyramid_channels=width, dropout=0.0)
        self.classifier = nn.Conv2d(self.decoder.out_channels, num_classes, 1)
        _initialise_classifier(self.classifier)

    def forward(self, low: Tensor | None, deep: tuple[Tensor, ...]) -> Tensor:
        logits: Tensor = self.classifier(self.decoder(list(deep)))
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


class ResidualUnit(nn.Module):
    """Two 3×3 convolutions, each after a ReLU, added to their input (N,W,h,w)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, value: Tensor) -> Tensor:
        return value + self.second(F.relu(self.first(F.relu(value))))


class DPTHead(nn.Module):
    """DPT's decoder (Ranftl et al. 2021) in UniMatch V2's form: no batch norm, prefix tokens left out.

    deep: four maps (N,D,h,w) of a ViT, first block first → logits (N,C,8h,8w). The maps become 4h, 2h, h and h/2 high
    and are fused from the coarsest to the finest. segmentation_models_pytorch's decoder takes patches of 16 only, and
    has batch norm.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        large = channels > 768
        width = 256 if large else 128 if channels > 384 else 64
        widths = (256, 512, 1024, 1024) if large else (channels // 8, channels // 4, channels // 2, channels)
        self.project = nn.ModuleList(nn.Conv2d(channels, each, 1) for each in widths)
        self.resize = nn.ModuleList(
            [
                nn.ConvTranspose2d(widths[0], widths[0], 4, stride=4),
                nn.ConvTranspose2d(widths[1], widths[1], 2, stride=2),
                nn.Identity(),
                nn.Conv2d(widths[3], widths[3], 3, stride=2, padding=1),
            ]
        )
        self.narrow = nn.ModuleList(nn.Conv2d(each, width, 3, padding=1, bias=False) for each in widths)
        self.enter = nn.ModuleList(ResidualUnit(width) for _ in range(3))
        self.fuse = nn.ModuleList(nn.Sequential(ResidualUnit(width), nn.Conv2d(width, width, 1)) for _ in range(4))
        self.refine = nn.Conv2d(width, width, 3, padding=1)
        self.classifier = nn.Conv2d(width, num_classes, 1)
        _initialise_classifier(self.classifier)

    def forward(self, low: Tensor | None, deep: tuple[Tensor, ...]) -> Tensor:
        stages = zip(self.narrow, self.resize, self.project, deep, strict=True)
        maps = [narrow(resize(project(value))) for narrow, resize, project, value in stages]
        fused = self._fused(3, maps[3], maps[2].shape[-2:])
        for index in (2, 1, 0):
            fused = fused + self.enter[index](maps[index])
            height, width = fused.shape[-2:]
            fused = self._fused(index, fused, maps[index - 1].shape[-2:] if index else (2 * height, 2 * width))
        return self.classifier(F.relu(self.refine(fused)))

    def _fused(self, index: int, value: Tensor, size: Sequence[int]) -> Tensor:
        """The 1×1 convolution comes before the enlargement: the same numbers, a quarter of the work."""
        return F.interpolate(self.fuse[index](value), size=tuple(size), mode="bilinear", align_corners=True)


def make_head(settings: "NetworkSettings", channels: Channels, num_classes: int) -> nn.Module:
    """The head that `settings.head` names; InputError if the encoder lacks the map that it takes."""
    if settings.head == "deeplabv2":
        return DeepLabV2Head(channels.channels, num_classes, settings.dilations)
    if settings.head == "linear":
        return LinearHead(channels.channels, num_classes)
    if settings.head == "dpt":
        return DPTHead(channels.channels, num_classes)
    if settings.head == "fpn":
        return FPNHead(channels.maps, num_classes, settings.head_width)
    if channels.low_channels is None:
        raise InputError(
            f"network.head: deeplabv3plus takes a map at stride 4, which network.encoder {settings.encoder!r} lacks; "
            "set network.head to deeplabv2, linear or, for a vision transformer, dpt",
            "network/no-map-at-stride-4",
        )
    return DeepLabV3PlusHead(channels.low_channels, channels.channels, num_classes, settings.head_width)


def _initialise_classifier(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d) and module.bias is not None:
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)
