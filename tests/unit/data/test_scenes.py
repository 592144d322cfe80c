"""Scenes are cut into tiles that overlap; their labels, their places and their splits go with them."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rasterio", reason="needs the extra geo: pip install 'threestage[geo]'")

from affine import Affine
from pydantic import ValidationError

from tests.geotiffs import CRS, PLACE, mosaic, write_geotiff
from tests.refusals import refused
from threestage.data.band_images import read_bands
from threestage.data.formats import IngestSettings
from threestage.data.ingest import IngestReport, ingest
from threestage.data.records import DataSettings, decode_image, decode_mask, labelled_rows, load_manifest
from threestage.data.rejects import read_rejects
from threestage.data.split import make_split
from threestage.data.storage import read_table

CLASS_MAP = "classes: [{name: field, colour: [1, 1, 1], ids: [1]}, {name: house, colour: [2, 2, 2], ids: [2]}]\n"


def labels_of(pixels: np.ndarray) -> np.ndarray:
    return np.where(pixels[:, :, 0] > 110, 2, 1).astype(np.uint8)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Two scenes of 200x180 pixels, the first with a corner of nodata, and their labels."""
    folder = tmp_path_factory.mktemp("scenes")
    found = {name: np.maximum(mosaic(200, 180, seed), 1) for seed, name in enumerate(("north/a", "b"))}
    found["north/a"][:90, :90] = 0
    for name, pixels in found.items():
        write_geotiff(folder / f"images/{name}.tif", pixels, nodata=0)
        write_geotiff(folder / f"labels/{name}_labels.tif", labels_of(pixels))
    (folder / "classes.yaml").write_text(CLASS_MAP)
    return {"": np.array(str(folder)), **found}


@pytest.fixture(scope="module")
def made(scenes: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> tuple[IngestReport, Path]:
    """The data set of their tiles."""
    out = tmp_path_factory.mktemp("set")
    return run(scenes, out, rows_per_file=8), out


def run(scenes: dict[str, np.ndarray], out: Path, **changes: Any) -> IngestReport:
    folder = str(scenes[""])
    given = {"masks": f"{folder}/labels", "mask_suffix": "_labels", "class_map": f"{folder}/classes.yaml"}
    settings = {"format": "scenes", "tile": 64, "tile_overlap": 16, **given, **changes}
    return ingest(f"{folder}/images", str(out), IngestSettings.model_validate(settings))


def places(out: Path) -> dict[str, dict[str, str]]:
    with open(out / "tiles.csv", newline="") as file:
        return {row["image_id"]: row for row in csv.DictReader(file)}


def test_tiles_their_masks_and_where_they_lie(scenes: dict[str, np.ndarray], made: tuple[IngestReport, Path]) -> None:
    report, out = made
    rows = labelled_rows(str(out), report.manifest, "train").to_pylist()
    tiles = places(out)
    assert len(rows) == len(tiles) == report.added_labels and report.bad == 0
    seen = {name: np.zeros((200, 180), np.uint8) for name in scenes if name}
    for row in rows:
        tile = tiles[row["image_id"]]
        pixels, left, top = scenes[tile["group"]], int(tile["column"]), int(tile["row"])
        box = slice(top, top + 64), slice(left, left + 64)
        assert np.array_equal(decode_image(row["image"]), pixels[box]), row["image_id"]
        expected = labels_of(pixels)[box] - 1
        expected[(pixels[box] == 0).all(2)] = 255
        assert np.array_equal(decode_mask(row["mask"]), expected), "nodata is ignored"
        assert row["source"] == f"{tile['scene']}#{left},{top},64,64"
        assert (tile["crs"], tile["scene"].rsplit("/", 1)[-1]) == (CRS, f"{tile['group'].rsplit('/', 1)[-1]}.tif")
        assert Affine(*map(float, tile["transform"].split())) == PLACE * Affine.translation(left, top)
        seen[tile["group"]][box] += 1
    assert (seen["b"] > 0).all() and seen["b"].max() == 4, "the tiles cover a scene, and overlap"
    assert not seen["north/a"][:40, :40].any(), "tiles that are more than half nodata are left out"
    assert any("nodata" in warning for warning in report.warnings)


def test_a_rerun_changes_nothing(scenes: dict[str, np.ndarray], made: tuple[IngestReport, Path]) -> None:
    first, out = made
    before = (out / "tiles.csv").stat().st_mtime_ns
    second = run(scenes, out, rows_per_file=8)
    assert second.manifest == first.manifest and (second.added_images, second.bad) == (0, 0)
    assert (out / "tiles.csv").stat().st_mtime_ns == before


def test_a_split_keeps_the_tiles_of_a_scene_together(made: tuple[IngestReport, Path]) -> None:
    report, out = made
    split = make_split(str(out), report.manifest, DataSettings(root=str(out), validation=0.5))
    sides = [{image_id.rpartition("/")[0] for image_id in ids} for ids in (split.labelled, split.validation)]
    assert sorted(map(sorted, sides)) == [["b"], ["north/a"]]
    own = DataSettings(root=str(out), validation=0.5, group=r"_x\d+")
    assert {i.rpartition("/")[0] for i in make_split(str(out), report.manifest, own).labelled} == {"b", "north/a"}


def test_polygons_as_labels(scenes: dict[str, np.ndarray], tmp_path: Path) -> None:
    def ring(left: int, top: int, right: int, bottom: int) -> list[list[float]]:
        corners = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
        return [list(PLACE * corner) for corner in corners]

    shapes = [("field", ring(0, 0, 64, 100)), ("house", ring(20, 30, 50, 64))]
    features = [
        {"properties": {"class": name}, "geometry": {"type": "Polygon", "coordinates": [corners]}}
        for name, corners in shapes
    ]
    crs = {"crs": {"type": "name", "properties": {"name": CRS}}}
    (tmp_path / "all.geojson").write_text(json.dumps({"features": features, **crs}))
    given = {"masks": f"{tmp_path}/all.geojson", "mask_suffix": ""}
    report = run(scenes, tmp_path / "ignored", **given)
    masks = _masks(tmp_path / "ignored", report)
    expected = np.zeros((64, 64), np.uint8)
    expected[30:, 20:50] = 1
    assert np.array_equal(masks["b/y000000_x000000"], expected)
    assert 0 < report.added_labels < report.added_images, "a tile without a polygon is unlabelled"
    report = run(scenes, tmp_path / "field", **given, unlabelled_pixels="field")
    assert report.added_labels == report.added_images
    assert not _masks(tmp_path / "field", report)["b/y000136_x000116"].any()


def _masks(root: Path, report: IngestReport) -> dict[str, np.ndarray]:
    rows = labelled_rows(str(root), report.manifest, "train").to_pylist()
    return {row["image_id"]: decode_mask(row["mask"]) for row in rows}


def test_tiles_of_more_bands_keep_their_numbers(scenes: dict[str, np.ndarray], tmp_path: Path) -> None:
    pytest.importorskip("tifffile", reason="needs the extra geo: pip install 'threestage[geo]'")
    pytest.importorskip("imagecodecs", reason="needs the extra geo: pip install 'threestage[geo]'")
    deep = np.dstack([scenes["b"], scenes["b"][:, :, :1]]).astype(np.uint16) * 100
    write_geotiff(tmp_path / "in/a.tif", deep, photometric="MINISBLACK")
    settings = IngestSettings(format="scenes", tile=64, bands=4)
    report = ingest(f"{tmp_path}/in", f"{tmp_path}/out", settings)
    assert report.bad == 0 and report.manifest.bands is not None and report.manifest.bands.count == 4
    rows = read_table(f"{tmp_path}/out/{report.manifest.files[0].path}").to_pylist()
    tiles = places(tmp_path / "out")
    for row in rows:
        left, top = (int(tiles[row["image_id"]][key]) for key in ("column", "row"))
        assert np.array_equal(read_bands(row["image"], 4), deep[top : top + 64, left : left + 64])


def test_unlabelled_scenes_of_any_size(scenes: dict[str, np.ndarray], tmp_path: Path) -> None:
    write_geotiff(tmp_path / "in/small.tif", scenes["b"][:40, :50])
    settings = IngestSettings(format="scenes")
    report = ingest(f"{tmp_path}/in", f"{tmp_path}/out", settings)
    assert (report.added_images, report.labelled) == (1, 0)
    sizes = report.manifest.sizes
    assert (sizes.max_height, sizes.max_width) == (40, 50)


def test_scenes_that_cannot_be_used_are_bad_files(scenes: dict[str, np.ndarray], tmp_path: Path) -> None:
    folder, pixels = str(scenes[""]), scenes["b"]
    for name in ("moved", "values", "broken", "float"):
        write_geotiff(tmp_path / f"in/{name}.tif", pixels)
    write_geotiff(tmp_path / "labels/moved.tif", labels_of(pixels), transform=PLACE * Affine.translation(3, 0))
    write_geotiff(tmp_path / "labels/values.tif", labels_of(pixels) + 5)
    write_geotiff(tmp_path / "labels/float.tif", labels_of(pixels).astype(np.float32))
    write_geotiff(tmp_path / "in/good.tif", pixels)
    write_geotiff(tmp_path / "labels/good.tif", labels_of(pixels))
    (tmp_path / "in/broken.tif").write_bytes(b"II*\0 no tiff")
    given = {"masks": f"{tmp_path}/labels", "class_map": f"{folder}/classes.yaml", "max_bad_fraction": 1}
    settings = IngestSettings.model_validate({"format": "scenes", "tile": 200, **given})
    report = ingest(f"{tmp_path}/in", f"{tmp_path}/out", settings)
    reasons = {reject.image_id.split("/")[0]: reject.reason for reject in read_rejects(report.rejects_uri or "")}
    codes = {name: reason.rpartition("[")[2].rstrip("]") for name, reason in reasons.items()}
    assert codes == {
        "moved": "mask/size", "values": "mask/unknown-value", "broken": "image/undecodable", "float": "mask/layout",
    }  # fmt: skip
    assert load_manifest(f"{tmp_path}/out").counts["train"].labelled == 1


def test_wrong_settings_and_sources_are_refused(scenes: dict[str, np.ndarray], tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"tile=64: .*\[data/format-option\]"):
        IngestSettings(format="images", tile=64)
    with pytest.raises(ValidationError, match=r"tile_overlap=64: .*\[data/format-option\]"):
        IngestSettings(format="scenes", tile=64, tile_overlap=64)
    with refused("data/no-pair", "b.geojson"):
        run(scenes, tmp_path / "out", mask_suffix="")
    with refused("class-map/missing", "scenes"):
        run(scenes, tmp_path / "out", class_map=None)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/a.png").write_bytes(b"")
    with refused("data/no-images", "empty"):
        ingest(f"{tmp_path}/empty", f"{tmp_path}/out", IngestSettings(format="scenes"))
