"""timm encoders cut before their last stage, so that stage 2's auxiliary branch can own a copy of it (method.md, ĝ)."""

import contextlib
import difflib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from threestage.data.bands import RGB
from threestage.errors import InputError, reason_of
from threestage.models.trunks import (
    AddPositions,
    BranchedStage,
    BranchedTrunk,
    Encoder,
    LastStage,
    StagedTrunk,
    VitStage,
    VitTrunk,
    without_dots,
)

VIT_NAME = re.compile(r"^(test_vit|vit_|flexivit_|deit|eva)")
_PROBE = 64
COARSEST = 32
"""The stride of a hierarchical encoder's last map; FPN takes maps at 4, 8, 16 and this."""
ANY_SIZE = {"swin_transformer": "strict_img_size", "swin_transformer_v2": "strict_img_size"}
"""The timm module of a family, and the argument that is false where it takes images of any size."""
REFUSALS = (RuntimeError, TypeError, AttributeError, ValueError, AssertionError)
"""What timm's models raise at an image, or an argument, that they do not take."""
TAPS_OF_24 = (4, 11, 17, 23)
"""Of a ViT with 24 blocks, as DPT and DINOv2 have them; other depths are cut into quarters."""


def create_timm(name: str, output_stride: int, pretrained: bool = False, channels: int = RGB) -> nn.Module:
    """timm's whole model `name`; a ViT takes any image size, a convolutional network has `output_stride`.
    Of other `channels` than RGB timm widens the first convolution (`widen_first_convolution`).

    Raises InputError for an unknown name (with the nearest ones), a stride that the model cannot have, and
    `pretrained` where timm's hub has no weights or cannot be reached.
    """
    import timm

    if not timm.is_model(name) or ("." in name and name not in timm.list_pretrained()):
        near = difflib.get_close_matches(name, timm.list_models() + timm.list_pretrained(), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() names them"
        raise InputError(f"network.encoder: timm knows no {name!r}; {hint}", "network/unknown-encoder")
    options: dict[str, Any] = {"dynamic_img_size": True} if VIT_NAME.match(name) else {"output_stride": output_stride}
    options |= {flag: False for family, flag in ANY_SIZE.items() if timm.models.is_model_in_modules(name, {family})}
    if timm.models.is_model_in_modules(name, {"mobilenetv3"}):
        options["features_only"] = True  # only this form of the family takes a stride
    if channels != RGB:
        options["in_chans"] = channels
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
    b/4 blocks and the final norm. tapped: there are four maps; recompute: a ViT's blocks run again in the backward pass.
    Raises InputError if the model has no such maps, does not run in that order, or takes images of one size only.
    """
    if VIT_NAME.match(name):
        return _split_vit(name, model, tapped, recompute)
    branched = hasattr(model, "transition3")
    if branched and not tapped:
        raise InputError(
            f"network.head: the branches of network.encoder {name!r} end together, and only fpn takes all four; set network.head "
            "to fpn",
            "network/unsuited-head",
        )
    encoder = Encoder(BranchedTrunk(model), BranchedStage(model)) if branched else _split_stages(name, model, tapped)
    key = (name, output_stride, tapped)
    measured = _measured.get(key) or _measure(name, encoder, model, output_stride, tapped)
    if not next(encoder.parameters()).is_meta:  # a map without values was not compared
        _measured[key] = measured
    encoder.low_channels, encoder.maps, encoder.size_multiple = measured
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
        if stride == COARSEST:
            try:
                return timm.create_model(name, **without_stride(options))
            except (TypeError, RuntimeError, ValueError):
                raise _unsupported(name, "timm cannot make it for images of any size") from error
        others = [other for other in (32, 16, 8) if stride and other != stride and _takes_stride(name, options, other)]
        if not others:
            raise _unsupported(name, f"timm makes it at no output stride ({reason_of(error)})") from error
        raise InputError(
            f"network.encoder: {name!r} cannot have network.output_stride {stride}; set network.output_stride to {others[0]}, "
            "or take a resnet, mobilenet, efficientnet, regnet or convnext",
            "network/output-stride",
        ) from error


def without_stride(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != "output_stride"}


def _takes_stride(name: str, options: dict[str, Any], stride: int) -> bool:
    """Whether the encoder can be made with this output stride and cut into stages."""
    import timm

    choices = [{**options, "output_stride": stride}, *([without_stride(options)] if stride == COARSEST else [])]
    for chosen in choices:
        for tapped in (False, True):
            with contextlib.suppress(*REFUSALS), torch.device("meta"):
                split_encoder(name, timm.create_model(name, **chosen), stride, tapped)
                return True
    return False


def taps_of(blocks: int) -> tuple[int, ...]:
    """The blocks after which DPT's four maps are taken: the ends of the quarters."""
    return TAPS_OF_24 if blocks == 24 else tuple(blocks * quarter // 4 - 1 for quarter in (1, 2, 3, 4))


def _split_vit(name: str, model: Any, tapped: bool, recompute: bool) -> Encoder:
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    if not isinstance(model, VisionTransformer | Eva) or getattr(model, "rope_mixed", False):
        raise _unsupported(name, "it is no plain vision transformer")
    cut = len(model.blocks) - max(1, len(model.blocks) // 4)
    taps = taps_of(len(model.blocks))[:3] if tapped else ()
    if tapped and len(model.blocks) < 4:
        raise _unsupported(name, "network.head=dpt takes maps after four blocks, and it has fewer")
    norm = model.fc_norm if isinstance(model.norm, nn.Identity) else model.norm
    last = VitStage(nn.Sequential(*model.blocks[cut:]), norm, model.num_prefix_tokens, recompute)
    model.blocks = model.blocks[:cut]
    for part in ("norm", "fc_norm", "head", "head_dist", "attn_pool"):
        if getattr(model, part, None) is not None:
            setattr(model, part, nn.Identity())
    maps = (model.embed_dim,) * (4 if tapped else 1)
    return Encoder(VitTrunk(model, taps, recompute), last, maps, vit_patch(model))


def _split_stages(name: str, model: Any, tapped: bool) -> Encoder:
    info = getattr(model, "feature_info", None)
    info = getattr(info, "info", info)
    if not isinstance(info, list) or len(info) < 2:
        raise _unsupported(name, "it gives no feature maps")
    modules = list(_flat_children(model))
    ends = [_end_of(feature["module"], modules) for feature in info]
    if None in ends[-2:]:
        raise _unsupported(name, _why_not(model))
    if tapped and ([feature["reduction"] for feature in info[-4:]] != [4, 8, 16, COARSEST] or None in ends[-4:]):
        found = ", ".join(str(feature["reduction"]) for feature in info)
        raise InputError(
            f"network.head: fpn takes maps at strides 4, 8, 16 and {COARSEST}, and network.encoder {name!r} has {found}; set "
            f"network.output_stride to {COARSEST}, or network.head to deeplabv3plus or deeplabv2",
            "network/unsuited-head",
        )
    quarter = [end for feature, end in zip(info[:-1], ends, strict=False) if feature["reduction"] == 4]
    third, end = ends[-2] + 1, ends[-1] + 1  # type: ignore[operator]
    last = LastStage(without_dots(modules[third:end]))
    if next(last.parameters(), None) is None:
        raise _unsupported(name, "its last stage has no weights")
    nhwc = last.nhwc = getattr(model, "output_fmt", "NCHW") == "NHWC"
    taps = tuple(end for end in ends[-4:-1] if end is not None) if tapped else ()
    low = quarter[-1] if quarter else None
    if hasattr(model, "_pos_embed"):
        modules[0] = ("patch_embed", nn.Sequential(modules[0][1], AddPositions(model)))
    return Encoder(StagedTrunk(modules[:third], low, taps, nhwc), last)


Measured = tuple[int | None, tuple[int, ...], int]
_measured: dict[tuple[str, int, bool], Measured] = {}  # by name, output stride and whether tapped, once a process


def _measure(name: str, encoder: Encoder, model: Any, stride: int, tapped: bool) -> Measured:
    """Channels of the map at stride 4, channels of the last maps, and the multiple of the sides, by one image. The maps must be
    timm's own.

    An encoder takes any size, sides that are multiples of its coarsest stride, or those of the images that it was made for.
    """
    wider = [(multiple, (multiple, 2 * multiple)) for multiple in (COARSEST, _made_for(model)) if multiple]
    for multiple, size in [*([] if tapped else [(1, (_PROBE + 1, _PROBE + 1))]), *wider]:
        with contextlib.suppress(*REFUSALS):
            low, maps = _own_maps(encoder.eval(), model.eval(), size)
            cells, found = size[1] // stride, maps[-1].shape[-1]
            if found not in (cells, cells + 1):
                raise ValueError(f"{found} cells, not {cells}: it has another stride")
            if multiple == 1 and found == cells:
                multiple = stride
            return None if low is None else low.shape[1], tuple(one.shape[1] for one in maps), multiple
    raise _unsupported(name, _why_not(model))


def _made_for(model: Any) -> int:
    """The side of the images that timm's weights were trained with; 0 where it does not say."""
    return int((getattr(model, "pretrained_cfg", {}).get("input_size") or (0,))[-1])


def _why_not(model: Any) -> str:
    """Why a model's last stage cannot be run apart."""
    side = _made_for(model)
    with contextlib.suppress(*REFUSALS), torch.no_grad():
        model(_probe_image(model, (side, side)))
        try:
            model(_probe_image(model, (side, 2 * side)))
        except REFUSALS:
            return f"it takes images of {side}x{side} pixels only"
    return "its stages are no modules that run one after another"


def _own_maps(encoder: Encoder, model: Any, size: tuple[int, int]) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """The map at stride 4 and the last ones of an image; ValueError where these are not timm's own."""
    image = _probe_image(model, size)
    with torch.no_grad():
        low, third = encoder.trunk(image)
        found = encoder.last(*third)
        maps = found if isinstance(found, tuple) else (found,)
        if hasattr(model, "forward_intermediates"):
            expected = model.forward_intermediates(image, indices=len(maps), intermediates_only=True)
        else:
            expected = model(image)[-len(maps) :]
    for mine, theirs in zip(maps, expected, strict=True):
        if mine.shape != theirs.shape or not (mine.is_meta or torch.allclose(mine, theirs, atol=1e-4)):
            raise ValueError(f"{tuple(mine.shape)}, timm's {tuple(theirs.shape)}")
    return low, maps


def _probe_image(model: nn.Module, size: tuple[int, int]) -> Tensor:
    device = next(model.parameters()).device
    channels = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), RGB)
    return torch.linspace(-1, 1, channels * size[0] * size[1], device=device).view(1, channels, *size)


def _flat_children(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in model.named_children():
        if type(child) is nn.Sequential:
            yield from ((f"{name}.{key}", part) for key, part in child.named_children())
        else:
            yield name, child


def _end_of(feature: str, modules: list[tuple[str, nn.Module]]) -> int | None:
    inside = [index for index, (name, _) in enumerate(modules) if f"{name}.".startswith(f"{feature}.")]
    return inside[-1] if inside else None


def _unsupported(name: str, why: str) -> InputError:
    return InputError(
        f"network.encoder: {name!r} cannot be cut into stages: {why}; take a resnet, mobilenet, efficientnet, regnet, "
        "convnext, swin, pvt_v2 or a plain vit",
        "network/unsupported-encoder",
    )
