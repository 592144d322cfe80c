"""Polygons of a GeoJSON file as labels of the pixels of a TIFF image (extra `geo`).

A pixel belongs to a polygon when its centre does; where polygons overlap, the later feature wins.
"""

from collections import Counter
from functools import lru_cache
from itertools import accumulate
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

Points = npt.NDArray[np.float64]
Box = tuple[slice, slice]
"""Rows and columns of an image."""


class Polygons(NamedTuple):
    """`categories`: of each polygon, the name or number of its class. `rings`: of each (n,2), x and y in pixels of the image, the
    outer one first. `boxes` (N,4): left, top, right and bottom of each. `different`: the categories, each once."""

    categories: list[str | int]
    rings: list[list[Points]]
    boxes: Points
    different: frozenset[str | int]


@lru_cache(maxsize=8)
def polygons_on(uri: str, image_uri: str, stamp: str) -> Polygons:
    """The polygons of a file on an image, in their order. `stamp`: another one where a file has changed.

    Raises InputError where the file is no GeoJSON with polygons of a category each, or lies in a reference system that the
    image has not.
    """
    with open_raster(image_uri) as raster:
        return read_polygons(uri, raster)


def read_polygons(uri: str, raster: Raster) -> Polygons:
    """As `polygons_on`, of an open image."""
    found = storage.read_json(uri, dict[str, Any])
    features = storage.shaped(found.get("features"), list[dict[str, Any]], f"{uri}: features")
    named = _named_crs(found, uri)
    if raster.crs is None and named is not None:
        raise InputError(
            f"{uri}: its polygons lie in {named}, and the image says not where it lies; give pixels (x, y), or a GeoTIFF",
            CODE,
        )
    polygons = [(_category(feature, uri), rings) for feature in features for rings in _rings(feature, uri)]
    if not polygons:
        raise InputError(f"{uri}: holds no Polygon and no MultiPolygon; check the export", CODE)
    points = np.concatenate([ring for _, rings in polygons for ring in rings])
    ends = iter(accumulate(len(ring) for _, rings in polygons for ring in rings))
    pixels = _in_pixels(points, raster, named or DEFAULT_CRS, uri)
    placed = [[pixels[(end := next(ends)) - len(ring) : end] for ring in rings] for _, rings in polygons]
    boxes = np.array([(*rings[0].min(0), *rings[0].max(0)) for rings in placed])
    categories = [category for category, _ in polygons]
    return Polygons(categories, placed, boxes, frozenset(categories))


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


def _rings(feature: dict[str, Any], uri: str) -> list[list[Points]]:
    """Of each polygon of a feature, as they stand there."""
    geometry: dict[str, Any] = feature.get("geometry") or {}
    kind, coordinates = geometry.get("type"), geometry.get("coordinates") or []
    if kind not in ("Polygon", "MultiPolygon"):
        return []
    try:
        polygons = [coordinates] if kind == "Polygon" else coordinates
        found = [[np.array([point[:2] for point in ring], np.float64) for ring in polygon] for polygon in polygons]
        if not all(ring.ndim == 2 and len(ring) >= 4 and np.isfinite(ring).all() for rings in found for ring in rings):
            raise ValueError("a ring is no list of 4 or more points")
    except (TypeError, ValueError, IndexError) as error:
        raise InputError(f"{uri}: a {kind} has odd coordinates ({error}); check the export", CODE) from None
    return [rings for rings in found if rings]


def _in_pixels(points: Points, raster: Raster, crs: str, uri: str) -> Points:
    """Points (n,2) of a reference system, on the image. Raises InputError where they have no place there."""
    from rasterio.errors import CRSError, RasterioError
    from rasterio.warp import transform

    x, y = points.T
    if raster.crs is not None:
        try:
            with gdal_environment():
                x, y = (np.array(values) for values in transform(crs, raster.crs, x, y))
        except (CRSError, RasterioError) as error:
            raise InputError(f"{uri}: lies in {crs}, which cannot be read ({error}); name another", CODE) from None
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise InputError(f"{uri}: has points of {crs} without a place in {raster.crs}; check the export", CODE)
    pixels: Points = np.stack(~raster.transform * (x, y), axis=1)
    return pixels


def class_ids_of(polygons: Polygons, class_map: ClassMap, uri: str) -> dict[str | int, int]:
    """Category → class id: by the names and `categories` of the map, numbers by its `ids`. Raises InputError that lists every
    category which the map does not name."""
    ids: dict[str | int, int] = {}
    for number, entry in enumerate(class_map.classes):
        ids |= dict.fromkeys((*entry.category_names, *entry.ids), number)
    ids |= dict.fromkeys((*class_map.ignore.categories, *class_map.ignore.ids), IGNORE_INDEX)
    if not ids.keys() >= polygons.different:
        counts = Counter(polygons.categories)
        unknown = ", ".join(f"{name} ({count} polygons)" for name, count in counts.most_common() if name not in ids)
        raise InputError(
            f"{uri}: categories that are no class: {unknown}; name them in the class map, as a class, under the "
            "`categories` of one, or under `ignore: {categories: [NAME]}`",
            "class-map/unknown-categories",
        )
    return ids


def burn(polygons: Polygons, ids: dict[str | int, int], box: Box, unlabelled: int) -> npt.NDArray[np.uint8]:
    """uint8 (H,W) class ids of a part of the image; `unlabelled` where no polygon is."""
    from affine import Affine
    from rasterio.features import rasterize

    rows, columns = box
    left, top, right, bottom = polygons.boxes.T
    near = (left < columns.stop) & (right > columns.start) & (top < rows.stop) & (bottom > rows.start)
    shapes = [
        ({"type": "Polygon", "coordinates": [ring.tolist() for ring in polygons.rings[n]]}, ids[polygons.categories[n]])
        for n in np.flatnonzero(near).tolist()
    ]
    size = (rows.stop - rows.start, columns.stop - columns.start)
    if not shapes:
        return np.full(size, unlabelled, np.uint8)
    with gdal_environment():
        place = Affine.translation(columns.start, rows.start)
        burnt: npt.NDArray[np.uint8] = rasterize(shapes, size, fill=unlabelled, transform=place, dtype="uint8")
    return burnt
