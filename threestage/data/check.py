"""Is this file a whole image, or mask, to train on? What can be converted is; the rest is refused by name."""

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from threestage.data.classes import Lookup, Unknown
from threestage.data.records import (
    DECODER_ERRORS,
    SIXTEEN_BITS,
    BadImage,
    decoder_complaint,
    is_turned,
    open_image,
    upright,
)

JPEG_FORMATS = ("JPEG", "MPO")
GREY_PNG = 0


class BadFile(Exception):
    """Why a file is refused, in words for the user."""


@dataclass(frozen=True)
class CheckedImage:
    """`data` are the file's own bytes, unless it had to be turned by EXIF, or made RGB of CMYK, palette or opaque alpha."""

    data: bytes
    height: int
    width: int


def check_image(data: bytes) -> CheckedImage:
    """Decode an image whole. Raises BadFile when it is broken, cut short, of 16 bits, animated or transparent."""
    image = _decoded(data)
    try:
        return _converted(image, data)
    except DECODER_ERRORS as error:
        raise BadFile(decoder_complaint(error)) from None


def _converted(image: Image.Image, data: bytes) -> CheckedImage:
    if _bits(data, image) == 16:
        raise BadFile(SIXTEEN_BITS)
    if _has_frames(data):
        raise BadFile("holds more than one frame: give one file per image")
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
        raise BadFile(f"has transparent pixels (mode {image.mode}): flatten it first")
    if image.mode not in ("L", "RGB", "1", "P", "PA", "LA", "RGBA", "CMYK", "YCbCr"):
        raise BadFile(f"has the pixel mode {image.mode}, which is not converted: save it as 8-bit RGB")
    if not is_turned(image) and image.mode in ("L", "RGB"):
        return CheckedImage(data, image.height, image.width)
    turned = upright(image).convert("L" if image.mode == "L" else "RGB")
    return CheckedImage(_encoded(turned, image.format), turned.height, turned.width)


def check_mask(data: bytes, lookup: Lookup, size: tuple[int, int], name: str) -> npt.NDArray[np.uint8]:
    """uint8 (H,W) class ids of a source mask, whose (height, width) must be `size`.

    Ids of one-channel and palette masks are taken as they are stored (never through a conversion to grey, which would
    give the palette's brightness); RGB masks are looked up by colour. Raises BadFile.
    """
    image = _decoded(data)
    if image.format in (*JPEG_FORMATS, "WEBP"):
        raise BadFile(f"mask {name} is a {image.format}, which may change ids: save it as PNG")
    if (image.height, image.width) != size:
        raise BadFile(
            f"mask {name} is {image.width}x{image.height} but its image, upright, is {size[1]}x{size[0]} pixels"
        )
    result = lookup(_source_values(image, data, name))
    if isinstance(result, Unknown):
        raise BadFile(
            f"mask {name} holds {'colour' if image.mode.startswith('RGB') else 'id'} {result.value} at "
            f"({result.row}, {result.column}), not in class map {lookup.name}: add it, or map it to ignore"
        )
    return result


def _source_values(image: Image.Image, data: bytes, name: str) -> npt.NDArray[np.integer]:
    """(H,W) ids, or (H,W,3) colours."""
    if image.mode in ("LA", "RGBA") and image.getchannel("A").getextrema() == (255, 255):
        image = image.convert(image.mode[:-1])
    values = np.asarray(image)
    if image.mode == "L" and _png_header(data) in ((2, GREY_PNG), (4, GREY_PNG)):
        return values // (255 // (2 ** _bits(data, image) - 1))  # Pillow stretches these to 0–255
    if image.mode == "1":
        return values.astype(np.uint8)
    if image.mode in ("P", "L", "RGB") or image.mode.startswith("I"):
        return values
    raise BadFile(f"mask {name} has the pixel mode {image.mode}: ids (one channel or palette) or RGB colours are read")


def _decoded(data: bytes) -> Image.Image:
    """Every pixel decoded, so a file cut short is found out. Raises BadFile."""
    if not data:
        raise BadFile("is empty")
    try:
        with open_image(data) as probe:
            probe.verify()  # checksums; the object cannot be used afterwards
        image = open_image(data)
        image.load()
    except BadImage as error:
        raise BadFile(str(error)) from None
    except DECODER_ERRORS as error:
        raise BadFile(decoder_complaint(error)) from None
    return image


def _has_frames(data: bytes) -> bool:
    """Whether there is a second frame. Of a TIFF, Pillow would count them all, which may take minutes."""
    with open_image(data) as image:
        if image.format != "TIFF":
            return image.format != "MPO" and getattr(image, "n_frames", 1) > 1
        try:
            image.seek(1)
        except (EOFError, *DECODER_ERRORS):
            return False
        return True


def _png_header(data: bytes) -> tuple[int, int] | None:
    """(bits per channel, colour type) of a PNG."""
    return (data[24], data[25]) if data.startswith(b"\x89PNG\r\n\x1a\n") else None


def _bits(data: bytes, image: Image.Image) -> int:
    """Bits per channel, as far as they are more or fewer than 8; Pillow itself cuts 16-bit colour PNG to 8."""
    header = _png_header(data)
    if header:
        return header[0]
    return 16 if image.mode.startswith("I") or image.mode == "F" else 8


def _encoded(image: Image.Image, source_format: str | None) -> bytes:
    stream = io.BytesIO()
    if source_format in JPEG_FORMATS:
        image.save(stream, format="JPEG", quality=95, subsampling=0)
    else:
        image.save(stream, format="PNG")
    return stream.getvalue()
