"""CutMix between the strong views of a batch (French et al. 2020; box as in UniMatch). Off in the faithful presets."""

from dataclasses import dataclass

import torch
from torch import Tensor

from threestage.augment.draws import Draws
from threestage.augment.geometry import Size

AREA = (0.02, 0.4)
"""Least and greatest share of the picture that a box takes."""
ASPECT = (0.3, 1 / 0.3)
"""Least and greatest height / width of a box."""


@dataclass(frozen=True)
class Mixing:
    """Which pixels of each picture of a worker's batch come from the next picture of that batch, at the same place."""

    inside: Tensor
    """(N,h,w) bool"""

    def __call__(self, values: Tensor) -> Tensor:
        """Pictures (N,C,h,w), class ids or weights (N,h,w) → the same, mixed."""
        inside = self.inside if values.ndim == self.inside.ndim else self.inside[:, None]
        return torch.where(inside, values.roll(-1, 0), values)


def draw_mixing(count: int, size: Size, probability: float, draws: Draws, device: torch.device) -> Mixing:
    """One box for each of `count` pictures, empty with the chance 1 - `probability`; drawn on the host."""
    mixed, area, aspect, top, left = draws.uniform(count, 5).unbind(1)
    area = (AREA[0] + (AREA[1] - AREA[0]) * area) * size[0] * size[1] * (mixed < probability)
    aspect = ASPECT[0] + (ASPECT[1] - ASPECT[0]) * aspect
    rows = _span(torch.sqrt(area * aspect), top, size[0], device)
    columns = _span(torch.sqrt(area / aspect), left, size[1], device)
    return Mixing(rows[:, :, None] & columns[:, None, :])


def _span(length: Tensor, place: Tensor, side: int, device: torch.device) -> Tensor:
    """(N,side) bool: a run of `length` (N,) pixels, at most the whole side, that begins at the share `place` of its room."""
    length = length.round().clamp(max=side)
    first = torch.floor(place * (side - length + 1)).to(device, non_blocking=True)
    end = first + length.to(device, non_blocking=True)
    pixels = torch.arange(side, device=device)
    return (pixels >= first[:, None]) & (pixels < end[:, None])
