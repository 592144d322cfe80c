"""The photometric operations of RandAugment on one image; each agrees with PIL's to within one level.

An image is (3,H,W) uint8 levels. Most operations give a level what it becomes whatever its place: these return a table,
(3,256) or (256,) int64, so that any number of them in a row is one table (`compose`) and one pass over the pixels
(`look_up`). What they have to know of the image is its `histogram`. Only colour and sharpness look at other channels or
other pixels. What is done to pixels is done here on a device; `pil_warp` does it on a CPU.
"""

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

LEVELS = 256


TABLES: dict[str, Callable[[float, torch.device | None], Tensor]] = {
    "solarize": lambda m, device: solarize(256 - 256 * m, device),
    "brightness": lambda m, device: brightness(0.1 + 1.8 * m, device),
    "posterize": lambda m, device: posterize(4 - int(4 * m), device),
}
"""Name → table of levels, made on the device, from m = level / 10; the magnitudes are the paper's, here and below."""

TABLES_OF_HISTOGRAM: dict[str, Callable[[Tensor, float], Tensor]] = {
    "autocontrast": lambda histogram, m: autocontrast(histogram),
    "equalize": lambda histogram, m: equalize(histogram),
    "contrast": lambda histogram, m: contrast(histogram, 0.1 + 1.8 * m),
}
"""Name → table of levels, from the histogram of each channel and m."""

OF_PIXELS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "color": lambda image, m: color(image, 0.1 + 1.8 * m),
    "sharpness": lambda image, m: sharpness(image, 0.1 + 1.8 * m),
}
"""Name → operation on levels (3,H,W)."""

PHOTOMETRIC = frozenset((*TABLES, *TABLES_OF_HISTOGRAM, *OF_PIXELS))


def operate(name: str, m: float, image: Tensor, valid: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """One operation more on an image (3,H,W) of which `table` (3,256) is yet to be looked up: both afterwards.

    m: the magnitude, level / 10; valid: (H,W) bool, the pixels that statistics are of.
    """
    if name in TABLES:
        return image, compose(table, _table(name, m, table.device))
    if name in TABLES_OF_HISTOGRAM:
        return image, compose(table, TABLES_OF_HISTOGRAM[name](relabelled(histogram(image, valid), table), m))
    return OF_PIXELS[name](look_up(table, image), m), _levels(table.device).expand(3, -1)


@cache
def _table(name: str, m: float, device: torch.device) -> Tensor:
    """One of the few tables that depend on no image."""
    return TABLES[name](m, device)


def to_levels(image: Tensor) -> Tensor:
    """Float in [0,255] → the nearest of 256 levels, uint8."""
    return (image + 0.5).int().byte()  # by way of int: float → uint8 is slow on a CPU


def compose(first: Tensor, then: Tensor) -> Tensor:
    """The table (3,256) that does `first` (3,256), then `then` (3,256) or (256,)."""
    return then.expand(3, LEVELS).gather(1, first)


def look_up(table: Tensor, image: Tensor) -> Tensor:
    """What a table (3,256) gives to the levels of an image (3,H,W), uint8."""
    return look_up_all([table], [image])[0]


def look_up_all(tables: Sequence[Tensor], images: Sequence[Tensor]) -> Tensor:
    """What each table gives to its image, (N,3,H,W) uint8."""
    levels = torch.stack(tuple(images))
    return torch.stack(tuple(tables)).byte().gather(2, levels.flatten(2).long()).view(levels.shape)


def histogram(image: Tensor, valid: Tensor) -> Tensor:
    """(3,256) int64: how many of the `valid` (H,W) pixels of the image (3,H,W) have each level."""
    counts = torch.zeros(3, LEVELS, dtype=torch.int64, device=image.device)
    return counts.scatter_add_(1, image.flatten(1).long(), valid.flatten().long().expand(3, -1))


def relabelled(histogram: Tensor, table: Tensor) -> Tensor:
    """The histogram of what `table` (3,256) gives to the levels."""
    return torch.zeros_like(histogram).scatter_add_(1, table, histogram)


def level_range(image: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Least level and span of the `valid` (N,H,W) pixels of all channels of images (N,3,H,W), float (N,1,1); 0 and 255
    where there are not two levels: such an image is not stretched."""
    inside = -valid.byte()[:, None]  # 0 or 255, whose bits are all set
    low, high = (image | ~inside).amin((1, 2, 3)), (image & inside).amax((1, 2, 3))
    some = high > low
    return (low * some).float().view(-1, 1, 1), torch.where(some, high - low, 255).float().view(-1, 1, 1)


def stretch(low: Tensor, span: Tensor) -> Tensor:
    """Tables (N,3,256) that spread the levels of a range (see `level_range`) over 0..255."""
    table = (_levels(low.device) - low).mul_(255 / span).round_().clamp_(0, 255)
    return table.long().expand(-1, 3, -1)


def unstretch(low: Tensor, span: Tensor, table: Tensor) -> Tensor:
    """The tables (N,3,256), as uint8, followed by the opposite of `stretch`."""
    return (table * (span / 255)).add_(low).add_(0.5).int().byte()


def autocontrast(histogram: Tensor) -> Tensor:
    """Stretch each channel's least and greatest level to 0 and 255; a channel of one level stays (`ImageOps`)."""
    levels = _levels(histogram.device)
    low = torch.where(histogram > 0, levels, 255).amin(1, keepdim=True)
    high = torch.where(histogram > 0, levels, 0).amax(1, keepdim=True)
    table = ((levels - low) * 255 // (high - low).clamp(min=1)).clamp_(0, 255)
    return torch.where(high > low, table, levels)


def equalize(histogram: Tensor) -> Tensor:
    """Flatten each channel's histogram by PIL's own look-up table (`ImageOps.equalize`), exactly."""
    below = histogram.cumsum(1) - histogram
    last = torch.where(histogram > 0, below, 0).amax(1, keepdim=True)  # all pixels but those of the greatest level
    step = last // 255
    table = ((step // 2 + below) // step.clamp(min=1)).clamp_(max=255)
    return torch.where(step > 0, table, _levels(histogram.device))


def solarize(threshold: float, device: torch.device | None = None) -> Tensor:
    """Invert the levels at or above `threshold` (`ImageOps.solarize`)."""
    levels = _levels(device)
    return torch.where(levels < threshold, levels, 255 - levels)


def posterize(bits: int, device: torch.device | None = None) -> Tensor:
    """Keep the highest `bits` (1..8) of each level (`ImageOps.posterize`)."""
    step = 2 ** (8 - bits)
    return _levels(device) // step * step


def brightness(factor: float, device: torch.device | None = None) -> Tensor:
    """Blend with black: 0 is black, 1 the image (`ImageEnhance.Brightness`)."""
    return _blend(torch.zeros(1, device=device), _levels(device), factor).long()


def contrast(histogram: Tensor, factor: float) -> Tensor:
    """Blend with the mean grey level: 0 is flat, 1 the image (`ImageEnhance.Contrast`)."""
    levels = _levels(histogram.device)
    mean = (histogram * levels).sum(1).double() / histogram[0].sum().clamp(min=1)  # of each channel
    return _blend(_grey(mean), levels, factor).long()


def color(image: Tensor, factor: float) -> Tensor:
    """Blend with the grey version: 0 is grey, 1 the image (`ImageEnhance.Color`)."""
    levels = image.float()
    return _blend(_grey(levels), levels, factor).byte()


def sharpness(image: Tensor, factor: float) -> Tensor:
    """Blend with PIL's `SMOOTH` filter: 0 is blurred, 1 the image (`ImageEnhance.Sharpness`); the border stays."""
    levels = image.short()
    rows = (levels[:, :-2] + levels[:, 1:-1]).add_(levels[:, 2:])
    around = (rows[..., :-2] + rows[..., 1:-1]).add_(rows[..., 2:])
    inner = levels[:, 1:-1, 1:-1]
    smooth = around.add_(inner, alpha=4).float().div_(13).add_(0.5).floor_()
    sharp = image.clone()
    sharp[:, 1:-1, 1:-1] = _blend(smooth, inner, factor).byte()
    return sharp


def _grey(image: Tensor) -> Tensor:
    """PIL's `convert("L")` of (3,...) numbers: (...), rounded; exact for whole ones, as every term is below 2²⁴."""
    red, green, blue = image
    return (red * 19595).add_(green, alpha=38470).add_(blue, alpha=7471).div_(65536).add_(0.5).floor_()


def _blend(plain: Tensor, image: Tensor, factor: float) -> Tensor:
    """int32 levels: `plain` where the factor is 0, `image` where it is 1, and so on in a line; cut off, not rounded."""
    return (image - plain).mul_(factor).add_(plain).clamp_(0, 255).int()


def _levels(device: torch.device | None = None) -> Tensor:
    return torch.arange(LEVELS, device=device)
