"""What a prediction job writes of its images, as files of their own or as rows of Parquet.

format png                                     format parquet
OUTPUT/masks/NAME.png       palette, class ids
OUTPUT/overlays/NAME.jpg    the image under the colours
OUTPUT/confidence/NAME.png  grey, 255 = 1
OUTPUT/parts/PART.parquet   image_id, file     OUTPUT/parts/PART.parquet   image_id, mask, confidence

Masks and confidences have the size of the image as it was given. A part's Parquet file is written last: its footer holds
the part's report and a digest of all that decides what its predictions are, so a rerun knows what is done.
"""

import hashlib
import io
from collections.abc import Iterator
from typing import Literal

import numpy as np
import pyarrow as pa
from PIL import Image
from torch import Tensor, nn

from threestage.data import storage
from threestage.data.palette import palette_png
from threestage.data.pool import PoolFile, PoolRow
from threestage.data.records import MAX_IMAGE_PIXELS, decode_image, encode_mask
from threestage.evaluation import BATCH
from threestage.inference import Protocol, predict
from threestage.models.export import ModelCard
from threestage.models.network import size_multiple
from threestage.pool_prediction import Encoded, Product, encode_class_ids
from threestage.prediction_parts import Kind, Part, output_name, read_part
from threestage.pseudo_masks import PoolTask
from threestage.report import overlay

PARTS_FOLDER = "parts"
FILES_SCHEMA = pa.schema([("image_id", pa.string()), ("file", pa.string())])
ROWS_SCHEMA = pa.schema([("image_id", pa.string()), ("mask", pa.binary()), ("confidence", pa.binary())])
WRITERS = 16  # a put takes an object store tens of milliseconds

Format = Literal["png", "parquet"]


class PredictionTask(PoolTask):
    """What is needed to predict any part of the input, on any machine, as plain JSON. `repeated`: see `repeated_ids`."""

    source: str
    kind: Kind
    protocol: Protocol
    format: Format
    overlays: bool
    confidences: bool
    repeated: frozenset[int]
    batch_size: int = BATCH
    max_image_pixels: int = MAX_IMAGE_PIXELS
    used_ids: frozenset[str] = frozenset()
    excluded_ids: frozenset[str] = frozenset()

    def digest(self) -> str:
        decisive = self.model_dump_json(include={"protocol", "format", "overlays", "confidences"})
        return hashlib.sha256(f"{super().digest()}/{decisive}".encode()).hexdigest()


def part_uri(task: PoolTask, file: PoolFile) -> str:
    """Where the Parquet file of a part lies."""
    return storage.join(task.destination, PARTS_FOLDER, file.name)


class Predictions(Product):
    """Masks of images, in the format of the task."""

    precision = "float32"  # as in an evaluation
    writers = WRITERS

    def __init__(self, task: PredictionTask, card: ModelCard) -> None:
        self._task = task
        self._card = card
        self._multiple = size_multiple(card.network)
        self.schema = FILES_SCHEMA if task.format == "png" else ROWS_SCHEMA

    def rows(self, file: PoolFile) -> Iterator[list[PoolRow]]:
        assert isinstance(file, Part)
        return read_part(self._task.source, file)

    def uri(self, task: PoolTask, file: PoolFile) -> str:
        return part_uri(task, file)

    def predict(self, network: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return predict(network, pixels, self._task.protocol, self._multiple)

    def encode(self, row: PoolRow, pixels: np.ndarray, class_ids: np.ndarray, confidence: np.ndarray) -> Encoded:
        """Writes the image's files in format png."""
        if self._task.downscale > 1:
            pixels = decode_image(row.image, self._task.max_image_pixels)
        mask, sure = (_enlarged(values, self._task.downscale, pixels.shape) for values in (class_ids, confidence))
        if self._task.format == "parquet":
            return encode_class_ids(mask), sure.tobytes() if self._task.confidences else None
        return (self._write(row, pixels, mask, sure),)

    def _write(self, row: PoolRow, pixels: np.ndarray, mask: np.ndarray, confidence: np.ndarray) -> str:
        """The mask's path below the output."""
        task, name = self._task, output_name(row, self._task.source, self._task.kind, self._task.repeated)
        file = f"masks/{name}.png"
        storage.write_bytes(storage.join(task.destination, file), palette_png(mask, self._card.colours))
        if task.confidences:
            storage.write_bytes(storage.join(task.destination, "confidence", f"{name}.png"), encode_mask(confidence))
        if task.overlays:
            picture = _jpeg(overlay(pixels, mask, self._card.colours))
            storage.write_bytes(storage.join(task.destination, "overlays", f"{name}.jpg"), picture)
        return file


def _enlarged(values: np.ndarray, factor: int, size: tuple[int, ...]) -> np.ndarray:
    """(h,w) at the size (H,W,…): each value is its block's, the last ones also the ragged rest's (`downscale_image`)."""
    if factor == 1:
        return values
    whole = values.repeat(factor, 0).repeat(factor, 1)
    return np.pad(whole, [(0, long - short) for long, short in zip(size, whole.shape, strict=False)], mode="edge")


def _jpeg(picture: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, format="JPEG", quality=90)
    return stream.getvalue()
