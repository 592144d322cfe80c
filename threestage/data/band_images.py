"""Images of 8 or 16 bits or floats, of any number of bands: the file's own numbers, and what a network sees of them.

TIFF is read by tifffile (extra `geo`), which keeps every band and type; other formats by Pillow, where it keeps them.
"""

import io
from itertools import islice
from typing import Any

import numpy as np

from threestage.data.bands import MAX_BANDS, Bands, Levels, Numbers
from threestage.data.headers import WHITE_IS_ZERO, BadImage, Layout, read_layout
from threestage.data.parallel import MAX_IMAGE_PIXELS, PIXELS
from threestage.data.records import (
    DECODER_ERRORS,
    decode_image,
    decoder_complaint,
    has_frames,
    is_opaque,
    open_image,
    upright,
)
from threestage.errors import InputError

TIFF_STARTS = (b"II", b"MM")
EXACT_MODES = ("I", "I;16", "I;16B")
"""In which Pillow keeps more than 8 bits."""
CONVERTED = {"1": "L", "P": "RGB", "PA": "RGBA", "CMYK": "RGB", "YCbCr": "RGB"}
ORIENTATION, PALETTE = 274, 3
PLAIN_BYTES = 3


def decode_pixels(data: bytes, max_pixels: int, bands: Bands | None) -> Levels:
    """What a network sees of an encoded image: uint8 (H,W,C), RGB without `bands`.

    The one place where an image becomes levels. Raises BadImage as `decode_image` does, and where it has other bands.
    """
    return decode_image(data, max_pixels) if bands is None else bands.levels(read_bands(data, bands.count, max_pixels))


def read_bands(data: bytes, count: int, max_pixels: int = MAX_IMAGE_PIXELS) -> Numbers:
    """(H,W,count) as the file holds it: uint8, uint16, another whole number, or float.

    Raises BadImage where it cannot be decoded, or has another number of bands; InputError without the extra for TIFF.
    """
    layout = read_layout(data)
    is_tiff = data[:2] in TIFF_STARTS
    try:
        values = _of_tiff(data, max_pixels) if is_tiff else _of_picture(data, layout, count, max_pixels)
    except (BadImage, InputError):
        raise
    except (*DECODER_ERRORS, RuntimeError) as error:  # imagecodecs' own are RuntimeErrors
        raise BadImage(decoder_complaint(error), "image/undecodable") from None
    if values.shape[2] != count:
        raise BadImage(f"has {values.shape[2]} bands, and the images of the data set {count}", "image/bands")
    return values


def count_pixels(data: bytes) -> int:
    """Of the image in a file of any bands, by its header. Raises what `read_bands` raises."""
    if data[:2] not in TIFF_STARTS:
        with open_image(data) as image:
            return image.width * image.height
    read_layout(data)
    try:
        with _tifffile().TiffFile(io.BytesIO(data)) as file:
            return int(file.pages.first.imagewidth * file.pages.first.imagelength)
    except InputError:
        raise
    except DECODER_ERRORS as error:
        raise BadImage(decoder_complaint(error), "image/undecodable") from None


def _of_picture(data: bytes, layout: Layout, count: int, max_pixels: int) -> Numbers:
    with open_image(data, max_pixels) as image, PIXELS.hold_large(image.width * image.height):
        if has_frames(image, layout):
            raise BadImage("holds more than one frame: give one file per image", "image/frames")
        if layout.bits > 8 and image.mode not in EXACT_MODES:
            raise BadImage(f"has {layout.bits} bits per channel of a colour: save it as TIFF", "image/bits")
        turned = upright(image)
        if turned.mode in CONVERTED:
            turned = turned.convert(CONVERTED[turned.mode])
        if turned.mode in ("LA", "RGBA") and len(turned.getbands()) == count + 1 and is_opaque(turned):
            turned = turned.convert(turned.mode[:-1])
        values = np.array(turned)
        if image.mode == "I" and layout.bits == 16:
            values = values.astype(np.uint16)
        return values.reshape(turned.height, turned.width, -1)


def _tifffile() -> Any:
    try:
        import imagecodecs  # noqa: F401  (tifffile decompresses with it, and no further than the header says)
        import tifffile
    except ImportError as error:
        raise InputError(
            f"TIFF with --bands: {error.name} not installed; pip install 'threestage[geo]'", "data/missing-package"
        ) from None
    return tifffile


def _of_tiff(data: bytes, max_pixels: int) -> Numbers:
    """Bands within one page, or as so many pages of one band; overviews and masks are passed over."""
    tifffile = _tifffile()
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        pages = [page for page in islice(file.pages, 2 * MAX_BANDS) if not (page.is_reduced or page.is_mask)]
        with PIXELS.hold_large(sum(_refuse(page, max_pixels) for page in pages)):
            return np.concatenate([_channels_last(page) for page in pages], axis=2)


def _refuse(page: Any, max_pixels: int) -> int:
    """What decoding a page takes, in pixels of RGB. Raises BadImage where that is too much, or for numbers of another meaning."""
    sides = [(page.imagewidth, page.imagelength), *([(page.tilewidth, page.tilelength)] if page.is_tiled else [])]
    for width, height in sides:
        if width * height > max_pixels:
            raise BadImage(f"has {width}x{height} pixels, more than {max_pixels}", "image/too-many-pixels")
    turn = page.tags.get(ORIENTATION)
    if turn is not None and turn.value != 1:
        raise BadImage("is a TIFF that is to be turned (tag Orientation): save it upright", "image/bands")
    if page.photometric in (WHITE_IS_ZERO, PALETTE) or page.imagedepth > 1:
        raise BadImage("is a TIFF with a palette, in which 0 is white, or with depth: save its bands", "image/bands")
    if page.dtype is None or page.dtype.kind not in "uif":
        raise BadImage(
            f"holds numbers of {page.bitspersample} bits that are not read: save uint8, uint16 or float32", "image/bits"
        )
    samples = page.samplesperpixel
    if samples > MAX_BANDS:
        raise BadImage(f"has {samples} bands, more than {MAX_BANDS}", "image/bands")
    return int(page.imagewidth * page.imagelength) * max(1, samples * page.dtype.itemsize // PLAIN_BYTES)


def _channels_last(page: Any) -> Numbers:
    values: Numbers = page.asarray(maxworkers=1)
    if page.axes == "YX":
        return values[:, :, None]
    if page.axes == "SYX":
        return np.moveaxis(values, 0, 2)
    if page.axes == "YXS":
        return values
    raise BadImage(f"is a TIFF of the axes {page.axes}: give height, width and bands", "image/bands")
