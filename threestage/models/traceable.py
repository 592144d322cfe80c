"""What timm computes in ways that torch.export ties to one image size, computed in others."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
