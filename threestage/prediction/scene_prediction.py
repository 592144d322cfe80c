"""Predict a TIFF image of any size by windows, never whole, and write its mask as a tiled GeoTIFF, or PNG (extra `geo`).

The classes are written uncompressed to a temporary file as they come, strip after strip, and compressed at the end. A pixel
without data in the image is 255 in the mask.
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from threestage import IGNORE_INDEX
from threestage.data import storage
from threestage.data.bands import Bands
from threestage.data.batches import send
from threestage.data.classes import Colour
from threestage.data.headers import BadImage
from threestage.data.palette import palette
from threestage.data.raster import Raster, gdal_environment, open_raster
from threestage.data.records import downscale_image
from threestage.prediction.pseudo_masks import class_confidence_entropy, quantise
from threestage.prediction.tta import TTASettings, score_in_strips, window_scores

SCENE_WINDOW = 512
STRIP_SCORES = 2**24
"""Scores of a band of windows across a strip: 64 MiB, of which there are a few copies."""
BLOCK = 512
COPY_BYTES = 2**22
LAYOUT = {"tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK, "BIGTIFF": "IF_SAFER"}
SUFFIXES = {"GTiff": ".tif", "PNG": ".png"}


class SceneTask(NamedTuple):
    """`name`: of what is written below `destination`, without folder and suffix. `driver`: GTiff or PNG. `downscale`: how many
    times smaller than the image the network's input is. `multiple`: the network's `size_multiple`. `confidence`: write it too.
    `bands`: of the image; None: 8-bit RGB."""

    uri: str
    destination: str
    name: str
    driver: str
    protocol: TTASettings
    downscale: int
    multiple: int
    colours: Sequence[Colour]
    confidence: bool
    bands: Bands | None = None


def scene_protocol(protocol: TTASettings, multiple: int) -> TTASettings:
    """In windows: where none are asked for, of SCENE_WINDOW with Hann weights."""
    if protocol.window is not None:
        return protocol
    side = max(1, SCENE_WINDOW // multiple) * multiple
    return protocol.model_copy(update={"window": (side, side), "overlap": "hann"})


def predict_scene(network: nn.Module, scene: SceneTask, device: torch.device) -> tuple[str, tuple[int, int]]:
    """The mask's path below the destination, and (height, width). Raises BadImage, OSError where the store fails."""
    with tempfile.TemporaryDirectory() as folder, open_raster(scene.uri) as raster:
        if min(raster.height, raster.width) < scene.downscale:
            raise BadImage(f"is smaller than data.downscale={scene.downscale}", "image/too-small")
        masks, confidences = (os.path.join(folder, f"{name}.tif") for name in ("mask", "confidence"))
        with ExitStack() as stack:
            mask = stack.enter_context(_written(masks, raster, scene.colours))
            sure = stack.enter_context(_written(confidences, raster, None)) if scene.confidence else None
            for (rows, columns), class_ids, confidence in predict_windows(network, raster, scene, device):
                void = ~raster.valid(rows, columns)
                class_ids[void] = IGNORE_INDEX
                _write(mask, rows, columns, class_ids)
                if sure is not None:
                    confidence[void] = 0
                    _write(sure, rows, columns, confidence)
        if scene.confidence:
            _publish(confidences, scene, "confidence")
        return _publish(masks, scene, "masks"), (raster.height, raster.width)


Predicted = tuple[tuple[slice, slice], np.ndarray, np.ndarray]


@torch.inference_mode()
def predict_windows(network: nn.Module, raster: Raster, scene: SceneTask, device: torch.device) -> Iterator[Predicted]:
    """Of every part of an image: its rows and columns, class ids and confidence (h,w) uint8, where 255 is 1."""
    assert scene.protocol.window is not None
    factor, classes = scene.downscale, len(scene.colours)
    size = (raster.height // factor, raster.width // factor)
    score = partial(_score, network, raster, scene, device)
    strip_width = STRIP_SCORES // (classes * scene.protocol.window[0])
    for rows, columns, scores in score_in_strips(score, size, scene.protocol, strip_width):
        scores = scores if scene.protocol.single_view else scores.log()
        class_ids, confidence, _ = class_confidence_entropy(scores)
        found = [values[0].cpu().numpy() for values in (class_ids, quantise(confidence))]
        place = tuple(
            slice(side.start * factor, whole if side.stop == small else side.stop * factor)
            for side, small, whole in zip((rows, columns), size, (raster.height, raster.width), strict=True)
        )
        ids, sure = (_enlarged(values, factor, (place[0], place[1])) for values in found)
        yield (place[0], place[1]), ids, sure


def _score(
    network: nn.Module, raster: Raster, scene: SceneTask, device: torch.device, rows: slice, columns: slice
) -> Tensor:
    """Of a window, in pixels of the network's input. One without any data is not predicted."""
    factor = scene.downscale
    rows, columns = (slice(side.start * factor, side.stop * factor) for side in (rows, columns))
    if not raster.valid(rows, columns).any():
        size = ((rows.stop - rows.start) // factor, (columns.stop - columns.start) // factor)
        return torch.full((1, len(scene.colours), *size), 1 / len(scene.colours), device=device)
    pixels = raster.read_pixels(rows, columns, None if scene.bands is None else scene.bands.count)
    pixels = pixels if scene.bands is None else scene.bands.levels(pixels)
    window = send(torch.from_numpy(downscale_image(pixels, factor)[None]), device).permute(0, 3, 1, 2)
    return window_scores(network, window, scene.protocol, scene.multiple)


def _enlarged(values: np.ndarray, factor: int, place: tuple[slice, slice]) -> np.ndarray:
    """(h,w) at the size of a place: each value is its block's, the last ones also the ragged rest's."""
    if factor == 1:
        return values
    whole = values.repeat(factor, 0).repeat(factor, 1)
    size = (side.stop - side.start for side in place)
    return np.pad(whole, [(0, long - short) for long, short in zip(size, whole.shape, strict=True)], mode="edge")


# ---- What is written


@contextmanager
def _written(path: str, raster: Raster, colours: Sequence[Colour] | None) -> Iterator[Any]:
    """An uncompressed GeoTIFF where the image lies; a mask has colours, and 255 stands for no data."""
    import rasterio

    place = {"crs": raster.crs, "transform": raster.transform, "height": raster.height, "width": raster.width}
    void = None if colours is None else IGNORE_INDEX
    with rasterio.open(path, "w", driver="GTiff", dtype="uint8", count=1, nodata=void, **place, **LAYOUT) as dataset:
        if colours is not None:
            table = enumerate(palette(colours).tolist())
            dataset.write_colormap(1, {index: (*rgb, 0 if index == IGNORE_INDEX else 255) for index, rgb in table})
        yield dataset


def _write(dataset: Any, rows: slice, columns: slice, values: np.ndarray) -> None:
    from rasterio.windows import Window

    window = Window(columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start)
    dataset.write(values, 1, window=window)


def _publish(path: str, scene: SceneTask, kind: str) -> str:
    """Compress what was written, copy it to the destination, and give its path there."""
    import rasterio.shutil

    packed = f"{path}{SUFFIXES[scene.driver]}"
    options = {"compress": "deflate", **LAYOUT} if scene.driver == "GTiff" else {}
    with gdal_environment():
        rasterio.shutil.copy(path, packed, driver=scene.driver, **options)
    file = f"{kind}/{scene.name}{SUFFIXES[scene.driver]}"
    with open(packed, "rb") as stream:
        storage.write_pieces(storage.join(scene.destination, file), iter(lambda: stream.read(COPY_BYTES), b""))
    return file
