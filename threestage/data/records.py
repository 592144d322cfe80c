"""A data set on storage: Parquet files of encoded images and masks that never change, and a small manifest.

root/manifest.json                      the current version
root/manifests/v0001.json …             every version
root/images/<split>-<digest>.parquet    images, with their masks where there were any; one split per file
root/labels/<split>-<digest>.parquet    images of the set whose mask came, was corrected or was taken away (null) later
root/rejected/v0001.parquet             what an ingest refused (data/rejects.py)
root/preview.png                        a picture of some labels (report/data_set_preview.py)
root/shards/, root/listing/             what an ingest has done, so that it can go on (data/publish.py, data/listing.py)
"""

import io
import re
import struct
import zlib
from collections.abc import Collection
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image
from pydantic import (
    AfterValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from threestage.data import parquet, storage
from threestage.data.bands import BandNumber, Bands
from threestage.data.headers import SIGNED, UNSIGNED, BadImage, Layout, read_layout
from threestage.data.parallel import MAX_IMAGE_PIXELS as MAX_IMAGE_PIXELS
from threestage.data.parallel import PIXELS as PIXELS
from threestage.data.parallel import map_ahead
from threestage.errors import InputError
from threestage.settings import Settings

MANIFEST_FORMAT = 1
MANIFEST_NAME = "manifest.json"
PREVIEW_NAME = "preview.png"
MAX_IMAGE_BYTES = 256 * 2**20
FILES_AT_ONCE = 4  # of images, each whole in memory until the rows that are needed are cut out
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")  # Pillow knows others that run programs (EPS: Ghostscript)
TILE_WIDTH, TILE_HEIGHT = 322, 323  # tags of TIFF
PILLOWS_LIMIT = 178_956_970
EXIF_ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)
DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    TypeError,  # a TIFF whose second page has no size
    LookupError,
    ArithmeticError,
    AttributeError,
    struct.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
BMP_BITS = {"1": 1, "L": 8}  # by the mode that Pillow gives to a palette of greys
PICTURE_MODES = ("L", "RGB", "1", "P", "PA", "LA", "RGBA", "CMYK", "YCbCr")

SplitName = Literal["train", "val", "test"]
Bytes = npt.NDArray[np.uint8]

RECORD_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("mask", pa.binary()),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
    ]
)


GROUP_LIST = ".csv"
LabelledIds = Annotated[str, Field(min_length=1)]
"""\"all\", or where the list of them lies."""


class DataSettings(Settings):
    """The data set, and the labels that a run may use.

    `labelled`: masks that the run may use: a count, a fraction, "all", or the path or URI of a text file with an image id at
    the start of each line, with or without a suffix. `downscale`: integer factor by which images and masks are reduced: mean
    of the pixels, majority of the ids.
    `fixed_void`: pixels that are void in at least this share of the labelled masks are void in every pseudo-mask of the same
    size (the camera's own vehicle); null: none.
    `unlabelled`: more images for the pool: a folder or prefix of image files, or a data set.
    `exclude`: a text file with an image id a line: these images are left out of the pool; labelled ones stay.
    `max_bad_fraction`: share of unusable images in the pool above which the run fails.
    `max_image_pixels`: larger images are not decoded (decompression bombs).
    """

    root: str = Field(description="data set made by `threestage ingest`: a path or s3://bucket/prefix")
    unlabelled: str | None = None
    exclude: str | None = None
    labelled: Annotated[int, Field(ge=1, strict=True)] | Annotated[float, Field(gt=0, lt=1)] | LabelledIds = "all"
    split_seed: int = Field(0, description="random seed of the labels that a count or fraction takes")
    validation: float = Field(
        default=0.2,
        ge=0,
        lt=1,
        description="share of the labels set aside for validation if the data set has no val split",
    )
    group: str | None = Field(
        default=None,
        min_length=1,
        description="scene of an image; a scene stays on one side of training and validation. A regular expression on the image "
        "id (its first group in brackets, else the whole match), or a .csv file with the columns image_id and group",
    )
    downscale: int = Field(default=1, ge=1)
    fixed_void: float | None = Field(default=None, gt=0, le=1)
    max_bad_fraction: float = Field(default=0.02, ge=0, le=1)
    max_image_pixels: int = Field(default=MAX_IMAGE_PIXELS, ge=1, le=PILLOWS_LIMIT)
    bands: Annotated[tuple[BandNumber, ...], Field(min_length=1)] | None = Field(
        default=None,
        description="bands that the network sees, from 1 on, in its order, of a data set made with `ingest --bands`; null: all. "
        "The first three are shown, and changed in colour, as red, green and blue",
    )

    @field_validator("group")
    @classmethod
    def _group_is_an_expression(cls, value: str | None) -> str | None:
        if value is not None and not value.endswith(GROUP_LIST):
            try:
                re.compile(value)
            except re.error as error:
                raise InputError(
                    f"is neither a regular expression ({error}) nor a {GROUP_LIST} file", "data/group-expression"
                ) from None
        return value

    @property
    def group_list(self) -> str | None:
        """Where the groups of the images are listed."""
        return self.group if self.group is not None and self.group.endswith(GROUP_LIST) else None

    @property
    def labelled_list(self) -> str | None:
        """Where the ids of the labelled images are listed."""
        return self.labelled if isinstance(self.labelled, str) and self.labelled != "all" else None


def stays_below(path: str) -> str:
    """A path that a manifest or a listing names: whoever writes there must not choose what is read elsewhere."""
    if path.startswith("/") or ".." in path.split("/"):
        raise ValueError(f"{path} leads out of its folder")
    return path


PathBelow = Annotated[str, AfterValidator(stays_below)]


class DataFile(Settings):
    """One Parquet file; `path` is relative to the root, `digest` covers ids, images and masks of its rows in order."""

    path: PathBelow
    kind: Literal["images", "labels"]
    split: SplitName
    rows: int
    labelled_rows: int
    digest: str


class SplitCounts(Settings):
    """`labelled` counts images that have a mask, wherever the mask lies."""

    images: int = 0
    labelled: int = 0


class SizeStatistics(Settings):
    """Of the images, in pixels; zeros for a set without images."""

    min_height: int = 0
    max_height: int = 0
    mean_height: float = 0.0
    min_width: int = 0
    max_width: int = 0
    mean_width: float = 0.0


class Manifest(Settings):
    """One version of a data set. `classes` is empty until the first masks come; `colours` are for pictures only. `bands`: of its
    images, as the first version measured them; None: 8-bit RGB.

    `digest` covers the classes, the bands and the files' digests: two sets with one digest hold the same images, masks and ids.
    """

    format: int = MANIFEST_FORMAT
    version: int
    name: str | None = None
    classes: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    files: tuple[DataFile, ...]
    counts: dict[SplitName, SplitCounts]
    sizes: SizeStatistics
    digest: str
    bands: Bands | None = None

    @field_validator("counts")
    @classmethod
    def _of_all_splits(cls, counts: dict[SplitName, SplitCounts]) -> dict[SplitName, SplitCounts]:
        none: dict[SplitName, SplitCounts] = {"train": SplitCounts(), "val": SplitCounts(), "test": SplitCounts()}
        return none | counts

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Of RGB as earlier versions wrote it."""
        found: dict[str, Any] = handler(self)
        return found if self.bands is not None else {key: value for key, value in found.items() if key != "bands"}

    @model_validator(mode="after")
    def _a_colour_per_class(self) -> Self:
        if len(self.colours) != len(self.classes):
            raise ValueError(f"{len(self.classes)} classes and {len(self.colours)} colours")
        return self


def load_manifest(root: str, version: int | None = None) -> Manifest:
    """The current manifest of a data set, or an earlier version of it.

    Raises InputError when there is none, or when a newer threestage wrote it.
    """
    uri = storage.join(root, MANIFEST_NAME) if version is None else version_uri(root, version)
    try:
        raw = storage.read_json(uri)
    except FileNotFoundError:
        if version is not None and (current := load_manifest(root)).version == version:
            return current  # published, and not yet kept under its number
        raise InputError(
            f"{uri}: no data set there; make one with `threestage ingest`, or correct the path", "data/no-data-set"
        ) from None
    if not isinstance(raw, dict) or not isinstance(raw.get("format"), int):
        raise InputError(f"{uri}: not a manifest of a threestage data set; correct the path", "data/not-a-data-set")
    if raw["format"] > MANIFEST_FORMAT:
        raise InputError(
            f"{uri}: format {raw['format']} is newer than this threestage reads ({MANIFEST_FORMAT}); upgrade threestage",
            "data/newer-format",
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise InputError(
            f"{uri}: not a manifest of a threestage data set ({reason}); correct the path", "data/not-a-data-set"
        ) from None


def version_uri(root: str, version: int) -> str:
    return storage.join(root, "manifests", f"v{version:04d}.json")


def pool_files(manifest: Manifest) -> tuple[DataFile, ...]:
    """Files whose rows are the unlabelled pool (the reader leaves out the ids carved for validation)."""
    return tuple(file for file in manifest.files if file.kind == "images" and file.split == "train")


def labelled_ids(root: str, manifest: Manifest, split: SplitName) -> list[str]:
    """Sorted ids of a split's images that have a mask; reads no image."""
    has_mask: dict[str, bool] = {}
    for file in files_with_masks(manifest, split):
        table = parquet.read_file(storage.join(root, file.path), ["image_id", "mask"])
        has_mask.update(zip(table.column("image_id").to_pylist(), _has_mask(table), strict=True))
    return sorted(image_id for image_id, there in has_mask.items() if there)


def labelled_rows(root: str, manifest: Manifest, split: SplitName, ids: Collection[str] | None = None) -> pa.Table:
    """The rows of a split that have a mask (RECORD_SCHEMA), or those of them named in `ids`, sorted by id.

    One row per id: what came later wins, be it a mask or that there is none any more. Holds all of them in memory at once.
    """
    wanted = None if ids is None else pa.array(sorted(ids), pa.string())

    def read(file: DataFile) -> pa.Table:
        table = parquet.read_file(storage.join(root, file.path), RECORD_SCHEMA.names).replace_schema_metadata(None)
        return table if wanted is None else table.filter(pc.is_in(table.column("image_id"), value_set=wanted))

    seen: set[str] = set()
    parts = [RECORD_SCHEMA.empty_table()]
    for table in map_ahead(read, reversed(files_with_masks(manifest, split)), FILES_AT_ONCE):
        found = table.column("image_id").to_pylist()
        latest = pa.array([image_id not in seen for image_id in found], pa.bool_())
        seen.update(found)
        parts.append(table.filter(pc.and_(latest, pc.is_valid(table.column("mask")))))
    return _sorted_by_id(pa.concat_tables(parts))


def _sorted_by_id(table: pa.Table) -> pa.Table:
    """By slices, without a copy: gathering a binary column into one array fails over 2 GiB."""
    ids = table.column("image_id").to_pylist()
    order = sorted(range(len(ids)), key=ids.__getitem__)
    return pa.concat_tables([table.slice(0, 0), *(table.slice(i, 1) for i in order)])


def files_with_masks(manifest: Manifest, split: SplitName) -> list[DataFile]:
    """In order of precedence, weakest first: images, then labels in the order in which they came."""
    files = [file for file in manifest.files if file.split == split and (file.labelled_rows or file.kind == "labels")]
    return sorted(files, key=lambda file: file.kind == "labels")


def _has_mask(table: pa.Table) -> list[bool]:
    return list(pc.is_valid(table.column("mask")).to_pylist())


def decode_image(data: bytes, max_pixels: int = MAX_IMAGE_PIXELS) -> Bytes:
    """uint8 (H,W,3) RGB of an encoded image, turned as its EXIF says. Large images that threads decode at the same time share
    PIXELS.

    Raises BadImage when it cannot be decoded, or when `open_picture` refuses it.
    """
    try:
        with open_picture(data, max_pixels) as image, PIXELS.hold_large(image.width * image.height):
            if image.format == "JPEG" and image.mode in ("L", "RGB") and not is_turned(image):
                return _decode_jpeg(data, image)
            return np.array(upright(image).convert("RGB"))
    except BadImage:
        raise
    except DECODER_ERRORS as error:
        raise BadImage(decoder_complaint(error), "image/undecodable") from None


def open_picture(data: bytes, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """An image to train on or to predict: one opaque frame of grey or colour, of 8 bits or fewer, and nothing beside it.

    The one place that decides this, for `ingest`, `predict` and `data.unlabelled`. Decodes only images with transparency.
    Raises BadImage when it is none, and what `open_image` raises.
    """
    layout = read_layout(data)
    refuse_numbers(layout)
    image = _open(data, layout, max_pixels)
    if has_frames(image, layout):
        raise BadImage("holds more than one frame: give one file per image", "image/frames")
    if image.mode not in PICTURE_MODES:
        raise BadImage(f"has the pixel mode {image.mode}, which is not converted: save it as 8-bit RGB", "image/bands")
    _refuse_bands(image, layout)
    return image


def refuse_numbers(layout: Layout) -> None:
    """Raise BadImage for an image of more than 8 bits, or of anything but unsigned numbers."""
    if layout.bits > 8:
        raise BadImage(
            f"has {layout.bits} bits per channel: convert it to 8, the range is not known here", "image/bits"
        )
    if layout.sample_format != UNSIGNED:
        numbers = "signed numbers" if layout.sample_format == SIGNED else "numbers of a special kind"
        raise BadImage(
            f"holds {numbers}: convert it to unsigned ones of 8 bits, the range is not known here", "image/bits"
        )


def _refuse_bands(image: Image.Image, layout: Layout) -> None:
    """Refuse bands beside the colour, unless they are a transparency that is opaque everywhere."""
    clear = image.has_transparency_data and not is_opaque(image)
    if clear and image.format != "TIFF":
        raise BadImage(f"has transparent pixels (mode {image.mode}): flatten it first", "image/transparent")
    extra = layout.bands - layout.colour_bands
    if clear or extra > 1 or (extra and not image.has_transparency_data):
        last = ", the last one declared as transparency and not opaque everywhere" if clear else ""
        raise BadImage(
            f"has {layout.bands} bands{last}; {layout.colour_bands} are read: keep those, or flatten it", "image/bands"
        )


def is_opaque(image: Image.Image) -> bool:
    """Whether no pixel is transparent; decodes the image."""
    return image.convert("RGBA").getchannel("A").getextrema() == (255, 255)


def has_frames(image: Image.Image, layout: Layout) -> bool:
    """Whether there is a second frame or page. Of an MPO the first is the photo; a TIFF's pages are not counted, which may
    take minutes."""
    return layout.pages or (image.format not in ("MPO", "TIFF") and getattr(image, "n_frames", 1) > 1)


def is_turned(image: Image.Image) -> bool:
    """Whether EXIF says that the image is to be shown turned or mirrored."""
    return image.getexif().get(EXIF_ORIENTATION) in TURNS


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Height and width of an image once it is turned as its EXIF says; decodes nothing."""
    swaps = (
        image.format != "TIFF" and image.getexif().get(EXIF_ORIENTATION) in SIDEWAYS
    )  # a TIFF's size is the turned one's
    return (image.width, image.height) if swaps else (image.height, image.width)


def upright(image: Image.Image) -> Image.Image:
    """The image, turned as its EXIF says. (PIL's own function writes the EXIF anew, and stops at an odd entry of it.)"""
    image.load()  # a TIFF is turned by that
    turn = TURNS.get(image.getexif().get(EXIF_ORIENTATION, 1))
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.info = {}  # or its EXIF would be saved with it
    return turned


def _decode_jpeg(data: bytes, image: Image.Image) -> Bytes:
    """What PIL gives, to the bit, in two thirds of its time; PIL decides about a file that is not without fault."""
    try:
        import simplejpeg

        return np.asarray(simplejpeg.decode_jpeg(data, colorspace="RGB"))
    except (ImportError, ValueError):
        return np.array(image.convert("RGB"))


def open_image(data: bytes, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """An image of FORMATS; nothing is decoded yet. Raises BadImage when its header, or that of a tile in it, announces more
    than `max_pixels`, or more than `read_layout` allows, and one of DECODER_ERRORS when it is no image."""
    return _open(data, read_layout(data), max_pixels)


def _open(data: bytes, layout: Layout, max_pixels: int) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    for what, (width, height) in (("", image.size), ("a tile of ", _tile(image))):
        if width * height > max_pixels:
            raise BadImage(f"has {what}{width}x{height} pixels, more than {max_pixels}", "image/too-many-pixels")
    if image.format == "BMP" and layout.bits != BMP_BITS.get(image.mode, layout.bits):  # Pillow reads other bits of it
        raise BadImage(
            f"is a BMP of {layout.bits} bits whose palette holds greys only, which is misread: save it as PNG",
            "image/bmp-palette",
        )
    return image


def _tile(image: Image.Image) -> tuple[int, int]:
    """Width and height of a TIFF's tiles, which are decoded whole however small the image is."""
    tags = getattr(image, "tag_v2", {})
    width, height = tags.get(TILE_WIDTH, 0), tags.get(TILE_HEIGHT, 0)
    if not isinstance(width, int) or not isinstance(height, int):
        raise BadImage("has tiles without a size", "image/undecodable")
    return width, height


def decoder_complaint(error: Exception) -> str:
    """Why an image cannot be decoded, from one of DECODER_ERRORS."""
    reason = error.message if isinstance(error, BadImage) else str(error)
    if type(error).__name__ == "UnidentifiedImageError":
        reason = f"it is no image, or of a format other than {', '.join(FORMATS)}"
    return f"cannot be decoded: {reason}"


def decode_mask(data: bytes) -> Bytes:
    """uint8 (H,W) class ids of a stored mask. Raises BadImage when it is not an 8-bit single-channel image, or too large."""
    with open_image(data, PILLOWS_LIMIT) as image:
        if image.mode != "L":
            raise BadImage(f"a stored mask has one 8-bit channel, this one is of mode {image.mode}", "mask/damaged")
        return np.array(image)


def encode_mask(mask: Bytes, fast: bool = False) -> bytes:
    """PNG of uint8 (H,W) class ids. `fast`: by the lengths of runs, which suits predictions: a third of the time."""
    if mask.dtype != np.uint8 or mask.ndim != 2:
        raise ValueError(f"a mask is uint8 (H,W), not {mask.dtype} {mask.shape}")
    stream = io.BytesIO()
    options = {"compress_level": 1, "compress_type": zlib.Z_RLE} if fast else {}
    Image.fromarray(mask).save(stream, format="PNG", **options)
    return stream.getvalue()


def downscale_image(image: Bytes, factor: int) -> Bytes:
    """uint8 (H,W,3) to (H//factor,W//factor,3): the mean of each block, rounded half up; a ragged rest is cropped."""
    if factor == 1:
        return image
    total = _blocks(image, factor).sum(axis=(1, 3), dtype=np.uint32)
    return ((total + factor * factor // 2) // (factor * factor)).astype(np.uint8)


def downscale_mask(mask: Bytes, factor: int) -> Bytes:
    """uint8 (H,W) to (H//factor,W//factor): the commonest id of each block (255 is one too); the lowest of equals."""
    if factor == 1:
        return mask
    blocks = _blocks(mask, factor)
    result = np.zeros((blocks.shape[0], blocks.shape[2]), np.uint8)
    most = np.zeros(result.shape, np.uint32)
    for class_id in np.unique(mask):
        votes = (blocks == class_id).sum(axis=(1, 3), dtype=np.uint32)
        wins = votes > most
        result[wins] = class_id
        most[wins] = votes[wins]
    return result


def _blocks(array: Bytes, factor: int) -> Bytes:
    """(H,W,…) to (H//f,f,W//f,f,…)."""
    height, width = array.shape[0] // factor, array.shape[1] // factor
    cropped = array[: height * factor, : width * factor]
    return cropped.reshape(height, factor, width, factor, *array.shape[2:])
