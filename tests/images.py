"""Encoded images that no library writes: TIFFs of any layout, and files that are cheap to make and dear to decode."""

import io
import struct
import zlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
from PIL import Image


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def tiff(
    pixels: np.ndarray,
    photometric: int,
    bits: int | None = None,
    extra: Sequence[int] = (),
    rows: bytes | None = None,
    more: Sequence[tuple[int, int, bytes]] = (),
    big: bool = False,
    order: Literal["<", ">"] = "<",
) -> bytes:
    """A plain TIFF of (H,W,C) of any type. `rows`: its pixels packed into fewer `bits`. `extra`: the tag ExtraSamples.
    `more`: tags (number, type, values). `big`: as BigTIFF."""
    height, width, bands = pixels.shape
    content = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes() if rows is None else rows
    content += b"\0" * (len(content) % 2)
    start, word, room = (16, "Q", 8) if big else (8, "I", 4)
    short = {
        256: [width], 257: [height], 258: [bits or pixels.dtype.itemsize * 8] * bands, 259: [1], 262: [photometric],
        277: [bands], 278: [height], 339: [{"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]] * bands,
    }  # fmt: skip
    if extra:
        short[338] = list(extra)
    tags = [(tag, 3, struct.pack(f"{order}{len(values)}H", *values)) for tag, values in short.items()]
    tags += [(273, 4, struct.pack(order + "I", start)), (279, 4, struct.pack(order + "I", len(content))), *more]
    place = start + len(content)
    after = place + (8 if big else 2) + len(tags) * (20 if big else 12) + room
    lines, blob = [], b""
    for tag, kind, values in sorted(tags):
        count = len(values) // {1: 1, 3: 2, 4: 4, 5: 8, 7: 1}[kind]
        held = values.ljust(room, b"\0")
        if len(values) > room:
            held, blob = struct.pack(order + word, after + len(blob)), blob + values
        lines.append(struct.pack(f"{order}HH{word}", tag, kind, count) + held)
    magic = struct.pack(order + ("HHHQ" if big else "HI"), *((43, 8, 0, place) if big else (42, place)))
    count_of_tags = struct.pack(order + ("Q" if big else "H"), len(tags))
    head = (b"II" if order == "<" else b"MM") + magic
    return head + content + count_of_tags + b"".join(lines) + bytes(room) + blob


def png(width: int, height: int, bits: int, kind: int, row: bytes, *chunks: bytes) -> bytes:
    """A PNG of equal rows. `kind`: its colour type; `chunks`: what stands before the pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress((b"\0" + row) * height))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def jpeg_of_scans(scans: int, side: int = 64) -> bytes:
    """A progressive JPEG with its last scan repeated."""
    data = encoded(Image.new("L", (side, side)), "JPEG", progressive=True)
    last = data.rfind(b"\xff\xda")
    return data[:-2] + data[last:-2] * (scans - data.count(b"\xff\xda")) + data[-2:]


def fractions(count: int) -> bytes:
    return struct.pack("<II", 72, 1) * count


def exif_of_fractions(count: int) -> bytes:
    """EXIF whose one entry, the turn, holds `count` fractions."""
    return b"II*\0" + struct.pack("<IHHHIII", 8, 1, 0x0112, 5, count, 26, 0) + fractions(count)


def opaque_and_clear(mode: str) -> Image.Image:
    """An image of 4x4 pixels, of which half are transparent."""
    image = Image.new(mode, (4, 4), (9,) * (len(mode) - 1) + (255,))
    image.paste((9,) * (len(mode) - 1) + (0,), (0, 0, 2, 4))
    return image
