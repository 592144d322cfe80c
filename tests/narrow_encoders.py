"""Hierarchical encoders for timm of a few thousand weights: importing this module makes them known, in this process alone."""

from typing import Any

from timm.models import build_model_with_cfg, register_model
from timm.models.hieradet_sam2 import HieraDet
from timm.models.hrnet import HighResolutionNet
from timm.models.maxxvit import MaxxVit, MaxxVitCfg
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import nn

NARROW = ("narrow_swin", "narrow_swinv2", "narrow_pvt", "narrow_maxvit", "narrow_hiera", "narrow_hrnet")


def narrow_swin(pretrained: bool = False, **options: Any) -> nn.Module:
    return _swin(SwinTransformer, "narrow_swin", options)


def narrow_swinv2(pretrained: bool = False, **options: Any) -> nn.Module:
    return _swin(SwinTransformerV2, "narrow_swinv2", options)


def _swin(kind: type[nn.Module], name: str, options: dict[str, Any]) -> nn.Module:
    """Windows of 4 cells, so that images of 64 pixels have some that are shifted."""
    shape = {"embed_dim": 8, "depths": (2, 1, 1, 1), "num_heads": (1, 1, 2, 2), "window_size": 4, "img_size": 64}
    return build_model_with_cfg(kind, name, False, **{**shape, "strict_img_size": False, **options})


def narrow_pvt(pretrained: bool = False, **options: Any) -> nn.Module:
    shape = {"embed_dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
    return build_model_with_cfg(PyramidVisionTransformerV2, "narrow_pvt", False, **{**shape, **options})


def narrow_maxvit(pretrained: bool = False, **options: Any) -> nn.Module:
    """Made for images of 64 pixels: its windows have 2 cells."""
    shape = MaxxVitCfg(embed_dim=(32, 32, 32, 32), depths=(1, 1, 1, 1), block_type=("M",) * 4, stem_width=8)
    made_for = {"input_size": (3, 64, 64), "fixed_input_size": True}
    return build_model_with_cfg(
        MaxxVit, "narrow_maxvit", False, model_cfg=shape, **{**options, "pretrained_cfg": made_for}
    )


def narrow_hiera(pretrained: bool = False, **options: Any) -> nn.Module:
    shape = {"embed_dim": 8, "stages": (1, 1, 2, 1), "window_spec": (8, 4, 2, 2), "global_att_blocks": (3,)}
    return build_model_with_cfg(HieraDet, "narrow_hiera", False, **{**shape, **options})


def narrow_hrnet(pretrained: bool = False, **options: Any) -> nn.Module:
    def stage(*channels: int) -> dict[str, Any]:
        blocks = (1,) * len(channels)
        return {"num_modules": 1, "num_branches": len(channels), "block_type": "BASIC", "num_blocks": blocks,
                "num_channels": channels, "fuse_method": "SUM"}  # fmt: skip

    shape = {f"stage{number}": stage(*(8, 8, 16, 16)[:number]) for number in (1, 2, 3, 4)}
    shape["stem_width"] = 8  # type: ignore[assignment]
    return build_model_with_cfg(HighResolutionNet, "narrow_hrnet", False, model_cfg=shape, **options)


for factory in (narrow_swin, narrow_swinv2, narrow_pvt, narrow_maxvit, narrow_hiera, narrow_hrnet):
    register_model(factory)
