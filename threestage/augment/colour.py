"""Colour jitter, grey and blur of strong views: UniMatch's photometric recipe, by torchvision. Off in the faithful presets."""

from typing import NamedTuple

import torch
from torch import Tensor

from threestage.augment.draws import Draws
from threestage.augment.plans import StrongSettings

JITTER = {"brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 0.25}
"""Greatest change of each: a factor of 1 ± it, of the hue a shift of ± it."""
BLUR = (0.1, 2.0)
"""Least and greatest sigma in pixels."""


class ColourPlan(NamedTuple):
    """What one image is given, on the host: jitters in their order with their strengths, then grey, then a blur."""

    jitter: tuple[tuple[str, float], ...]
    grey: bool
    sigma: float | None


def draw_colours(count: int, settings: StrongSettings, draws: Draws) -> list[ColourPlan] | None:
    """A plan for each image; None, and nothing drawn, where the settings ask for none."""
    if settings.jitter == settings.grey == settings.blur == 0:
        return None
    return [_plan(row, settings) for row in draws.uniform(count, 12).tolist()]


def _plan(drawn: list[float], settings: StrongSettings) -> ColourPlan:
    jittered, grey, blurred, sigma = drawn[:4]
    order = sorted(range(4), key=drawn[4:8].__getitem__)
    strengths = [(name, (2 * value - 1) * most) for (name, most), value in zip(JITTER.items(), drawn[8:], strict=True)]
    return ColourPlan(
        tuple(strengths[place] for place in order) if jittered < settings.jitter else (),
        grey < settings.grey,
        BLUR[0] + (BLUR[1] - BLUR[0]) * sigma if blurred < settings.blur else None,
    )


def with_colours(image: Tensor, plans: list[ColourPlan]) -> Tensor:
    """Images (N,3,h,w) uint8 as their plans change them, the channels last in memory."""
    changed = [_changed(one, plan) for one, plan in zip(image, plans, strict=True)]
    return torch.stack(changed).contiguous(memory_format=torch.channels_last)


def _changed(image: Tensor, plan: ColourPlan) -> Tensor:
    from torchvision.transforms.v2 import functional as F

    apply = {
        "brightness": F.adjust_brightness,
        "contrast": F.adjust_contrast,
        "saturation": F.adjust_saturation,
        "hue": F.adjust_hue,
    }
    for name, strength in plan.jitter:
        image = apply[name](image, strength if name == "hue" else 1 + strength)
    if plan.grey:
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    if plan.sigma is not None:
        side = 2 * min(round(3 * plan.sigma) + 1, (min(image.shape[-2:]) - 1) // 2) + 1
        image = F.gaussian_blur(image, [side, side], [plan.sigma, plan.sigma])
    return image
