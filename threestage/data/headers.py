"""What an encoded image holds, by its header: how its pixels are stored, and whether decoding it would cost too much.

Reads bytes only, a few microseconds for an ordinary file, before any decoder sees them. What follows the structure of no
known format is left to the decoder, which refuses it.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from threestage.errors import CodedError

MAX_SCANS = 64  # of a JPEG; encoders write about ten, and each costs a pass over all pixels
MAX_PARTS = 65_536  # segments, chunks or tags: each is a step in Python
MAX_CHUNKS_BESIDE = 1_000  # of a PNG, beside its pixels: each may be unpacked to a megabyte
MAX_HEADER_BYTES = 32 * 2**20  # of a JPEG, before its first scan
MAX_TAG_VALUES = 2**19  # numbers in a TIFF's tags, which are decoded one by one
RATIONAL_WEIGHT = 8  # a fraction takes as long as so many whole numbers
MAX_EXIF_BYTES = 2**20
MAX_RUN_LENGTH_BYTES = 8 * 2**20  # of a BMP in run-length encoding, which Pillow decodes in Python

OS2_HEADER_BYTES = 12  # of a BMP

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_BANDS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
RAW_EXIF = b"Raw profile type exif"  # the key of a text in which ImageMagick keeps EXIF
JPEG_SCAN, JPEG_END, JPEG_EXIF = 0xDA, 0xD9, 0xE1
SCAN_MARKER = re.compile(rb"\xff\xda")
JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)
FRAMES = frozenset({*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)})
PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
SEGMENTS = frozenset({*range(0xC0, 0xC8), *range(0xC9, 0xD0), *range(0xDA, 0xF0), 0xFE})  # markers with a length

WIDTH, HEIGHT, BITS, PHOTOMETRIC, BANDS, SAMPLE_FORMAT = 256, 257, 258, 262, 277, 339  # tags of TIFF
TAG_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
TAG_CODES = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I", 16: "Q"}
TAGS_OF_BYTES = (1, 2, 7)
RATIONALS = (5, 10)
WHITE_IS_ZERO, UNSIGNED, SIGNED = 0, 1, 2
COLOUR_BANDS = {2: 3, 5: 4, 6: 3, 8: 3}  # RGB, CMYK, YCbCr and Lab; one of anything else


class BadImage(CodedError, ValueError):
    """Why an image cannot be used, in words for the user."""


@dataclass(frozen=True)
class Layout:
    """How a file stores its pixels.

    `bits` and `bands`: bits per sample and samples per pixel. `colour_bands`: how many of the bands are the colour's.
    `sample_format` and `white_is_zero`: as TIFF has them. `pages`: whether a TIFF has a second page.
    """

    bits: int = 8
    bands: int = 3
    colour_bands: int = 3
    sample_format: int = UNSIGNED
    white_is_zero: bool = False
    pages: bool = False


def read_layout(data: bytes) -> Layout:
    """The layout of an encoded image.

    Raises BadImage when decoding it would cost far more than its pixels do: too many scans, tags, values or segments.
    """
    if data.startswith(PNG_SIGNATURE):
        return _png(data)
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg(data)
    if data[:2] in (b"II", b"MM"):
        return _tiff(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        _check_webp(data)
    elif data.startswith(b"BM"):
        return _bmp(data)
    return Layout()


def _check_exif(size: int) -> None:
    if size > MAX_EXIF_BYTES:
        raise BadImage(f"has {size} bytes of EXIF, more than {MAX_EXIF_BYTES}: remove them", "image/costly")


def _check_parts(count: int, most: int = MAX_PARTS) -> None:
    if count > most:
        raise BadImage("has too many segments: save it again", "image/costly")


def _bmp(data: bytes) -> Layout:
    if data[30:34] in (b"\1\0\0\0", b"\2\0\0\0") and len(data) > MAX_RUN_LENGTH_BYTES:
        raise BadImage(
            f"is a run-length encoded BMP of more than {MAX_RUN_LENGTH_BYTES} bytes: save it as PNG", "image/costly"
        )
    bits = _number(data, 24 if _number(data, 14, "<I") == OS2_HEADER_BYTES else 28, "<H")
    return Layout(bits=bits, bands=1, colour_bands=1) if bits <= 8 else Layout()


# PNG and WebP


def _png(data: bytes) -> Layout:
    beside = 0
    for count, (name, start, size) in enumerate(_chunks(data, len(PNG_SIGNATURE), ">I4s", 4)):
        _check_parts(count)
        beside += name != b"IDAT"
        _check_parts(beside, MAX_CHUNKS_BESIDE)
        if name == b"eXIf" or (name in (b"tEXt", b"zTXt", b"iTXt") and data.startswith(RAW_EXIF, start)):
            _check_exif(size)
        if name == b"IEND":
            break
    bits, kind = data[24:26] if len(data) > 25 else (8, 2)
    bands = PNG_BANDS.get(kind, 3)
    return Layout(bits=bits, bands=bands, colour_bands=bands - (kind in (4, 6)))


def _check_webp(data: bytes) -> None:
    for count, (name, _, size) in enumerate(_chunks(data, 12, "<4sI", 0)):
        _check_parts(count)
        if name == b"EXIF":
            _check_exif(size)


def _chunks(data: bytes, place: int, header: str, after: int) -> Iterator[tuple[bytes, int, int]]:
    """Name, place and size of each chunk's content; `after`: bytes that follow it. WebP pads to even sizes."""
    read, padded = struct.Struct(header).unpack_from, not after
    while place + 8 <= len(data):
        one, other = read(data, place)
        name, size = (other, one) if after else (one, other)
        yield name, place + 8, size
        place += 8 + size + after + (size & 1 if padded else 0)


# JPEG


def _jpeg(data: bytes) -> Layout:
    exif, bits, components, several = 0, 8, 1, True
    for count, (marker, start, size) in enumerate(_segments(data)):
        _check_parts(count)
        if start > MAX_HEADER_BYTES:
            raise BadImage(f"has more than {MAX_HEADER_BYTES} bytes before its pixels: save it again", "image/costly")
        if marker == JPEG_EXIF and data.startswith(b"Exif\0\0", start):
            exif += size
            _check_exif(exif)
        elif marker in FRAMES and size > 5:
            bits, components, several = data[start], data[start + 5], marker in PROGRESSIVE
        elif marker == JPEG_SCAN and size:
            several |= data[start] < components
    if several and len(SCAN_MARKER.findall(data)) > MAX_SCANS and _scans(data) > MAX_SCANS:
        raise BadImage(f"is a JPEG of more than {MAX_SCANS} scans: save it again", "image/costly")
    return Layout(bits=bits)


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, place and size of each segment up to the first scan's header, and each byte that belongs to none."""
    place = 2
    while place + 4 <= len(data):
        marker = data[place + 1] if data[place] == 0xFF else 0
        size = int.from_bytes(data[place + 2 : place + 4], "big") if marker in SEGMENTS else 0
        yield marker, place + 4, max(0, min(size - 2, len(data) - place - 4))
        if marker == JPEG_SCAN:
            return
        place += 2 + max(2, size) if marker in SEGMENTS else 1


def _scans(data: bytes) -> int:
    """Scans up to the image's end; what follows it, or stands in a segment, is none."""
    place, found = 2, 0
    while (match := JPEG_MARKER.search(data, place)) and found <= MAX_SCANS:
        marker, place = data[match.end() - 1], match.end()
        if marker == JPEG_END:
            break
        found += marker == JPEG_SCAN
        if marker in SEGMENTS:
            place += max(2, int.from_bytes(data[place : place + 2], "big"))
    return found


# TIFF


@dataclass(frozen=True)
class _Tag:
    kind: int
    count: int
    place: int  # of its values


def _tiff(data: bytes) -> Layout:
    order = "<" if data.startswith(b"II") else ">"
    big = data[2] == 43 if len(data) > 15 else False
    first = _number(data, 8 if big else 4, order + ("Q" if big else "I"))
    tags, following = _directory(data, first, order, big)
    _check_tags(tags, len(data))

    def value(tag: int, default: int) -> int:
        found = _values(data, tags.get(tag), order)
        return max(found) if found else default

    photometric, bands = value(PHOTOMETRIC, 0), value(BANDS, 1)
    colour_bands = COLOUR_BANDS.get(photometric, 1)
    return Layout(
        bits=value(BITS, 1),
        bands=max(bands, colour_bands),
        colour_bands=colour_bands,
        sample_format=value(SAMPLE_FORMAT, UNSIGNED),
        white_is_zero=photometric == WHITE_IS_ZERO,
        pages=following != first and _is_page(data, following, order, big),
    )


def _is_page(data: bytes, place: int, order: str, big: bool) -> bool:
    """Whether a directory there has a width and a height: some writers leave an offset that leads nowhere, or back."""
    tags, _ = _directory(data, place, order, big) if place else ({}, 0)
    return all(any(_values(data, tags.get(tag), order)) for tag in (WIDTH, HEIGHT))


def _directory(data: bytes, place: int, order: str, big: bool) -> tuple[dict[int, _Tag], int]:
    """The tags of a directory, the first of each number, and the place of the next directory (0: none)."""
    entry = struct.Struct(order + ("HHQ" if big else "HHI"))
    head, room = (8, 8) if big else (2, 4)
    count = _number(data, place, order + ("Q" if big else "H"))
    _check_parts(count)
    place += head
    end = min(place + count * (entry.size + room), len(data) - entry.size - room + 1)
    tags: dict[int, _Tag] = {}
    for start in range(place, end, entry.size + room):
        number, kind, values = entry.unpack_from(data, start)
        inside = start + entry.size
        fits = values * TAG_BYTES.get(kind, 0) <= room
        tags.setdefault(number, _Tag(kind, values, inside if fits else _number(data, inside, order + "IQ"[big])))
    return tags, _number(data, place + count * (entry.size + room), order + "IQ"[big])


def _check_tags(tags: dict[int, _Tag], size: int) -> None:
    """Their values are decoded one by one; their bytes are copied, and cannot be more than the file has."""
    numbers = sum(
        tag.count * (RATIONAL_WEIGHT if tag.kind in RATIONALS else 1)
        for tag in tags.values()
        if tag.kind not in TAGS_OF_BYTES
    )
    if numbers > MAX_TAG_VALUES or sum(tag.count * TAG_BYTES.get(tag.kind, 0) for tag in tags.values()) > size:
        raise BadImage("is a TIFF whose tags hold too many values: save it again", "image/costly")


def _values(data: bytes, tag: _Tag | None, order: str) -> tuple[int, ...]:
    code = TAG_CODES.get(tag.kind) if tag else None
    if tag is None or code is None or tag.count > MAX_PARTS:
        return ()
    read = struct.Struct(f"{order}{tag.count}{code}")
    return read.unpack_from(data, tag.place) if 0 <= tag.place <= len(data) - read.size else ()


def _number(data: bytes, place: int, code: str) -> int:
    """One at a place; 0 outside of the file."""
    read = struct.Struct(code)
    return int(read.unpack_from(data, place)[0]) if 0 <= place <= len(data) - read.size else 0
