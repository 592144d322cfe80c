"""Images and masks that would be read as what they are not, or cost far more than their pixels."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from tests.bad_inputs import BadInput, threestage
from tests.images import chunk, encoded, exif_of_fractions, fractions, jpeg_of_scans, opaque_and_clear, png, tiff
from threestage.data.headers import BadImage
from threestage.data.records import EXIF_ORIENTATION, decode_image, decode_mask, labelled_rows, load_manifest
from threestage.data.rejects import read_rejects

GREY, RGB = 1, 2
IDS = np.array([[0, 1, 1, 0], [0, 0, 1, 1]] * 2, np.uint8)
COLOURS = np.array([[10, 20, 30], [200, 0, 0]], np.uint8)
PIXELS = COLOURS[IDS]
CLASSES = """classes:
  - {name: ground, colour: [10, 20, 30], ids: [0]}
  - {name: thing, colour: [200, 0, 0], ids: [1]}
ignore: {ids: [255]}
"""
BY_BOTH = "left out by ingest and predict"
LEFT_OUT = "left out"
READ = "read as it is"


def image(data: Callable[[], bytes], suffix: str) -> Callable[[Path], str]:
    """Ingest it, and decode it as `predict` and the pool do."""

    def try_it(folder: Path) -> str:
        (folder / "images").mkdir()
        path = folder / "images" / f"a{suffix}"
        path.write_bytes(data())
        (folder / "images" / "good.png").write_bytes(encoded(Image.fromarray(PIXELS)))
        threestage("ingest", "images", "set", "--format", "images", "--local", "--max-bad-fraction", 1)
        rejects = read_rejects("set/rejected/v0001.parquet")
        try:
            decode_image(path.read_bytes())
        except BadImage as error:
            return (
                f"{BY_BOTH} [{error.code}]" if [reject.reason for reject in rejects] == [str(error)] else str(rejects)
            )
        return "taken by predict"

    return try_it


def mask(data: Callable[[], bytes], suffix: str, classes: str = CLASSES) -> Callable[[Path], str]:
    """Ingest an image with this mask, and one with a good mask."""

    def try_it(folder: Path) -> str:
        for name in ("images", "masks"):
            (folder / name).mkdir()
        for name in ("a", "good"):
            (folder / "images" / f"{name}.png").write_bytes(encoded(Image.fromarray(PIXELS)))
        good = IDS if "ids: [0]" in classes else PIXELS
        (folder / "masks/good.png").write_bytes(encoded(Image.fromarray(good)))
        (folder / f"masks/a{suffix}").write_bytes(data())
        (folder / "classes.yaml").write_text(classes)
        options = ("--masks", "masks", "--class-map", "classes.yaml", "--local", "--max-bad-fraction", 1)
        ended = threestage("ingest", "images", "set", *options)
        if ended.code:
            return ended.text
        rows = labelled_rows("set", load_manifest("set"), "train").to_pylist()
        found = {row["image_id"]: decode_mask(row["mask"]) for row in rows}
        if "a" in found:
            return READ if np.array_equal(found["a"], IDS) else "read as other classes"
        (reject,) = read_rejects("set/rejected/v0001.parquet")
        return f"{LEFT_OUT} {reject.reason[reject.reason.rindex('[') :]}"

    return try_it


def swapped_palette() -> bytes:
    found = Image.fromarray(1 - IDS)
    found.putpalette(COLOURS[::-1].tobytes())
    return encoded(found)


def upside_down() -> bytes:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 3
    return encoded(Image.fromarray(np.ascontiguousarray(IDS[::-1, ::-1])), exif=exif)


def black_and_white_bmp(bits: int) -> bytes:
    """Ids 0 and 1 as indices of two colours."""
    rows = [np.packbits(np.unpackbits(row[:, None], axis=1)[:, -bits:]).tobytes() for row in IDS[::-1]]
    content = b"".join(row + bytes(-len(row) % 4) for row in rows)
    height, width = IDS.shape
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, 0, len(content), 0, 0, 2, 0)
    return b"BM" + struct.pack("<IHHI", 62 + len(content), 0, 0, 62) + header + bytes(4) + b"\xff\xff\xff\0" + content


def four_bits() -> bytes:
    packed = bytes(int(first) << 4 | int(second) for first, second in IDS.reshape(-1, 2))
    return tiff(IDS[..., None], GREY, bits=4, rows=packed)


def pages(format: str) -> Callable[[], bytes]:
    first = Image.fromarray(PIXELS)
    return lambda: encoded(first, format, save_all=True, append_images=[first.rotate(180)])


def band(kind: int) -> Callable[[], bytes]:
    return lambda: tiff(np.dstack([PIXELS, PIXELS[..., :1]]), RGB, extra=[kind])


ONLY_COLOURS = CLASSES.replace(", ids: [0]", "").replace(", ids: [1]", "")
IMAGES: list[tuple[str, str, Callable[[], bytes], str]] = [
    ("RGB TIFF of 16 bits", "image/bits", lambda: tiff(PIXELS.astype(np.uint16), RGB), ".tif"),
    ("RGB PNG of 16 bits", "image/bits", lambda: png(4, 4, 16, 2, b"\1\2" * 12), ".png"),
    ("grey PNG of 16 bits", "image/bits", lambda: png(4, 4, 16, 0, b"\1\2" * 4), ".png"),
    ("TIFF of floats", "image/bits", lambda: tiff(PIXELS[..., :1].astype(np.float32), GREY), ".tif"),
    ("TIFF of signed bytes", "image/bits", lambda: tiff(IDS[..., None].astype(np.int8), GREY), ".tif"),
    ("TIFF of RGB and near infrared, declared as transparency", "image/bands", band(2), ".tif"),
    ("TIFF of RGB and a band without a meaning", "image/bands", band(0), ".tif"),
    ("TIFF of two pages", "image/frames", pages("TIFF"), ".tif"),
    ("animated WebP", "image/frames", pages("WEBP"), ".webp"),
    ("animated PNG", "image/frames", pages("PNG"), ".png"),
    ("transparent PNG", "image/transparent", lambda: encoded(opaque_and_clear("RGBA")), ".png"),
    ("progressive JPEG of 2,000 scans", "image/costly", lambda: jpeg_of_scans(2000), ".jpg"),
    (
        "TIFF with a tag of a million fractions",
        "image/costly",
        lambda: tiff(PIXELS, RGB, more=[(282, 5, fractions(10**6))]),
        ".tif",
    ),
    (
        "PNG with megabytes of EXIF",
        "image/costly",
        lambda: png(4, 4, 8, 2, b"\1" * 12, chunk(b"eXIf", exif_of_fractions(200_000))),
        ".png",
    ),
    ("PNG of 70,000 pieces", "image/costly", lambda: png(4, 4, 8, 2, b"\1" * 12, chunk(b"IDAT", b"") * 70_000), ".png"),
]
MASKS = [
    ("mask: RGB TIFF of 16 bits", "left out [mask/layout]",
     mask(lambda: tiff(PIXELS.astype(np.uint16), RGB), ".tif")),
    ("mask: TIFF of two pages", "left out [image/frames]", mask(pages("TIFF"), ".tif")),
    ("mask: TIFF of ids and another band", "left out [mask/layout]",
     mask(lambda: tiff(np.dstack([IDS, IDS]), GREY, extra=[0]), ".tif")),
    ("mask: grey TIFF in which 0 is white", "left out [mask/layout]",
     mask(lambda: tiff(IDS[..., None], 0), ".tif")),
    ("mask: TIFF of JPEG", "left out [mask/lossy]",
     mask(lambda: encoded(Image.fromarray(PIXELS), "TIFF", compression="jpeg"), ".tif")),
    ("mask: grey TIFF of 4 bits", READ, mask(four_bits, ".tif")),
    ("mask: palette in another order than the ids",
     "left out [mask/palette-order]",
     mask(swapped_palette, ".png")),
    ("mask: BMP of 8 bits with a palette of black and white",
     "left out [image/bmp-palette]",
     mask(lambda: black_and_white_bmp(8), ".bmp")),
    ("mask: PNG that its EXIF turns upside down", READ, mask(upside_down, ".png")),
    ("mask: palette in any order, with a class map of colours", READ,
     mask(swapped_palette, ".png", ONLY_COLOURS)),
]  # fmt: skip
BAD_INPUTS = [
    *(BadInput(what, f"{BY_BOTH} [{code}]", image(data, suffix)) for what, code, data, suffix in IMAGES),
    *(BadInput(what, expected, try_it) for what, expected, try_it in MASKS),
]
