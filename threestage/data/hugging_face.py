"""Image sets of Hugging Face: Parquet files with a column of images and one of masks, each of bytes or of {bytes, path}.

They are unpacked below the data set, into the layout of format camvid, and deleted when all of them are read and good:

unpacked-<digest>/<split>/images/<name of the Parquet file>/000017.jpg, and masks/….png where the row has a mask
"""

import hashlib
import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import pyarrow as pa

from threestage.data import storage
from threestage.data.formats import files_below
from threestage.data.pairs import IMAGE_SUFFIXES
from threestage.data.parallel import map_ahead
from threestage.data.parquet import Damaged, ForeignParquet, is_bytes, shown
from threestage.data.records import SplitName
from threestage.errors import InputError

HUGGING_FACE = "huggingface"
IMAGES = ("image", "pixel_values")
MASKS = ("annotation", "label", "mask", "semantic_segmentation", "segmentation", "segmentation_mask", "labels")
SPLIT = re.compile(r"(?:^|[/_-])(train|validation|val|test)(?=[/_.-])")
SPLITS: dict[str, SplitName] = {"train": "train", "validation": "val", "val": "val", "test": "test"}
AT_ONCE_BYTES = 2**27


class _Row(NamedTuple):
    """`place`: path below the folder, without suffix and kind. `suffix`: of the image's file."""

    split: SplitName
    place: str
    suffix: str
    image: bytes
    mask: bytes | None


def unpack_set(source: str, root: str, split: SplitName) -> str:
    """The folder below `root` into which all Parquet files of the source are unpacked; what is there is kept. `split`: of
    files whose names say none. Raises InputError where there are none, and for one that is damaged or of other columns."""
    paths, stamps = files_below(source, "Parquet files of images and masks")
    files = {path: uri for path, uri in paths.items() if path.endswith(".parquet")}
    if not files:
        raise InputError(f"{source}: no Parquet file below it; give the folder of the data set", "data/no-images")
    digest = hashlib.sha256(repr([(uri, stamps.get(uri)) for uri in files.values()]).encode()).hexdigest()[:16]
    folder = storage.join(root, f"unpacked-{digest}")
    there = set(storage.list_files(folder))

    def write(row: _Row) -> None:
        image = storage.join(folder, row.split, "images", f"{row.place}{row.suffix}")
        mask = storage.join(folder, row.split, "masks", f"{row.place}.png")
        if row.mask is not None and mask not in there:
            storage.write_bytes(mask, row.mask)
        if image not in there:
            storage.write_bytes(image, row.image)

    for path, uri in files.items():
        named = SPLIT.search(path)
        for _ in map_ahead(write, _rows(uri, path, SPLITS[named[1]] if named else split)):
            pass
    return folder


def _rows(uri: str, path: str, split: SplitName) -> Iterator[_Row]:
    """Those that have an image."""
    stem = path.removesuffix(".parquet").replace("/", "-")
    try:
        with ForeignParquet(uri) as parquet:
            image, mask = _column(uri, parquet.schema, IMAGES), _column(uri, parquet.schema, MASKS)
            for group in parquet.groups(range(len(parquet.group_rows)), [image, mask], AT_ONCE_BYTES):
                if group.table is None:
                    raise Damaged(str(group.problem))
                values = (group.table.column(name).to_pylist() for name in (image, mask))
                for number, (one, other) in enumerate(zip(*values, strict=True), group.first):
                    data, suffix = _content(one)
                    if data is not None:
                        yield _Row(split, f"{stem}/{number:06d}", suffix, data, _content(other)[0])
    except Damaged as damage:
        raise InputError(f"{uri}: {damage}; download it again", "data/damaged-file") from None


def _column(uri: str, schema: pa.Schema, names: tuple[str, ...]) -> str:
    """The first of the names that is a column of bytes, or of a struct with bytes."""
    for name in names:
        if schema.names.count(name) == 1 and (is_bytes(kind := schema.field(name).type) or _has_bytes(kind)):
            return name
    raise InputError(
        f"{uri}: none of {', '.join(names)} is a column of encoded images, it has {shown(schema)}; rename one",
        "data/layout",
    )


def _has_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_struct(kind)) and kind.get_field_index("bytes") >= 0 and is_bytes(kind.field("bytes").type)


def _content(value: Any) -> tuple[bytes | None, str]:
    """The bytes of a cell, and the suffix that its path has."""
    if not isinstance(value, dict):
        return value, ".jpg"
    suffix = PurePosixPath(str(value.get("path") or "")).suffix.lower()
    return value["bytes"], suffix if suffix in IMAGE_SUFFIXES else ".jpg"
