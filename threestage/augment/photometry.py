"""The photometric operations of RandAugment, batched; each agrees with PIL's to within one level.

Every `image` is (N,3,H,W) float holding whole numbers 0..255, and so is every result. Amounts are (N,), one per image.
`valid` (N,H,W) bool says which pixels count in an image's statistics (PIL's `mask`); padding never does.
"""

import torch
from torch import Tensor


def autocontrast(image: Tensor, valid: Tensor) -> Tensor:
    """Stretch each channel's least and greatest level to 0 and 255; a channel of one level stays (`ImageOps`)."""
    low, span = level_range(image, valid, (2, 3))
    stretched = torch.floor((image - low) * 255 / span).clamp_(0, 255)
    return torch.where(span > 0, stretched, image)


def equalize(image: Tensor, valid: Tensor) -> Tensor:
    """Flatten each channel's histogram by PIL's own look-up table (`ImageOps.equalize`), exactly."""
    levels = image.long().flatten(2)
    planes = torch.arange(levels.shape[0] * levels.shape[1], device=image.device).view(*levels.shape[:2], 1)
    weight = valid.long().flatten(1)[:, None].expand_as(levels)
    empty = torch.zeros(planes.numel() * 256, dtype=torch.long, device=image.device)
    histogram = empty.scatter_add_(0, (levels + 256 * planes).flatten(), weight.flatten()).view(*levels.shape[:2], 256)
    below = histogram.cumsum(2) - histogram
    last = torch.where(histogram > 0, below, 0).amax(2, keepdim=True)  # all pixels but those of the greatest level
    step = last // 255
    table = ((step // 2 + below) // step.clamp(min=1)).clamp_(max=255)
    table = torch.where(step > 0, table, torch.arange(256, device=image.device))
    return table.gather(2, levels).view_as(image).to(image.dtype)


def solarize(image: Tensor, threshold: Tensor) -> Tensor:
    """Invert the levels at or above `threshold` (`ImageOps.solarize`)."""
    return torch.where(image < _per_image(threshold), image, 255 - image)


def posterize(image: Tensor, bits: Tensor) -> Tensor:
    """Keep the highest `bits` (whole numbers 1..8) of each level (`ImageOps.posterize`)."""
    step = torch.exp2(8 - _per_image(bits))
    return torch.floor(image / step) * step


def color(image: Tensor, factor: Tensor) -> Tensor:
    """Blend with the grey version: 0 is grey, 1 the image (`ImageEnhance.Color`)."""
    return _blend(grey(image), image, factor)


def contrast(image: Tensor, factor: Tensor, valid: Tensor) -> Tensor:
    """Blend with the mean grey level: 0 is flat, 1 the image (`ImageEnhance.Contrast`)."""
    counted = valid[:, None].to(image.dtype)
    total = (grey(image) * counted).sum((1, 2, 3), keepdim=True)
    mean = total / counted.sum((1, 2, 3), keepdim=True).clamp(min=1)
    return _blend(torch.floor(mean + 0.5), image, factor)


def brightness(image: Tensor, factor: Tensor) -> Tensor:
    """Blend with black: 0 is black, 1 the image (`ImageEnhance.Brightness`)."""
    return _blend(torch.zeros_like(image[:, :1]), image, factor)


def sharpness(image: Tensor, factor: Tensor) -> Tensor:
    """Blend with PIL's `SMOOTH` filter: 0 is blurred, 1 the image (`ImageEnhance.Sharpness`); the border stays."""
    rows = image[..., :-2, :] + image[..., 1:-1, :] + image[..., 2:, :]
    around = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    smooth = image.clone()
    smooth[..., 1:-1, 1:-1] = torch.floor((around + 4 * image[..., 1:-1, 1:-1]) / 13 + 0.5)
    return _blend(smooth, image, factor)


def grey(image: Tensor) -> Tensor:
    """PIL's `convert("L")`: (N,1,H,W), exact, as every term is a whole number below 2²⁴."""
    red, green, blue = image.unbind(1)
    return torch.floor((19595 * red + 38470 * green + 7471 * blue + 32768) / 65536)[:, None]


def level_range(image: Tensor, valid: Tensor, over: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Least value and span of the valid pixels over the dimensions `over`, kept as size 1; span 0 if there are none."""
    low = image.masked_fill(~valid[:, None], torch.inf).amin(over, keepdim=True)
    high = image.masked_fill(~valid[:, None], -torch.inf).amax(over, keepdim=True)
    some = high >= low
    return torch.where(some, low, 0), torch.where(some, high - low, 0)


def _blend(plain: Tensor, image: Tensor, factor: Tensor) -> Tensor:
    return torch.floor((plain + _per_image(factor) * (image - plain)).clamp_(0, 255))


def _per_image(amount: Tensor) -> Tensor:
    return amount.reshape(-1, 1, 1, 1)
