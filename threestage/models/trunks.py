"""The parts of an encoder: its trunk, up to the end of the third stage, and its last stage, of which stage 2 trains a copy."""

from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class TrunkOutput(NamedTuple):
    """What the layers before the last stage give."""

    low: Tensor | None
    """(N,C,H/4,W/4): the finest map a DeepLabV3+ head takes; None if the encoder has no stride 4."""
    third: tuple[Any, ...]
    """Arguments of the last stage: the third stage's map or maps, or a ViT's tokens with their grid; then the earlier maps
    that are handed on."""


class Encoder(nn.Module):
    """`last(*trunk(image).third)` is the last map, (N,`channels`,h,w), or four maps, the last one last."""

    low_channels: int | None
    maps: tuple[int, ...]
    """Channels of each map that `last` gives."""
    size_multiple: int
    """Height and width are padded to a multiple of this; 1 where strided convolutions round up."""

    def __init__(self, trunk: nn.Module, last: nn.Module, maps: tuple[int, ...] = (), size_multiple: int = 1) -> None:
        super().__init__()
        self.trunk = trunk
        self.last = last
        self.low_channels = None
        self.maps = maps
        self.size_multiple = size_multiple

    @property
    def channels(self) -> int:
        return self.maps[-1]


class StagedTrunk(nn.Module):
    """The modules of a network up to its third stage, run one after another.

    low: the module that ends with the map at stride 4. taps: those whose maps are handed on beside the third stage's.
    nhwc: maps have their channels last.
    """

    def __init__(
        self, modules: list[tuple[str, nn.Module]], low: int | None, taps: tuple[int, ...] = (), nhwc: bool = False
    ) -> None:
        super().__init__()
        self.layers = nn.Sequential(without_dots(modules))
        self.low, self.taps, self.nhwc = low, taps, nhwc

    def forward(self, image: Tensor) -> TrunkOutput:
        low, value, tapped = None, image, []
        for index, layer in enumerate(self.layers):
            value = layer(value)
            if index == self.low:
                low = _channels_first(value, self.nhwc)
            if index in self.taps:
                tapped.append(_channels_first(value, self.nhwc))
        return TrunkOutput(low, (value, *tapped))


class LastStage(nn.Sequential):
    """The modules of a network's last stage. With maps of earlier stages (tapped): they come before its own."""

    nhwc = False

    def forward(self, value: Tensor, *tapped: Tensor) -> Tensor | tuple[Tensor, ...]:
        for layer in self:
            value = layer(value)
        last = _channels_first(value, self.nhwc)
        return (*tapped, last) if tapped else last


class AddPositions(nn.Module):
    """What SAM 2's Hiera adds to its patches, which is no module of its own: position embeddings for any grid."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.pos_embed, self.pos_embed_window = model.pos_embed, model.pos_embed_window
        self._add = type(model)._pos_embed

    def forward(self, patches: Tensor) -> Tensor:
        added: Tensor = self._add(self, patches)
        return added


class BranchedTrunk(nn.Module):
    """HRNet up to the end of its third stage, which has three branches, at strides 4, 8 and 16."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        names = ("conv1", "bn1", "act1", "conv2", "bn2", "act2", "layer1")
        self.stem = nn.Sequential(without_dots([(name, getattr(model, name)) for name in names]))
        self.transition1, self.transition2 = model.transition1, model.transition2
        self.stage2, self.stage3 = model.stage2, model.stage3

    def forward(self, image: Tensor) -> TrunkOutput:
        value = self.stem(image)
        branches = self.stage2([change(value) for change in self.transition1])
        branches = self.stage3(_next_branches(self.transition2, branches))
        return TrunkOutput(branches[0], tuple(branches))


class BranchedStage(nn.Module):
    """HRNet's last stage, whose four branches end together, and what widens each: four maps."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.transition3, self.stage4, self.incre_modules = model.transition3, model.stage4, model.incre_modules

    def forward(self, *branches: Tensor) -> tuple[Tensor, ...]:
        ended = self.stage4(_next_branches(self.transition3, list(branches)))
        return tuple(widen(branch) for widen, branch in zip(self.incre_modules, ended, strict=True))


def _next_branches(transition: nn.ModuleList, branches: list[Tensor]) -> list[Tensor]:
    """A stage's branches as the next one takes them: those that are made anew come from the coarsest."""
    return [
        branches[index] if isinstance(change, nn.Identity) else change(branches[-1])
        for index, change in enumerate(transition)
    ]


def _channels_first(value: Tensor, nhwc: bool) -> Tensor:
    return value.permute(0, 3, 1, 2) if nhwc else value


class VitTrunk(nn.Module):
    """Patches, position embedding and all blocks but the last ones of a vision transformer.

    taps: the blocks whose tokens are handed on beside those of the last one here. recompute: see `_run_block`.
    """

    def __init__(self, vit: Any, taps: tuple[int, ...] = (), recompute: bool = False) -> None:
        super().__init__()
        self.vit = vit
        self.taps = taps
        self.recompute = recompute

    def forward(self, image: Tensor) -> TrunkOutput:
        patches = self.vit.patch_embed(image)
        _, height, width, _ = patches.shape
        embedded = self.vit._pos_embed(patches)
        tokens, rope = embedded if isinstance(embedded, tuple) else (embedded, None)
        tokens, tapped = self.vit.norm_pre(tokens), []
        for index, block in enumerate(self.vit.blocks):
            tokens = _run_block(block, tokens, rope, self.recompute and self.training)
            if index in self.taps:
                tapped.append(tokens)
        return TrunkOutput(None, (tokens, height, width, rope, *tapped))


class VitStage(nn.Module):
    """A vision transformer's last blocks and final norm; prefix tokens (class, registers) are cut off its maps.

    With tokens of earlier blocks (tapped): their maps, normed as the last one's, come before it.
    """

    def __init__(self, blocks: nn.Sequential, norm: nn.Module, prefix: int, recompute: bool = False) -> None:
        super().__init__()
        self.blocks = blocks
        self.norm = norm
        self.prefix = prefix
        self.recompute = recompute

    def forward(
        self, tokens: Tensor, height: int, width: int, rope: Tensor | None, *tapped: Tensor
    ) -> Tensor | tuple[Tensor, ...]:
        for block in self.blocks:
            tokens = _run_block(block, tokens, rope, self.recompute and self.training)
        maps = tuple(self._map(each, height, width) for each in (*tapped, tokens))
        return maps if tapped else maps[0]

    def _map(self, tokens: Tensor, height: int, width: int) -> Tensor:
        tokens = self.norm(tokens)[:, self.prefix :]
        return tokens.transpose(1, 2).reshape(tokens.shape[0], -1, height, width)


def without_dots(modules: list[tuple[str, nn.Module]]) -> "OrderedDict[str, nn.Module]":
    """Modules by their names, without dots, as nn.Sequential takes them."""
    return OrderedDict((name.replace(".", "_"), module) for name, module in modules)


def _run_block(block: nn.Module, tokens: Tensor, rope: Tensor | None, recompute: bool) -> Tensor:
    """recompute: what the backward pass needs is computed again then, and not kept."""
    arguments = (tokens,) if rope is None else (tokens, rope)
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *arguments, use_reentrant=False)
    return block(*arguments)
