"""Weak and strong views of a whole batch, made on the device that holds it (A and W of method.md).

What is drawn comes from a CPU generator as small CPU tensors: CPU and GPU see the same parameters, and nothing here
reads a value back from the device.
"""

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from threestage.augment import geometry, photometry, pil_warp
from threestage.augment.colour import ColourPlan, draw_colours, with_colours
from threestage.augment.draws import Draws
from threestage.augment.plans import GEOMETRIC, Plan, StrongSettings, draw_cutouts, draw_operations, drawn_theta
from threestage.errors import InputError
from threestage.settings import Settings

RGB = 3
FILL = 128
"""The middle level of 256: what a pixel from outside the image, and a cut-out one, is set to."""


class AugmentSettings(Settings):
    """Crops and views of training images."""

    crop_size: tuple[int, int] = Field(description="height and width of every view in pixels")
    scale: tuple[float, float] = Field(
        (1.0, 1.0), description="smallest and largest random scale; 1, 1 keeps the pixels"
    )
    scale_step: float = Field(0.1, ge=0, description="step between random scales; 0: continuous")
    flip_probability: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")
    class_balance: float = Field(
        0.0,
        ge=0,
        le=1,
        description="draw labelled crops around a pixel of a class, with probability ∝ (its pixels)^-class_balance. Near 0: all "
        "classes equally often; 1: the rarest most; 0: off (paper)",
    )
    strong: StrongSettings = StrongSettings()

    @model_validator(mode="after")
    def _possible(self) -> "AugmentSettings":
        if min(self.crop_size) < 1:
            raise InputError(
                f"crop_size {self.crop_size} must be two positive numbers: height, width", "config/invalid-value"
            )
        if not 0 < self.scale[0] <= self.scale[1]:
            raise InputError(f"scale {self.scale} must be two ascending positive numbers", "config/invalid-value")
        return self


class Extent(NamedTuple):
    """Which part of its image each canvas shows, and where its crop is to be cut: (N,2) each, rows and columns, on any device.

    The canvas was cut for the same `place` (data/samples.py), so crops of any scale lie uniformly in the image.
    """

    size: Tensor
    """int64: valid rows and columns of the canvas"""
    image: Tensor
    """int64: rows and columns of the whole image"""
    origin: Tensor
    """int64: the image's row and column at the canvas's first pixel"""
    place: Tensor
    """float32 in [0,1): 0 is the first possible crop, 1 the last"""
    pixel: Tensor | None = None
    """int64: row and column in the image of a pixel that the crop has to hold"""

    @classmethod
    def of(cls, numbers: Tensor, pixel: Tensor | None = None) -> "Extent":
        """From (N,4,2) float64: size, image, origin and place of each canvas."""
        size, image, origin, place = numbers.unbind(1)
        return cls(size.long(), image.long(), origin.long(), place.float(), pixel)

    @classmethod
    def whole(cls, size: Tensor, draws: Draws) -> "Extent":
        """Canvases that show their whole images, of `size` (N,2)."""
        return cls(size, size, torch.zeros_like(size), _to(draws.uniform(len(size), 2), size))

    def map(self, function: Callable[[Tensor], Tensor]) -> "Extent":
        """The function of every tensor."""
        size, image, origin, place = map(function, self[:4])
        return Extent(size, image, origin, place, None if self.pixel is None else function(self.pixel))


class View:
    """A batch of pictures and where their pixels come from."""

    def __init__(
        self,
        image: Tensor,
        valid: Tensor | Callable[[], Tensor],
        theta: Tensor,
        move: geometry.Move | pil_warp.Move | None = None,
    ) -> None:
        self.image = image
        """(N,C,h,w) uint8, on a CPU with the channels last; see `network_input`"""
        self.theta = theta
        """(N,2,3) float32, from this view to the tensor that it was made from"""
        self.move = move or geometry.Move()
        """theta in pixels, worked out once; without, no picture moves"""
        self._valid = valid

    @cached_property
    def valid(self) -> Tensor:
        """(N,h,w) bool: the pixel comes from inside the source image"""
        return self._valid if isinstance(self._valid, Tensor) else self._valid()

    def recoloured(self, image: Tensor) -> "View":
        """The same places with other colours."""
        return View(image, self._valid, self.theta, self.move)

    def warp(self, labels: Tensor) -> Tensor:
        """Class ids uint8 (N,H,W) or (N,K,H,W) of the tensor that this view was made from → the same of this view
        (W of method.md): nearest, from the very pixels that the image is from; 255 where not valid."""
        moved = self.move(labels)
        return moved if self.move.ignores_all else geometry.ignored(moved, self.valid)


def network_input(image: Tensor) -> Tensor:
    """Images uint8 → float32 in [0,1]: at the very end, as four times as many bytes are moved afterwards."""
    return image.float().div_(255)


def weak_view(image: Tensor, size: Tensor | Extent, settings: AugmentSettings, draws: Draws) -> View:
    """Random scale, crop and flip of canvases `image` uint8 (N,C,H,W), each padded below and right of its `size`.

    `size`: the canvases' Extent, or (N,2) int64 valid height and width of whole images, on any device. An image that is
    scaled to less than the crop is placed at random inside it; the rest is not valid and mid-range. Scaling is bilinear (no
    anti-aliasing below 0.5) to whole pixels and to the nearest of 256 levels; an unscaled image keeps its exact pixels.
    """
    count, crop = len(image), settings.crop_size
    scale = _draw_scale(count, settings, draws)
    extent = size if isinstance(size, Extent) else Extent.whole(size, draws)
    flipped = draws.uniform(count) < settings.flip_probability
    theta = _crop_theta(_to(scale, extent.size), extent, crop, _size(image)).to(image.device, non_blocking=True)
    theta[:, 0, 0] *= _to(1 - 2 * flipped.float(), image)  # a flip before it: nothing is turned or sheared
    valid_size = extent.size.to(image.device, non_blocking=True)
    scaled = (scale != 1).nonzero().flatten().tolist()
    resized: dict[int, Tensor] = {}
    if scaled:
        rows = _to(torch.tensor(scaled), image)
        sampled = geometry.sample_image(image[rows].float(), theta[rows], crop, "bilinear", 0, valid_size[rows])
        resized = dict(zip(scaled, photometry.to_levels(sampled), strict=True))
    if _by_pillow(image):
        return _weak_pictures(image, theta, crop, valid_size, resized)
    index, valid = geometry.nearest_index(theta, crop, _size(image), valid_size, upright=True)
    move = geometry.Move(range(count), index)
    shown = move(image)
    if resized:
        shown = torch.stack(geometry.replaced(shown, resized))
    return View(geometry.filled(shown, valid, FILL), valid, theta, move)


def _weak_pictures(
    image: Tensor, theta: Tensor, crop: geometry.Size, valid_size: Tensor, resized: dict[int, Tensor]
) -> View:
    """The weak view on a CPU; `resized` are those that are scaled, by row."""
    source = _size(image)
    coefficients = dict(enumerate(geometry.fixed_point(theta, crop, source).tolist()))
    bounds = zip(coefficients.values(), valid_size.tolist(), strict=True)
    whole = all(pil_warp.shows_only(numbers, crop, seen) for numbers, seen in bounds)
    valid = torch.ones(len(image), *crop, dtype=torch.bool)
    if not whole:
        valid = geometry.inside(theta, crop, source, valid_size, upright=True)
    shown = np.empty((len(image), *crop, image.shape[1]), np.uint8)
    for row, pixels in enumerate(_arrays(image)):
        scaled = resized.get(row)
        moved = (
            pil_warp.moved(pixels, coefficients[row], crop, FILL) if scaled is None else scaled.movedim(0, 2).numpy()
        )
        shown[row] = moved
    if not whole:
        shown[~valid.numpy()] = FILL
    return View(_from_arrays(shown), valid, theta, pil_warp.Move(coefficients, crop, whole))


def _by_pillow(image: Tensor) -> bool:
    return image.device.type == "cpu"


def _arrays(image: Tensor) -> np.ndarray:
    """(N,C,H,W) on a CPU as (N,H,W,C): the same memory."""
    return image.movedim(1, 3).numpy()


def _from_arrays(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).movedim(3, 1)


def _draw_scale(count: int, settings: AugmentSettings, draws: Draws) -> Tensor:
    """(N,) float32 factors; in steps they are rounded, so that a step that means 1 is exactly 1."""
    least, greatest = settings.scale
    if settings.scale_step == 0:
        return least + (greatest - least) * draws.uniform(count)
    steps = int((greatest - least) / settings.scale_step + 1e-6)
    drawn = draws.integers(0, steps + 1, count)
    return torch.round(least + settings.scale_step * drawn.double(), decimals=6).float()


def _crop_theta(scale: Tensor, extent: Extent, crop: geometry.Size, source: geometry.Size) -> Tensor:
    """Theta of a window of `crop` pixels in the image scaled to whole pixels; `extent.place` says where, among the windows
    that hold `extent.pixel`."""
    scaled = torch.round(extent.image * scale[:, None]).clamp(min=1)
    room = scaled - torch.tensor(crop).to(scaled.device, non_blocking=True)  # below 0: the image is placed in the crop
    factor, cut = extent.image / scaled, room > 0
    least, most = torch.zeros_like(room), room.abs()
    if extent.pixel is not None:
        there = torch.floor((extent.pixel + 0.5) / factor)
        least = torch.where(cut, (there - (scaled - room) + 1).clamp(min=0), least)
        most = torch.where(cut, there.minimum(room), most)
    offset = (least + torch.floor(extent.place * (most - least + 1))).minimum(most)
    first = torch.ceil(extent.origin / factor)
    last = torch.floor((extent.origin + extent.size) / factor) - (scaled - room)
    inside = offset.minimum(last).maximum(first).maximum(least).minimum(most)  # the canvas was cut in whole pixels
    start = torch.where(cut, inside, offset * room.sign()) * factor - extent.origin
    top, left = start.unbind(1)
    return geometry.window(top, left, crop[0] * factor[:, 0], crop[1] * factor[:, 1], source)


def strong_view(view: View, settings: StrongSettings, draws: Draws) -> View:
    """A of method.md: RandAugment, then cutout, of a weak view; `theta` leads from the strong crop to the weak one.
    Colour jitter, grey and blur come before them, if asked for.

    Differs from PIL calls one after the other in this: the photometric operations act first, in the order drawn, on
    each image stretched to 8 bits (undone afterwards: both views share one distribution); the geometric ones are then
    composed in the order drawn and resample once, by nearest. So statistics (an equalisation's, say) see neither the
    fill nor what is not valid, and what one operation moves out and a later one moves back is kept. An image that drew
    no operation keeps its exact pixels. Cutouts are centred anywhere in the crop; they and all that is not valid become
    mid-range, but only the latter lose `valid`. Of other bands than RGB: see `_colour_groups`.
    """
    colours = draw_colours(len(view.image), settings, draws)
    if colours is not None:
        view = view.recoloured(geometry.filled(_recoloured(view.image, colours), view.valid, FILL))
    count, size = len(view.image), _size(view.image)
    plans = draw_operations(count, settings, draws)
    corners = draw_cutouts(count, size, settings, draws)
    theta = drawn_theta(plans, size)
    moved = [sample for sample, plan in enumerate(plans) if any(name in GEOMETRIC for name, _, _ in plan)]
    if _by_pillow(view.image):
        return _strong_pictures(view, plans, theta, moved, corners, settings.cutout_size)
    move, valid = geometry.Move(), view.valid
    if moved:
        index, inside = geometry.nearest_index(_to(theta[moved], valid), size, size)
        move = geometry.Move(moved, index)
        within = geometry.gather_pixels(torch.stack([valid[sample] for sample in moved]), index) & inside
        valid = torch.stack(geometry.replaced(valid, dict(zip(moved, within, strict=True))))
    shown = valid.byte() & ~_squares(_to(corners, valid), settings.cutout_size, size)
    image = geometry.filled(move(_apply_photometry(view, plans)), shown, FILL)
    return View(image, valid, _to(theta, image), move)


def _strong_pictures(
    view: View, plans: list[Plan], theta: Tensor, moved: list[int], corners: Tensor, side: int
) -> View:
    """The strong view on a CPU; `corners` (N,K,2) are those of the cutouts of `side` pixels."""
    size, inside = _size(view.image), view.valid.numpy()
    whole = bool(inside.all())
    numbers = dict(zip(moved, geometry.fixed_point(theta[moved], size, size).tolist(), strict=True))
    move = pil_warp.Move(numbers, size, whole)
    shown = np.empty((len(plans), *size, view.image.shape[1]), np.uint8)
    for row, (pixels, plan) in enumerate(zip(_arrays(view.image), plans, strict=True)):
        changed = _after(plan, pixels, None if whole else inside[row])
        shown[row] = pil_warp.moved(changed, numbers[row], size, FILL) if row in numbers else np.asarray(changed)
    for row, squares in enumerate(corners.tolist()):
        for top, left in squares:
            shown[row, max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = FILL
    return View(_from_arrays(shown), lambda: move(view.valid.view(torch.uint8), 0).view(torch.bool), theta, move)


def _after(plan: Plan, pixels: np.ndarray, valid: np.ndarray | None) -> pil_warp.Pixels:
    """An image (h,w,C) after the photometric operations of its plan; what is not `valid` (h,w) is mid-range again."""
    steps = _photometric(plan)
    if not steps:
        return pixels
    changed = _after_steps(pixels, valid, steps)
    if valid is not None:
        changed = np.array(changed)
        changed[~valid] = FILL
    return changed


def _after_steps(pixels: np.ndarray, valid: np.ndarray | None, steps: list[tuple[str, float]]) -> pil_warp.Pixels:
    if pixels.shape[2] == RGB:
        return pil_warp.after_operations(pixels, valid, steps)
    groups = _colour_groups(pixels.shape[2])
    pictures = (np.ascontiguousarray(pixels[..., bands]) for bands, _ in groups)
    changed = (np.asarray(pil_warp.after_operations(picture, valid, steps)) for picture in pictures)
    return np.concatenate([part[..., :kept] for part, (_, kept) in zip(changed, groups, strict=True)], axis=2)


def _recoloured(image: Tensor, plans: list[ColourPlan]) -> Tensor:
    if image.shape[1] == RGB:
        return with_colours(image, plans)
    groups = _colour_groups(image.shape[1])
    changed = torch.cat([with_colours(image[:, bands], plans)[:, :kept] for bands, kept in groups], 1)
    return changed.contiguous(memory_format=torch.channels_last)


def _colour_groups(channels: int) -> list[tuple[list[int], int]]:
    """The bands of an image as pictures of three, and how many of these are kept. The first three bands are red, green and blue;
    each other one is a grey picture, whose levels all operations change, and whose colours none can."""
    colours = [([0, 1, 2], RGB)] if channels >= RGB else []
    return colours + [([band] * RGB, 1) for band in range(RGB * len(colours), channels)]


def _photometric(plan: Plan) -> list[tuple[str, float]]:
    return [(name, m) for name, m, _ in plan if name in photometry.PHOTOMETRIC]


def _squares(corners: Tensor, side: int, size: geometry.Size) -> Tensor:
    """(N,h,w) uint8: 1 where the pixel lies in one of the squares (N,K,2) of `side` pixels, else 0."""
    hidden = torch.zeros(len(corners), *size, dtype=torch.uint8, device=corners.device)
    rows = torch.arange(size[0], device=corners.device) - corners[:, :, :1]
    columns = torch.arange(size[1], device=corners.device) - corners[:, :, 1:]
    in_row, in_column = (((at >= 0) & (at < side)).byte() for at in (rows, columns))
    for row, column in zip(in_row.unbind(1), in_column.unbind(1), strict=True):
        hidden |= row[:, :, None] & column[:, None, :]
    return hidden


def _apply_photometry(view: View, plans: list[Plan]) -> list[Tensor]:
    """The levels (C,h,w) of each sample after its photometric operations in their order; others are untouched."""
    if view.image.shape[1] == RGB:
        return _operated(view.image, view.valid, plans)
    groups = _colour_groups(view.image.shape[1])
    parts = [_operated(view.image[:, bands], view.valid, plans) for bands, _ in groups]
    samples = zip(*parts, strict=True)
    return [torch.cat([part[:kept] for part, (_, kept) in zip(sample, groups, strict=True)]) for sample in samples]


def _operated(image: Tensor, valid: Tensor, plans: list[Plan]) -> list[Tensor]:
    """The same of images (N,3,h,w)."""
    images = list(image)
    steps = [_photometric(plan) for plan in plans]
    touched = [sample for sample, of_sample in enumerate(steps) if of_sample]
    if not touched:
        return images
    low, span = photometry.level_range(image, valid)
    tables = list(photometry.stretch(low, span))
    for sample in touched:
        for name, m in steps[sample]:
            images[sample], tables[sample] = photometry.operate(name, m, images[sample], valid[sample], tables[sample])
    last = photometry.unstretch(low, span, torch.stack(tables))
    done = photometry.look_up_all([last[sample] for sample in touched], [images[sample] for sample in touched])
    return geometry.replaced(images, dict(zip(touched, done, strict=True)))


def _to(host: Tensor, like: Tensor) -> Tensor:
    return host.to(like.device, non_blocking=True)


def _size(values: Tensor) -> geometry.Size:
    return values.shape[-2], values.shape[-1]
