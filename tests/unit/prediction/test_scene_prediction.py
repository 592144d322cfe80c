"""A scene is predicted window by window into a GeoTIFF on its own grid, and no seam shows where windows or strips meet."""

from collections.abc import Generator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("rasterio", reason="needs the extra geo: pip install 'threestage[geo]'")

import pyarrow.parquet as pq
import rasterio
from PIL import Image

from tests.geotiffs import CRS, PLACE, mosaic, write_geotiff
from tests.refusals import refused
from tests.unit.prediction.test_predict import calibrated
from threestage.data import raster, storage
from threestage.data.bands import Bands
from threestage.data.formats import IngestSettings
from threestage.data.ingest import ingest
from threestage.data.palette import palette
from threestage.errors import StageFailure
from threestage.labels.predicted_masks import predicted_masks
from threestage.mlflow_sync.records import RegistrySettings
from threestage.models.export import ModelCard, save_model
from threestage.models.network import build_network
from threestage.models.settings import NetworkSettings
from threestage.prediction import input_parts, scene_prediction
from threestage.prediction.champion import Champion, PoolPredictions
from threestage.prediction.input_parts import Part, kind_of
from threestage.prediction.predict import (
    ModelFiles,
    PredictionTask,
    PredictSettings,
    network_of,
    predict_input,
    read_model,
)
from threestage.prediction.pseudo_masks import FileReport
from threestage.prediction.scene_prediction import scene_protocol
from threestage.prediction.tta import TTASettings, predict_in_windows
from threestage.ray_backend import predict as ray_predict

COLOURS = ((10, 0, 0), (200, 30, 30), (30, 200, 30))
WINDOWS = TTASettings(window=(128, 128), overlap="hann")


def make_model(folder: Path, downscale: int = 1) -> ModelFiles:
    settings = NetworkSettings(encoder="test_resnet", batch_norm="live", dilations=(1, 2))
    card = ModelCard(network=settings, classes=("a", "b", "c"), colours=COLOURS, downscale=downscale, stage="stage1")
    save_model(str(folder), build_network(settings, 3, seed=0), card)
    return read_model(str(folder), RegistrySettings())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """500 rows of 600 pixels, of which a corner has no data."""
    found = np.maximum(mosaic(500, 600), 1)
    found[:300, :250] = 0
    return found


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, pixels: np.ndarray) -> Path:
    return write_geotiff(tmp_path_factory.mktemp("scene") / "a.tif", pixels, nodata=0)


def reference(model: ModelFiles, pixels: np.ndarray, protocol: TTASettings = WINDOWS) -> np.ndarray:
    """The mask by the windows of the whole image, held in memory."""
    network, _ = network_of(model)
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    class_ids = predict_in_windows(network, image, protocol, 8, 2**30)[0][0].numpy().copy()
    class_ids[(pixels == 0).all(2)] = 255
    return class_ids


@pytest.mark.parametrize("protocol", [WINDOWS, TTASettings(window=(128, 96), stride=(100, 70), flip=True)])
def test_the_mask_is_that_of_the_whole_image_to_the_pixel(
    protocol: TTASettings,
    model: ModelFiles,
    scene: Path,
    pixels: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scene_prediction, "STRIP_SCORES", 3 * 128 * 250)  # several strips
    settings = PredictSettings(format="geotiff", protocol=protocol, confidence=True)
    report = predict_input(model, str(scene), str(tmp_path), settings)
    assert (report.images, report.bad) == (1, 0)
    with rasterio.open(tmp_path / "masks/a.tif") as mask:
        found = mask.read(1)
        assert np.array_equal(found, reference(model, pixels, protocol))
        assert len(np.unique(found)) > 2, "or a seam would not be seen"
        assert (mask.crs.to_string(), mask.transform, mask.nodata) == (CRS, PLACE, 255)
        assert mask.profile["tiled"] and mask.colormap(1)[1] == (200, 30, 30, 255)
    with rasterio.open(tmp_path / "confidence/a.tif") as confidence:
        sure = confidence.read(1)
        assert not sure[:300, :250].any() and sure[300:].min() > 80 and confidence.transform == PLACE


def test_estimates_of_a_scene_are_means_over_its_windows(model: ModelFiles, scene: Path, tmp_path: Path) -> None:
    settings = PredictSettings(format="geotiff", protocol=WINDOWS)
    report = predict_input(calibrated(model, near=3.0, far=4.0), str(scene), f"{tmp_path}/out", settings)
    (part,) = (tmp_path / "out/parts").iterdir()
    (row,) = pq.read_table(part).to_pylist()
    assert report.estimate is not None and (report.estimate.images, report.warnings) == (1, ())
    assert report.estimate.drift == pytest.approx(row["drift"]) and 0 < row["mean_iou"] < 1


def test_as_png(model: ModelFiles, scene: Path, pixels: np.ndarray, tmp_path: Path) -> None:
    predict_input(model, str(scene), str(tmp_path), PredictSettings(input_format="scenes", protocol=WINDOWS))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "classes.json", "masks", "parts", "prediction.json", "rejects.parquet",
    ]  # fmt: skip
    with Image.open(tmp_path / "masks/a.png") as mask:
        assert mask.mode == "P" and np.array_equal(np.asarray(mask), reference(model, pixels))
        assert (mask.getpalette() or [])[:9] == palette(COLOURS)[:3].ravel().tolist()


def test_a_model_of_other_bands(pixels: np.ndarray, tmp_path: Path) -> None:
    bands = Bands(count=4, low=(0.0,) * 4, high=(25_500.0,) * 4, used=(4, 1, 2, 3))
    settings = NetworkSettings(encoder="test_resnet", batch_norm="live", dilations=(1, 2)).model_copy(
        update={"channels": 4}
    )
    card = ModelCard(
        network=settings, classes=("a", "b", "c"), colours=COLOURS, downscale=1, stage="stage1", bands=bands
    )
    network = build_network(settings, 3, seed=0).eval()
    save_model(f"{tmp_path}/model", network, card)
    small = pixels[300:428, 250:442]
    deep = np.dstack([small, small[:, :, :1]]).astype(np.uint16) * 100
    scene = write_geotiff(tmp_path / "a.tif", deep, photometric="MINISBLACK")
    model = read_model(f"{tmp_path}/model", RegistrySettings())
    predict_input(model, str(scene), f"{tmp_path}/out", PredictSettings(format="geotiff", protocol=WINDOWS))
    image = torch.from_numpy(bands.levels(deep)).permute(2, 0, 1)[None]
    expected = predict_in_windows(network_of(model)[0], image, WINDOWS, 8, 2**30)[0][0].numpy()
    with rasterio.open(tmp_path / "out/masks/a.tif") as mask:
        assert np.array_equal(mask.read(1), expected)


def test_a_model_of_smaller_images(scene: Path, pixels: np.ndarray, tmp_path: Path) -> None:
    small = make_model(tmp_path / "model", downscale=3)
    predict_input(small, str(scene), f"{tmp_path}/out", PredictSettings(format="geotiff", protocol=WINDOWS))
    with rasterio.open(tmp_path / "out/masks/a.tif") as mask:
        found = mask.read(1)
    blocks = found[300:498, 252:600].reshape(66, 3, 116, 3)
    assert found.shape == (500, 600) and (blocks == blocks[:, :1, :, :1]).all()
    assert np.array_equal(found == 255, (pixels == 0).all(2))
    assert np.array_equal(found[498:, 252:], found[497:498, 252:].repeat(2, 0)), "the rest is as its last block"


def test_the_same_command_keeps_what_is_done_and_bad_files_are_listed(
    model: ModelFiles, pixels: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_geotiff(tmp_path / "in/far/a.tif", pixels[300:, 250:], crs=None, transform=None)
    (tmp_path / "in/b.tiff").write_bytes(b"no tiff")
    (tmp_path / "in/readme.txt").write_text("passed over")
    settings = PredictSettings(format="geotiff", max_bad_fraction=0.5)
    first = predict_input(model, f"{tmp_path}/in", f"{tmp_path}/out", settings)
    assert (first.images, first.kept, first.bad) == (1, 0, 1) and "image/undecodable" in first.rejected[0].reason
    with rasterio.open(tmp_path / "out/masks/far/a.tif") as mask:
        assert mask.crs is None and mask.shape == (200, 350)
    again = predict_input(model, f"{tmp_path}/in", f"{tmp_path}/out", settings)
    assert (again.images, again.kept, again.bad) == (1, 1, 1)
    with refused("data/bad-images", error=StageFailure):
        predict_input(model, f"{tmp_path}/in", f"{tmp_path}/out", PredictSettings(format="geotiff"))


def test_a_large_tiff_is_a_scene_by_itself(scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kind_of(str(scene)) == "images"
    monkeypatch.setattr(input_parts, "MAX_IMAGE_PIXELS", 299_999)
    assert kind_of(str(scene)) == "scenes"


def test_scenes_are_always_cut_into_windows() -> None:
    taken = scene_protocol(TTASettings(flip=True), 14)
    assert (taken.window, taken.overlap, taken.flip) == ((504, 504), "hann", True)
    assert scene_protocol(WINDOWS, 8) == WINDOWS


def test_without_the_extra_a_line_says_what_to_install(
    model: ModelFiles, scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raster, "PACKAGE", "not_there")
    with refused("data/missing-package", "not_there", "pip install 'threestage[geo]'"):
        predict_input(model, str(scene), f"{tmp_path}/out", PredictSettings(format="geotiff"))
    with refused("data/missing-package", "pip install 'threestage[geo]'"):
        ingest(str(scene), f"{tmp_path}/set", IngestSettings(format="scenes"))


def test_on_a_cluster_too(model: ModelFiles, scene: Path, pixels: np.ndarray, tmp_path: Path) -> None:
    """What an actor of Ray does with its parts."""
    for name, content in model.items():
        storage.write_bytes(f"{tmp_path}/model/{name}", content)

    def run(files: ModelFiles, task: PredictionTask, parts: Sequence[Part]) -> Generator[FileReport]:
        predict_parts_there = ray_predict._open(f"{tmp_path}/model", task.model_dump(mode="json"))
        yield from predict_parts_there([part.model_dump_json() for part in parts])

    predict_input(model, str(scene), f"{tmp_path}/out", PredictSettings(format="geotiff", protocol=WINDOWS), run=run)
    with rasterio.open(tmp_path / "out/masks/a.tif") as mask:
        assert np.array_equal(mask.read(1), reference(model, pixels))


def test_masks_of_scenes_are_no_tasks_of_a_labelling_tool(model: ModelFiles, scene: Path, tmp_path: Path) -> None:
    predict_input(model, str(scene), str(tmp_path), PredictSettings(format="geotiff", protocol=WINDOWS))
    with refused("labels/scenes", tmp_path):
        predicted_masks(str(tmp_path), make_nothing)


def make_nothing(champion: Champion) -> PoolPredictions:
    raise AssertionError


def test_what_is_no_scene_is_refused(model: ModelFiles, scene: Path, tmp_path: Path) -> None:
    with refused("predict/scene-format"):
        predict_input(model, str(scene), f"{tmp_path}/out", PredictSettings(input_format="scenes", format="parquet"))
    (tmp_path / "in").mkdir()
    for name in ("a.tif", "a.tiff"):
        (tmp_path / "in" / name).write_bytes(scene.read_bytes())
    with refused("predict/same-name", "masks/a"):
        predict_input(model, f"{tmp_path}/in", f"{tmp_path}/out", PredictSettings(format="geotiff"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/a.png").write_bytes(b"")
    with refused("predict/no-images"):
        predict_input(model, f"{tmp_path}/other", f"{tmp_path}/out2", PredictSettings(format="geotiff"))
