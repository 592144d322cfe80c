"""timm encoders cut before their last stage, so that stage 2's auxiliary branch can own a copy of it (method.md, ĝ)."""

import contextlib
import difflib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from threestage.errors import InputError

VIT_NAME = re.compile(r"^(test_vit|vit_|flexivit_|deit|eva)")
_PROBE = 64
TAPS_OF_24 = (4, 11, 17, 23)
"""Of a ViT with 24 blocks, as DPT and DINOv2 have them; other depths are cut into quarters."""


class TrunkOutput(NamedTuple):
    """What the layers before the last stage give."""

    low: Tensor | None
    """(N,C,H/4,W/4): the finest map a DeepLabV3+ head takes; None if the encoder has no stride 4."""
    third: tuple[Any, ...]
    """Arguments of the last stage: the third stage's map, or a ViT's tokens with their grid."""


class Encoder(nn.Module):
    """`last(*trunk(image).third)` is the last map, (N,`channels`,h,w), or four such maps of a ViT, the last one last."""

    low_channels: int | None
    channels: int
    tapped: bool
    """Whether there are four maps."""
    size_multiple: int
    """Height and width are padded to a multiple of this; 1 where strided convolutions round up."""

    def __init__(
        self, trunk: nn.Module, last: nn.Module, channels: int = 0, size_multiple: int = 1, tapped: bool = False
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.last = last
        self.tapped = tapped
        self.low_channels = None
        self.channels = channels
        self.size_multiple = size_multiple


class ConvTrunk(nn.Module):
    """The modules of a convolutional network up to its third stage, run one after another."""

    def __init__(self, modules: list[tuple[str, nn.Module]], low: int | None) -> None:
        super().__init__()
        self.layers = _sequence(modules)
        self.low = low

    def forward(self, image: Tensor) -> TrunkOutput:
        low = None
        value = image
        for index, layer in enumerate(self.layers):
            value = layer(value)
            if index == self.low:
                low = value
        return TrunkOutput(low, (value,))


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


class TraceablePool(nn.Module):
    """What timm's 2×2 average pooling of a shortcut computes, in a form that torch.export traces for any size.

    Stride 2 rounds up and averages only what is there; stride 1 (a dilated stage) keeps the size, padding with zeros.
    """

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, value: Tensor) -> Tensor:
        padded = F.pad(value, (0, 1, 0, 1), mode="replicate" if self.stride == 2 else "constant")
        return F.avg_pool2d(padded, 2, self.stride)


def replace_pooling(module: nn.Module) -> None:
    """Swap, in place, the shortcut pooling of timm's resnet*d and *t, which ties torch.export to one image size."""
    from timm.layers import AvgPool2dSame

    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            same = type(child) is AvgPool2dSame and child.stride in (1, (1, 1))
            ceil = type(child) is nn.AvgPool2d and child.ceil_mode and child.stride in (2, (2, 2))
            if (same or ceil) and child.kernel_size in (2, (2, 2)):
                setattr(parent, name, TraceablePool(1 if same else 2))


def same_padding(side: Any, kernel: int, stride: int, dilation: int) -> Any:
    """How many pixels TensorFlow's SAME convolution adds to a side, as timm's `get_same_padding` without `math.ceil`, which
    torch.export cannot save."""
    reach = (kernel - 1) * dilation + 1
    total = (side - 1) // stride * stride + reach - side
    return total if reach >= stride else torch.sym_max(total, 0)


def centred_grid(feat_shape: list[Any], grid_offset: float = 0.0, **_: Any) -> Tensor:
    """(h,w,2) in [-1,1]: DINOv3's cell centres, as timm builds them, without `float(side)`, which ties torch.export to it."""
    axes = [(torch.arange(side).float() + 0.5 + grid_offset) / torch.sym_float(side) for side in feat_shape]
    return 2.0 * torch.stack(torch.meshgrid(axes, indexing="ij"), dim=-1) - 1.0


@contextlib.contextmanager
def traceable(module: nn.Module) -> Iterator[None]:
    """While it lasts, timm computes in another form what torch.export cannot take at any size. The pooling of `module` stays
    replaced. It changes timm's modules: not beside threads that run networks."""
    from timm.layers import padding, pos_embed_sincos

    replace_pooling(module)
    build_grid = getattr(pos_embed_sincos, "_build_grid", None)  # timm 1.0.31's; older ones have other functions

    def grid(feat_shape: Any, grid_type: str = "index", **how: Any) -> Tensor:
        plain = (how.get("grid_indexing", "ij"), how.get("normalize_coords", "separate")) == ("ij", "separate")
        own = grid_type == "centered" and plain
        return centred_grid(feat_shape, **how) if own else build_grid(feat_shape, grid_type, **how)  # type: ignore[misc]

    with contextlib.ExitStack() as replaced:
        for where, name, own in ((padding, "get_same_padding", same_padding), (pos_embed_sincos, "_build_grid", grid)):
            if before := getattr(where, name, None):
                replaced.callback(setattr, where, name, before)
                setattr(where, name, own)
        yield


def create_timm(name: str, output_stride: int, pretrained: bool = False) -> nn.Module:
    """timm's whole model `name`; a ViT takes any image size, a convolutional network has `output_stride`.

    Raises InputError for an unknown name (with the nearest ones), a stride that the model cannot have, and
    `pretrained` where timm's hub has no weights or cannot be reached.
    """
    import timm

    if not timm.is_model(name) or ("." in name and name not in timm.list_pretrained()):
        near = difflib.get_close_matches(name, timm.list_models() + timm.list_pretrained(), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() names them"
        raise InputError(f"network.encoder: timm knows no {name!r}; {hint}", "network/unknown-encoder")
    options: dict[str, Any] = {"dynamic_img_size": True} if VIT_NAME.match(name) else {"output_stride": output_stride}
    if timm.models.is_model_in_modules(name, {"mobilenetv3"}):
        options["features_only"] = True  # only this form of the family takes a stride
    if not pretrained:
        return _create(name, options)
    _create(name, options)  # a mistake in the settings shows before the download
    try:
        return timm.create_model(name, pretrained=True, **options)
    except Exception as error:  # the hub's clients raise many kinds
        raise InputError(
            f"network.pretrained: no weights of {name!r} from timm's hub ({type(error).__name__}); "
            "give network.weights, a path or URI of a .pth or .safetensors file",
            "network/no-pretrained-weights",
        ) from error


def split_encoder(
    name: str, model: nn.Module, output_stride: int, tapped: bool = False, recompute: bool = False
) -> Encoder:
    """Cut timm's `model` before its last stage; the classifier and what follows the last map are dropped.

    The last stage is what lies after the second last entry of `model.feature_info`; of a ViT with b blocks the last
    b/4 blocks and the final norm. tapped: a ViT gives four maps; recompute: its blocks run again in the backward pass;
    other encoders know neither. Raises InputError if the model has no such maps or does not run in that order.
    """
    if VIT_NAME.match(name):
        return _split_vit(name, model, tapped, recompute)
    encoder = _split_convolutional(name, model)
    key = (name, output_stride)
    measured = _measured.get(key) or _measure(name, encoder, model, output_stride)
    if not next(encoder.parameters()).is_meta:  # a map without values was not compared
        _measured[key] = measured
    encoder.low_channels, encoder.channels, encoder.size_multiple = measured
    return encoder.train()


def vit_patch(model: Any) -> int:
    """The stride of a vision transformer's map in pixels."""
    return int(model.patch_embed.feat_ratio(as_scalar=True))


def weight_names(name: str) -> set[str]:
    """The names of all tensors of timm's whole model, its classifier included."""
    import timm

    with torch.device("meta"):
        return set(timm.create_model(name).state_dict())


def _create(name: str, options: dict[str, Any]) -> nn.Module:
    import timm

    stride = options.get("output_stride")
    try:
        return timm.create_model(name, **options)
    except (TypeError, AssertionError, NotImplementedError, RuntimeError, ValueError) as error:
        if stride == 32:
            try:
                return timm.create_model(name)
            except (RuntimeError, ValueError):
                raise _unsupported(name) from error
        others = [other for other in (32, 16, 8) if stride and other != stride and _takes_stride(name, options, other)]
        if not others:
            raise _unsupported(name) from error
        raise InputError(
            f"network.encoder: {name!r} cannot have network.output_stride {stride}; set network.output_stride to {others[0]}, "
            "or take a resnet, mobilenet, efficientnet, regnet or convnext",
            "network/output-stride",
        ) from error


def _takes_stride(name: str, options: dict[str, Any], stride: int) -> bool:
    """Whether the encoder can be made with this output stride and cut into stages."""
    import timm

    choices = [{**options, "output_stride": stride}, *([{}] if stride == 32 else [])]
    for chosen in choices:
        with contextlib.suppress(TypeError, AssertionError, RuntimeError, ValueError), torch.device("meta"):
            split_encoder(name, timm.create_model(name, **chosen), stride)
            return True
    return False


def taps_of(blocks: int) -> tuple[int, ...]:
    """The blocks after which DPT's four maps are taken: the ends of the quarters."""
    return TAPS_OF_24 if blocks == 24 else tuple(blocks * quarter // 4 - 1 for quarter in (1, 2, 3, 4))


def _split_vit(name: str, model: Any, tapped: bool, recompute: bool) -> Encoder:
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    if not isinstance(model, VisionTransformer | Eva) or getattr(model, "rope_mixed", False):
        raise _unsupported(name)
    cut = len(model.blocks) - max(1, len(model.blocks) // 4)
    taps = taps_of(len(model.blocks))[:3] if tapped else ()
    if tapped and len(model.blocks) < 4:
        raise _unsupported(name)
    norm = model.fc_norm if isinstance(model.norm, nn.Identity) else model.norm
    last = VitStage(nn.Sequential(*model.blocks[cut:]), norm, model.num_prefix_tokens, recompute)
    model.blocks = model.blocks[:cut]
    for part in ("norm", "fc_norm", "head", "head_dist", "attn_pool"):
        if getattr(model, part, None) is not None:
            setattr(model, part, nn.Identity())
    return Encoder(VitTrunk(model, taps, recompute), last, model.embed_dim, vit_patch(model), tapped)


def _split_convolutional(name: str, model: nn.Module) -> Encoder:
    info = getattr(model, "feature_info", None)
    info = getattr(info, "info", info)
    if not isinstance(info, list) or len(info) < 2:
        raise InputError(
            f"network.encoder: {name!r} gives no feature maps; take a resnet, mobilenet, convnext or vit",
            "network/unsupported-encoder",
        )
    modules = list(_flat_children(model))
    ends = [_end_of(feature["module"], modules) for feature in info]
    if None in ends[-2:]:
        raise _unsupported(name)
    quarter = [end for feature, end in zip(info[:-1], ends, strict=False) if feature["reduction"] == 4]
    third, end = ends[-2] + 1, ends[-1] + 1  # type: ignore[operator]
    last = _sequence(modules[third:end])
    if next(last.parameters(), None) is None:
        raise _unsupported(name)
    return Encoder(ConvTrunk(modules[:third], quarter[-1] if quarter else None), last)


_measured: dict[tuple[str, int], tuple[int | None, int, int]] = {}  # by name and output stride, once a process


def _measure(name: str, encoder: Encoder, model: nn.Module, stride: int) -> tuple[int | None, int, int]:
    """Channels of a convolutional encoder's two maps and the multiple of its sides, by one image; the map must be timm's own."""
    encoder.eval()
    side = _PROBE + 1
    device = next(encoder.parameters()).device
    image = torch.linspace(-1, 1, 3 * side**2, device=device).view(1, 3, side, side)
    try:
        with torch.no_grad():
            low, third = encoder.trunk(image)
            deep = encoder.last(*third)
            reference = _own_last_map(model.eval(), image)
    except (RuntimeError, TypeError, AttributeError, ValueError, AssertionError) as error:
        raise _unsupported(name) from error
    cells = _PROBE // stride
    fits = deep.shape == reference.shape and deep.ndim == 4 and deep.shape[-1] in (cells, cells + 1)
    if not fits or not (deep.is_meta or torch.allclose(deep, reference, atol=1e-4)):
        raise _unsupported(name)
    return None if low is None else low.shape[1], deep.shape[1], stride if deep.shape[-1] == cells else 1


def _own_last_map(model: Any, image: Tensor) -> Tensor:
    if hasattr(model, "forward_intermediates"):
        return model.forward_intermediates(image, indices=1, intermediates_only=True)[0]
    return model(image)[-1]


def _flat_children(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in model.named_children():
        if type(child) is nn.Sequential:
            yield from ((f"{name}.{key}", part) for key, part in child.named_children())
        else:
            yield name, child


def _end_of(feature: str, modules: list[tuple[str, nn.Module]]) -> int | None:
    inside = [index for index, (name, _) in enumerate(modules) if f"{name}.".startswith(f"{feature}.")]
    return inside[-1] if inside else None


def _sequence(modules: list[tuple[str, nn.Module]]) -> nn.Sequential:
    sequence = nn.Sequential()
    for name, module in modules:
        sequence.add_module(name.replace(".", "_"), module)
    return sequence


def _run_block(block: nn.Module, tokens: Tensor, rope: Tensor | None, recompute: bool) -> Tensor:
    """recompute: what the backward pass needs is computed again then, and not kept."""
    arguments = (tokens,) if rope is None else (tokens, rope)
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *arguments, use_reentrant=False)
    return block(*arguments)


def _unsupported(name: str) -> InputError:
    return InputError(
        f"network.encoder: {name!r} cannot be cut into stages; take a resnet, mobilenet, efficientnet, regnet, "
        "convnext or a plain vit",
        "network/unsupported-encoder",
    )
