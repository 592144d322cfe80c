"""What the strong views of a batch apply: drawn on the host as plain numbers, the same for every device."""

from collections.abc import Callable

import torch
from pydantic import Field, model_validator
from torch import Tensor

from threestage.augment import geometry
from threestage.augment.draws import Draws
from threestage.errors import InputError
from threestage.settings import Settings

OPERATIONS = (
    "identity", "autocontrast", "equalize", "rotate", "solarize", "color", "contrast", "brightness", "sharpness",
    "shear_x", "shear_y", "translate_x", "translate_y", "posterize",
)  # fmt: skip
"""The paper's fourteen; each slot draws one of them with equal chance."""

GEOMETRIC: dict[str, Callable[[float, geometry.Size], geometry.Matrix]] = {
    "rotate": lambda m, size: geometry.rotate(30 * m, size),
    "shear_x": lambda m, size: geometry.shear(0.3 * m, 0, size),
    "shear_y": lambda m, size: geometry.shear(0, 0.3 * m, size),
    "translate_x": lambda m, size: geometry.translate(10 * m, 0, size),
    "translate_y": lambda m, size: geometry.translate(0, 10 * m, size),
}
"""Name → matrix, from m = ±level / 10 and the size of the crop; the magnitudes are the paper's."""


class StrongSettings(Settings):
    """RandAugment and cutout; the defaults are the paper's."""

    operations: int = Field(3, ge=0, description="operations drawn per image, with replacement")
    probability: float = Field(0.5, ge=0, le=1, description="probability that a drawn operation is applied")
    levels: tuple[int, int] = Field((1, 9), description="smallest and largest level; the magnitude is level / 10")
    cutouts: int = Field(3, ge=0, description="squares cut out of each image; their pixels keep their labels")
    cutout_size: int = Field(32, ge=0, description="side of a cutout in pixels")
    jitter: float = Field(
        0.0,
        ge=0,
        le=1,
        description="probability of colour jitter (brightness, contrast, saturation 0.5, hue 0.25); paper: 0",
    )
    grey: float = Field(0.0, ge=0, le=1, description="probability that a view is grey; paper: 0")
    blur: float = Field(0.0, ge=0, le=1, description="probability of a blur of sigma 0.1 to 2 pixels; paper: 0")

    @model_validator(mode="after")
    def _ordered(self) -> "StrongSettings":
        if not 0 <= self.levels[0] <= self.levels[1] <= 10:
            raise InputError(
                f"levels {self.levels} must be two ascending whole numbers from 0 to 10", "config/invalid-value"
            )
        return self


Plan = list[tuple[str, float, float]]
"""What an image applies, in order: name, magnitude (level / 10), sign (-1 or 1)."""


def draw_operations(count: int, settings: StrongSettings, draws: Draws) -> list[Plan]:
    shape = (count, settings.operations)
    operation = draws.integers(0, len(OPERATIONS), *shape)
    applied = draws.uniform(*shape) < settings.probability
    level = draws.integers(settings.levels[0], settings.levels[1] + 1, *shape)
    positive = draws.integers(0, 2, *shape)
    rows = zip(*(drawn.tolist() for drawn in (operation, applied, level, positive)), strict=True)
    return [[step for slot in zip(*row, strict=True) if (step := _step(*slot)) is not None] for row in rows]


def _step(operation: int, applied: bool, level: int, positive: int) -> tuple[str, float, float] | None:
    if not applied or OPERATIONS[operation] == "identity":
        return None
    return OPERATIONS[operation], level / 10, 1.0 if positive else -1.0


def draw_cutouts(count: int, size: geometry.Size, settings: StrongSettings, draws: Draws) -> Tensor:
    """(N,cutouts,2) int64: the first row and column of each square, whose centre is any pixel of the crop."""
    centre = torch.floor(draws.uniform(count, settings.cutouts, 2) * torch.tensor(size)).long()
    return centre - settings.cutout_size // 2


def drawn_theta(plans: list[Plan], size: geometry.Size) -> Tensor:
    """(N,2,3) on the host: the geometric operations of all slots as one transform, the first drawn acting first."""
    moves = [[GEOMETRIC[name](m * sign, size) for name, m, sign in plan if name in GEOMETRIC] for plan in plans]
    return torch.tensor([geometry.chain(steps) for steps in moves])
