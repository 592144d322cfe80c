"""What a prediction job writes of its images, as files of their own or as rows of Parquet.

format png                                     format parquet
OUTPUT/masks/NAME.png       palette, class ids
OUTPUT/overlays/NAME.jpg    the image under the colours
OUTPUT/confidence/NAME.png  grey, 255 = 1
OUTPUT/parts/PART.parquet   image_id, file     OUTPUT/parts/PART.parquet   image_id, mask, confidence

Masks and confidences have the size of the image as it was given. A part's Parquet file is written last: its footer holds
the part's report and a digest of all that decides what its predictions are, so a rerun knows what is done.
"""

import errno
import hashlib
import io
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image
from torch import Tensor, nn

from threestage.data import storage
from threestage.data.palette import palette_png
from threestage.data.pool import PoolFile, PoolRow
from threestage.data.records import DECODER_ERRORS, MAX_IMAGE_PIXELS, decode_image, encode_mask
from threestage.evaluation import BATCH
from threestage.models.export import ModelCard
from threestage.models.network import size_multiple
from threestage.prediction.input_parts import Kind, Part, output_name, read_part
from threestage.prediction.pool_prediction import Encoded, PredictionWriter, Unwritable, encode_class_ids
from threestage.prediction.pseudo_masks import REPORT_KEY, FileReport, PoolTask
from threestage.prediction.tta import TTASettings, predict_with_tta
from threestage.report.terminal_tables import overlay

PARTS_FOLDER = "parts"
MASKS, MASK_SUFFIX = "masks/", ".png"
FILES_SCHEMA = pa.schema([("image_id", pa.string()), ("file", pa.string())])
ROWS_SCHEMA = pa.schema([("image_id", pa.string()), ("mask", pa.binary()), ("confidence", pa.binary())])
JPEG_SIDE = 65_500  # libjpeg's JPEG_MAX_DIMENSION
NAME_ERRORS = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EINVAL, errno.ELOOP, errno.EILSEQ)
"""Of one file; after others, such as ENOSPC, no file can be written."""
WRITERS = 16  # a put takes an object store tens of milliseconds

Format = Literal["png", "parquet"]


class PredictionTask(PoolTask):
    """What is needed to predict any part of the input, on any machine, as plain JSON. `crowded`: see `crowded_names`."""

    source: str
    kind: Kind
    protocol: TTASettings
    format: Format
    overlays: bool
    confidences: bool
    crowded: frozenset[int] = frozenset()
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


def names_written(task: PredictionTask, part: Part) -> list[str]:
    """The names of the masks of a part that is done, less those of images that were replaced since."""
    files = storage.read_table(part_uri(task, part), ["file"]).column("file").to_pylist()
    replaced = frozenset(part.replaced)
    return [
        file.removeprefix(MASKS).removesuffix(MASK_SUFFIX)
        for row, file in enumerate(files)
        if file is not None and row not in replaced
    ]


def without_replaced(task: PredictionTask, part: Part, report: FileReport) -> FileReport:
    """Empty the rows of a part whose images were replaced since they were predicted: another part has them now."""
    images = part.rows - len(part.replaced) - len(report.rejects)
    if not part.replaced or report.statistics.images == images:
        return report
    uri, sources = part_uri(task, part), storage.read_table(part.uri, ["image_uri"]).column("image_uri")
    gone = {sources[row].as_py() for row in part.replaced}
    rejects = tuple(reject for reject in report.rejects if reject.source not in gone)
    counts = {"images": part.rows - len(gone) - len(rejects), "unreadable": len(rejects)}
    statistics = report.statistics.model_copy(update=counts)
    report = report.model_copy(update={"statistics": statistics, "rejects": rejects})
    table = storage.read_table(uri)
    kept = pa.array([row not in part.replaced for row in range(part.rows)])
    for number, name in enumerate(table.column_names[1:], 1):
        table = table.set_column(number, name, pc.if_else(kept, table.column(name), None))
    metadata = (table.schema.metadata or {}) | {REPORT_KEY: report.model_dump_json().encode()}
    storage.write_table(uri, table.replace_schema_metadata(metadata))
    return report


class Predictions(PredictionWriter):
    """Masks of images, in the format of the task."""

    precision = "float32"  # as in an evaluation
    writers = WRITERS

    def __init__(self, task: PredictionTask, card: ModelCard) -> None:
        self._task = task
        self.protocol = task.protocol
        self._card = card
        self._multiple = size_multiple(card.network)
        self.schema = FILES_SCHEMA if task.format == "png" else ROWS_SCHEMA

    def rows(self, file: PoolFile) -> Iterator[list[PoolRow]]:
        assert isinstance(file, Part)
        return read_part(self._task.source, file)

    def uri(self, task: PoolTask, file: PoolFile) -> str:
        return part_uri(task, file)

    def predict(self, network: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return predict_with_tta(network, pixels, self._task.protocol, self._multiple)

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
        task, name = self._task, output_name(row, self._task.source, self._task.kind, self._task.crowded)
        file = f"{MASKS}{name}{MASK_SUFFIX}"
        colours = self._card.colours
        contents: dict[str, Callable[[], bytes]] = {file: lambda: palette_png(mask, colours)}
        if task.confidences:
            contents[f"confidence/{name}.png"] = lambda: encode_mask(confidence)
        if task.overlays:
            contents[f"overlays/{name}.jpg"] = lambda: _jpeg(overlay(*_for_jpeg(pixels, mask), colours))
        for path, encode in contents.items():
            try:
                content = encode()
            except (*DECODER_ERRORS, MemoryError) as error:
                raise Unwritable(
                    row, f"its {path.split('/')[0]} cannot be encoded: {error} [predict/not-written]"
                ) from None
            try:
                storage.write_bytes(storage.join(task.destination, path), content)
            except OSError as error:
                if error.errno not in NAME_ERRORS:
                    raise
                raise Unwritable(row, f"{path} cannot be written: {error.strerror} [predict/not-written]") from None
        return file


def _enlarged(values: np.ndarray, factor: int, size: tuple[int, ...]) -> np.ndarray:
    """(h,w) at the size (H,W,…): each value is its block's, the last ones also the ragged rest's (`downscale_image`)."""
    if factor == 1:
        return values
    whole = values.repeat(factor, 0).repeat(factor, 1)
    return np.pad(whole, [(0, long - short) for long, short in zip(size, whole.shape, strict=False)], mode="edge")


def _for_jpeg(pixels: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every n-th row and column of an image whose sides are too long for a JPEG."""
    step = -(-max(mask.shape) // JPEG_SIDE)
    return pixels[::step, ::step], mask[::step, ::step]


def _jpeg(picture: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, format="JPEG", quality=90)
    return stream.getvalue()
