"""A TIFF of any size is read by windows, from here or from S3 by ranges; nothing but that one file is opened for it."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rasterio", reason="needs the extra geo: pip install 'threestage[geo]'")

from tests.geotiffs import CRS, PLACE, mosaic, write_geotiff
from tests.refusals import refused
from threestage.data import raster as raster_module
from threestage.data import storage
from threestage.data.headers import BadImage
from threestage.data.parallel import map_ahead
from threestage.data.raster import open_raster

BOX = slice(100, 230), slice(7, 300)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return mosaic(300, 400)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory, pixels: np.ndarray) -> Path:
    return write_geotiff(tmp_path_factory.mktemp("scene") / "a.tif", pixels, BIGTIFF="YES")


def test_a_window_and_where_the_image_lies(image: Path, pixels: np.ndarray) -> None:
    with open_raster(str(image)) as raster:
        assert (raster.height, raster.width, raster.bands) == (300, 400, 3) and not raster.has_nodata
        assert np.array_equal(raster.read_rgb(*BOX), pixels[BOX]) and raster.valid(*BOX).all()
        assert (raster.crs.to_string(), raster.transform) == (CRS, PLACE)


def test_a_window_is_read_from_s3_by_ranges(
    image: Path, pixels: np.ndarray, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raster_module, "RANGE_BYTES", 4096)
    storage.write_bytes(f"{bucket}/a.tif", image.read_bytes())
    asked = set[int]()
    ask = raster_module._Ranges._ask

    def noted(ranges: raster_module._Ranges, number: int) -> bytes:
        asked.add(number)
        return ask(ranges, number)

    monkeypatch.setattr(raster_module._Ranges, "_ask", noted)
    with open_raster(f"{bucket}/a.tif") as raster:
        assert np.array_equal(raster.read_rgb(slice(0, 90), slice(0, 90)), pixels[:90, :90])
    assert 4096 * len(asked) < 0.4 * image.stat().st_size


def test_threads_open_one_file_at_once(image: Path, pixels: np.ndarray) -> None:
    def read(top: int) -> np.ndarray:
        with open_raster(str(image)) as raster:
            return raster.read_rgb(slice(top, top + 50), slice(0, 400))

    found = list(map_ahead(read, range(0, 250, 10)))
    assert all(np.array_equal(part, pixels[top : top + 50]) for part, top in zip(found, range(0, 250, 10), strict=True))


def test_nodata_transparency_grey_and_palettes(tmp_path: Path, pixels: np.ndarray) -> None:
    import rasterio

    whole = slice(0, 300), slice(0, 400)
    holed = np.maximum(pixels, 1)
    holed[:150] = 0
    with open_raster(str(write_geotiff(tmp_path / "nodata.tif", holed, nodata=0))) as raster:
        assert np.array_equal(raster.valid(*whole), (holed > 0).any(2))
    alpha = np.dstack([pixels, np.full((300, 400), 255, np.uint8)])
    alpha[:, :100, 3] = 0
    with open_raster(str(write_geotiff(tmp_path / "alpha.tif", alpha, photometric="RGB", ALPHA="YES"))) as raster:
        assert raster.bands == 3 and np.array_equal(raster.read_rgb(*whole), pixels)
        assert not raster.valid(*whole)[:, :100].any() and raster.valid(*whole)[:, 100:].all()
    grey = write_geotiff(tmp_path / "grey.tif", pixels[:, :, 0] % 3)
    with open_raster(str(grey)) as raster:
        assert np.array_equal(raster.read_rgb(*whole), (pixels[:, :, :1] % 3).repeat(3, 2))
    with rasterio.open(grey, "r+") as dataset:
        dataset.write_colormap(1, {0: (1, 2, 3), 1: (9, 8, 7), 2: (0, 0, 99)})
    with open_raster(str(grey)) as raster:
        colours = np.array([(1, 2, 3), (9, 8, 7), (0, 0, 99)], np.uint8)
        assert np.array_equal(raster.read_rgb(*whole), colours[pixels[:, :, 0] % 3])


def test_what_is_no_such_tiff_is_refused(tmp_path: Path, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "a.tif"
    other.write_bytes(b"<VRTDataset rasterXSize='1' rasterYSize='1'></VRTDataset>")
    with refused("image/undecodable", error=BadImage), open_raster(str(other)):
        pass
    deep = write_geotiff(tmp_path / "deep.tif", pixels.astype(np.uint16))
    with refused("image/bits", "uint16", error=BadImage), open_raster(str(deep)) as raster:
        raster.read_rgb(*BOX)
    five = write_geotiff(tmp_path / "five.tif", np.dstack([pixels, pixels[:, :, :2]]), photometric="MINISBLACK")
    with refused("image/bands", "5", error=BadImage), open_raster(str(five)) as raster:
        raster.read_rgb(*BOX)
    monkeypatch.setattr(raster_module, "MAX_BLOCK_BYTES", 128 * 128 * 3 - 1)
    with refused("image/not-tiled", "128x128", error=BadImage), open_raster(str(other.with_name("deep.tif"))):
        pass


def test_a_damaged_place_is_a_damaged_image(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(self: object, dataset: object, ranges: object) -> None:
        raise ValueError("the reference system is invalid")

    monkeypatch.setattr(raster_module.Raster, "__init__", damaged)
    with refused("image/undecodable", "invalid", error=BadImage), open_raster(str(image)):
        pass


def test_a_cut_off_file_is_refused_when_its_end_is_read(image: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.tif").write_bytes(image.read_bytes()[: image.stat().st_size // 2])
    with refused("image/undecodable", error=BadImage), open_raster(str(tmp_path / "cut.tif")) as raster:
        raster.read_rgb(slice(0, 300), slice(0, 400))


def test_a_store_that_fails_is_no_damaged_image(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Away:
        def read_at(self, size: int, start: int) -> bytes:
            raise OSError("the store is away")

        def close(self) -> None:
            pass

    monkeypatch.setattr(raster_module, "RANGE_BYTES", 4096)
    with pytest.raises(OSError, match="away"), open_raster(str(image)) as raster:
        monkeypatch.setattr(raster._ranges, "_file", Away())
        raster.read_rgb(*BOX)


def test_no_other_file_is_opened(image: Path) -> None:
    """GDAL looks for overviews, masks and metadata beside an image."""
    ranges = raster_module._Ranges(str(image))
    open_file = ranges.opener("a.tif")
    for name in ("a.tif.ovr", "a.tif.aux.xml", "/etc/passwd", "s3://other/a.tif"):
        with pytest.raises(FileNotFoundError):
            open_file(name)
    with pytest.raises(FileNotFoundError):
        open_file("a.tif", "wb")
    ranges.__exit__()


def test_grids(tmp_path: Path, pixels: np.ndarray, image: Path) -> None:
    from affine import Affine

    same = write_geotiff(tmp_path / "same.tif", pixels[:, :, 0])
    moved = write_geotiff(tmp_path / "moved.tif", pixels[:, :, 0], transform=PLACE * Affine.translation(1, 0))
    smaller = write_geotiff(tmp_path / "smaller.tif", pixels[:200, :, 0])
    with open_raster(str(image)) as raster:
        for path, fits in ((same, True), (moved, False), (smaller, False)):
            with open_raster(str(path)) as other:
                assert raster.same_grid(other) == fits
