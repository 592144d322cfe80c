"""GeoJSON polygons become the labels of an image's pixels, wherever both say that they lie."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rasterio", reason="needs the extra geo: pip install 'threestage[geo]'")

from tests.geotiffs import CRS, PLACE, write_geotiff
from tests.refusals import refused
from threestage.data.classes import ClassEntry, ClassMap, Ignored
from threestage.data.polygons import burn, class_ids_of, polygons_on

CLASSES = ClassMap(
    classes=(ClassEntry(name="field", colour=(1, 1, 1)), ClassEntry(name="house", colour=(2, 2, 2), ids=(7,))),
    ignore=Ignored(categories=("cloud",)),
)
WHOLE = slice(0, 60), slice(0, 80)


def square(left: float, top: float, right: float, bottom: float) -> list[list[float]]:
    return [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]


def feature(category: object, *rings: list[Any], key: str = "class") -> dict[str, Any]:
    return {
        "type": "Feature",
        "properties": {key: category},
        "geometry": {"type": "Polygon", "coordinates": list(rings)},
    }


def write(path: Path, *features: dict[str, Any], **others: Any) -> str:
    path.write_text(json.dumps({"type": "FeatureCollection", "features": list(features), **others}))
    return str(path)


@pytest.fixture
def image(tmp_path: Path) -> str:
    return str(write_geotiff(tmp_path / "image.tif", np.zeros((60, 80, 3), np.uint8)))


@pytest.fixture
def plain(tmp_path: Path) -> str:
    return str(write_geotiff(tmp_path / "plain.tif", np.zeros((60, 80, 3), np.uint8), crs=None, transform=None))


def expected() -> np.ndarray:
    """A field with a hole, and a house over its corner."""
    ids = np.full((60, 80), 255, np.uint8)
    ids[10:30, 20:60] = 0
    ids[15:20, 30:40] = 255
    ids[25:40, 50:70] = 1
    return ids


SHAPES = (("field", square(20, 10, 60, 30), square(30, 15, 40, 20)), (7, square(50, 25, 70, 40)))


def test_pixels_of_an_image_without_a_place(tmp_path: Path, plain: str) -> None:
    uri = write(tmp_path / "a.geojson", *(feature(*shape) for shape in SHAPES))
    polygons = polygons_on(uri, plain, "")
    ids = class_ids_of(polygons, CLASSES, uri)
    assert np.array_equal(burn(polygons, ids, WHOLE, 255), expected())
    part = slice(12, 44), slice(33, 55)
    assert np.array_equal(burn(polygons, ids, part, 255), expected()[part])
    assert (burn(polygons, ids, (slice(50, 60), slice(0, 10)), 1) == 1).all(), "unlabelled pixels may be a class"


def test_longitude_and_latitude_and_named_systems(tmp_path: Path, image: str) -> None:
    from rasterio.warp import transform

    def placed(to: str, ring: list[list[float]]) -> list[list[float]]:
        x, y = zip(*(PLACE * point for point in ring), strict=True)
        return [list(point) for point in zip(*transform(CRS, to, x, y), strict=True)]

    for name, to, others in (
        ("world", "OGC:CRS84", {}),
        ("utm", CRS, {"crs": {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32633"}}}),
    ):
        shapes = [feature(category, *(placed(to, ring) for ring in rings)) for category, *rings in SHAPES]
        polygons = polygons_on(write(tmp_path / f"{name}.geojson", *shapes, **others), image, "")
        assert np.array_equal(burn(polygons, {"field": 0, 7: 1}, WHOLE, 255), expected()), name


def test_several_polygons_of_one_feature_and_what_is_ignored(tmp_path: Path, plain: str) -> None:
    both = {
        "properties": {"name": "cloud"},
        "geometry": {"type": "MultiPolygon", "coordinates": [[square(0, 0, 9, 9)], [square(70, 50, 80, 60)]]},
    }
    point = {"properties": {}, "geometry": {"type": "Point", "coordinates": [1, 1]}}
    uri = write(tmp_path / "a.geojson", feature("house", square(0, 0, 80, 60), key="label"), point, both)
    polygons = polygons_on(uri, plain, "")
    ids = burn(polygons, class_ids_of(polygons, CLASSES, uri), WHOLE, 0)
    assert (ids[:9, :9] == 255).all() and (ids[50:, 70:] == 255).all() and (ids == 1).sum() == 60 * 80 - 81 - 100


def test_what_cannot_be_labels_is_refused(tmp_path: Path, plain: str) -> None:
    good = square(0, 0, 9, 9)
    unknown = polygons_on(write(tmp_path / "unknown.geojson", feature("barn", good)), plain, "")
    with refused("class-map/unknown-categories", "barn (1 polygons)"):
        class_ids_of(unknown, CLASSES, "unknown.geojson")
    for name, features, others in (
        ("empty", [], {}),
        ("no-class", [feature(None, good)], {}),
        ("odd", [feature("field", [[0, 0], "x"])], {}),
        ("line", [feature("field", good[:2])], {}),
        ("infinite", [feature("field", [*good[:3], [1e999, 0]])], {}),
        ("placed", [feature("field", good)], {"crs": {"properties": {"name": CRS}}}),
    ):
        with refused("labels/geojson", name):
            polygons_on(write(tmp_path / f"{name}.geojson", *features, **others), plain, "")
