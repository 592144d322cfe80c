"""What a prediction job reads, cut into parts that are predicted apart from each other: image files below a folder or a
prefix, which are listed first; a data set of `threestage ingest`; Parquet files with a column `image` of bytes; or scenes,
TIFF images that are read by windows, each a part of its own.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate, chain, repeat
from pathlib import PurePosixPath
from typing import Literal

import numpy as np
import numpy.typing as npt

from threestage.data import safe_walk, storage
from threestage.data.formats import files_below, suffix_of
from threestage.data.headers import BadImage
from threestage.data.listing import Each, first_image, holds_data_set, is_image_file, list_images
from threestage.data.pairs import IMAGE_SUFFIXES
from threestage.data.parallel import map_ahead
from threestage.data.parquet import Damaged, ForeignParquet, RowGroup, is_bytes, read_own_groups, shown
from threestage.data.pool import (
    CHUNK_BYTES,
    FETCH_THREADS,
    PARQUET_SUFFIX,
    PoolFile,
    PoolRow,
    listed_pool,
    lost_rows,
    pool_row,
    read_pool_rows,
    unnamed,
    values_of,
)
from threestage.data.publish import id_hash
from threestage.data.raster import TIFF_SUFFIXES, is_rasterio_installed, open_raster
from threestage.data.records import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS, load_manifest
from threestage.errors import InputError

NAME_BYTES = 200  # of a file's or folder's name; file systems take 255
PATH_BYTES = 800  # of names and folders together; S3 takes 1024
ONE_ROW = 0  # bytes at a time: few of them may stand for gigabytes
ID_BYTES = 2**25  # of a batch of ids
OF_NAMES = ("image_id", "source")

Kind = Literal["images", "data set", "parquet", "scenes"]


class Part(PoolFile):
    """Some of the input's rows. `groups`: first and number of a Parquet file's row groups, where it is not a file of ours;
    `first_row`: the number of its first row in that file. `problem`: why a file of others cannot be used; it then is one
    bad row."""

    groups: tuple[int, int] | None = None
    first_row: int = 0
    problem: str | None = None

    @property
    def name(self) -> str:
        return f"{self.digest[:16]}{PARQUET_SUFFIX}"


def kind_of(source: str, wanted: Kind | None = None) -> Kind:
    """What an input is, or which of two it is `wanted` as. Looks at few files. Raises InputError where there is nothing to
    predict, and where images lie beside a data set."""
    if not storage.exists(source):
        raise InputError(
            f"{source}: not found; give an image, or the folder or prefix that holds images", "predict/not-found"
        )
    if wanted == "scenes":
        return wanted
    if storage.is_file(source):
        return _kind_of_file(source)
    if wanted is not None:
        return wanted
    found = first_image(source)
    if holds_data_set(source):
        if found:
            raise InputError(
                f"{source}: holds a data set (manifest.json) and images ({found}); give --input-format data-set or images",
                "predict/two-inputs",
            )
        return "data set"
    if not found and _parquet_files(source):
        return "parquet"
    if found is None:
        raise InputError(
            f"{source}: no images there, and no Parquet files; give the folder that holds them", "predict/no-images"
        )
    return "images"


def _kind_of_file(source: str) -> Kind:
    if source.endswith(PARQUET_SUFFIX):
        return "parquet"
    if is_image_file(source):
        return "scenes" if suffix_of(source) in TIFF_SUFFIXES and _is_too_large(source) else "images"
    expected = ", ".join(sorted(IMAGE_SUFFIXES))
    raise InputError(f"{source}: not an image ({expected}) and not a Parquet file; convert it", "predict/no-images")


def _is_too_large(uri: str) -> bool:
    """Whether a TIFF file is one that images of a folder are refused for, by its bytes or its pixels."""
    files, path = storage.filesystem(uri)
    if (files.get_file_info(path).size or 0) > MAX_IMAGE_BYTES:
        return True
    if not is_rasterio_installed():
        return False
    try:
        with open_raster(uri) as raster:
            return raster.height * raster.width > MAX_IMAGE_PIXELS
    except BadImage:
        return False


def plan_parts(source: str, kind: Kind, listing: str, rows_per_part: int, each: Each) -> list[Part]:
    """The parts of an input. Image files are listed into the folder `listing`, of which `each` does the ranges; a rerun
    adds what is new. Raises InputError, and OSError when the source cannot be listed."""
    if kind == "images":
        list_images(source, listing, rows_per_part, each)
        return [Part(**file.model_dump()) for file in listed_pool(listing)]
    if kind == "data set":
        files = [file for file in load_manifest(source).files if file.kind == "images"]
        parts = [Part(uri=storage.join(source, file.path), rows=file.rows, digest=file.digest) for file in files]
    elif kind == "scenes":
        parts = _scene_parts(source)
    else:
        found = map_ahead(partial(_parts_of, rows_per_part), _parquet_files(source), FETCH_THREADS)
        parts = list(chain.from_iterable(found))
    if not parts:
        raise InputError(f"{source}: it holds no row; give another input", "predict/empty-input")
    if all(part.problem is not None for part in parts):
        raise InputError(
            f"{parts[0].uri}: {parts[0].problem}; remove it, or rename or convert its columns", "predict/no-images"
        )
    return parts


def read_part(source: str, part: Part) -> Iterator[list[PoolRow]]:
    """The rows of a part in their order, in chunks; one without usable bytes says what is wrong. The source of a row of
    others' Parquet is URI#number."""
    if part.problem is not None:
        yield [PoolRow(path_below(source, part.uri), part.uri, b"", problem=f"{part.problem} [image/unreadable]")]
    elif part.groups is None:
        yield from read_pool_rows(part, masks=False)
    else:
        yield from _chunks(_rows_of_others(source, part))


def _rows_of_others(source: str, part: Part) -> Iterator[PoolRow]:
    name = path_below(source, part.uri)
    for group in _groups_of_others(part, ("image_id", "image"), ONE_ROW):
        if group.table is None:
            yield from chain.from_iterable(lost_rows(part.uri, name, group))
            continue
        (unnamed_id,), (image,) = unnamed(name, group), values_of(group.table, "image")
        (image_id,) = values_of(group.table, "image_id") if "image_id" in group.table.column_names else (None,)
        yield pool_row(unnamed_id, image_id, f"{part.uri}#{group.first}", image)


def _groups_of_others(part: Part, columns: Sequence[str], most_bytes: int) -> Iterator[RowGroup]:
    """The rows of a part of others' Parquet, as many at a time as fit into `most_bytes`."""
    assert part.groups is not None
    first, number = part.groups
    try:
        with ForeignParquet(part.uri) as parquet:
            there = [name for name in columns if name in parquet.schema.names]
            yield from parquet.groups(range(first, first + number), there, most_bytes)
    except (Damaged, FileNotFoundError, PermissionError) as error:  # since the parts were made
        yield RowGroup(part.first_row, part.rows, None, f"its file cannot be read: {error}")


def _chunks(rows: Iterable[PoolRow]) -> Iterator[list[PoolRow]]:
    """The rows, as many at a time as pool files have in a row group, or fewer where they are large."""
    chunk, size = list[PoolRow](), 0
    for row in rows:
        chunk.append(row)
        size += len(row.image)
        if len(chunk) == storage.ROW_GROUP_ROWS or size > CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def path_below(source: str, uri: str) -> str:
    """A file's path below the source; its name when it is the source."""
    below = uri.removeprefix(storage.absolute(source)).strip("/")
    return below or uri.rsplit("/", 1)[-1]


def _scene_parts(source: str) -> list[Part]:
    """A part for each TIFF. Raises InputError where two would be written to one file."""
    paths, stamps = files_below(source, "TIFF images")
    scenes = {path: uri for path, uri in paths.items() if suffix_of(path) in TIFF_SUFFIXES}
    if not scenes:
        raise InputError(f"{source}: no TIFF image below it; files in .tif or .tiff are expected", "predict/no-images")
    names = [safe_name(scene_id(path)) for path in scenes]
    if twins := [name for name, count in Counter(names).items() if count > 1]:
        raise InputError(f"{source}: two images would be written to masks/{twins[0]}; rename one", "predict/same-name")
    parts = []
    for uri in scenes.values():
        files, path = storage.filesystem(uri)
        info = files.get_file_info(path)
        problem = safe_walk.WHY_NOT.get(stamps.get(uri, (0,))[0])
        parts.append(Part(uri=uri, rows=1, digest=_digest(f"{uri}/{info.size}/{info.mtime_ns}"), problem=problem))
    return parts


def scene_id(path: str) -> str:
    return path.removesuffix(PurePosixPath(path).suffix)


# Parquet files of others


def _parquet_files(source: str) -> list[tuple[str, str | None]]:
    """URIs, and why a file cannot be read, where that is known; names that begin with _ or . are left out, as Parquet's
    readers do."""
    if source.endswith(PARQUET_SUFFIX) and storage.is_file(source):
        return [(storage.absolute(source), None)]
    below = len(storage.absolute(source))
    found = [file for file in _files_below(source) if file[0].endswith(PARQUET_SUFFIX)]
    return [file for file in found if not any(name.startswith(("_", ".")) for name in file[0][below:].split("/"))]


def _files_below(source: str) -> list[tuple[str, str | None]]:
    if storage.is_s3(source):
        return [(uri, None) for uri in storage.list_files(source)]
    folder = storage.absolute(source)
    entries = filter(None, (safe_walk.entry(folder, path) for path in safe_walk.walk(folder)))
    return [(storage.join(folder, entry.path), safe_walk.WHY_NOT.get(entry.size)) for entry in entries]


def _parts_of(rows_per_part: int, file: tuple[str, str | None]) -> list[Part]:
    """A file's row groups in runs of about `rows_per_part` rows; more where one group has more."""
    uri, problem = file
    if problem is not None:
        return [Part(uri=uri, rows=1, digest=_digest(f"{uri}/{problem}"), problem=problem)]
    files, path = storage.filesystem(uri)
    info = files.get_file_info(path)
    content = f"{uri}/{info.size}/{info.mtime_ns}"
    try:
        sizes = _group_sizes(uri)
    except (Damaged, FileNotFoundError, PermissionError) as error:
        return [Part(uri=uri, rows=1, digest=_digest(f"{content}/{error}"), problem=str(error))]
    parts, first, first_row = list[Part](), 0, 0
    for end, row in enumerate(accumulate(sizes), 1):
        if row - first_row >= rows_per_part or (end == len(sizes) and row > first_row):
            digest, groups = _digest(f"{content}/{first}/{end}"), (first, end - first)
            parts.append(Part(uri=uri, rows=row - first_row, digest=digest, groups=groups, first_row=first_row))
            first, first_row = end, row
    return parts


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _group_sizes(uri: str) -> list[int]:
    """Rows of each row group. Raises Damaged where the file is not Parquet, has no images, or two columns of ids."""
    try:
        with ForeignParquet(uri) as parquet:
            schema, sizes = parquet.schema, parquet.group_rows
    except Damaged as damage:
        raise Damaged(f"not a Parquet file ({damage})") from None
    if schema.names.count("image") != 1 or not is_bytes(schema.field("image").type):
        raise Damaged(f"one column image of bytes (encoded images) is expected, it has {shown(schema)}")
    if schema.names.count("image_id") > 1:
        raise Damaged(f"one column image_id, or none, is expected, it has {shown(schema)}")
    return sizes


# Names of what is written


Written = Mapping[str, Sequence[str]]
"""By part, the names of what is written of it."""


def crowded_names(
    parts: Sequence[Part], source: str, kind: Kind, find_written: Callable[[], Written] = dict
) -> frozenset[int]:
    """Hashes (see `id_hash`) of the names that more than one image would have, or that are folders of others'.

    `find_written`: for what a rerun keeps; asked where names are crowded. Reads the ids, and then again.
    Memory: 8 bytes for each image. Raises InputError where two images cannot have two names.
    """
    crowded = frozenset[int]()
    written: Written = {}
    while True:
        hashes = partial(_name_hashes, source, kind, crowded, written)
        found = list(map_ahead(hashes, _by_file(parts), FETCH_THREADS))
        folders = frozenset().union(*(folders for _, folders in found))
        names, counts = np.unique(np.concatenate([names for names, _ in found]), return_counts=True)
        clash = frozenset(names[counts > 1].tolist()) | folders.intersection(names.tolist() if folders else ())
        if clash <= crowded:
            break
        written = written or find_written()
        crowded |= clash
    if clash:
        names_of = partial(_names_of_file, source, kind, crowded, written)
        name = next(name for of_file in _by_file(parts) for name in names_of(of_file) if id_hash(name) in clash)
        raise InputError(
            f"{source}: two images would be written to masks/{name}.png; rename one, or give another output folder",
            "predict/same-name",
        )
    return crowded


def _by_file(parts: Sequence[Part]) -> list[list[Part]]:
    files: dict[str, list[Part]] = {}
    for part in parts:
        files.setdefault(part.uri, []).append(part)
    return list(files.values())


def _name_hashes(
    source: str, kind: Kind, crowded: Collection[int], written: Written, parts: Sequence[Part]
) -> tuple[npt.NDArray[np.uint64], frozenset[int]]:
    """Of the names of a file's images, and of the folders in them that would be named as an image's file."""
    names, folders = list[int](), set[int]()
    for name in _names_of_file(source, kind, crowded, written, parts):
        names.append(id_hash(name))
        if ".png/" in name or ".jpg/" in name:
            above = accumulate(name.split("/")[:-1], "{}/{}".format)
            folders.update(id_hash(folder[:-4]) for folder in above if folder.endswith((".png", ".jpg")))
    return np.array(names, np.uint64), frozenset(folders)


def _names_of_file(
    source: str, kind: Kind, crowded: Collection[int], written: Written, parts: Sequence[Part]
) -> Iterator[str]:
    for part in parts:
        if part.name in written:
            yield from written[part.name]
        else:
            yield from (output_name(row, source, kind, crowded) for row in _rows_without_images(source, part))


def _rows_without_images(source: str, part: Part) -> Iterator[PoolRow]:
    """Those that may be predicted."""
    if part.problem is not None:
        return
    if part.by_reference:
        table = storage.read_table(part.uri, ["image_id", "image_uri"]).to_pylist()
        replaced = frozenset(part.replaced)
        yield from (PoolRow(row["image_id"], row["image_uri"], b"") for n, row in enumerate(table) if n not in replaced)
        return
    others, name = part.groups is not None, path_below(source, part.uri) if part.groups else part.name
    read = partial(_groups_of_others, part, ["image_id"]) if others else partial(read_own_groups, part.uri, OF_NAMES)
    for group in read(ID_BYTES):
        if group.table is None:
            continue
        columns = group.table.column_names
        ids = values_of(group.table, "image_id") if "image_id" in columns else [None] * group.rows
        numbers = range(group.first, group.first + group.rows)
        sources = [f"{part.uri}#{number}" for number in numbers] if others else values_of(group.table, "source")
        rows = map(pool_row, unnamed(name, group), ids, sources, repeat(b""))
        yield from (row for row in rows if row.problem is None)


def output_name(row: PoolRow, source: str, kind: Kind, crowded: Collection[int]) -> str:
    """Path of what is written for a row, without an ending: the image's path below the source, or its id in a Parquet
    file. Where that is crowded, with the image's ending or with a digest of the place that it came from; then with a longer
    digest."""
    name = safe_name(row.image_id)
    if id_hash(name) in crowded:
        longer = path_below(source, row.source) if kind == "images" else f"{row.image_id}-{_short_digest(row.source)}"
        name = safe_name(longer)
        if id_hash(name) in crowded:
            name = safe_name(f"{longer}-{_digest(row.source)[:32]}")
    return name


def safe_name(name: str) -> str:
    """A relative path that stays below its folder. A name that has to be changed for it ends with a digest of what it was."""
    kept = [_shortened(part) for part in name.replace("\0", "").split("/") if part not in ("", ".", "..")]
    safe = "/".join(kept)
    if len(safe.encode()) > PATH_BYTES:
        return _short_digest(name)
    return name if safe == name != "" else f"{safe or 'image'}-{_short_digest(name)}"


def _shortened(part: str) -> str:
    return part.encode()[:NAME_BYTES].decode(errors="ignore")


def _short_digest(text: str) -> str:
    return _digest(text)[:8]
