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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]

Matrix = tuple[tuple[float, float, float], tuple[float, float, float]]
"""The theta of one picture on the host, where plain numbers are several times as fast as small tensors."""

TIE = 2.0**-10
"""Pixels added before rounding: a point exactly between two pixels takes the right or lower one, whatever the rounding
of float32 did to its theta."""

FRACTION_BITS = 16
"""Of a pixel, in `fixed_point`. It is also what Pillow counts in."""


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


def rotate(degrees: float, size: Size) -> Matrix:
    """Matrix that turns the picture of `size` counter-clockwise about its centre: rigid in pixels."""
    aspect, radians = size[0] / size[1], math.radians(degrees)
    cos, sin = math.cos(radians), math.sin(radians)
    return ((cos, -sin * aspect, 0.0), (sin / aspect, cos, 0.0))


def shear(x: float, y: float, size: Size) -> Matrix:
    """Matrix that reads (X + x·Y, Y + y·X), with X, Y in pixels from the top-left corner."""
    aspect = size[0] / size[1]
    return ((1.0, x * aspect, x * aspect), (y / aspect, 1.0, y / aspect))


def translate(x: float, y: float, size: Size) -> Matrix:
    """Matrix that moves the picture of `size` by x pixels to the right and y pixels down."""
    return ((1.0, 0.0, -2 * x / size[1]), (0.0, 1.0, -2 * y / size[0]))


def chain(steps: Iterable[Matrix]) -> Matrix:
    """One matrix for several, of which the first acts first on the picture; the identity if there is none."""
    whole: Matrix = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
    for (a, b, c), (d, e, f) in steps:
        whole = tuple((p * a + q * d, p * b + q * e, p * c + q * f + r) for p, q, r in whole)  # type: ignore[assignment]
    return whole


def fixed_point(theta: Tensor, size: Size, source: Size) -> Tensor:
    """theta in whole 2⁻¹⁶ths of a source pixel, (N,2,3) int64 (a, b, c): output pixel (column j, row i) shows the source's
    column or row ⌊(a·j + b·i + c) / 2¹⁶⌋. In whole numbers, so that every device, every label map and Pillow pick the same."""
    numbers = _in_pixels(theta.double(), size, source)
    numbers[:, :, 2] += TIE
    return numbers.mul_(2**FRACTION_BITS).round_().long()


def _in_pixels(theta: Tensor, size: Size, source: Size) -> Tensor:
    """What an output column and an output row add to the point (x, y) that is read, in pixels from the source's edge, and
    the point of the first pixel's centre: (N,2,3)."""
    to_normal, half = _scales(size, source, theta.dtype, theta.device)
    through = (theta[..., None] * to_normal).sum(2)  # no matmul: see `compose`
    through[:, :, 2] += 1
    return through * half


@lru_cache(64)
def _scales(size: Size, source: Size, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """From output pixels to normalised coordinates, (3,3); from these, 1 added, to pixels of the source, (2,1). Sent to the
    device once."""
    (height, width), (rows, columns) = size, source
    to_normal = ((2 / width, 0, 1 / width - 1), (0, 2 / height, 1 / height - 1), (0, 0, 1))
    half = ((columns / 2,), (rows / 2,))
    on_host = torch.tensor(to_normal, dtype=dtype), torch.tensor(half, dtype=dtype)
    return on_host[0].to(device, non_blocking=True), on_host[1].to(device, non_blocking=True)


def nearest_index(
    theta: Tensor, size: Size, source: Size, valid_size: Tensor | None = None, upright: bool = False
) -> tuple[Tensor, Tensor]:
    """Where each output pixel is read from: computed once, used for every map that shares `theta`.

    Returns `index` (N,h,w) int64 into the flattened (H·W) source, clamped to it, and `inside` (N,h,w) bool: the output
    pixel's centre lies in the source, or in its first `valid_size` (N,2) rows and columns where that is given.
    `upright` says that no theta turns or shears: columns and rows are then worked out apart.
    """
    rows, columns = source
    x, y = _source_pixels(theta, size, source, upright)
    index = torch.add(x.clamp(0, columns - 1), y.clamp(0, rows - 1), alpha=columns)
    return index, _within(x, y, source, valid_size)


def inside(theta: Tensor, size: Size, source: Size, valid_size: Tensor | None = None, upright: bool = False) -> Tensor:
    """(N,h,w) bool: the output pixel comes from the first `valid_size` (N,2) rows and columns of the source."""
    return _within(*_source_pixels(theta, size, source, upright), source, valid_size)


def _source_pixels(theta: Tensor, size: Size, source: Size, upright: bool) -> tuple[Tensor, Tensor]:
    """Column and row of the source that each output pixel shows, int64: (N,h,w) both, or (N,1,w) and (N,h,1)."""
    along, down, start = (part[..., None, None] for part in fixed_point(theta, size, source).unbind(2))
    j = torch.arange(size[1], device=theta.device)
    i = torch.arange(size[0], device=theta.device)[:, None]
    if upright:
        x, y = along[:, 0] * j + start[:, 0], down[:, 1] * i + start[:, 1]
    else:
        x, y = (along * j + (down * i + start)).unbind(1)
    return x >> FRACTION_BITS, y >> FRACTION_BITS


def _within(x: Tensor, y: Tensor, source: Size, valid_size: Tensor | None) -> Tensor:
    rows, columns = source
    width, height = (columns, rows) if valid_size is None else valid_size.flip(1)[:, :, None, None].unbind(1)
    return ((x | (width - 1 - x)) >= 0) & ((y | (height - 1 - y)) >= 0)  # neither of the two is negative


def gather_pixels(values: Tensor, index: Tensor) -> Tensor:
    """`values` (N,...,H,W) of any dtype read at `index` (N,h,w) from `nearest_index`: (N,...,h,w), same dtype."""
    lead = values.shape[:-2]
    wide = index.reshape(len(index), *([1] * (len(lead) - 1)), -1)
    return values.flatten(-2).gather(-1, wide.expand(*lead, -1)).unflatten(-1, index.shape[1:])


def gather_labels(labels: Tensor, index: Tensor, inside: Tensor) -> Tensor:
    """Class ids `labels` (N,H,W) or (N,K,H,W) uint8 read at `index`, not interpolated; 255 where not `inside` (N,h,w)."""
    return ignored(gather_pixels(labels, index), inside)


def ignored(labels: Tensor, valid: Tensor) -> Tensor:
    """Class ids (N,h,w) or (N,K,h,w) uint8, 255 (IGNORE_INDEX) where not `valid` (N,h,w)."""
    outside = valid.view(torch.uint8) - 1  # 0 or 255, which has all bits: `masked_fill` is slow on a CPU
    return labels | (outside if labels.dim() == valid.dim() else outside[:, None])


def filled(levels: Tensor, shown: Tensor, level: int) -> Tensor:
    """Levels (N,C,h,w) uint8, `level` where not `shown` (N,h,w)."""
    kept = -shown.byte()[:, None]  # 0 or 255
    return (levels & kept).bitwise_or_(level & ~kept)


@dataclass(frozen=True)
class Move:
    """Where the pixels of some pictures of a batch are read from; the others stay as they are."""

    rows: Sequence[int] = ()
    index: Tensor | None = None
    """(rows,h,w) int64, see `nearest_index`; None if nothing moves"""
    ignores_all = False
    """What comes from outside the source is the pixel of its edge: labels there are yet to be ignored."""

    def __call__(self, values: Tensor | Sequence[Tensor]) -> Tensor:
        """Pictures or maps (N,...,H,W) of any dtype → (N,...,h,w)."""
        if self.index is None:
            return values if isinstance(values, Tensor) else torch.stack(tuple(values))
        if isinstance(values, Tensor) and len(self.rows) == len(values):
            return gather_pixels(values, self.index)
        moved = gather_pixels(torch.stack([values[row] for row in self.rows]), self.index)
        return torch.stack(replaced(values, dict(zip(self.rows, moved, strict=True))))


def replaced(values: Iterable[Tensor], new: Mapping[int, Tensor]) -> list[Tensor]:
    """The rows of a batch, some of them replaced."""
    return [new.get(row, value) for row, value in enumerate(values)]


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
    along, down, start = (part[..., None, None] for part in _in_pixels(theta, size, (rows, columns)).unbind(2))
    j = torch.arange(size[1], device=theta.device, dtype=theta.dtype)
    i = torch.arange(size[0], device=theta.device, dtype=theta.dtype)[:, None]
    x, y = (along * j + (down * i + start)).unbind(1)
    if valid_size is not None:
        bottom, right = (valid_size[:, :, None, None] - 0.5).unbind(1)
        x, y = torch.minimum(x, right), torch.minimum(y, bottom)
    grid = torch.stack((2 * x / columns - 1, 2 * y / rows - 1), dim=3)
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _size(values: Tensor) -> Size:
    return values.shape[-2], values.shape[-1]
