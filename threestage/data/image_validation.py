"""Is this file a whole image, or mask, to train on? What can be converted is; the rest is refused by name.

Images and masks that are decoded at the same time share PIXELS, so that memory does not grow with the threads.
"""

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from threestage.data.band_images import read_bands
from threestage.data.bands import Numbers, some_pixels
from threestage.data.classes import Lookup, Unknown
from threestage.data.headers import SIGNED, UNSIGNED, BadImage, Layout, read_layout
from threestage.data.palette import refuse_other_order
from threestage.data.parallel import PIXELS as PIXELS
from threestage.data.records import (
    DECODER_ERRORS,
    decoder_complaint,
    has_frames,
    is_opaque,
    is_turned,
    open_image,
    open_picture,
    refuse_numbers,
    upright,
    upright_size,
)
from threestage.errors import CodedError

JPEG_FORMATS = ("JPEG", "MPO")
LOSSY_TIFFS = ("jpeg", "tiff_jpeg", "webp")
MASK_FRAMES = "holds more than one frame or page: give one mask with all classes"


class BadFile(CodedError):
    """Why a file is refused, in words for the user."""


class UnknownValues(BadFile):
    """A mask has values that its class map does not know. `pixels`: how many of each."""

    def __init__(self, message: str, pixels: Mapping[str, int]) -> None:
        super().__init__(message, "mask/unknown-value")
        self.pixels = pixels


@dataclass(frozen=True)
class CheckedImage:
    """`data` are the file's own bytes, unless it had to be turned by EXIF, or made RGB of CMYK, palette or opaque alpha."""

    data: bytes
    height: int
    width: int
    sample: Numbers | None = None
    """Of an image of bands, see `some_pixels`."""


def check_image(data: bytes) -> CheckedImage:
    """Decode an image whole. Raises BadFile when it is broken, cut short, or refused by `open_picture`."""
    with _decoding(data, refuse_numbers):
        image = open_picture(data)
        image.load()
        if not is_turned(image) and image.mode in ("L", "RGB"):
            return CheckedImage(data, image.height, image.width)
        turned = upright(image).convert("L" if image.mode == "L" else "RGB")
        return CheckedImage(_encoded(turned, image.format), turned.height, turned.width)


def check_bands(data: bytes, count: int) -> CheckedImage:
    """As `check_image`, of a data set whose images have `count` bands of any type; keeps the file's own bytes."""
    if not data:
        raise BadFile("is empty", "image/undecodable")
    try:
        values = read_bands(data, count)
    except BadImage as error:
        raise BadFile(error.message, error.code) from None
    return CheckedImage(data, values.shape[0], values.shape[1], some_pixels(values))


def check_mask(data: bytes, lookup: Lookup, size: tuple[int, int], name: str) -> npt.NDArray[np.uint8]:
    """uint8 (H,W) class ids of a source mask, whose (height, width) must be `size`.

    Ids of one-channel and palette masks are taken as they are stored (never through a conversion to grey, which would
    give the palette's brightness); RGB masks are looked up by colour, and so are palette masks where no class has ids.
    Raises BadFile.
    """
    with _decoding(data, _refuse_mask_layout, f"mask {name} "):
        image, layout = open_image(data), read_layout(data)
        _refuse_mask(image, layout, size)
        return known_classes(_source_values(upright(image), layout, lookup), lookup, name)


def known_classes(values: npt.NDArray[np.integer], lookup: Lookup, name: str) -> npt.NDArray[np.uint8]:
    """uint8 (H,W) class ids of a mask's ids (H,W) or colours (H,W,3). Raises UnknownValues."""
    result = lookup(values)
    if isinstance(result, Unknown):
        others = f" (and {len(result.pixels) - 1} other values)" if len(result.pixels) > 1 else ""
        raise UnknownValues(
            f"mask {name} holds {'colour' if values.ndim == 3 else 'id'} {result.value} at ({result.row}, {result.column})"
            f"{others}, not in class map {lookup.name}: add it, or map it to ignore",
            result.pixels,
        )
    return result


def check_label_image(data: bytes, size: tuple[int, int]) -> npt.NDArray[np.integer]:
    """(H,W) numbers of a mask file of a labelling tool, whose (height, width) must be `size`: the stored values, and of RGB
    R + 256 G + 65536 B. Raises BadFile."""
    with _decoding(data, _refuse_mask_layout):
        image, layout = open_image(data), read_layout(data)
        _refuse_mask(image, layout, size)
        values = _stored_values(upright(image), layout)
        return values.astype(np.int32) @ np.array([1, 256, 65536], np.int32) if values.ndim == 3 else values


def read_values(data: bytes) -> tuple[npt.NDArray[np.integer], dict[int, tuple[int, int, int]]]:
    """What a mask holds: (H,W) ids or (H,W,3) colours, and the palette of the ids. Raises BadFile."""
    with _decoding(data, _refuse_mask_layout):
        image, layout = open_image(data), read_layout(data)
        _refuse_mask(image, layout, upright_size(image))
        image = upright(image)
        colours = np.array(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3).tolist() if image.mode == "P" else []
        return _stored_values(image, layout), {index: (r, g, b) for index, (r, g, b) in enumerate(colours)}


@contextmanager
def _decoding(data: bytes, refuse: Callable[[Layout], None], prefix: str = "") -> Iterator[None]:
    """Hold the image's pixels of PIXELS; its layout is not refused, and a PNG's checksums are right.

    BadImage, and whatever a decoder raises here or in the body, becomes a BadFile.
    """
    if not data:
        raise BadFile(f"{prefix}is empty", "image/undecodable")
    try:
        refuse(read_layout(data))
        with open_image(data) as probe:
            pixels = probe.width * probe.height
            probe.verify()  # checksums; the object cannot be used afterwards
        with PIXELS.hold(pixels):
            yield
    except BadImage as error:
        raise BadFile(f"{prefix}{error.message}", error.code) from None
    except DECODER_ERRORS as error:
        raise BadFile(f"{prefix}{decoder_complaint(error)}", "image/undecodable") from None


def _refuse_mask_layout(layout: Layout) -> None:
    """Raise BadImage where the values could not be read as they are stored."""
    if layout.pages:
        raise BadImage(MASK_FRAMES, "image/frames")
    if layout.colour_bands > 1 and layout.bits > 8:
        raise BadImage(f"has colours of {layout.bits} bits per channel: save it with 8", "mask/layout")
    if layout.sample_format not in (UNSIGNED, SIGNED):
        raise BadImage("holds no whole numbers: save its ids as PNG", "mask/layout")
    if layout.white_is_zero and layout.bits > 1:
        raise BadImage("is a TIFF in which 0 is white, whose ids may be inverted: save it as PNG", "mask/layout")
    _refuse_mask_bands(layout.bands, layout.colour_bands + 1)


def _refuse_mask_bands(bands: int, most: int) -> None:
    if bands > most:
        raise BadImage(
            f"has {bands} bands: ids (one band or a palette) or RGB colours are read, remove the others", "mask/layout"
        )


def _refuse_mask(image: Image.Image, layout: Layout, size: tuple[int, int]) -> None:
    """The same for what is known of an opened image. Decodes only masks with transparency."""
    compression = image.info.get("compression")
    if image.format in (*JPEG_FORMATS, "WEBP") or compression in LOSSY_TIFFS:
        kind = f"TIFF of {compression}" if compression in LOSSY_TIFFS else image.format
        raise BadImage(f"is a {kind}, which may change ids: save it as PNG", "mask/lossy")
    if has_frames(image, layout):
        raise BadImage(MASK_FRAMES, "image/frames")
    height, width = upright_size(image)
    if (height, width) != size:
        raise BadImage(f"is {width}x{height} but its image, upright, is {size[1]}x{size[0]} pixels", "mask/size")
    opaque = image.mode in ("LA", "RGBA") and is_opaque(image)
    _refuse_mask_bands(max(layout.bands, len(image.getbands())), layout.colour_bands + opaque)


def _source_values(image: Image.Image, layout: Layout, lookup: Lookup) -> npt.NDArray[np.integer]:
    """(H,W) ids, or (H,W,3) colours."""
    if image.mode == "P" and lookup.only_colours:
        image = image.convert("RGB")
    if image.mode == "P":
        refuse_other_order(image, lookup)
    return _stored_values(image, layout)


def _stored_values(image: Image.Image, layout: Layout) -> npt.NDArray[np.integer]:
    """The same; of a palette the indices."""
    if image.mode in ("LA", "RGBA"):
        image = image.convert(image.mode[:-1])
    values = np.asarray(image)
    if image.mode == "L" and layout.bits < 8:
        return values // (255 // (2**layout.bits - 1))  # Pillow stretches these to 0–255
    if image.mode == "L" and layout.sample_format == SIGNED:
        return values.view(np.int8)
    if image.mode == "1":
        return values.astype(np.uint8)
    if image.mode not in ("L", "P", "RGB") and not image.mode.startswith("I"):
        raise BadImage(
            f"has the pixel mode {image.mode}: ids (one channel or palette) or RGB colours are read", "mask/layout"
        )
    return values


def _encoded(image: Image.Image, source_format: str | None) -> bytes:
    stream = io.BytesIO()
    if source_format in JPEG_FORMATS:
        image.save(stream, format="JPEG", quality=95, subsampling=0)
    else:
        image.save(stream, format="PNG")
    return stream.getvalue()
