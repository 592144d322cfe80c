"""Test-time augmentation: predict an image whole or in windows, mirrored too, and at several scales. Evaluation and
`threestage predict` share it.

Windows: their logits are averaged where they overlap, plainly or with weights that fall towards a window's border (Hann), where
the network sees least around a pixel. Mirrored and scaled views: the softmax probabilities of all views
are averaged at the image's size. Images are scaled as training scales them: bilinear, without a low-pass filter.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from types import EllipsisType
from typing import Annotated, Any

import torch
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer
from torch import Tensor, nn
from torch.nn import functional as F

from threestage.data.raster import window_starts
from threestage.errors import InputError
from threestage.models.network import crop_fits, size_multiple
from threestage.models.settings import InferenceSettings, NetworkSettings, sides
from threestage.prediction.pseudo_masks import class_confidence_entropy

Scale = Annotated[float, Field(gt=0, le=16)]
LEAST_PROBABILITY = torch.finfo(torch.float32).tiny
VIEW_PIXELS = 2**22
BLENDED = {"mean": "averaged", "hann": "averaged with Hann weights"}
WINDOW_SIDE = 2048
"""Of windows that an image is cut into because it does not fit into the memory."""


class TTASettings(InferenceSettings):
    """`window`, `stride`: height and width in pixels; without a window the whole image, without a stride two thirds of
    the window. `overlap`: how windows are blended. `scales`: of the image's sides."""

    flip: bool = False
    scales: Annotated[tuple[Scale, ...], Field(min_length=1)] = (1.0,)

    @model_serializer(mode="wrap")
    def _without_default_overlap(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Digests and records of plain means are those of the versions that knew nothing else."""
        found: dict[str, Any] = handler(self)
        return {key: value for key, value in found.items() if (key, value) != ("overlap", "mean")}

    @property
    def single_view(self) -> bool:
        return self.scales == (1.0,) and not self.flip

    def describe(self) -> str:
        """In words, for titles."""
        parts = ["whole image"]
        if self.window is not None:
            parts = [
                f"windows of {sides(self.window)} every {sides(self.step)} pixels (logits {BLENDED[self.overlap]})"
            ]
        scales = ", ".join(f"{scale:g}" for scale in self.scales)
        parts.append("single scale" if self.scales == (1.0,) else f"scale{'s' * (len(self.scales) > 1)} {scales}")
        if self.flip:
            parts.append("flipped too")
        averaged = self.flip or len(self.scales) > 1
        return ", ".join(parts) + (" (probabilities averaged)" if averaged else "")


def protocol_for(asked: TTASettings, model: InferenceSettings) -> TTASettings:
    """What was asked for; without windows, those that the model was trained with."""
    if asked.window is not None or model.window is None:
        return asked
    return asked.model_copy(update={name: getattr(model, name) for name in InferenceSettings.model_fields})


def check_protocol(protocol: InferenceSettings, settings: NetworkSettings) -> None:
    """InputError when the sides of the windows do not suit the network, see `size_multiple`."""
    if protocol.window is None or crop_fits(settings, protocol.window):
        return
    multiple = size_multiple(settings)
    near = ",".join(str(multiple * max(1, round(side / multiple))) for side in protocol.window)
    raise InputError(
        f"window={sides(protocol.window)}: {settings.encoder} takes sides that are multiples of {multiple}; try {near}",
        "network/size-multiple",
    )


@torch.inference_mode()
def predict_with_tta(
    network: nn.Module, image: Tensor, protocol: TTASettings, multiple: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(N,3,H,W) uint8 → class (N,H,W) uint8, confidence (N,H,W) float in [0,1], entropy (N,H,W) in nats.

    `multiple`: the network's `size_multiple`. With the default protocol the same as `pseudo_masks.predict`; several views
    are made of few images at a time (VIEW_PIXELS).
    """
    if protocol.single_view:
        return class_confidence_entropy(window_logits(network, image.float() / 255, protocol))
    pixels = image.shape[-2] * image.shape[-1] * max(protocol.scales) ** 2
    found = [
        class_confidence_entropy(
            predict_probabilities(network, few, protocol, multiple).clamp_min(LEAST_PROBABILITY).log()
        )
        for few in image.split(max(1, int(VIEW_PIXELS / pixels)))
    ]
    class_ids, confidence, entropy = (torch.cat(parts) for parts in zip(*found, strict=True))
    return class_ids, confidence, entropy


@torch.inference_mode()
def predict_in_windows(
    network: nn.Module, image: Tensor, protocol: TTASettings, multiple: int, most_pixels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `predict`, of images (N,3,H,W) that are too large for the memory, of which `most_pixels` fit: in the windows of the
    protocol, or else in windows that fit. What is averaged where windows overlap is kept for one band of them only.

    With several views, the probabilities of a window's views are averaged first.
    """
    size = (image.shape[-2], image.shape[-1])
    if protocol.window is None or math.prod(protocol.window) > most_pixels:
        protocol = protocol.model_copy(update={"window": fitting_window(size, multiple, most_pixels), "stride": None})
    class_ids = image.new_empty((len(image), *size))
    confidence, entropy = (image.new_empty(class_ids.shape, dtype=torch.float32) for _ in range(2))
    score = partial(window_scores, network, protocol=protocol, multiple=multiple)
    for place, scores in _bands(score, image, protocol, 0 if size[0] >= size[1] else 1):  # bands across the longer side
        scores = scores if protocol.single_view else scores.log()
        class_ids[place], confidence[place], entropy[place] = class_confidence_entropy(scores)
    return class_ids, confidence, entropy


def fitting_window(size: tuple[int, int], multiple: int, most_pixels: int) -> tuple[int, int]:
    """Sides (h,w) of the windows for an image (H,W): one window and a third of a band of them have `most_pixels` at most.

    Their sides are WINDOW_SIDE where that fits, else a half, a quarter … of it: no answer follows each change of the memory.
    """
    across = min(size)  # the bands lie across the longer side
    room = (math.sqrt(across**2 / 9 + 4 * most_pixels) - across / 3) / 2
    side = min(WINDOW_SIDE, 2 ** math.floor(math.log2(max(room, 1))))
    side = max(1, side // multiple) * multiple
    height, width = (min(side, -(-long // multiple) * multiple) for long in size)
    return height, width


@dataclass(frozen=True)
class _Places:
    """Stands for an image (H,W) that is read by windows: a part of it is its rows and columns. `left`: where it begins in the
    image that it is a strip of."""

    shape: tuple[int, int]
    left: int

    def __getitem__(self, place: tuple[Any, ...]) -> tuple[slice, slice]:
        rows, columns = place[-2:]
        return rows, slice(columns.start + self.left, columns.stop + self.left)


def score_in_strips(
    score: Callable[[slice, slice], Tensor], size: tuple[int, int], protocol: InferenceSettings, strip_width: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """The scores of an image (H,W) that is never held, to the bit as `_bands` gives them of the whole: rows, columns, and
    (1,C,h,w) of them. `score`: of the window at these rows and columns.

    In strips from top to bottom, of about `strip_width` columns: memory is that of one band of windows across a strip. The
    windows on a border between strips are predicted for both.
    """
    assert protocol.window is not None
    window, step = protocol.window[1], protocol.step[1]
    starts = [*window_starts(size[1], window, step), size[1]]
    together = max(1, (strip_width - window) // step + 1)
    for first in range(0, len(starts) - 1, together):
        own = starts[first : first + together + 1]
        left = next(start for start in starts if start + window > own[0])
        width = min(own[-2] + window, size[1]) - left
        for place, scores in _bands(lambda part: score(*part), _Places((size[0], width), left), protocol, 0):
            rows = place[-2]
            assert isinstance(rows, slice)
            yield rows, slice(own[0], own[-1]), scores[..., own[0] - left : own[-1] - left]


def _bands(
    score: Callable[[Any], Tensor], image: Tensor | _Places, protocol: InferenceSettings, long: int
) -> Iterator[tuple[tuple[EllipsisType | slice, ...], Tensor]]:
    """The mean of the scores of the windows that cover a pixel, weighted as the protocol says, in bands that follow each other
    along the side `long` (0: the height): where they are, and (N,C,h,w) of them. `score`: of what `image` gives for a window,
    (N,C,h,w) float32."""
    assert protocol.window is not None
    size = (image.shape[-2], image.shape[-1])
    starts = [window_starts(*sides) for sides in zip(size, protocol.window, protocol.step, strict=True)]
    total: Tensor | None = None
    for start, following in zip(starts[long], [*starts[long][1:], size[long]], strict=True):
        band = slice(start, min(start + protocol.window[long], size[long]))
        for other in starts[1 - long]:
            across = slice(other, min(other + protocol.window[1 - long], size[1 - long]))
            scores = score(image[_at(long, band, across)])
            if total is None:
                sides = [0, 0]
                sides[long], sides[1 - long] = band.stop - start, size[1 - long]
                total, count = scores.new_zeros((*scores.shape[:2], *sides)), scores.new_zeros(sides)
            place = _at(long, slice(0, band.stop - start), across)
            if protocol.overlap == "mean":
                total[place] += scores
                count[place[1:]] += 1
            else:
                weight = hann_weights((scores.shape[-2], scores.shape[-1]), scores.device)
                total[place] += scores * weight
                count[place[1:]] += weight
        assert total is not None
        done = _at(long, slice(0, following - start), slice(None))
        yield _at(long, slice(start, following), slice(None)), total[done] / count[done[1:]]
        kept = _at(long, slice(following - start, None), slice(None))
        total, count = _moved(total, kept, long), _moved(count, kept[1:], long)


def hann_weights(size: tuple[int, int], device: torch.device) -> Tensor:
    """Of a window's pixels, (h,w) in ]0,1]: Hann's window at their centres, so that none is 0."""
    sides = (torch.sin(torch.pi * (torch.arange(side) + 0.5) / side) ** 2 for side in size)
    rows, columns = (side.to(device, non_blocking=True) for side in sides)
    return rows[:, None] * columns


def _at(long: int, along: slice, across: slice) -> tuple[EllipsisType | slice, ...]:
    """Rows and columns, by which of them the long side is."""
    return (..., along, across) if long == 0 else (..., across, along)


def _moved(band: Tensor, kept: tuple[EllipsisType | slice, ...], long: int) -> Tensor:
    """The band that follows: it begins with what it shares with this one."""
    moved = torch.zeros_like(band)
    rest = band[(..., *kept[-2:])]
    moved[_at(long, slice(0, rest.shape[long - 2]), slice(None))] = rest
    return moved


def window_scores(network: nn.Module, window: Tensor, protocol: TTASettings, multiple: int) -> Tensor:
    """Of windows (N,3,H,W) uint8: logits (N,C,H,W) float32, with several views their mean probabilities."""
    if protocol.single_view:
        return network(window.float() / 255)[0].float()
    whole = protocol.model_copy(update={"window": None, "stride": None})
    return predict_probabilities(network, window, whole, multiple).clamp_min(LEAST_PROBABILITY)


@torch.inference_mode()
def predict_probabilities(network: nn.Module, image: Tensor, protocol: TTASettings, multiple: int) -> Tensor:
    """(N,3,H,W) uint8 → mean of the views' class probabilities (N,C,H,W) float32.

    A scaled view's sides are rounded to the nearest multiple of `multiple`; scale 1 is the image as it is.
    """
    size = (image.shape[-2], image.shape[-1])
    total: Tensor | None = None
    for scale, flipped in _views(protocol):
        view = _resize(image.float() / 255, scaled_size(size, scale, multiple))
        logits = window_logits(network, view.flip(-1) if flipped else view, protocol).float()
        probabilities = _resize(logits.flip(-1) if flipped else logits, size).softmax(dim=1)
        total = probabilities if total is None else total.add_(probabilities)
    assert total is not None
    return total / len(list(_views(protocol)))


def _views(protocol: TTASettings) -> Iterator[tuple[float, bool]]:
    return product(protocol.scales, (False, True) if protocol.flip else (False,))


def scaled_size(size: tuple[int, int], scale: float, multiple: int) -> tuple[int, int]:
    """Height and width times `scale`, each rounded to a multiple of `multiple`, at least one; scale 1 rounds nothing."""
    if scale == 1:
        return size
    height, width = (multiple * max(1, round(side * scale / multiple)) for side in size)
    return height, width


def _resize(value: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(value.shape[-2:]) == size:
        return value
    return F.interpolate(value, size=size, mode="bilinear", align_corners=False)


def window_logits(network: nn.Module, image: Tensor, protocol: InferenceSettings) -> Tensor:
    """Logits (N,C,H,W) of images (N,3,H,W) float in [0,1]: of the whole, or the mean of the windows that cover a pixel.

    Memory: that of a band of windows, and the logits once more.
    """
    size = (image.shape[-2], image.shape[-1])
    if protocol.window is None or all(side <= window for side, window in zip(size, protocol.window, strict=True)):
        return network(image)[0]
    logits: Tensor | None = None
    for place, scores in _bands(lambda part: network(part)[0].float(), image, protocol, 0):
        logits = scores.new_empty((*scores.shape[:2], *size)) if logits is None else logits
        logits[place] = scores
    assert logits is not None
    return logits
