"""Scenes: TIFF images that are cut into tiles, since they are too large to train on whole (format `scenes`, extra `geo`).

A tile is named by its place, as SCENE.tif#column,row,width,height, and read when its shard is written. Its id is the scene's
path and that place. Labels are TIFFs on the scene's grid, or GeoJSON polygons.

root/tiles.csv    where every tile lies, and its scene as its group: a split keeps the tiles of a scene together
"""

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from threestage import IGNORE_INDEX
from threestage.data import safe_walk, storage
from threestage.data.classes import Lookup
from threestage.data.formats import TILE, IngestSettings, SourceItem, Stamps, files_below, passed_over, suffix_of
from threestage.data.headers import BadImage
from threestage.data.image_validation import BadFile, known_classes
from threestage.data.pairs import Paths, stems
from threestage.data.polygons import POLYGON_SUFFIXES, burn, class_ids_of, polygons_on
from threestage.data.raster import TIFF_SUFFIXES, Raster, open_raster, refuse_missing_rasterio, tiff_of, window_starts
from threestage.errors import InputError

SCENES = "scenes"
TILES_NAME = "tiles.csv"
COLUMNS = ("image_id", "group", "scene", "column", "row", "width", "height", "crs", "transform")
LEAST_VALID = 0.5
"""Share of a tile that must be data."""
PLACE = re.compile(r"(?P<uri>.+\.tiff?)#(?P<column>\d+),(?P<row>\d+),(?P<width>\d+),(?P<height>\d+)", re.IGNORECASE)
SHOWN = 3

Box = tuple[slice, slice]
Row = dict[str, str | int]


class Tile(NamedTuple):
    """A tile's pixels: encoded, and as they are for its digest."""

    encoded: bytes
    pixels: bytes


def is_tile(uri: str) -> bool:
    return PLACE.fullmatch(uri) is not None


def _place_of(uri: str) -> tuple[str, Box]:
    found = PLACE.fullmatch(uri)
    assert found is not None
    column, row, width, height = (int(found[name]) for name in ("column", "row", "width", "height"))
    return found["uri"], (slice(row, row + height), slice(column, column + width))


# ---- The tiles of a source


def list_tiles(source: str, settings: IngestSettings, notes: list[str]) -> tuple[list[SourceItem], list[Row]]:
    """The tiles of all scenes, and where each lies. Opens every scene; reads those with nodata once.

    Adds to `notes` what the user should know. Raises InputError where there is no scene, or labels fit none.
    """
    refuse_missing_rasterio("format=scenes")
    paths, stamps = files_below(source, "TIFF images")
    labels = Paths() if settings.masks is None else _label_files(settings.masks, stamps)
    scenes = {
        path: uri for path, uri in paths.items() if suffix_of(path) in TIFF_SUFFIXES and uri not in labels.values()
    }
    if not scenes:
        raise InputError(f"{source}: no TIFF image below it; files in .tif or .tiff are expected", "data/no-images")
    notes += passed_over(source, Counter(map(suffix_of, paths)), TIFF_SUFFIXES | POLYGON_SUFFIXES)
    partners = _partners(source, scenes, labels, settings)
    items, rows, blank = list[SourceItem](), list[Row](), 0
    for path, uri in scenes.items():
        scene = _Scene(path, uri, partners.get(path), _stamp(stamps, [uri, partners.get(path)], settings))
        problem = safe_walk.WHY_NOT.get(stamps.get(uri, (0,))[0])
        try:
            if problem is not None:
                raise BadImage(problem, "image/place")
            found, without = scene.tiles(settings)
        except (BadImage, BadFile) as error:
            items.append(SourceItem(scene.name, uri, None, settings.split, problem=str(error)))
            continue
        items += [item for item, _ in found]
        rows += [row for _, row in found]
        blank += without
    if blank:
        notes.append(f"{source}: {blank} tiles are more than half nodata and left out")
    if settings.labelled_only:
        items = [item for item in items if item.mask_uri or item.problem]
    return items, rows


def _stamp(stamps: Stamps, uris: Sequence[str | None], settings: IngestSettings) -> str:
    return repr([*(stamps.get(uri or "") for uri in uris), settings.unlabelled_pixels])


def _label_files(masks: str, stamps: Stamps) -> Paths:
    paths, theirs = files_below(masks, "labels: TIFF images or GeoJSON")
    stamps.update(theirs)
    return Paths({path: uri for path, uri in paths.items() if suffix_of(path) in TIFF_SUFFIXES | POLYGON_SUFFIXES})


def _partners(source: str, scenes: Mapping[str, str], labels: Paths, settings: IngestSettings) -> dict[str, str]:
    """Path of a scene → URI of its labels: of its name, or the only file, where that is GeoJSON or there is one scene."""
    if settings.masks is None:
        return {}
    if len(labels) == 1 and storage.is_file(settings.masks):
        (path, uri), *_ = labels.items()
        if len(scenes) == 1 or suffix_of(path) in POLYGON_SUFFIXES:
            return dict.fromkeys(scenes, uri)
    named = stems(labels, TIFF_SUFFIXES | POLYGON_SUFFIXES)
    wanted = {path: f"{_stem(path)}{settings.mask_suffix}" for path in scenes}
    found = {path: labels[named[name][0]] for path, name in wanted.items() if name in named}
    if not found:
        first = next(iter(wanted.values()))
        raise InputError(
            f"{settings.masks}: no labels there are named like an image in {source} (the first image needs {first}.tif or "
            f"{first}.geojson); rename them, or give --mask-suffix",
            "data/no-pair",
        )
    return found


def _stem(path: str) -> str:
    return path.removesuffix(PurePosixPath(path).suffix)


class _Scene(NamedTuple):
    """`path`: below the source. `labels`: URI of the TIFF or GeoJSON, None without labels. `stamp`: other if a file changed."""

    path: str
    uri: str
    labels: str | None
    stamp: str

    @property
    def name(self) -> str:
        return _stem(self.path)

    def tiles(self, settings: IngestSettings) -> tuple[list[tuple[SourceItem, Row]], int]:
        """Those with enough data, and how many have less. Raises BadImage, and BadFile where its labels do not fit."""
        with open_raster(self.uri) as raster:
            if self.labels is not None and suffix_of(self.labels) in TIFF_SUFFIXES:
                _refuse_labels(self.labels, raster)
            boxes = list(_boxes(raster, settings))
            kept = [box for box in boxes if not raster.has_nodata or raster.valid(*box).mean() >= LEAST_VALID]
            return [self._tile(box, raster, settings) for box in kept], len(boxes) - len(kept)

    def _tile(self, box: Box, raster: Raster, settings: IngestSettings) -> tuple[SourceItem, Row]:
        from affine import Affine

        rows, columns = box
        width, height = columns.stop - columns.start, rows.stop - rows.start
        place = f"#{columns.start},{rows.start},{width},{height}"
        image_id = f"{self.name}/y{rows.start:06d}_x{columns.start:06d}"
        mask = None if self.labels is None else f"{self.labels}{place}"
        item = SourceItem(image_id, f"{self.uri}{place}", mask, settings.split, stamp=self.stamp)
        transform = raster.transform * Affine.translation(columns.start, rows.start)
        row: Row = {
            "image_id": image_id,
            "group": self.name,
            "scene": self.uri,
            "column": columns.start,
            "row": rows.start,
            "width": width,
            "height": height,
            "crs": "" if raster.crs is None else raster.crs.to_string(),
            "transform": " ".join(map(repr, transform[:6])),
        }
        return item, row


def _boxes(raster: Raster, settings: IngestSettings) -> Iterator[Box]:
    side = settings.tile or TILE
    step = side - (side // 8 if settings.tile_overlap is None else settings.tile_overlap)
    for top in window_starts(raster.height, side, step):
        for left in window_starts(raster.width, side, step):
            yield slice(top, min(top + side, raster.height)), slice(left, min(left + side, raster.width))


def _refuse_labels(uri: str, raster: Raster) -> None:
    name = uri.rsplit("/", 1)[-1]
    try:
        with open_raster(uri) as labels:
            if labels.is_lossy:
                raise BadFile(f"mask {name} is compressed with loss, which may change ids: save it anew", "mask/lossy")
            if labels.dtype.kind not in "ui" or labels.bands not in (1, 3):
                raise BadFile(
                    f"mask {name} holds {labels.bands} bands of {labels.dtype}: save ids or RGB", "mask/layout"
                )
            if not labels.same_grid(raster):
                raise BadFile(
                    f"mask {name} has {labels.width}x{labels.height} pixels and lies elsewhere than its image of "
                    f"{raster.width}x{raster.height}: save it on the image's grid",
                    "mask/size",
                )
    except BadImage as error:
        raise BadFile(f"mask {name} {error.message}", error.code) from None


# ---- What is read of a tile


def read_tile(uri: str, bands: int | None) -> Tile:
    """A tile as PNG, of `bands` as TIFF; without data it is black. Raises BadImage, and OSError where the store fails."""
    scene, box = _place_of(uri)
    with open_raster(scene) as raster:
        pixels = raster.read_pixels(*box, bands)
    if bands is not None:
        return Tile(tiff_of(pixels), pixels.tobytes())
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG", compress_level=1)
    return Tile(stream.getvalue(), pixels.tobytes())


def read_tile_mask(item: SourceItem, lookup: Lookup, unlabelled: int) -> npt.NDArray[np.uint8]:
    """uint8 (H,W) class ids of a tile's labels; 255 where the image or its labels have no data. `unlabelled`: the class of
    pixels without a polygon. Raises BadFile, and InputError for a damaged GeoJSON."""
    assert item.mask_uri is not None
    scene, box = _place_of(item.image_uri)
    labels = item.mask_uri.rpartition("#")[0]
    with open_raster(scene) as raster:
        valid = raster.valid(*box)
    if suffix_of(labels) in POLYGON_SUFFIXES:
        polygons = polygons_on(labels, scene, item.stamp)
        ids = burn(polygons, class_ids_of(polygons, lookup.class_map, labels), box, unlabelled)
    else:
        with open_raster(labels) as raster:
            values = raster.read_rgb(*box) if raster.has_palette and lookup.only_colours else raster.read(*box)
            valid &= raster.valid(*box)
        ids = _class_ids(values if values.shape[2] == 3 else values[:, :, 0], valid, lookup, labels.rsplit("/", 1)[-1])
    ids[~valid] = IGNORE_INDEX
    return ids


def _class_ids(
    values: npt.NDArray[Any], valid: npt.NDArray[np.bool_], lookup: Lookup, name: str
) -> npt.NDArray[np.uint8]:
    """Of ids (H,W) or colours (H,W,3); what is not valid need not be in the class map."""
    if not valid.any():
        return np.full(valid.shape, IGNORE_INDEX, np.uint8)
    _, known = lookup.targets(values)
    values[~valid] = values[valid & known][0] if (valid & known).any() else values[valid][0]
    return known_classes(values, lookup, name)


# ---- Where the tiles lie


def write_tiles(root: str, rows: Sequence[Row]) -> None:
    """Add the places of tiles to those that the data set has."""
    uri = storage.join(root, TILES_NAME)
    there = {row["image_id"]: row for row in _read_rows(root)}
    there |= {str(row["image_id"]): {key: str(value) for key, value in row.items()} for row in rows}
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, COLUMNS)
    writer.writeheader()
    writer.writerows(there[image_id] for image_id in sorted(there))
    content = stream.getvalue().encode()
    if not storage.exists(uri) or storage.read_bytes(uri) != content:
        storage.write_bytes(uri, content)


def scenes_of(root: str, image_ids: Sequence[str]) -> dict[str, str]:
    """The scene of each image, of other images than tiles its id; empty for a data set without tiles."""
    scenes = {row["image_id"]: row["group"] for row in _read_rows(root)}
    return {image_id: scenes.get(image_id, image_id) for image_id in image_ids} if scenes else {}


def _read_rows(root: str) -> list[dict[str, str]]:
    uri = storage.join(root, TILES_NAME)
    if not storage.exists(uri):
        return []
    rows = csv.DictReader(storage.read_lines(uri))
    if tuple(rows.fieldnames or ()) != COLUMNS:
        raise InputError(f"{uri}: is damaged; ingest the images again", "data/damaged-file")
    return list(rows)
