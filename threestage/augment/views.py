"""Weak and strong views of a whole batch, made on the device that holds it (A and W of method.md).

What is drawn comes from a CPU generator as small CPU tensors: CPU and GPU see the same parameters, and nothing here
reads a value back from the device.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import torch
from pydantic import Field, model_validator
from torch import Tensor

from threestage.augment import geometry, photometry
from threestage.augment.draws import Draws
from threestage.settings import Settings

FILL = 128
"""The middle level of 256: what a pixel from outside the image, and a cut-out one, is set to."""

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
"""Name → matrix, from m = ±level / 10 and the size of the crop; magnitudes of method.md, row A, here and below."""

TABLES: dict[str, Callable[[float], Tensor]] = {
    "solarize": lambda m: photometry.solarize(256 - 256 * m),
    "brightness": lambda m: photometry.brightness(0.1 + 1.8 * m),
    "posterize": lambda m: photometry.posterize(4 - int(4 * m)),
}
"""Name → table of levels, from m = level / 10."""

TABLES_OF_HISTOGRAM: dict[str, Callable[[Tensor, float], Tensor]] = {
    "autocontrast": lambda histogram, m: photometry.autocontrast(histogram),
    "equalize": lambda histogram, m: photometry.equalize(histogram),
    "contrast": lambda histogram, m: photometry.contrast(histogram, 0.1 + 1.8 * m),
}
"""Name → table of levels, from the histogram of each channel and m."""

OF_PIXELS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "color": lambda image, m: photometry.color(image, 0.1 + 1.8 * m),
    "sharpness": lambda image, m: photometry.sharpness(image, 0.1 + 1.8 * m),
}
"""Name → operation on levels (3,H,W)."""

PHOTOMETRIC = frozenset((*TABLES, *TABLES_OF_HISTOGRAM, *OF_PIXELS))


class StrongSettings(Settings):
    """RandAugment and cutout as in method.md, row A; the defaults are the paper's."""

    operations: int = Field(3, ge=0, description="operations drawn per image, with replacement")
    probability: float = Field(0.5, ge=0, le=1, description="chance that a drawn operation is applied")
    levels: tuple[int, int] = Field((1, 9), description="least and greatest level; the magnitude is level / 10")
    cutouts: int = Field(3, ge=0, description="squares cut out per image; their pixels keep their labels")
    cutout_size: int = Field(32, ge=0, description="side of a cutout in pixels")

    @model_validator(mode="after")
    def _ordered(self) -> "StrongSettings":
        if not 0 <= self.levels[0] <= self.levels[1] <= 10:
            raise ValueError(f"levels {self.levels} must be two ascending whole numbers from 0 to 10")
        return self


class AugmentSettings(Settings):
    """What a training batch is cropped to, and how its views differ from the images."""

    crop_size: tuple[int, int] = Field(description="height and width of every view in pixels")
    scale: tuple[float, float] = Field((1.0, 1.0), description="least and greatest random scale; 1, 1 keeps the pixels")
    scale_step: float = Field(0.1, ge=0, description="scales are drawn in these steps; 0 is continuous")
    flip_probability: float = Field(0.5, ge=0, le=1, description="chance of a horizontal flip")
    class_balance: float = Field(
        0.0,
        ge=0,
        le=1,
        description="labelled crops are drawn around a pixel of a class of chance ∝ its pixels^-class_balance; 0 (faithful): "
        "every image in turn, cut anywhere",
    )
    strong: StrongSettings = StrongSettings()

    @model_validator(mode="after")
    def _possible(self) -> "AugmentSettings":
        if min(self.crop_size) < 1:
            raise ValueError(f"crop_size {self.crop_size} must be two positive numbers: height, width")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale {self.scale} must be two ascending positive numbers")
        return self


@dataclass(frozen=True)
class View:
    """A batch of pictures and where their pixels come from."""

    image: Tensor
    """(N,3,h,w) uint8; see `network_input`"""
    valid: Tensor
    """(N,h,w) bool: the pixel comes from inside the source image"""
    theta: Tensor
    """(N,2,3) float32, from this view to the tensor that it was made from"""
    move: geometry.Move = field(default_factory=geometry.Move)
    """theta as an index, worked out once; by default no picture moves"""

    def warp(self, labels: Tensor) -> Tensor:
        """Class ids uint8 (N,H,W) or (N,K,H,W) of the tensor that this view was made from → the same of this view
        (W of method.md): nearest, through the very index that moved the image; 255 where not valid."""
        return geometry.ignored(self.move(labels), self.valid)


def network_input(image: Tensor) -> Tensor:
    """Images uint8 → float32 in [0,1]: at the very end, as four times as many bytes are moved afterwards."""
    return image.float().div_(255)


def weak_view(image: Tensor, size: Tensor, settings: AugmentSettings, draws: Draws) -> View:
    """Random scale, crop and flip of canvases `image` uint8 (N,3,H,W), each padded below and right of its `size`.

    `size` (N,2) int64 holds the valid height and width, on any device. An image that is scaled to less than the crop
    is placed at random inside it; the rest is not valid and mid-range. Scaling is bilinear (no anti-aliasing below 0.5)
    to whole pixels and to the nearest of 256 levels; an unscaled image keeps its exact pixels.
    """
    count, crop = len(image), settings.crop_size
    scale = _draw_scale(count, settings, draws)
    place = draws.uniform(count, 2)
    flipped = draws.uniform(count) < settings.flip_probability
    theta = geometry.compose(
        _crop_theta(_to(scale, size), size, _to(place, size), crop, _size(image)).to(image.device, non_blocking=True),
        geometry.horizontal_flip(_to(flipped, image)),
    )
    valid_size = size.to(image.device, non_blocking=True)
    index, valid = geometry.nearest_index(theta, crop, _size(image), valid_size, upright=True)
    move = geometry.Move(range(count), index)
    shown = move(image)
    scaled = (scale != 1).nonzero().flatten().tolist()
    if scaled:
        rows = _to(torch.tensor(scaled), image)
        resized = geometry.sample_image(image[rows].float(), theta[rows], crop, "bilinear", 0, valid_size[rows])
        shown = torch.stack(geometry.replaced(shown, scaled, photometry.to_levels(resized)))
    return View(geometry.filled(shown, valid, FILL), valid, theta, move)


def _draw_scale(count: int, settings: AugmentSettings, draws: Draws) -> Tensor:
    """(N,) float32 factors; in steps they are rounded, so that a step that means 1 is exactly 1."""
    least, greatest = settings.scale
    if settings.scale_step == 0:
        return least + (greatest - least) * draws.uniform(count)
    steps = int((greatest - least) / settings.scale_step + 1e-6)
    drawn = draws.integers(0, steps + 1, count)
    return torch.round(least + settings.scale_step * drawn.double(), decimals=6).float()


def _crop_theta(scale: Tensor, size: Tensor, place: Tensor, crop: geometry.Size, source: geometry.Size) -> Tensor:
    """Theta of a window of `crop` pixels in the image scaled to whole pixels; `place` (N,2) in [0,1) says where."""
    scaled = torch.round(size * scale[:, None]).clamp(min=1)
    room = scaled - torch.tensor(crop).to(size.device, non_blocking=True)  # below 0: the image is placed in the crop
    offset = torch.floor(place * (room.abs() + 1)).minimum(room.abs()) * room.sign()
    factor = size / scaled
    top, left = (offset * factor).unbind(1)
    return geometry.window(top, left, crop[0] * factor[:, 0], crop[1] * factor[:, 1], source)


def strong_view(view: View, settings: StrongSettings, draws: Draws) -> View:
    """A of method.md: RandAugment, then cutout, of a weak view; `theta` leads from the strong crop to the weak one.

    Differs from PIL calls one after the other in this: the photometric operations act first, in the order drawn, on
    each image stretched to 8 bits (undone afterwards: both views share one distribution); the geometric ones are then
    composed in the order drawn and resample once, by nearest. So statistics (an equalisation's, say) see neither the
    fill nor what is not valid, and what one operation moves out and a later one moves back is kept. An image that drew
    no operation keeps its exact pixels. Cutouts are centred anywhere in the crop; they and all that is not valid become
    mid-range, but only the latter lose `valid`.
    """
    count, size = len(view.image), _size(view.image)
    plans = _draw_operations(count, settings, draws)
    corners = _draw_cutouts(count, size, settings, draws)
    theta = _drawn_theta(plans, size)
    moved = [sample for sample, matrix in enumerate(theta) if not torch.equal(matrix, torch.eye(2, 3))]
    move, valid = geometry.Move(), view.valid
    if moved:
        index, inside = geometry.nearest_index(_to(theta[moved], valid), size, size)
        move = geometry.Move(moved, index)
        within = geometry.gather_pixels(torch.stack([valid[sample] for sample in moved]), index) & inside
        valid = torch.stack(geometry.replaced(valid, moved, within))
    shown = valid.byte() & ~_squares(_to(corners, valid), settings.cutout_size, size)
    image = geometry.filled(move(_apply_photometry(view, plans)), shown, FILL)
    return View(image, valid, _to(theta, image), move)


Plan = list[tuple[str, float, float]]
"""What an image applies, in order: name, magnitude (level / 10), sign (-1 or 1)."""


def _draw_operations(count: int, settings: StrongSettings, draws: Draws) -> list[Plan]:
    shape = (count, settings.operations)
    operation = draws.integers(0, len(OPERATIONS), *shape)
    applied = draws.uniform(*shape) < settings.probability
    level = draws.integers(settings.levels[0], settings.levels[1] + 1, *shape)
    sign = draws.integers(0, 2, *shape) * 2 - 1
    operation = torch.where(applied, operation, OPERATIONS.index("identity"))
    rows = zip(operation.tolist(), (level / 10).tolist(), sign.float().tolist(), strict=True)
    plans = [[(OPERATIONS[code], m, side) for code, m, side in zip(*row, strict=True)] for row in rows]
    return [[step for step in plan if step[0] != "identity"] for plan in plans]


def _draw_cutouts(count: int, size: geometry.Size, settings: StrongSettings, draws: Draws) -> Tensor:
    """(N,cutouts,2) int64: the first row and column of each square, whose centre is any pixel of the crop."""
    centre = torch.floor(draws.uniform(count, settings.cutouts, 2) * torch.tensor(size)).long()
    return centre - settings.cutout_size // 2


def _squares(corners: Tensor, side: int, size: geometry.Size) -> Tensor:
    """(N,h,w) uint8: 1 where the pixel lies in one of the squares (N,K,2) of `side` pixels, else 0."""
    hidden = torch.zeros(len(corners), *size, dtype=torch.uint8, device=corners.device)
    rows = torch.arange(size[0], device=corners.device) - corners[:, :, :1]
    columns = torch.arange(size[1], device=corners.device) - corners[:, :, 1:]
    in_row, in_column = (((at >= 0) & (at < side)).byte() for at in (rows, columns))
    for row, column in zip(in_row.unbind(1), in_column.unbind(1), strict=True):
        hidden |= row[:, :, None] & column[:, None, :]
    return hidden


def _drawn_theta(plans: list[Plan], size: geometry.Size) -> Tensor:
    """(N,2,3) on the host: the geometric operations of all slots as one transform, the first drawn acting first."""
    moves = [[GEOMETRIC[name](m * sign, size) for name, m, sign in plan if name in GEOMETRIC] for plan in plans]
    return torch.tensor([geometry.chain(steps) for steps in moves])


def _apply_photometry(view: View, plans: list[Plan]) -> list[Tensor]:
    """The levels (3,h,w) of each sample after its photometric operations in their order; others are untouched."""
    images = list(view.image)
    steps = [[(name, m) for name, m, _ in plan if name in PHOTOMETRIC] for plan in plans]
    touched = [sample for sample, of_sample in enumerate(steps) if of_sample]
    if not touched:
        return images
    low, span = photometry.level_range(view.image, view.valid)
    tables = list(photometry.stretch(low, span))
    for sample in touched:
        for name, m in steps[sample]:
            image, table = images[sample], tables[sample]
            images[sample], tables[sample] = _operate(name, m, image, view.valid[sample], table)
    last = photometry.unstretch(low, span, torch.stack(tables))
    done = photometry.look_up([last[sample] for sample in touched], [images[sample] for sample in touched])
    return geometry.replaced(images, touched, done)


def _operate(name: str, m: float, image: Tensor, valid: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Levels (3,h,w) and the table (3,256) that is yet to be looked up in them, after one more operation."""
    if name in TABLES:
        return image, photometry.compose(table, _table(name, m, image.device))
    if name in TABLES_OF_HISTOGRAM:
        histogram = photometry.histogram(image, valid, table)
        return image, photometry.compose(table, TABLES_OF_HISTOGRAM[name](histogram, m))
    (seen,) = photometry.look_up([table.byte()], [image])
    return OF_PIXELS[name](seen, m), torch.arange(photometry.LEVELS, device=image.device).expand(3, -1)


@cache
def _table(name: str, m: float, device: torch.device) -> Tensor:
    """One of the few tables that depend on no image, where it is needed."""
    return TABLES[name](m).to(device)


def _to(host: Tensor, like: Tensor) -> Tensor:
    return host.to(like.device, non_blocking=True)


def _size(values: Tensor) -> geometry.Size:
    return values.shape[-2], values.shape[-1]
