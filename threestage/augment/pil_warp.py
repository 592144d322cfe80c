"""The pixels of the views on a CPU: image by image by Pillow, whose loops over bytes are faster there than tensors.

What `photometry` and `geometry.Move` do on other devices: the same pixels are read, and levels differ by one at most. An
image is (H,W,3) uint8, channels last as decoders give it, or the picture that was made of it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from threestage import IGNORE_INDEX
from threestage.augment import photometry
from threestage.augment.geometry import FRACTION_BITS, Size

Picture = Image.Image
Pixels = np.ndarray | Picture
WHOLE = 1 << FRACTION_BITS


@dataclass(frozen=True)
class Move:
    """Where the pixels of some pictures of a batch are read from; the others stay as they are (`geometry.Move` elsewhere)."""

    coefficients: Mapping[int, Sequence[Sequence[int]]]
    """of each row that moves, see `geometry.fixed_point`"""
    size: Size
    ignores_all: bool
    """All of the source is valid, so that moved labels are 255 wherever they are not."""

    def __call__(self, values: Tensor, outside: int = IGNORE_INDEX) -> Tensor:
        """Maps uint8 (N,H,W) or (N,K,H,W) → (N,h,w) or (N,K,h,w); `outside` where nothing of the source is seen."""
        source = values.numpy().reshape(len(values), -1, *values.shape[-2:])
        found = np.empty((*source.shape[:2], *self.size), np.uint8)
        for row, maps in enumerate(source):
            for place, one in zip(found[row], maps, strict=True):
                place[:] = moved(one, self.coefficients[row], self.size, outside) if row in self.coefficients else one
        return torch.from_numpy(found.reshape(*values.shape[:-2], *self.size))


def moved(pixels: Pixels, coefficients: Sequence[Sequence[int]], size: Size, outside: int) -> np.ndarray:
    """A map (H,W) uint8 or an image as its output pixels show it, `outside` what does not come from it."""
    (step, b, _), (d, pace, _) = coefficients
    if isinstance(pixels, np.ndarray) and abs(step) == pace == WHOLE and b == d == 0:
        return _shifted(pixels, coefficients, size, outside)
    if isinstance(pixels, np.ndarray) and pixels.ndim == 3 and pixels.shape[2] != 3:  # of other bands than RGB
        bands = (moved(pixels[:, :, band], coefficients, size, outside) for band in range(pixels.shape[2]))
        return np.stack(list(bands), axis=2)
    picture = as_picture(pixels)
    numbers = [value / WHOLE for row in coefficients for value in row]
    for start in (2, 5):  # Pillow adds half a pixel to where it begins
        numbers[start] -= (numbers[start - 2] + numbers[start - 1]) / 2
    fill = (outside,) * 3 if picture.mode == "RGB" else outside
    return np.asarray(picture.transform((size[1], size[0]), Image.Transform.AFFINE, numbers, fillcolor=fill))


def _shifted(pixels: np.ndarray, coefficients: Sequence[Sequence[int]], size: Size, outside: int) -> np.ndarray:
    """`moved`, of a picture that keeps its scale, mirrored or not."""
    (step, _, first), (_, _, top) = coefficients
    first, top = first >> FRACTION_BITS, top >> FRACTION_BITS
    mirrored, height, width = step < 0, *size
    left = first - width + 1 if mirrored else first
    seen = pixels[max(top, 0) : max(top + height, 0), max(left, 0) : max(left + width, 0)]
    if mirrored:
        seen = _mirror(seen)
    if seen.shape[:2] == size:
        return seen
    shown = np.full((*size, *pixels.shape[2:]), outside, np.uint8)
    row, column = max(-top, 0), max(left + width - pixels.shape[1] if mirrored else -left, 0)
    shown[row : row + seen.shape[0], column : column + seen.shape[1]] = seen
    return shown


def _mirror(pixels: np.ndarray) -> np.ndarray:
    """Left is right of a map (H,W) or an image (H,W,3). NumPy moves a channel at a time five times faster than all three."""
    if pixels.ndim == 2:
        return pixels[:, ::-1]
    mirror = np.empty_like(pixels)
    for channel in range(pixels.shape[2]):
        mirror[:, :, channel] = pixels[:, ::-1, channel]
    return mirror


def shows_only(coefficients: Sequence[Sequence[int]], size: Size, source: Sequence[int]) -> bool:
    """Whether an output that is not turned shows nothing but the first rows and columns of the `source`."""
    left, right, top, bottom = _reach(coefficients, size)
    return min(left, top) >= 0 and bottom < source[0] and right < source[1]


def _reach(coefficients: Sequence[Sequence[int]], size: Size) -> tuple[int, int, int, int]:
    """Least and greatest column, least and greatest row of the source that such an output shows."""
    (step, _, first), (_, pace, top) = coefficients
    columns = [(first + step * column) >> FRACTION_BITS for column in (0, size[1] - 1)]
    rows = [(top + pace * row) >> FRACTION_BITS for row in (0, size[0] - 1)]
    return min(columns), max(columns), min(rows), max(rows)


def as_picture(pixels: Pixels) -> Picture:
    return Image.fromarray(np.ascontiguousarray(pixels)) if isinstance(pixels, np.ndarray) else pixels


def after_operations(pixels: np.ndarray, valid: np.ndarray | None, steps: Sequence[tuple[str, float]]) -> Pixels:
    """An image (H,W,3) after photometric operations (name, magnitude) in their order, each on its levels stretched over
    0..255, as in `photometry`; statistics are of the `valid` (H,W) pixels, all of them without."""
    mask = None if valid is None else Image.fromarray(valid.view(np.uint8) * 255)
    low, high = _level_range(pixels if valid is None else pixels[valid])
    shown: Pixels = pixels
    tables: Tables = (_stretch(low, high),) * 3
    for name, m in steps:
        if name in photometry.TABLES:
            tables = _then(tables, (_table(name, m),) * 3)
        elif name in photometry.TABLES_OF_HISTOGRAM:
            picture = as_picture(shown)
            counts = torch.from_numpy(np.array(picture.histogram(mask))).view(3, -1)
            counts = counts if tables == AS_IT_IS else photometry.relabelled(counts, _as_tensor(tables))
            tables = _then(tables, _as_bytes(photometry.TABLES_OF_HISTOGRAM[name](counts, m).expand(3, -1)))
            shown = shown if len(set(tables)) == 1 else picture
        else:
            shown, tables = OF_PIXELS[name](_look_up(tables, shown), 0.1 + 1.8 * m), AS_IT_IS
    return _look_up(_then(tables, (_unstretch(low, high),) * 3), shown)


def color(pixels: Pixels, factor: float) -> Picture:
    """As `photometry.color`."""
    return ImageEnhance.Color(as_picture(pixels)).enhance(factor)


def sharpness(pixels: Pixels, factor: float) -> np.ndarray:
    """As `photometry.sharpness`, of Pillow's very levels in less than half of its time: rows are added as they lie."""
    sharp = np.array(pixels)
    levels = sharp.reshape(len(sharp), -1)
    wide = levels.astype(np.int16)
    rows = wide[:-2] + wide[1:-1]
    rows += wide[2:]
    around = rows[:, :-6] + rows[:, 3:-3]  # a pixel's neighbours are three levels away
    around += rows[:, 6:]
    inner = wide[1:-1, 3:-3]
    around += 4 * inner
    smooth = (2 * around + 13) // 26  # around / 13, rounded
    blended = (inner - smooth).astype(np.float32)
    blended *= factor
    blended += smooth
    levels[1:-1, 3:-3] = np.clip(blended, 0, 255, out=blended)
    return sharp


OF_PIXELS: dict[str, Callable[[Pixels, float], Pixels]] = {"color": color, "sharpness": sharpness}

Tables = tuple[bytes, ...]
"""Of each channel: what its 256 levels become."""
AS_IT_IS: Tables = (bytes(range(256)),) * 3


def _then(first: Tables, then: Tables) -> Tables:
    return tuple(map(bytes.translate, first, then))


def _look_up(tables: Tables, pixels: Pixels) -> Pixels:
    if tables == AS_IT_IS:
        return pixels
    if isinstance(pixels, np.ndarray) and len(set(tables)) == 1:
        return np.frombuffer(bytearray(pixels).translate(tables[0]), np.uint8).reshape(pixels.shape)
    return as_picture(pixels).point(b"".join(tables))


def _level_range(levels: np.ndarray) -> tuple[int, int]:
    """Least and greatest level; 0 and 255 where there are not two."""
    low, high = (int(levels.min()), int(levels.max())) if levels.size else (0, 0)
    return (low, high) if high > low else (0, 255)


@lru_cache(4096)
def _stretch(low: int, high: int) -> bytes:
    return _as_bytes(photometry.stretch(*_as_range(low, high))[0])[0]


@lru_cache(4096)
def _unstretch(low: int, high: int) -> bytes:
    return _as_bytes(photometry.unstretch(*_as_range(low, high), _as_tensor(AS_IT_IS)[None])[0])[0]


def _as_range(low: int, high: int) -> tuple[Tensor, Tensor]:
    return torch.full((1, 1, 1), float(low)), torch.full((1, 1, 1), float(high - low))


@cache
def _table(name: str, m: float) -> bytes:
    return _as_bytes(photometry.TABLES[name](m, None)[None])[0]


def _as_bytes(tables: Tensor) -> Tables:
    return tuple(row.tobytes() for row in tables.byte().numpy())


def _as_tensor(tables: Tables) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(tables)), dtype=torch.uint8).view(len(tables), -1).long()
