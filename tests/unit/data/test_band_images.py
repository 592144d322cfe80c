"""Why: a decoder that quietly makes 8 bits, or three bands, of more would take away what the user brought the file for."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.images import encoded, png, tiff
from tests.refusals import refused
from threestage.data import band_images
from threestage.data.band_images import count_pixels, decode_pixels, read_bands
from threestage.data.bands import Bands
from threestage.data.headers import BadImage

RANDOM = np.random.default_rng(0)
GREY16 = RANDOM.integers(0, 2**16, (6, 9), dtype=np.uint16)
MINIMUM_IS_BLACK, RGB = 1, 2


def test_png_keeps_its_bands_and_bits() -> None:
    data = encoded(Image.fromarray(GREY16))
    assert np.array_equal(read_bands(data, 1)[:, :, 0], GREY16) and read_bands(data, 1).dtype == np.uint16
    four = RANDOM.integers(0, 256, (6, 9, 4), dtype=np.uint8)
    assert np.array_equal(read_bands(encoded(Image.fromarray(four)), 4), four)
    opaque = four.copy()
    opaque[:, :, 3] = 255
    assert np.array_equal(read_bands(encoded(Image.fromarray(opaque)), 3), four[:, :, :3])
    assert count_pixels(data) == 54


def test_an_image_is_turned_as_its_exif_says() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = GREY16.astype(np.uint8)
    assert np.array_equal(read_bands(encoded(Image.fromarray(grey), exif=exif), 1)[:, :, 0], np.rot90(grey, -1))


def test_what_is_not_read_exactly_is_refused() -> None:
    four = encoded(Image.fromarray(RANDOM.integers(0, 256, (6, 9, 4), dtype=np.uint8)))
    with refused("image/bands", 4, 3, error=BadImage):
        read_bands(four, 3)
    with refused("image/bits", 16, error=BadImage):
        read_bands(png(2, 2, 16, 2, bytes(12)), 3)
    with refused("image/undecodable", error=BadImage):
        read_bands(four[:60], 4)
    with refused("image/too-many-pixels", "9x6", 53, error=BadImage):
        read_bands(four, 4, 53)


def test_a_network_sees_levels_and_rgb_is_read_as_before() -> None:
    bands = Bands(count=1, low=(0,), high=(2**16 - 1,))
    found = decode_pixels(encoded(Image.fromarray(GREY16)), 2**20, bands)
    assert np.array_equal(found[:, :, 0], np.rint(GREY16 / 257)) and found.dtype == np.uint8
    photo = Image.fromarray(RANDOM.integers(0, 256, (6, 9, 3), dtype=np.uint8))
    assert np.array_equal(decode_pixels(encoded(photo), 2**20, None), np.asarray(photo))


def test_tiff_without_the_extra_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    monkeypatch.setitem(__import__("sys").modules, "imagecodecs", None)
    with refused("data/missing-package", "threestage[geo]"):
        read_bands(tiff(GREY16[:, :, None], MINIMUM_IS_BLACK), 1)


# ---- TIFF


@pytest.fixture
def tifffile() -> Any:
    pytest.importorskip("imagecodecs")
    return pytest.importorskip("tifffile")


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize("bands", [1, 4, 7])
def test_tiff_of_any_bands_and_numbers(tifffile: Any, dtype: str, bands: int) -> None:
    pixels = (1000 * RANDOM.standard_normal((6, 9, bands))).astype(dtype)
    data = tiff(pixels, MINIMUM_IS_BLACK)
    found = read_bands(data, bands)
    assert found.dtype == dtype and np.array_equal(found, pixels) and count_pixels(data) == 54


@pytest.mark.parametrize(
    "options",
    [
        {"planarconfig": "separate", "compression": "lzw"},
        {"planarconfig": "separate", "tile": (16, 16), "compression": "zlib", "predictor": True},
        {"photometric": "minisblack"},  # a page for each band
    ],
)
def test_bands_that_lie_apart_and_compressed_ones(tifffile: Any, options: dict[str, Any]) -> None:
    pixels, stream = RANDOM.integers(0, 4000, (4, 20, 33), dtype=np.uint16), io.BytesIO()
    tifffile.imwrite(stream, pixels, **{"photometric": "minisblack", **options})
    assert np.array_equal(read_bands(stream.getvalue(), 4), pixels.transpose(1, 2, 0))


def test_overviews_are_passed_over(tifffile: Any, tmp_path: Path) -> None:
    pixels = RANDOM.integers(0, 4000, (32, 32, 4), dtype=np.uint16)
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(pixels, photometric="minisblack", planarconfig="contig")
        file.write(pixels[::2, ::2], photometric="minisblack", planarconfig="contig", subfiletype=1)
    assert np.array_equal(read_bands((tmp_path / "a.tif").read_bytes(), 4), pixels)


def test_tiff_that_means_something_else_is_refused(tifffile: Any) -> None:
    two = GREY16[:, :, None].repeat(2, 2)
    orientation = (274, 3, b"\6\0")
    with refused("image/bands", 2, 3, error=BadImage):
        read_bands(tiff(two, MINIMUM_IS_BLACK), 3)
    with refused("image/bands", "Orientation", error=BadImage):
        read_bands(tiff(two, MINIMUM_IS_BLACK, more=[orientation]), 2)
    with refused("image/bands", "0 is white", error=BadImage):
        read_bands(tiff(GREY16[:, :, None], 0), 1)
    with refused("image/too-many-pixels", 53, error=BadImage):
        read_bands(tiff(two, MINIMUM_IS_BLACK), 2, 53)
    for cut in (9, 100, 200):
        with refused("image/undecodable", error=BadImage):
            read_bands(tiff(two, MINIMUM_IS_BLACK)[:cut], 2)


def test_a_page_cannot_have_countless_bands(tifffile: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(band_images, "MAX_BANDS", 3)
    with refused("image/bands", 4, 3, error=BadImage):
        read_bands(tiff(GREY16[:, :, None].repeat(4, 2), MINIMUM_IS_BLACK), 4)
