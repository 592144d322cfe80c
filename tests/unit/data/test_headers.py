"""Why: `ingest`, `predict` and the pool must give the same answer about a file, and none may be read as what it is not or
cost more than its pixels."""

import contextlib
import struct
import threading
import time
from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from tests.images import (
    chunk,
    encoded,
    exif_of_fractions,
    fractions,
    jpeg_of_scans,
    opaque_and_clear,
    png,
    tiff,
)
from tests.refusals import refused
from threestage.data import image_validation, parallel, records
from threestage.data.classes import ClassMap, Lookup
from threestage.data.headers import MAX_PARTS, MAX_SCANS, MAX_TAG_VALUES, BadImage, read_layout
from threestage.data.image_validation import BadFile, check_image, check_mask
from threestage.data.parallel import PixelBudget
from threestage.data.records import decode_image, open_picture

GREY, RGB, PALETTE = 1, 2, 3
PIXELS = np.random.default_rng(0).integers(1, 200, (4, 6, 3), np.uint8)
FOUR = np.dstack([PIXELS, PIXELS[..., :1]])
PLAIN_JPEG = encoded(Image.fromarray(PIXELS), "JPEG")


def both(data: bytes) -> str:
    """The code with which ingest and predict refuse an image; empty where both take it, with the same pixels."""
    try:
        decoded = decode_image(data)
    except BadImage as error:
        assert error.code is not None
        with refused(error.code, error.message, error=BadFile):
            check_image(data)
        return error.code
    assert np.array_equal(decode_image(check_image(data).data), decoded)
    return ""


def frames(format: str) -> bytes:
    first = Image.fromarray(PIXELS)
    return encoded(first, format, save_all=True, append_images=[first.rotate(180)])


REFUSED: dict[str, tuple[bytes, str]] = {
    "RGB TIFF of 16 bits": (tiff(PIXELS.astype(np.uint16) * 16, RGB), "image/bits"),
    "RGB TIFF of 16 bits, other order": (tiff(PIXELS.astype(np.uint16), RGB, order=">"), "image/bits"),
    "RGB BigTIFF of 16 bits": (tiff(PIXELS.astype(np.uint16), RGB, big=True), "image/bits"),
    "RGB PNG of 16 bits": (png(2, 2, 16, 2, b"\1\2" * 6), "image/bits"),
    "grey PNG of 16 bits": (png(2, 2, 16, 0, b"\1\2" * 2), "image/bits"),
    "RGBA PNG of 16 bits": (png(2, 2, 16, 6, b"\xff" * 16), "image/bits"),
    "TIFF of floats": (tiff(PIXELS[..., :1].astype(np.float32), GREY), "image/bits"),
    "TIFF of signed bytes": (tiff(PIXELS[..., :1].astype(np.int8), GREY), "image/bits"),
    "12 bands of 16 bits": (tiff(np.zeros((4, 6, 12), np.uint16), GREY, extra=[0] * 11), "image/bits"),
    "RGB and a band": (tiff(FOUR, RGB, extra=[0]), "image/bands"),
    "RGB and two bands": (tiff(np.dstack([FOUR, FOUR[..., :1]]), RGB, extra=[0, 0]), "image/bands"),
    "RGB and near infrared": (tiff(FOUR, RGB, extra=[2]), "image/bands"),
    "grey and a band": (tiff(FOUR[..., :2], GREY, extra=[0]), "image/bands"),
    "transparent PNG": (encoded(opaque_and_clear("RGBA")), "image/transparent"),
    "transparent grey PNG": (encoded(opaque_and_clear("LA")), "image/transparent"),
    "transparent WebP": (encoded(opaque_and_clear("RGBA"), "WEBP", lossless=True), "image/transparent"),
    "PNG with a transparent colour": (encoded(Image.new("RGB", (4, 4)), transparency=(0, 0, 0)), "image/transparent"),
    "animated WebP": (frames("WEBP"), "image/frames"),
    "animated PNG": (frames("PNG"), "image/frames"),
    "TIFF of two pages": (frames("TIFF"), "image/frames"),
    "Lab TIFF": (tiff(PIXELS, 8), "image/bands"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_ingest_refuses_predict_refuses(kind: str) -> None:
    data, code = REFUSED[kind]
    assert both(data) == code


TAKEN: dict[str, bytes] = {
    "RGB TIFF": tiff(PIXELS, RGB),
    "RGB BigTIFF": tiff(PIXELS, RGB, big=True),
    "RGB TIFF, other order": tiff(PIXELS, RGB, order=">"),
    "grey TIFF": tiff(PIXELS[..., :1], GREY),
    "grey TIFF, white is 0": tiff(PIXELS[..., :1], 0),
    "grey TIFF of 4 bits": tiff(np.zeros((2, 2, 1), np.uint8), GREY, bits=4, rows=b"\x12\x34"),
    "RGB TIFF, opaque": tiff(np.dstack([PIXELS, np.full((4, 6), 255, np.uint8)]), RGB, extra=[2]),
    "RGBA PNG, opaque": encoded(Image.fromarray(PIXELS).convert("RGBA")),
    "palette PNG": encoded(Image.fromarray(PIXELS).convert("P")),
    "PNG with a colour that would be transparent": encoded(Image.fromarray(PIXELS), transparency=(255, 0, 255)),
    "progressive JPEG": encoded(Image.fromarray(PIXELS), "JPEG", progressive=True),
    "JPEG of as many scans as are allowed": jpeg_of_scans(MAX_SCANS),
    "two JPEGs in one file": encoded(Image.fromarray(PIXELS), "MPO", save_all=True, append_images=[Image.fromarray(PIXELS)]),
    "JPEG with padded markers": PLAIN_JPEG[:2] + b"\xff" * 9 + PLAIN_JPEG[2:],
    "BMP": encoded(Image.fromarray(PIXELS), "BMP"),
    "CMYK JPEG": encoded(Image.fromarray(PIXELS).convert("CMYK"), "JPEG"),
}  # fmt: skip


@pytest.mark.parametrize("kind", TAKEN)
def test_what_ingest_takes_predict_takes(kind: str) -> None:
    if "CMYK" in kind or "two JPEGs" in kind:  # ingest encodes these anew, as JPEG
        decode_image(TAKEN[kind])
        check_image(TAKEN[kind])
    else:
        assert both(TAKEN[kind]) == ""


def test_scans_after_the_end_and_in_a_segment_are_none() -> None:
    data = encoded(Image.fromarray(PIXELS), "JPEG", progressive=True)
    film = data + b"\xff\xda" * 200
    noted = data[:2] + b"\xff\xfe\x01\x92" + b"\xff\xda" * 200 + data[2:]
    assert both(film) == both(noted) == ""


# ---- Cost


def bmp_of_runs(size: int) -> bytes:
    """Run-length encoded, of nothing but ends of lines."""
    head = struct.pack("<IiiHHIIiiII", 40, 64, 64, 1, 8, 1, size, 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 54 + 1024) + head + bytes(range(256)) * 4 + bytes(size)


def overlapping_tags() -> bytes:
    """Tags that all hold the same megabyte."""
    return tiff(PIXELS, RGB, more=[(40000 + i, 7, b"") for i in range(100)] + [(50000, 7, bytes(2**20))])


def many_times(data: bytes) -> bytes:
    """Each empty tag of a TIFF made to hold what its last one holds."""
    *_, size, place = struct.unpack("<HHII", data[data.index(struct.pack("<HH", 50000, 7)) :][:12])
    for tag in range(40000, 40100):
        data = data.replace(struct.pack("<HHII", tag, 7, 0, 0), struct.pack("<HHII", tag, 7, size, place))
    return data


DEAR: dict[str, Callable[[], bytes]] = {
    "scans": lambda: jpeg_of_scans(2000),
    "scans of one component each": lambda: _scan_by_scan(200),
    "fractions in a TIFF": lambda: tiff(PIXELS, RGB, more=[(282, 5, fractions(10**6))]),
    "numbers in a TIFF": lambda: tiff(PIXELS, RGB, more=[(282, 3, bytes(2 * MAX_TAG_VALUES))]),
    "fractions in a BigTIFF": lambda: tiff(PIXELS, RGB, more=[(282, 5, fractions(10**6))], big=True),
    "one megabyte in a hundred tags": lambda: many_times(overlapping_tags()),
    "fractions in the EXIF of a PNG": lambda: png(2, 2, 8, 2, b"\1" * 6, chunk(b"eXIf", exif_of_fractions(200_000))),
    "EXIF as text": lambda: png(
        2, 2, 8, 2, b"\1" * 6, chunk(b"tEXt", b"Raw profile type exif\0\n\n\n" + exif_of_fractions(100_000).hex().encode())
    ),
    "EXIF of a WebP": lambda: encoded(Image.fromarray(PIXELS), "WEBP", exif=exif_of_fractions(200_000)),
    "EXIF in many segments": lambda: _after_start((b"\xff\xe1\xff\xffExif\0\0" + bytes(65_527)) * 20),
    "comments": lambda: _after_start(b"\xff\xfe\0\2" * MAX_PARTS * 2),
    "padding": lambda: _after_start(b"\xff" * MAX_PARTS * 2),
    "megabytes before the pixels": lambda: _after_start((b"\xff\xfe\xff\xff" + bytes(65_533)) * 520),
    "pieces of a PNG": lambda: png(2, 2, 8, 2, b"\1" * 6, chunk(b"IDAT", b"") * MAX_PARTS),
    "profiles of a PNG": lambda: png(2, 2, 8, 2, b"\1" * 6, chunk(b"iCCP", b"a\0\0") * 2000),
    "runs of a BMP": lambda: bmp_of_runs(9 * 2**20),
}  # fmt: skip


def _after_start(inserted: bytes) -> bytes:
    return PLAIN_JPEG[:2] + inserted + PLAIN_JPEG[2:]


def _scan_by_scan(scans: int) -> bytes:
    """A baseline JPEG whose first component comes again and again."""
    place = PLAIN_JPEG.index(b"\xff\xda")
    return PLAIN_JPEG[:place] + b"\xff\xda\0\x08\1\1\0\0\x3f\0" * scans + PLAIN_JPEG[-2:]


@pytest.mark.parametrize("kind", DEAR)
def test_a_dear_image_is_refused_by_its_header(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = DEAR[kind]()
    monkeypatch.setattr(Image, "open", None)
    assert both(data) == "image/costly"


def test_a_header_costs_nothing_beside_the_decoding() -> None:
    """It is 20 µs of 2,500; measured as the best of several, with a wide margin."""
    pixels = np.random.default_rng(0).integers(0, 255, (46, 61, 3), np.uint8)
    photo = Image.fromarray(pixels).resize((480, 360))
    for data in (encoded(photo, "JPEG"), encoded(photo), encoded(photo, "TIFF"), encoded(photo, "WEBP")):
        assert _fastest(read_layout, data) < 0.1 * _fastest(decode_image, data)


def _fastest(function: Callable[[bytes], object], data: bytes) -> float:
    times = []
    for _ in range(10):
        start = time.perf_counter()
        function(data)
        times.append(time.perf_counter() - start)
    return min(times)


# ---- Masks

COLOURS = np.array([[10, 20, 30], [200, 0, 0], [0, 0, 0]], np.uint8)
IDS = np.array([[0, 1, 1], [0, 2, 0]], np.uint8)
CLASSES = [
    {"name": "ground", "colour": COLOURS[0].tolist(), "ids": [0]},
    {"name": "thing", "colour": COLOURS[1].tolist(), "ids": [1]},
]
BOTH = Lookup(ClassMap.model_validate({"classes": CLASSES, "ignore": {"ids": [2], "colours": [[0, 0, 0]]}}), "map")
ONLY_COLOURS = Lookup(
    ClassMap.model_validate(
        {"classes": [{**entry, "ids": []} for entry in CLASSES], "ignore": {"ids": [2], "colours": [[0, 0, 0]]}}
    ),
    "map",
)
EXPECTED = [[0, 1, 1], [0, 255, 0]]


def mask_of(data: bytes, lookup: Lookup = BOTH, size: tuple[int, int] = (2, 3)) -> list[list[int]]:
    return check_mask(data, lookup, size, "m.png").tolist()


def palette_mask(ids: np.ndarray, colours: np.ndarray) -> bytes:
    image = Image.fromarray(ids)
    image.putpalette(colours.tobytes())
    return encoded(image)


FOUR_BITS = b"\x01\x10\x02\x00"


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("big", [False, True])
def test_ids_of_a_tiff_of_few_bits_are_not_stretched(order: Literal["<", ">"], big: bool) -> None:
    if order == ">" and big:
        pytest.skip("Pillow reads no BigTIFF of that order")
    four = tiff(IDS[..., None], GREY, bits=4, rows=FOUR_BITS, big=big, order=order)
    two = tiff(IDS[..., None], GREY, bits=2, rows=b"\x14\x20", big=big, order=order)
    assert mask_of(four) == mask_of(two) == EXPECTED


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32])
def test_ids_of_any_whole_numbers(dtype: type) -> None:
    assert mask_of(tiff(IDS[..., None].astype(dtype), GREY)) == EXPECTED
    if np.dtype(dtype).kind == "i":
        with refused("mask/unknown-value", "id -1 at (0, 0)", error=BadFile):
            mask_of(tiff(IDS[..., None].astype(dtype) - 1, GREY))
        signed = ClassMap.model_validate({"classes": [{**CLASSES[0], "ids": [-1]}, {**CLASSES[1], "ids": [0, 1]}]})
        assert mask_of(tiff(IDS[..., None].astype(dtype) - 1, GREY), Lookup(signed, "map")) == [[0, 1, 1], [0, 1, 0]]


REFUSED_MASKS: dict[str, tuple[bytes, str]] = {
    "RGB TIFF of 16 bits": (tiff(COLOURS[IDS].astype(np.uint16), RGB), "mask/layout"),
    "RGB PNG of 16 bits": (png(3, 2, 16, 2, b"\0\x0a\0\x14\0\x1e" * 3), "mask/layout"),
    "floats": (tiff(IDS[..., None].astype(np.float32), GREY), "mask/layout"),
    "two pages": (encoded(Image.fromarray(IDS), "TIFF", save_all=True, append_images=[Image.fromarray(IDS)]), "image/frames"),
    "animated PNG": (
        encoded(Image.fromarray(IDS), save_all=True, append_images=[Image.fromarray(IDS).rotate(180)]), "image/frames"
    ),
    "a band beside": (tiff(np.dstack([IDS, IDS]), GREY, extra=[0]), "mask/layout"),
    "colours and a band": (tiff(np.dstack([COLOURS[IDS], IDS]), RGB, extra=[0]), "mask/layout"),
    "transparency": (encoded(opaque_and_clear("RGBA").resize((3, 2))), "mask/layout"),
    "white is 0": (tiff(IDS[..., None], 0), "mask/layout"),
    "JPEG in TIFF": (encoded(Image.fromarray(COLOURS[IDS]), "TIFF", compression="jpeg"), "mask/lossy"),
    "WebP": (encoded(Image.fromarray(COLOURS[IDS]), "WEBP", lossless=True), "mask/lossy"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED_MASKS)
def test_a_mask_is_read_as_it_is_stored_or_refused(kind: str) -> None:
    data, code = REFUSED_MASKS[kind]
    with refused(code, "mask m.png ", error=BadFile):
        mask_of(data)


# ---- Palettes

OTHER_ORDER = [1, 0, 2]


def test_a_palette_in_another_order_than_the_ids_is_refused() -> None:
    swapped = palette_mask(np.array(OTHER_ORDER, np.uint8)[IDS], COLOURS[OTHER_ORDER])
    with refused("mask/palette-order", "[200, 0, 0] (thing)", "id 0 (ground in class map map)", error=BadFile):
        mask_of(swapped)
    assert mask_of(swapped, ONLY_COLOURS) == EXPECTED


def test_a_palette_of_one_colour_for_another_id_is_refused() -> None:
    with refused("mask/palette-order", "(thing)", "id 0", error=BadFile):
        mask_of(palette_mask(np.zeros((2, 3), np.uint8), COLOURS[1:2]))


def test_a_palette_of_the_map_in_the_order_of_its_ids() -> None:
    assert mask_of(palette_mask(IDS, COLOURS)) == mask_of(palette_mask(IDS, COLOURS), ONLY_COLOURS) == EXPECTED


GREY_RAMP = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, 1)
VOC = np.array([[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128]], np.uint8)


@pytest.mark.parametrize("colours", [GREY_RAMP, VOC])
@pytest.mark.parametrize("ids", [IDS, np.zeros((2, 3), np.uint8)])
def test_a_palette_that_has_nothing_to_do_with_the_map_is_no_matter(colours: np.ndarray, ids: np.ndarray) -> None:
    """Black is its first colour, and an ignored one of the map."""
    assert mask_of(palette_mask(ids, colours)) == np.array([0, 1, 255])[ids].tolist()


def test_an_unknown_colour_of_a_palette_is_named() -> None:
    with refused("mask/unknown-value", "colour [1, 1, 1] at (0, 1)", error=BadFile):
        mask_of(palette_mask(IDS, np.array([[10, 20, 30], [1, 1, 1], [0, 0, 0]], np.uint8)), ONLY_COLOURS)


# ---- Memory


def test_threads_share_a_budget_and_none_is_passed_over() -> None:
    budget, held, most, order = PixelBudget(10), 0, 0, list[int]()
    lock = threading.Lock()

    def work(amount: int) -> None:
        nonlocal held, most
        with budget.hold(amount):
            with lock:
                order.append(amount)
                held, most = held + min(amount, 10), max(most, held + min(amount, 10))
            time.sleep(0.02)
            with lock:
                held -= min(amount, 10)

    threads = []
    for amount in (6, 25, 1, 1, 1, 6):
        threads.append(threading.Thread(target=work, args=(amount,)))
        threads[-1].start()
        time.sleep(0.002)
    for thread in threads:
        thread.join()
    assert most == 10 and order[:2] == [6, 25]


def test_large_images_are_decoded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what fails gives its pixels back."""
    monkeypatch.setattr(image_validation, "PIXELS", PixelBudget(64 * 64))
    at_once = set[int]()

    def seen(data: bytes) -> Image.Image:
        at_once.add(image_validation.PIXELS._free)
        time.sleep(0.005)
        return open_picture(data)

    monkeypatch.setattr(image_validation, "open_picture", seen)
    good, bad = encoded(Image.new("RGB", (60, 60))), encoded(Image.new("RGB", (60, 60)), "JPEG")[:-50]

    def one(data: bytes) -> None:
        with contextlib.suppress(BadFile):
            check_image(data)

    threads = [threading.Thread(target=one, args=(data,)) for data in (good, bad) * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert at_once == {64 * 64 - 60 * 60} and image_validation.PIXELS._free == 64 * 64


def test_a_prediction_s_threads_share_the_pixels_of_large_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "LARGE_PIXELS", 60 * 60)
    monkeypatch.setattr(records, "PIXELS", PixelBudget(64 * 64))
    free = list[int]()

    def seen(image: Image.Image) -> Image.Image:
        free.append(records.PIXELS._free)
        return image

    monkeypatch.setattr(records, "upright", seen)
    for side in (60, 59):
        decode_image(encoded(Image.new("RGB", (side, side))))
    assert free == [64 * 64 - 60 * 60, 64 * 64] and records.PIXELS._free == 64 * 64


def test_a_large_mask_is_looked_up_in_parts() -> None:
    ids = np.zeros((1030, 1024), np.uint8)
    ids[1028, 5] = 1
    assert np.array_equal(check_mask(encoded(Image.fromarray(ids)), BOTH, ids.shape, "m.png"), ids)
    ids[1029, 7] = 9
    with refused("mask/unknown-value", "id 9 at (1029, 7)", error=BadFile):
        check_mask(encoded(Image.fromarray(ids)), BOTH, ids.shape, "m.png")
