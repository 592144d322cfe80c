"""An encoder for timm of a few thousand weights: importing this module makes it known under its name, in this process alone."""

from typing import Any

from timm.models import build_model_with_cfg, register_model
from timm.models.resnet import BasicBlock, ResNet

NAME = "narrow_resnet"


def narrow_resnet(pretrained: bool = False, **options: Any) -> ResNet:
    """A ResNet of four blocks with 4 and 8 channels."""
    shape = {
        "block": BasicBlock,
        "layers": (1, 1, 1, 1),
        "channels": (4, 4, 8, 8),
        "stem_width": 4,
        "stem_type": "deep",
    }
    return build_model_with_cfg(ResNet, NAME, pretrained, **{**shape, **options})


register_model(narrow_resnet)
