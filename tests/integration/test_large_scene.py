"""20,000 x 20,000 pixels: `threestage predict` within 1.7 GiB, and where strips meet the mask is the reference's to the pixel.

About a quarter of an hour on one thread. Run it with `pytest -m slow tests/integration/test_large_scene.py`.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("rasterio", reason="needs the extra geo: pip install 'threestage[geo]'")

import rasterio

from tests.geotiffs import CRS, PLACE
from threestage.data.raster import window_starts
from threestage.mlflow_sync.records import RegistrySettings
from threestage.models.export import ModelCard, save_model
from threestage.models.network import build_network
from threestage.models.settings import NetworkSettings
from threestage.prediction.predict import open_model
from threestage.prediction.scene_prediction import STRIP_SCORES
from threestage.prediction.tta import TTASettings, predict_in_windows

SIDE, WINDOW, STRIDE, CLASSES = 20_000, 512, 448, 6
MOST_KIB = 1.7 * 2**20
MEASURED = """
import resource, sys
from threestage.cli import main
sys.argv = ["threestage", *sys.argv[1:]]
try:
    main()
finally:
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""


def write_scene(path: Path) -> None:
    """Cells of 20 pixels in random colours, with noise, and a corner without data."""
    rng = np.random.default_rng(0)
    layout = {"tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "deflate", "zlevel": 1, "BIGTIFF": "YES"}
    place = {"crs": CRS, "transform": PLACE, "width": SIDE, "height": SIDE, "count": 3, "dtype": "uint8", "nodata": 0}
    with rasterio.open(path, "w", driver="GTiff", **place, **layout) as dataset:
        for top in range(0, SIDE, 512):
            rows = min(512, SIDE - top)
            cells = rng.integers(1, 240, (3, -(-rows // 20), SIDE // 20), np.uint8)
            band = cells.repeat(20, 1).repeat(20, 2)[:, :rows] + rng.integers(0, 16, (3, rows, SIDE), np.uint8)
            if top < 3000:
                band[:, :, :2500] = 0
            dataset.write(band, window=rasterio.windows.Window(0, top, SIDE, rows))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_scene_of_400_million_pixels(tmp_path: Path) -> None:
    write_scene(tmp_path / "large.tif")
    network = NetworkSettings(encoder="test_resnet", batch_norm="live", dilations=(1, 2), output_stride=32)
    names = tuple("abcdef")
    card = ModelCard(
        network=network, classes=names, colours=[(i, i, i) for i in range(CLASSES)], downscale=1, stage="stage1"
    )
    save_model(str(tmp_path / "model"), build_network(network, CLASSES, seed=0), card)
    options = [
        "--format",
        "geotiff",
        "--window",
        f"{WINDOW},{WINDOW}",
        "--stride",
        f"{STRIDE},{STRIDE}",
        "--overlap",
        "hann",
    ]
    places = [str(tmp_path / name) for name in ("model", "large.tif", "out")]
    command = [sys.executable, "-c", MEASURED, "predict", *places, "--local", "--json", *options]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["images"] == 1
    peak = int(ended.stderr.rpartition("peak ")[2])
    print(f"peak {peak / 2**20:.2f} GiB")
    assert peak <= MOST_KIB
    with rasterio.open(tmp_path / "out/masks/large.tif") as mask, rasterio.open(tmp_path / "large.tif") as image:
        assert (mask.shape, mask.crs, mask.transform) == (image.shape, image.crs, image.transform)
        assert (mask.read(1, window=rasterio.windows.Window(0, 0, 2500, 3000)) == 255).all()
        for first_row, first_column in seams():
            _compare(mask, image, str(tmp_path / "model"), first_row, first_column)


def seams() -> list[tuple[int, int]]:
    """Numbers of a row and of a column of windows before places where two strips meet, and of the last ones."""
    together = (STRIP_SCORES // (CLASSES * WINDOW) - WINDOW) // STRIDE + 1
    last = len(window_starts(SIDE, WINDOW, STRIDE)) - 5
    return [(20, together - 2), (7, 2 * together - 2), (last, last)]


def _compare(mask: rasterio.DatasetReader, image: rasterio.DatasetReader, model: str, row: int, column: int) -> None:
    """Five by five windows, of which the outer ones miss neighbours, unless they lie on the border."""
    starts = window_starts(SIDE, WINDOW, STRIDE)
    top, left = starts[row], starts[column]
    bottom, right = (starts[number + 4] + WINDOW for number in (row, column))
    window = rasterio.windows.Window(left, top, right - left, bottom - top)
    pixels = torch.from_numpy(image.read(window=window))[None]
    network, _ = open_model(model, RegistrySettings())
    protocol = TTASettings(window=(WINDOW, WINDOW), stride=(STRIDE, STRIDE), overlap="hann")
    expected = predict_in_windows(network, pixels, protocol, 32, 2**30)[0][0].numpy()
    inner = np.s_[WINDOW:-WINDOW, WINDOW:-WINDOW]
    assert np.array_equal(mask.read(1, window=window)[inner], expected[inner])
    assert len(np.unique(expected[inner])) > 2, "or a seam would not be seen"
