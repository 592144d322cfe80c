"""TIFF images of any size, tiled or BigTIFF, read by windows: never whole. Needs the extra `geo` (rasterio).

GDAL gets the bytes through `threestage.data.storage` and opens nothing itself: no other file, no host, no other format.
"""

import importlib.util
import io
import secrets
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from threestage.data import storage
from threestage.data.headers import BadImage
from threestage.errors import InputError

PACKAGE = "rasterio"
TIFF_SUFFIXES = frozenset({".tif", ".tiff"})
MAX_PIXELS = 2**34
MAX_BLOCK_BYTES = 2**26
LOSSY = ("jpeg", "webp", "jpegxl")
GDAL_OPTIONS = {
    "GDAL_CACHEMAX": 128,  # MB of decoded blocks in a process
    "GDAL_NUM_THREADS": 1,
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",  # no file beside the image is looked for
    "GDAL_PAM_ENABLED": False,
    "PROJ_NETWORK": "OFF",
}
RANGE_BYTES, RANGES_HELD = 2**18, 64
"""A request to the store has so many bytes, of which the last ones are kept for each open image."""

Values = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]


def is_tiff(path: str) -> bool:
    return PurePosixPath(path).suffix.lower() in TIFF_SUFFIXES


def is_rasterio_installed() -> bool:
    return importlib.util.find_spec(PACKAGE) is not None


def refuse_missing_rasterio(what: str) -> None:
    if not is_rasterio_installed():
        raise InputError(f"{what}: {PACKAGE} is not installed; pip install 'threestage[geo]'", "data/missing-package")


def window_starts(side: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side, in pixels: every `stride`, the last one moved back to the border."""
    return [0] if side <= window else [*range(0, side - window, stride), side - window]


class Raster:
    """An open TIFF of `height` x `width` pixels. `bands`: how many are not transparency. `crs` and `transform`: rasterio's; crs
    is None where it does not say where it lies."""

    def __init__(self, dataset: Any, ranges: "_Ranges") -> None:
        from rasterio.enums import ColorInterp, MaskFlags

        self._dataset, self._ranges = dataset, ranges
        self.height, self.width = int(dataset.height), int(dataset.width)
        self.crs, self.transform, self.dtype = dataset.crs, dataset.transform, np.dtype(dataset.dtypes[0])
        self.is_lossy = dataset.compression is not None and dataset.compression.name in LOSSY
        self.has_nodata = any(MaskFlags.all_valid not in flags for flags in dataset.mask_flag_enums)
        kinds = dataset.colorinterp
        self._indexes = [number for number, kind in enumerate(kinds, 1) if kind != ColorInterp.alpha]
        self.bands = len(self._indexes)
        self._palette: npt.NDArray[np.uint8] | None = None
        if kinds[0] == ColorInterp.palette:
            colours = dataset.colormap(1)
            self._palette = np.array([colours.get(index, (0, 0, 0))[:3] for index in range(256)], np.uint8)

    @property
    def has_palette(self) -> bool:
        return self._palette is not None

    def read(self, rows: slice, columns: slice) -> Values:
        """(H,W,bands) as they are stored; of a palette the indices."""
        values = self._dataset.read(self._indexes, window=_window(rows, columns))
        self._ranges.raise_error()
        return np.ascontiguousarray(np.moveaxis(values, 0, 2))

    def valid(self, rows: slice, columns: slice) -> Mask:
        """(H,W), False where there is no data: by the nodata value in all bands, the mask or the transparency."""
        if not self.has_nodata:
            return np.ones((rows.stop - rows.start, columns.stop - columns.start), np.bool_)
        mask = self._dataset.dataset_mask(window=_window(rows, columns))
        self._ranges.raise_error()
        return np.asarray(mask > 0)

    def read_pixels(self, rows: slice, columns: slice, bands: int | None) -> Values:
        """(H,W,bands) as they are stored, or without `bands` uint8 RGB; 0 where there is no data. Raises BadImage."""
        as_rgb = bands is None or self.has_palette
        values = self.read_rgb(rows, columns) if as_rgb else self.read(rows, columns)
        values[~self.valid(rows, columns)] = 0
        return values

    def read_rgb(self, rows: slice, columns: slice) -> npt.NDArray[np.uint8]:
        """uint8 (H,W,3) of grey, RGB or a palette. Raises BadImage for others."""
        if self.dtype != np.uint8:
            raise BadImage(f"holds {self.dtype}: its range is not known here, ingest with --bands", "image/bits")
        if self.bands not in (1, 3):
            raise BadImage(f"has {self.bands} bands; 1 or 3 are read without --bands", "image/bands")
        values = self.read(rows, columns)
        if self._palette is not None:
            return self._palette[values[:, :, 0]]
        return values if self.bands == 3 else values.repeat(3, axis=2)

    def same_grid(self, other: "Raster") -> bool:
        """Whether pixels of one are those of the other, as far as both say where they lie."""
        if (self.height, self.width) != (other.height, other.width):
            return False
        if self.crs is None or other.crs is None:
            return True
        tolerance = 1e-3 * abs(self.transform.determinant) ** 0.5
        corners = [(0, 0), (self.width, 0), (0, self.height)]
        apart = [np.subtract(self.transform * corner, other.transform * corner) for corner in corners]
        return bool(self.crs == other.crs and np.abs(apart).max() <= tolerance)


def _window(rows: slice, columns: slice) -> Any:
    from rasterio.windows import Window

    return Window(columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start)


@contextmanager
def open_raster(uri: str) -> Iterator[Raster]:
    """Raises BadImage where it is no TIFF that can be read by windows, also in the block; InputError without the extra; OSError
    where the store fails."""
    refuse_missing_rasterio(uri)
    import rasterio
    from rasterio.errors import RasterioError

    with ExitStack() as stack:
        ranges = stack.enter_context(_Ranges(uri))
        stack.enter_context(gdal_environment())
        try:
            name = f"{secrets.token_hex(8)}.tif"
            dataset = stack.enter_context(rasterio.open(name, driver="GTiff", opener=ranges.opener(name)))
            yield _checked_raster(dataset, ranges)
        except RasterioError as error:
            ranges.raise_error()
            raise BadImage(f"cannot be decoded: {error}", "image/undecodable") from None


@contextmanager
def gdal_environment() -> Iterator[None]:
    """Without credentials, network or files beside an image."""
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning
    from rasterio.session import DummySession

    warnings.simplefilter("ignore", NotGeoreferencedWarning)  # ordinary pictures are read too
    with rasterio.Env(session=DummySession(), **GDAL_OPTIONS):
        yield


def _checked_raster(dataset: Any, ranges: "_Ranges") -> Raster:
    _refuse(dataset)
    try:
        return Raster(dataset, ranges)
    except ValueError as error:  # of a damaged reference system or palette
        raise BadImage(f"cannot be decoded: {error}", "image/undecodable") from None


def _refuse(dataset: Any) -> None:
    height, width = dataset.shape
    if height * width > MAX_PIXELS:
        raise BadImage(f"has {width}x{height} pixels, more than {MAX_PIXELS}", "image/too-many-pixels")
    if len(set(dataset.dtypes)) > 1 or np.dtype(dataset.dtypes[0]).kind not in "uif":
        raise BadImage(f"holds {', '.join(sorted(set(dataset.dtypes)))}: save one kind of numbers", "image/bits")
    rows, columns = max(dataset.block_shapes, key=np.prod)
    if rows * columns * dataset.count * np.dtype(dataset.dtypes[0]).itemsize > MAX_BLOCK_BYTES:
        raise BadImage(
            f"has blocks of {columns}x{rows} pixels, too large to read by windows: save it in tiles "
            "(gdal_translate -co TILED=YES)",
            "image/not-tiled",
        )


def tiff_of(values: Values) -> bytes:
    """A plain TIFF of (H,W,B) numbers of any type."""
    import rasterio

    height, width, bands = values.shape
    layout = {"height": height, "width": width, "count": bands, "interleave": "pixel", "photometric": "MINISBLACK"}
    with gdal_environment(), rasterio.MemoryFile() as file:
        with file.open(driver="GTiff", dtype=values.dtype.name, compress="deflate", **layout) as dataset:
            dataset.write(np.moveaxis(values, 2, 0))
        return bytes(file.read())


class _Ranges:
    """A file of the store by ranges, each asked for once while it is among the last ones. What the store fails to give is empty,
    for GDAL takes no exception, and raised afterwards."""

    def __init__(self, uri: str) -> None:
        storage.refuse_special_file(uri)
        files, path = storage.filesystem(uri)
        self._file = files.open_input_file(path)
        self.size = int(self._file.size())
        self._error: OSError | None = None
        self._range = lru_cache(RANGES_HELD)(self._ask)

    def __enter__(self) -> "_Ranges":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def opener(self, name: str) -> Any:
        """What rasterio asks for files: this one is there under `name`, and no other."""

        def open_file(path: str, mode: str = "rb", **_: Any) -> io.RawIOBase:
            if path != name or mode not in ("r", "rb"):
                raise FileNotFoundError(path)
            return _RangeFile(self)

        return open_file

    def read(self, start: int, size: int) -> bytes:
        end = min(start + size, self.size)
        numbers = range(start // RANGE_BYTES, -(-end // RANGE_BYTES))
        first = numbers.start * RANGE_BYTES
        return b"".join(map(self._range, numbers))[start - first : end - first] if start < end else b""

    def _ask(self, number: int) -> bytes:
        start = number * RANGE_BYTES
        try:
            return bytes(self._file.read_at(min(RANGE_BYTES, self.size - start), start))
        except (OSError, pa.ArrowInvalid) as error:
            self._error = error if isinstance(error, OSError) else OSError(str(error))
            return b""

    def raise_error(self) -> None:
        if self._error is not None:
            raise self._error


class _RangeFile(io.RawIOBase):
    """What GDAL reads."""

    def __init__(self, ranges: _Ranges) -> None:
        self._ranges, self._place = ranges, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._ranges.size}[whence]
        return self._place

    def read(self, size: int = -1) -> bytes:
        data = self._ranges.read(self._place, self._ranges.size if size < 0 else size)
        self._place += len(data)
        return data
