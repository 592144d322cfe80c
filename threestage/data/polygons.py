"""Polygons of a GeoJSON file as labels of the pixels of a TIFF image (extra `geo`).

A pixel belongs to a polygon when its centre does; where polygons overlap, the later feature wins.
"""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from threestage import IGNORE_INDEX
from threestage.data import storage
from threestage.data.classes import ClassMap
from threestage.data.raster import Raster, gdal_environment, open_raster
from threestage.errors import InputError

POLYGON_SUFFIXES = frozenset({".geojson", ".json"})
CATEGORY_KEYS = ("class", "label", "category", "name")
DEFAULT_CRS = "OGC:CRS84"
"""Longitude and latitude, what GeoJSON means where it names no other."""
CODE = "labels/geojson"

Box = tuple[slice, slice]
"""Rows and columns of an image."""


class Polygon(NamedTuple):
    """`category`: name or number of its class. `rings` (n,2): (x,y) in pixels of the image, the outer one first; `first` and
    `last`: the corners of the box around it."""

    category: str | int
    rings: list[npt.NDArray[np.float64]]
    first: tuple[float, float]
    last: tuple[float, float]


@lru_cache(maxsize=8)
def polygons_on(uri: str, image_uri: str, stamp: str) -> list[Polygon]:
    """The polygons of a file in pixels of an image, in their order. `stamp`: another one where a file has changed.

    Raises InputError where the file is no GeoJSON with polygons of a category each, or lies in a reference system that the
    image has not.
    """
    with open_raster(image_uri) as raster:
        return read_polygons(uri, raster)


def read_polygons(uri: str, raster: Raster) -> list[Polygon]:
    """As `polygons_on`, of an open image."""
    found = storage.read_json(uri, dict[str, Any])
    features = storage.shaped(found.get("features"), list[dict[str, Any]], f"{uri}: features")
    named = _named_crs(found, uri)
    if raster.crs is None and named is not None:
        raise InputError(
            f"{uri}: its polygons lie in {named}, and the image says not where it lies; give pixels (x, y), or a GeoTIFF",
            CODE,
        )
    polygons = [
        Polygon(_category(feature, uri), rings, _corner(rings, min), _corner(rings, max))
        for feature in features
        for rings in _rings(feature, uri, raster, named or DEFAULT_CRS)
    ]
    if not polygons:
        raise InputError(f"{uri}: holds no Polygon and no MultiPolygon; check the export", CODE)
    return polygons


def _named_crs(found: dict[str, Any], uri: str) -> str | None:
    """That of the member `crs`, which older GeoJSON has."""
    if found.get("crs") is None:
        return None
    return str(storage.shaped(found["crs"], dict[str, Any], f"{uri}: crs").get("properties", {}).get("name"))


def _category(feature: dict[str, Any], uri: str) -> str | int:
    properties = storage.shaped(feature.get("properties") or {}, dict[str, Any], f"{uri}: properties")
    for key in CATEGORY_KEYS:
        value = properties.get(key)
        if isinstance(value, str | int) and not isinstance(value, bool):
            return value
    raise InputError(
        f"{uri}: a polygon has no class in its properties ({', '.join(properties) or 'it has none'}); give one of "
        f"{', '.join(CATEGORY_KEYS)}",
        CODE,
    )


def _rings(feature: dict[str, Any], uri: str, raster: Raster, crs: str) -> list[list[npt.NDArray[np.float64]]]:
    """Of each polygon of a feature, in pixels."""
    geometry: dict[str, Any] = feature.get("geometry") or {}
    kind, coordinates = geometry.get("type"), geometry.get("coordinates") or []
    if kind not in ("Polygon", "MultiPolygon"):
        return []
    try:
        polygons = [coordinates] if kind == "Polygon" else coordinates
        rings = [[np.array([point[:2] for point in ring], np.float64) for ring in polygon] for polygon in polygons]
        found = [[_in_pixels(ring, raster, crs) for ring in polygon] for polygon in rings if polygon]
    except (TypeError, ValueError, IndexError) as error:
        raise InputError(f"{uri}: a {kind} has odd coordinates ({error}); check the export", CODE) from None
    return found


def _in_pixels(ring: npt.NDArray[np.float64], raster: Raster, crs: str) -> npt.NDArray[np.float64]:
    from rasterio.warp import transform

    if ring.ndim != 2 or len(ring) < 4 or not np.isfinite(ring).all():
        raise ValueError("a ring is no list of 4 or more points")
    x, y = ring.T
    if raster.crs is not None:
        with gdal_environment():
            x, y = (np.array(values) for values in transform(crs, raster.crs, x, y))
    pixels = np.stack(~raster.transform * (x, y), axis=1)
    if not np.isfinite(pixels).all():
        raise ValueError(f"outside of {raster.crs}")
    return pixels


def _corner(rings: list[npt.NDArray[np.float64]], end: Any) -> tuple[float, float]:
    """Of the box around the outer ring."""
    return end(rings[0][:, 0]), end(rings[0][:, 1])


def class_ids_of(polygons: Sequence[Polygon], class_map: ClassMap, uri: str) -> dict[str | int, int]:
    """Category → class id: by the names and `categories` of the map, numbers by its `ids`. Raises InputError that lists every
    category which the map does not name."""
    ids: dict[str | int, int] = {}
    for number, entry in enumerate(class_map.classes):
        ids |= dict.fromkeys((*entry.category_names, *entry.ids), number)
    ids |= dict.fromkeys((*class_map.ignore.categories, *class_map.ignore.ids), IGNORE_INDEX)
    counts = Counter(polygon.category for polygon in polygons)
    if unknown := [f"{name} ({count} polygons)" for name, count in counts.most_common() if name not in ids]:
        raise InputError(
            f"{uri}: categories that are no class: {', '.join(unknown)}; name them in the class map, as a class, under the "
            "`categories` of one, or under `ignore: {categories: [NAME]}`",
            "class-map/unknown-categories",
        )
    return ids


def burn(polygons: Sequence[Polygon], ids: dict[str | int, int], box: Box, unlabelled: int) -> npt.NDArray[np.uint8]:
    """uint8 (H,W) class ids of a part of the image; `unlabelled` where no polygon is."""
    from affine import Affine
    from rasterio.features import rasterize

    rows, columns = box
    shapes = [
        ({"type": "Polygon", "coordinates": [ring.tolist() for ring in polygon.rings]}, ids[polygon.category])
        for polygon in polygons
        if polygon.first[0] < columns.stop
        and polygon.last[0] > columns.start
        and polygon.first[1] < rows.stop
        and polygon.last[1] > rows.start
    ]
    size = (rows.stop - rows.start, columns.stop - columns.start)
    if not shapes:
        return np.full(size, unlabelled, np.uint8)
    with gdal_environment():
        place = Affine.translation(columns.start, rows.start)
        burnt: npt.NDArray[np.uint8] = rasterize(shapes, size, fill=unlabelled, transform=place, dtype="uint8")
    return burnt
