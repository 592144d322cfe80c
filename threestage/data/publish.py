"""Write the files of a data set and publish a new version of its manifest."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from threestage.data import storage
from threestage.data.classes import ClassMap
from threestage.data.records import (
    MANIFEST_NAME,
    RECORD_SCHEMA,
    DataFile,
    Manifest,
    SizeStatistics,
    SplitCounts,
    SplitName,
    load_manifest,
    version_uri,
)
from threestage.errors import InputError

MAX_FILE_BYTES = 128 * 1024**2
ROW_DIGESTS_KEY = b"threestage.row_digests"

Kind = Literal["images", "labels"]


def digest_of(data: bytes) -> str:
    """128 bits of the SHA-256, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()[:32]


@dataclass(frozen=True)
class Known:
    """What the data set holds under an image id: digests of the source file's bytes and of the mask's class ids."""

    split: SplitName
    image_digest: str
    mask_digest: str | None


@dataclass(frozen=True)
class Row:
    """A row to write; `known` is what the data set has of the image already, whose mask is then new or mended."""

    record: dict[str, Any]
    split: SplitName
    image_digest: str
    mask_digest: str | None
    known: Known | None

    @property
    def kind(self) -> Kind:
        return "labels" if self.known else "images"

    @property
    def size(self) -> int:
        return len(self.record["image"]) + len(self.record["mask"] or b"")


class Writer:
    """Collects rows into files of at most `rows_per_file` rows and MAX_FILE_BYTES, and counts what it writes."""

    def __init__(self, root: str, rows_per_file: int) -> None:
        self.files: list[DataFile] = []
        self.rows = self.images = self.labels = 0
        self.newly_labelled: dict[SplitName, int] = {}
        self.heights: list[int] = []
        self.widths: list[int] = []
        self._root = root
        self._rows_per_file = rows_per_file
        self._waiting: dict[tuple[Kind, SplitName], list[Row]] = {}
        self._written: list[str] = []

    def add(self, row: Row) -> None:
        waiting = self._waiting.setdefault((row.kind, row.split), [])
        waiting.append(row)
        self._count(row)
        if len(waiting) >= self._rows_per_file or sum(other.size for other in waiting) >= MAX_FILE_BYTES:
            self._write(row.kind, row.split, self._waiting.pop((row.kind, row.split)))

    def flush(self) -> None:
        """Write what waits, however little."""
        for (kind, split), rows in sorted(self._waiting.items()):
            self._write(kind, split, rows)
        self._waiting.clear()

    def discard(self) -> None:
        """Delete the files that this writer made (not those that it found finished)."""
        for uri in self._written:
            storage.delete(uri)

    def _count(self, row: Row) -> None:
        self.rows += 1
        if row.known is None:
            self.images += 1
            self.heights.append(row.record["height"])
            self.widths.append(row.record["width"])
        if row.mask_digest is not None:
            self.labels += 1
            if row.known is None or row.known.mask_digest is None:
                self.newly_labelled[row.split] = self.newly_labelled.get(row.split, 0) + 1

    def _write(self, kind: Kind, split: SplitName, rows: Sequence[Row]) -> None:
        digests = [[row.image_digest, row.mask_digest] for row in rows]
        ids = [row.record["image_id"] for row in rows]
        digest = hashlib.sha256(json.dumps([kind, split, ids, digests]).encode()).hexdigest()
        path = f"{kind}/{split}-{digest[:16]}.parquet"
        uri = storage.join(self._root, path)
        if not storage.exists(uri):
            self._written.append(uri)
            schema = RECORD_SCHEMA.with_metadata({ROW_DIGESTS_KEY: json.dumps(digests)})
            storage.write_table(uri, pa.Table.from_pylist([row.record for row in rows], schema=schema))
        labelled = sum(row.mask_digest is not None for row in rows)
        self.files.append(
            DataFile(path=path, kind=kind, split=split, rows=len(rows), labelled_rows=labelled, digest=digest)
        )


def row_digests(root: str, file: DataFile) -> list[tuple[str, str, str | None]]:
    """(image id, image digest, mask digest) of every row of a file; reads no image."""
    table = storage.read_table(storage.join(root, file.path), ["image_id"])
    digests = json.loads(table.schema.metadata[ROW_DIGESTS_KEY])
    ids = table.column("image_id").to_pylist()
    return [(image_id, image, mask) for image_id, (image, mask) in zip(ids, digests, strict=True)]


def next_manifest(
    current: Manifest | None, class_map: ClassMap | None, name: str | None, writer: Writer
) -> Manifest | None:
    """The data set's next version with what was written added, or None if nothing was."""
    if not writer.files:
        return None
    entries = class_map.classes if class_map else ()
    classes, colours = tuple(entry.name for entry in entries), tuple(entry.colour for entry in entries)
    if current and current.classes:
        classes, colours = current.classes, current.colours
    files = (*(current.files if current else ()), *writer.files)
    return Manifest(
        version=current.version + 1 if current else 1,
        name=name or (current.name if current else None),
        classes=classes,
        colours=colours,
        files=files,
        counts=_counts(current, writer),
        sizes=_sizes(current, writer),
        digest=hashlib.sha256(json.dumps([classes, [file.digest for file in files]]).encode()).hexdigest(),
    )


def _counts(current: Manifest | None, writer: Writer) -> dict[SplitName, SplitCounts]:
    counts: dict[SplitName, SplitCounts] = {"train": SplitCounts(), "val": SplitCounts(), "test": SplitCounts()}
    counts |= current.counts if current else {}
    for split, count in counts.items():
        images = sum(file.rows for file in writer.files if file.kind == "images" and file.split == split)
        labelled = writer.newly_labelled.get(split, 0)
        counts[split] = SplitCounts(images=count.images + images, labelled=count.labelled + labelled)
    return counts


def _sizes(current: Manifest | None, writer: Writer) -> SizeStatistics:
    old = current.sizes if current else SizeStatistics()
    before = sum(count.images for count in current.counts.values()) if current else 0
    if not writer.images:
        return old
    total = before + writer.images
    return SizeStatistics(
        min_height=min(*writer.heights, *([old.min_height] if before else writer.heights)),
        max_height=max(*writer.heights, old.max_height),
        mean_height=(old.mean_height * before + sum(writer.heights)) / total,
        min_width=min(*writer.widths, *([old.min_width] if before else writer.widths)),
        max_width=max(*writer.widths, old.max_width),
        mean_width=(old.mean_width * before + sum(writer.widths)) / total,
    )


def publish(root: str, current: Manifest | None, manifest: Manifest | None) -> Manifest:
    """Make a manifest the current one. With none to publish, the current one stays.

    Raises InputError when there is nothing to publish and none before it, or when another ingest published meanwhile (a
    check, not a lock: two that end within the same moment are not told apart).
    """
    if manifest is None:
        if current is None:
            raise InputError(f"{root}: no good image was found for it, so no data set was made")
        return current
    if _version_now(root) != (current.version if current else 0):
        raise InputError(f"{root}: another ingest has changed it meanwhile; run this one again")
    content = manifest.model_dump(mode="json")
    storage.write_json(version_uri(root, manifest.version), content)
    storage.write_json(storage.join(root, MANIFEST_NAME), content)
    return manifest


def _version_now(root: str) -> int:
    return load_manifest(root).version if storage.exists(storage.join(root, MANIFEST_NAME)) else 0
