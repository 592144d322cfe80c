"""GeoTIFFs for tests of the extra `geo`: import it after `pytest.importorskip("rasterio", ...)`."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from affine import Affine
from rasterio.errors import NotGeoreferencedWarning

WHY = "needs the extra geo: pip install 'threestage[geo]'"
CRS = "EPSG:32633"
PLACE = Affine(0.5, 0, 400_000, 0, -0.5, 5_000_000)
"""Half a metre a pixel, north is up."""


def write_geotiff(path: Path, pixels: np.ndarray, **profile: Any) -> Path:
    """(H,W) or (H,W,B) in tiles of 128 pixels."""
    bands = np.moveaxis(pixels.reshape(*pixels.shape[:2], -1), 2, 0)
    size = {"count": len(bands), "height": pixels.shape[0], "width": pixels.shape[1], "dtype": pixels.dtype.name}
    layout = {
        "tiled": True,
        "blockxsize": 128,
        "blockysize": 128,
        "compress": "deflate",
        "crs": CRS,
        "transform": PLACE,
    }
    warnings.simplefilter("ignore", NotGeoreferencedWarning)
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(path, "w", driver="GTiff", **{**size, **layout, **profile}) as dataset:
        dataset.write(bands)
    return path


def mosaic(height: int, width: int, seed: int = 0, side: int = 40) -> np.ndarray:
    """uint8 (H,W,3) of random tiles with noise: no two places look alike."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 200, (-(-height // side), -(-width // side), 3), np.uint8)
    whole = coarse.repeat(side, 0).repeat(side, 1)[:height, :width]
    return whole + rng.integers(0, 55, (height, width, 3), np.uint8)
