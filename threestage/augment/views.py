"""Weak and strong views of a whole batch, made on the device that holds it (A and W of method.md).

What is drawn comes from a CPU generator as small CPU tensors: CPU and GPU see the same parameters, and nothing here
reads a value back from the device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field, model_validator
from torch import Tensor

from threestage.augment import geometry, photometry
from threestage.augment.draws import Draws
from threestage.settings import Settings

FILL = 0.5
"""Mid-range of [0,1]: what a pixel from outside the image, and a cut-out one, is set to."""

OPERATIONS = (
    "identity", "autocontrast", "equalize", "rotate", "solarize", "color", "contrast", "brightness", "sharpness",
    "shear_x", "shear_y", "translate_x", "translate_y", "posterize",
)  # fmt: skip
"""The paper's fourteen; each slot draws one of them with equal chance."""

PHOTOMETRIC: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "autocontrast": lambda image, m, valid: photometry.autocontrast(image, valid),
    "equalize": lambda image, m, valid: photometry.equalize(image, valid),
    "solarize": lambda image, m, valid: photometry.solarize(image, 256 - 256 * m),
    "color": lambda image, m, valid: photometry.color(image, 0.1 + 1.8 * m),
    "contrast": lambda image, m, valid: photometry.contrast(image, 0.1 + 1.8 * m, valid),
    "brightness": lambda image, m, valid: photometry.brightness(image, 0.1 + 1.8 * m),
    "sharpness": lambda image, m, valid: photometry.sharpness(image, 0.1 + 1.8 * m),
    "posterize": lambda image, m, valid: photometry.posterize(image, 4 - torch.floor(4 * m)),
}
"""Name → operation on levels (N,3,H,W), m (N,) = level / 10 and valid (N,H,W); magnitudes of method.md, row A."""


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
    """(N,3,h,w) float32 in [0,1]"""
    valid: Tensor
    """(N,h,w) bool: the pixel comes from inside the source image"""
    theta: Tensor
    """(N,2,3) float32, from this view to the tensor that it was made from"""

    def warp(self, labels: Tensor) -> Tensor:
        """Class ids uint8 (N,H,W) or (N,K,H,W) of the tensor that this view was made from → the same of this view
        (W of method.md): nearest, through the very index that moved the image; 255 where not valid."""
        index, _ = geometry.nearest_index(self.theta, _size(self.image), _size(labels))
        return geometry.gather_labels(labels, index, self.valid)


def weak_view(image: Tensor, size: Tensor, settings: AugmentSettings, draws: Draws) -> View:
    """Random scale, crop and flip of canvases `image` uint8 (N,3,H,W), each padded below and right of its `size`.

    `size` (N,2) int64 holds the valid height and width, on any device. An image that is scaled to less than the crop
    is placed at random inside it; the rest is not valid and mid-range. Scaling is bilinear (no anti-aliasing below 0.5)
    to whole pixels; an unscaled image keeps its exact pixels.
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
    index, valid = geometry.nearest_index(theta, crop, _size(image), valid_size)
    view = geometry.gather_pixels(image, index).float() / 255
    scaled = _rows((scale != 1).nonzero().flatten().tolist(), image)
    if len(scaled):
        source = image[scaled].float() / 255
        resized = geometry.sample_image(source, theta[scaled], crop, "bilinear", FILL, valid_size[scaled])
        view = view.index_copy_(0, scaled, resized)
    return View(view.masked_fill_(~valid[:, None], FILL), valid, theta)


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
    drawn = _draw_operations(count, settings, draws)
    corners = _draw_cutouts(count, size, settings, draws)
    theta = _to(_drawn_theta(drawn, size), view.image)
    image = _apply_photometry(view, drawn)
    index, inside = geometry.nearest_index(theta, size, size)
    valid = geometry.gather_pixels(view.valid, index) & inside
    hidden = ~valid | _squares(_to(corners, view.image), settings.cutout_size, size)
    return View(geometry.gather_pixels(image, index).masked_fill_(hidden[:, None], FILL), valid, theta)


@dataclass(frozen=True)
class _Drawn:
    """What each of N images drew in each of K slots, on the host; an operation not applied is written as identity."""

    operation: Tensor
    """(N,K) int64, an index into OPERATIONS"""
    magnitude: Tensor
    """(N,K) float32, level / 10"""
    sign: Tensor
    """(N,K) float32, -1 or 1"""

    def signed(self, name: str, slot: int) -> Tensor:
        """(N,) magnitude with its sign where the slot applies the operation, else 0."""
        chosen = self.operation[:, slot] == OPERATIONS.index(name)
        return chosen * self.magnitude[:, slot] * self.sign[:, slot]


def _draw_operations(count: int, settings: StrongSettings, draws: Draws) -> _Drawn:
    shape = (count, settings.operations)
    operation = draws.integers(0, len(OPERATIONS), *shape)
    applied = draws.uniform(*shape) < settings.probability
    level = draws.integers(settings.levels[0], settings.levels[1] + 1, *shape)
    sign = draws.integers(0, 2, *shape) * 2 - 1
    return _Drawn(torch.where(applied, operation, OPERATIONS.index("identity")), level / 10, sign.float())


def _draw_cutouts(count: int, size: geometry.Size, settings: StrongSettings, draws: Draws) -> Tensor:
    """(N,cutouts,2) float32: the first row and column of each square, whose centre is any pixel of the crop."""
    centre = torch.floor(draws.uniform(count, settings.cutouts, 2) * torch.tensor(size))
    return centre - settings.cutout_size // 2


def _squares(corners: Tensor, side: int, size: geometry.Size) -> Tensor:
    """(N,h,w) bool: the pixel lies in one of the squares (N,K,2) of `side` pixels."""
    rows = torch.arange(size[0], device=corners.device) - corners[:, :, :1]
    columns = torch.arange(size[1], device=corners.device) - corners[:, :, 1:]
    in_row, in_column = (rows >= 0) & (rows < side), (columns >= 0) & (columns < side)
    return (in_row[:, :, :, None] & in_column[:, :, None, :]).any(1)


def _drawn_theta(drawn: _Drawn, size: geometry.Size) -> Tensor:
    """(N,2,3) on the host: the geometric operations of all slots as one transform, the first drawn acting first."""
    theta = geometry.identity(len(drawn.operation))
    for slot in range(drawn.operation.shape[1]):
        turned = geometry.rotate(30 * drawn.signed("rotate", slot), size)
        sheared = geometry.shear(0.3 * drawn.signed("shear_x", slot), 0.3 * drawn.signed("shear_y", slot), size)
        x, y = 10 * drawn.signed("translate_x", slot), 10 * drawn.signed("translate_y", slot)
        for step in (turned, sheared, geometry.translate(x, y, size)):
            theta = geometry.compose(theta, step)
    return theta


def _apply_photometry(view: View, drawn: _Drawn) -> Tensor:
    """The image (N,3,h,w) after each sample's photometric operations in their order; other samples are untouched."""
    plans = _photometric_plans(drawn)
    touched = [sample for sample, plan in enumerate(plans) if plan]
    if not touched:
        return view.image
    rows = _rows(touched, view.image)
    valid = view.valid[rows]
    image = view.image[rows]
    low, span = photometry.level_range(image, valid, (1, 2, 3))
    span = span.masked_fill(span == 0, 1)
    levels = torch.round((image - low) * (255 / span)).clamp_(0, 255)
    for turn in range(max(map(len, plans))):
        for name, group in _by_operation([plans[sample][turn : turn + 1] for sample in touched]).items():
            chosen = _rows([row for row, _ in group], image)
            magnitude = _to(torch.tensor([m for _, m in group]), image)
            levels.index_copy_(0, chosen, PHOTOMETRIC[name](levels[chosen], magnitude, valid[chosen]))
    return view.image.index_copy(0, rows, levels * (span / 255) + low)


Plan = list[tuple[str, float]]


def _photometric_plans(drawn: _Drawn) -> list[Plan]:
    """Per sample, the (name, magnitude) of the photometric operations that it applies, in order."""
    rows = zip(drawn.operation.tolist(), drawn.magnitude.tolist(), strict=True)
    named = [[(OPERATIONS[code], m) for code, m in zip(*row, strict=True)] for row in rows]
    return [[(name, m) for name, m in plan if name in PHOTOMETRIC] for plan in named]


def _by_operation(plans: Sequence[Plan]) -> dict[str, list[tuple[int, float]]]:
    """Operation → the (row, magnitude) of the samples that apply it now."""
    groups: dict[str, list[tuple[int, float]]] = {}
    for row, plan in enumerate(plans):
        for name, magnitude in plan:
            groups.setdefault(name, []).append((row, magnitude))
    return groups


def _rows(indices: list[int], like: Tensor) -> Tensor:
    return _to(torch.tensor(indices, dtype=torch.long), like)


def _to(host: Tensor, like: Tensor) -> Tensor:
    return host.to(like.device, non_blocking=True)


def _size(values: Tensor) -> geometry.Size:
    return values.shape[-2], values.shape[-1]
