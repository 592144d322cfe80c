"""The segmentation network: an encoder, a main head and, while training, an auxiliary one (method.md, g, ĝ and g̃)."""

import re
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from threestage.data.bands import RGB
from threestage.errors import InputError
from threestage.models.encoders import VIT_NAME, create_timm, split_encoder, vit_patch, weight_names
from threestage.models.heads import make_head
from threestage.models.settings import NetworkSettings
from threestage.models.trunks import Encoder
from threestage.models.weights import (
    check_fit,
    copy_weights,
    read_encoder_weights,
    rename_weights,
    widen_first_convolution,
)

NORMALISATION_TOLERANCE = 0.01  # of RGB in [0,1]
PYRAMIDS = ("dpt", "fpn")  # heads that take four maps
Auxiliary = Literal["none", "branch", "shared"]


class Network(nn.Module):
    """`encoder`, `main_head` and the auxiliary head of a stage.

    auxiliary "branch" is stage 2's ĝ: `auxiliary_stage`, a copy of the encoder's last stage on the features of the
    third, and its own classifier. Deviation: the authors' ResNet branch is half as wide and starts at N(0, 0.01); a
    copy works for every encoder, and does not leave a fresh stage un-normalised under frozen batch norm.
    "shared" is stage 3's g̃: its own classifier on the last map. C has no extra class (the authors' code has one).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, settings: NetworkSettings, num_classes: int, auxiliary: Auxiliary = "none") -> None:
        """Weights are loaded here and new ones drawn from torch's global generator: see `build_network`."""
        super().__init__()
        self.settings = settings
        self.num_classes = num_classes
        self.encoder = _make_encoder(settings)
        self.main_head = make_head(settings, self.encoder, num_classes)
        self.auxiliary_stage = deepcopy(self.encoder.last) if auxiliary == "branch" else None
        self.auxiliary_head = None if auxiliary == "none" else make_head(settings, self.encoder, num_classes)
        for name, values in zip(("mean", "std"), settings.normalisation, strict=True):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)
        for layer in self._frozen_layers():
            layer.requires_grad_(False)
        if settings.freeze_encoder:
            self.encoder.requires_grad_(False)
            if self.auxiliary_stage is not None:
                self.auxiliary_stage.requires_grad_(False)
        self.train()

    def forward(
        self, image: Tensor, with_auxiliary: bool = False, dropout: tuple[int, float, bool] = (0, 0.0, False)
    ) -> tuple[Tensor, Tensor | None]:
        """image (N,`channels`,H,W) float in [0,1] → main logits (N,C,H,W), and the auxiliary ones if asked for and there.

        A size that the encoder cannot take is padded at the right and bottom with the mean colour, and cut off again.
        dropout: the main head sees the last so many images without some channels of their features, each with that chance;
        True: the two halves of them lose complementary channels.
        """
        padded = self._normalise_and_pad(image)
        low, third = self.encoder.trunk(padded)
        deep = self.encoder.last(*third)
        features = (low, deep) if dropout[0] == 0 else (_dropped(low, *dropout), _dropped(deep, *dropout))
        main = self._upsample_and_crop(self.main_head(*features), padded, image)
        if not with_auxiliary or self.auxiliary_head is None:
            return main, None
        if self.auxiliary_stage is not None:
            deep = self.auxiliary_stage(*third)
        return main, self._upsample_and_crop(self.auxiliary_head(low, deep), padded, image)

    def train(self, mode: bool = True) -> "Network":
        """As nn.Module.train, but frozen batch norm and a frozen encoder stay in eval mode."""
        super().train(mode)
        if self.settings.freeze_encoder:
            self.encoder.eval()
            if self.auxiliary_stage is not None:
                self.auxiliary_stage.eval()
        for layer in self._frozen_layers():
            layer.eval()
        return self

    def pretrained_parameters(self) -> list[nn.Parameter]:
        """The encoder's trainable parameters."""
        return [parameter for parameter in self.encoder.parameters() if parameter.requires_grad]

    def new_parameters(self) -> list[nn.Parameter]:
        """The heads' and the branch's trainable parameters: they take the new layers' learning rate."""
        encoder = {id(parameter) for parameter in self.encoder.parameters()}
        return [p for p in self.parameters() if p.requires_grad and id(p) not in encoder]

    def main_state_dict(self) -> dict[str, Tensor]:
        """The state without the auxiliary head; fits `Network(settings, num_classes, "none")` strictly."""
        return without_auxiliary(self.state_dict())

    def _normalise_and_pad(self, image: Tensor) -> Tensor:
        image = (image - self.mean) / self.std
        multiple = self.encoder.size_multiple
        if multiple == 1:
            return image
        return F.pad(image, (0, -image.shape[-1] % multiple, 0, -image.shape[-2] % multiple))

    def _upsample_and_crop(self, logits: Tensor, padded: Tensor, image: Tensor) -> Tensor:
        (height, width), (full_height, full_width) = image.shape[-2:], padded.shape[-2:]
        corners = self.settings.align_corners
        logits = F.interpolate(logits, size=(full_height, full_width), mode="bilinear", align_corners=corners)
        if self.encoder.size_multiple == 1:
            return logits
        return F.pad(logits, (0, width - full_width, 0, height - full_height))  # torch.export cannot take a slice

    def _frozen_layers(self) -> list[nn.Module]:
        if self.settings.batch_norm == "live":
            return []
        stages = [stage for stage in (self.encoder, self.auxiliary_stage) if stage is not None]
        return [layer for stage in stages for layer in stage.modules() if isinstance(layer, _BatchNorm)]


def _dropped(features: Any, images: int, probability: float, complementary: bool = False) -> Any:
    """A map, several maps or None, each with its own draw."""
    if features is None:
        return None
    if isinstance(features, tuple):
        return tuple(_dropped(each, images, probability, complementary) for each in features)
    last = features[-images:]
    changed = last * _complementary(last, probability) if complementary else F.dropout2d(last, probability)
    return torch.cat([features[:-images], changed])


def _complementary(features: Tensor, probability: float) -> Tensor:
    """Factors (2n,D,1,1) of n images and then n views of the same: 0 or 2 a channel, 2 or 0 in the second view; a random
    half of the images keeps all (UniMatch V2, Section 3.3)."""
    images, channels = len(features) // 2, features.shape[1]
    factor = 2.0 * (torch.rand(images, channels, 1, 1, device=features.device) >= probability)
    factor[torch.randperm(images, device=features.device)[: images - images // 2]] = 1.0
    return torch.cat([factor, 2 - factor]).to(features.dtype)


def channels_of(network: nn.Module) -> int:
    """How many bands a network sees; RGB's of a module that does not say."""
    return network.settings.channels if isinstance(network, Network) else RGB


def without_auxiliary(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What ships of a network's state."""
    return {name: value for name, value in state.items() if not name.startswith("auxiliary_")}


def build_network(settings: NetworkSettings, num_classes: int, auxiliary: Auxiliary = "none", seed: int = 0) -> Network:
    """The network on the CPU, its weights loaded and its new ones a function of `seed`; torch's generator is kept.

    InputError: an unknown or unsuited encoder or head, weights that are absent or do not fit, an unreachable hub.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return Network(settings, num_classes, auxiliary)


def check_settings(settings: NetworkSettings) -> None:
    """Raise the InputError that `build_network` would raise, without memory for the network or a word to the hub.

    Frozen batch norm without weights is refused too: it would leave the network un-normalised, and dead the residual
    blocks whose last scale timm starts at 0.
    """
    if settings.batch_norm == "frozen" and settings.weights is None and not settings.pretrained:
        raise InputError(
            "network.batch_norm: frozen takes an encoder with weights; to train from scratch set it to live, or give "
            "network.weights",
            "network/frozen-without-weights",
        )
    with torch.device("meta"):
        make_head(settings, _make_encoder(settings.model_copy(update={"pretrained": False})), num_classes=2)
    if settings.pretrained:
        _check_normalisation(settings)


def _check_normalisation(settings: NetworkSettings) -> None:
    """Raise InputError where `mean` or `std` is not what timm's weights expect."""
    if expected := _other_normalisation(settings):
        raise InputError(
            f"network.mean={list(settings.mean)}, network.std={list(settings.std)}: timm's weights of {settings.encoder} take "
            f"mean {expected[0]} and std {expected[1]}: set network.mean and network.std to these, or give network.weights in "
            "place of pretrained",
            "network/normalisation",
        )


def doubtful_normalisation(settings: NetworkSettings) -> str | None:
    """A warning where weights from a file may expect another `mean` and `std`; only their author knows."""
    if settings.weights is None or not (expected := _other_normalisation(settings)):
        return None
    return (
        f"network.mean={list(settings.mean)}, network.std={list(settings.std)}: timm's own weights of {settings.encoder} take "
        f"mean {expected[0]} and std {expected[1]}; if {settings.weights} comes from timm, set network.mean and network.std "
        "to these"
    )


def _other_normalisation(settings: NetworkSettings) -> tuple[list[float], list[float]] | None:
    """Mean and std of timm's weights of the encoder, where `mean` or `std` is another."""
    import timm

    config = timm.get_pretrained_cfg(settings.encoder, allow_unregistered=True)
    if config is None:
        return None
    given, expected = (*settings.mean, *settings.std), (*config.mean, *config.std)
    if max(abs(one - other) for one, other in zip(given, expected, strict=True)) <= NORMALISATION_TOLERANCE:
        return None
    return list(config.mean), list(config.std)


def size_multiple(settings: NetworkSettings) -> int:
    """What a crop's side must be a multiple of, in pixels: the output stride, or a ViT's patch."""
    if not VIT_NAME.match(settings.encoder):
        return settings.output_stride
    patch = re.search(r"patch(\d+)", settings.encoder)
    if patch:
        return int(patch.group(1))
    with torch.device("meta"):
        return vit_patch(create_timm(settings.encoder, settings.output_stride))


def crop_fits(settings: NetworkSettings, crop_size: tuple[int, int]) -> bool:
    """Whether (height, width) are multiples of `size_multiple`; for a convolutional encoder one more is right too.

    The paper's 321 = 8·40 + 1 puts the 41 cells of a map exactly on the corners.
    """
    allowed = (0,) if VIT_NAME.match(settings.encoder) else (0, 1)
    return all(side > 1 and side % size_multiple(settings) in allowed for side in crop_size)


def _make_encoder(settings: NetworkSettings) -> Encoder:
    state = None if settings.weights is None else read_encoder_weights(settings.weights)
    model = create_timm(settings.encoder, settings.output_stride, settings.pretrained, settings.channels)
    _check_head(settings)
    tensors = dict(model.state_dict(keep_vars=True))
    if state is not None:
        state = rename_weights(state, model)
    encoder = split_encoder(
        settings.encoder, model, settings.output_stride, settings.head in PYRAMIDS, settings.gradient_checkpointing
    )
    if state is not None and settings.weights is not None:
        kept = {id(tensor) for tensor in encoder.state_dict(keep_vars=True).values()}
        wanted = {name: tensor for name, tensor in tensors.items() if id(tensor) in kept}
        known = weight_names(settings.encoder) | {name for name in state if _is_classifier(name, model)}
        state = widen_first_convolution(state, wanted) if settings.channels != RGB else state
        check_fit(settings.weights, settings.encoder, state, wanted, known)
        copy_weights(state, wanted)
    return encoder


def _check_head(settings: NetworkSettings) -> None:
    """Raise InputError where the head takes maps of another kind of encoder."""
    is_vit = VIT_NAME.match(settings.encoder) is not None
    if settings.head == "dpt" and not is_vit:
        raise InputError(
            f"network.head: dpt takes four maps of a vision transformer, and network.encoder {settings.encoder!r} is none; "
            "set network.head to fpn, deeplabv3plus or deeplabv2",
            "network/no-transformer",
        )
    if settings.head == "fpn" and is_vit:
        raise InputError(
            f"network.head: fpn takes maps at four strides, and network.encoder {settings.encoder!r} has one stride; "
            "set network.head to dpt or linear",
            "network/unsuited-head",
        )


def _is_classifier(name: str, model: nn.Module) -> bool:
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    return name.startswith(tuple(f"{part}." for part in ([names] if isinstance(names, str) else names)))
