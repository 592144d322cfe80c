"""Batched affine geometry: one `theta` moves an image, its mask, its pseudo-mask and the teacher's targets alike.

Conventions, for every function here:
- `theta` is (N,2,3) float32 and maps a point of the *output* to the point of the *input* that it is read from.
- Points are (x, y) in normalised coordinates with `align_corners=False`: -1 and 1 are the outer edges of the picture,
  so the centre of pixel i of S lies at (2i + 1) / S - 1.
- `size` and `source` are (height, width) in pixels. Everything stays on the device of its tensors, without a sync.
- Degrees turn the picture counter-clockwise (PIL `rotate`, torchvision `F.rotate`); a translation moves it to the right
  and down (torchvision `F.affine`); a shear by f reads x + f·y, measured from the top-left corner (PIL `AFFINE`).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from threestage import IGNORE_INDEX

Size = tuple[int, int]

TIE = 2.0**-10
"""Pixels added before rounding: a point exactly between two pixels takes the right or lower one, whatever the rounding
of float32 did to it, so every device and every label map picks the same one."""


def identity(count: int, device: torch.device | str | None = None) -> Tensor:
    """`count` times the transform that changes nothing, (N,2,3)."""
    return torch.eye(2, 3, device=device).expand(count, 2, 3).contiguous()


def compose(outer: Tensor, inner: Tensor) -> Tensor:
    """The theta (N,2,3) that takes a point through `inner`, then through `outer`.

    `outer` reaches into the source: for a strong view of a weak view of a canvas it is the weak view's theta.
    """
    through = (outer[:, :, :2, None] * inner[:, None]).sum(2)  # no matmul: TF32 and autocast would move pixels
    return torch.cat((through[:, :, :2], through[:, :, 2:] + outer[:, :, 2:]), dim=2)


def window(top: Tensor, left: Tensor, height: Tensor, width: Tensor, source: Size) -> Tensor:
    """Theta whose output shows the given window of the source; the four (N,) tensors are in source pixels, may be
    fractional and may reach beyond the source. A crop keeps the scale when the window is as large as the output."""
    rows, columns = source
    zero = torch.zeros_like(top)
    x = torch.stack((width / columns, zero, (2 * left + width) / columns - 1), dim=1)
    y = torch.stack((zero, height / rows, (2 * top + height) / rows - 1), dim=1)
    return torch.stack((x, y), dim=1)


def horizontal_flip(flipped: Tensor) -> Tensor:
    """Theta that mirrors left and right where `flipped` (N,) bool is set."""
    theta = identity(len(flipped), flipped.device)
    theta[:, 0, 0] = 1 - 2 * flipped.float()
    return theta


def rotate(degrees: Tensor, size: Size) -> Tensor:
    """Theta that turns the picture of `size` by `degrees` (N,) counter-clockwise about its centre: rigid in pixels."""
    height, width = size
    theta = identity(len(degrees), degrees.device)
    radians = degrees.float() * (math.pi / 180)
    theta[:, 0, 0] = theta[:, 1, 1] = torch.cos(radians)
    theta[:, 0, 1] = -torch.sin(radians) * (height / width)
    theta[:, 1, 0] = torch.sin(radians) * (width / height)
    return theta


def shear(x: Tensor, y: Tensor, size: Size) -> Tensor:
    """Theta that reads (X + x·Y, Y + y·X), with X, Y in pixels from the top-left corner; factors x, y are (N,)."""
    height, width = size
    theta = identity(len(x), x.device)
    theta[:, 0, 1] = theta[:, 0, 2] = x * (height / width)
    theta[:, 1, 0] = theta[:, 1, 2] = y * (width / height)
    return theta


def translate(x: Tensor, y: Tensor, size: Size) -> Tensor:
    """Theta that moves the picture of `size` by x pixels to the right and y pixels down, both (N,)."""
    height, width = size
    theta = identity(len(x), x.device)
    theta[:, 0, 2] = -2 * x / width
    theta[:, 1, 2] = -2 * y / height
    return theta


def nearest_index(theta: Tensor, size: Size, source: Size, valid_size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Where each output pixel is read from: computed once, used for every map that shares `theta`.

    Returns `index` (N,h,w) int64 into the flattened (H·W) source, clamped to it, and `inside` (N,h,w) bool: the output
    pixel's centre lies in the source, or in its first `valid_size` (N,2) rows and columns where that is given.
    """
    rows, columns = source
    height, width = source if valid_size is None else valid_size[:, :, None, None].unbind(1)
    x = _source_pixels(theta[:, 0], size, columns).add_(TIE).floor_()
    y = _source_pixels(theta[:, 1], size, rows).add_(TIE).floor_()
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    index = y.clamp_(0, rows - 1).long() * columns + x.clamp_(0, columns - 1).long()
    return index, inside


def _source_pixels(row: Tensor, size: Size, length: int) -> Tensor:
    """One coordinate (N,h,w) of the point that each output pixel's centre is read from, in pixels from the source's
    edge; `row` (N,3) of theta says which."""
    height, width = size
    along = row[:, 0] * (length / width)
    down = row[:, 1] * (length / height)
    start = (row[:, 2] - row[:, 0] - row[:, 1] + 1) * (length / 2) + (along + down) / 2
    j = torch.arange(width, device=row.device, dtype=row.dtype)
    i = torch.arange(height, device=row.device, dtype=row.dtype)
    columns = along[:, None] * j + start[:, None]
    return columns[:, None, :] + (down[:, None] * i)[:, :, None]


def inside(theta: Tensor, size: Size, source: Size, valid_size: Tensor | None = None) -> Tensor:
    """(N,h,w) bool: the output pixel comes from the first `valid_size` (N,2) rows and columns of the source."""
    return nearest_index(theta, size, source, valid_size)[1]


def gather_pixels(values: Tensor, index: Tensor) -> Tensor:
    """`values` (N,...,H,W) of any dtype read at `index` (N,h,w) from `nearest_index`: (N,...,h,w), same dtype."""
    lead = values.shape[:-2]
    wide = index.reshape(len(index), *([1] * (len(lead) - 1)), -1)
    return values.flatten(-2).gather(-1, wide.expand(*lead, -1)).unflatten(-1, index.shape[1:])


def gather_labels(labels: Tensor, index: Tensor, inside: Tensor) -> Tensor:
    """Class ids `labels` (N,H,W) or (N,K,H,W) read at `index`, not interpolated; 255 where not `inside` (N,h,w)."""
    outside = ~inside if labels.dim() == 3 else ~inside[:, None]
    return gather_pixels(labels, index).masked_fill_(outside, IGNORE_INDEX)


def warp_labels(labels: Tensor, theta: Tensor, size: Size) -> Tensor:
    """Class ids (N,H,W) or (N,K,H,W) uint8 → (…,h,w) uint8 by nearest; 255 outside (W in method.md)."""
    index, within = nearest_index(theta, size, _size(labels))
    return gather_labels(labels, index, within)


def warp_mask(mask: Tensor, theta: Tensor, size: Size) -> Tensor:
    """Bool (N,H,W) → bool (N,h,w) by nearest; False outside."""
    index, within = nearest_index(theta, size, _size(mask))
    return gather_pixels(mask, index) & within


def sample_image(
    image: Tensor, theta: Tensor, size: Size, mode: str, fill: float, valid_size: Tensor | None = None
) -> Tensor:
    """Float image (N,C,H,W) → (N,C,h,w), "bilinear" or "nearest"; `fill` wherever `inside` is False.

    Bilinear never blends with what lies beyond the valid source: points within half a pixel of its edge take the edge.
    """
    index, within = nearest_index(theta, size, _size(image), valid_size)
    sampled = gather_pixels(image, index) if mode == "nearest" else _bilinear(image, theta, size, valid_size)
    return sampled.masked_fill_(~within[:, None], fill)


def _bilinear(image: Tensor, theta: Tensor, size: Size, valid_size: Tensor | None) -> Tensor:
    rows, columns = _size(image)
    x, y = _source_pixels(theta[:, 0], size, columns), _source_pixels(theta[:, 1], size, rows)
    if valid_size is not None:
        bottom, right = (valid_size[:, :, None, None] - 0.5).unbind(1)
        x, y = torch.minimum(x, right), torch.minimum(y, bottom)
    grid = torch.stack((2 * x / columns - 1, 2 * y / rows - 1), dim=3)
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _size(values: Tensor) -> Size:
    return values.shape[-2], values.shape[-1]
