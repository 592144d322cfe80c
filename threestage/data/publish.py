"""Write the Parquet files of a data set, add up what shards wrote, publish a new version of the manifest."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field

from threestage.data import parquet, storage
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
from threestage.data.rejects import Reject
from threestage.errors import InputError
from threestage.settings import Settings

MAX_FILE_BYTES = 128 * 1024**2
ROW_DIGESTS_KEY = b"threestage.row_digests"

Kind = Literal["images", "labels"]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
"""128 bits of a SHA-256, in hexadecimal."""


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
    image_digest: str
    mask_digest: str | None
    known: Known | None

    @property
    def kind(self) -> Kind:
        return "labels" if self.known else "images"

    @property
    def size(self) -> int:
        return len(self.record["image"]) + len(self.record["mask"] or b"")


class Extent(Settings):
    """Of some lengths in pixels; zeros for none."""

    smallest: int = 0
    largest: int = 0
    total: int = 0

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Self:
        return cls(smallest=min(lengths), largest=max(lengths), total=sum(lengths)) if lengths else cls()

    def __add__(self, other: "Extent") -> "Extent":
        known = [extent.smallest for extent in (self, other) if extent.total]
        return Extent(
            smallest=min(known, default=0),
            largest=max(self.largest, other.largest),
            total=self.total + other.total,
        )


class ShardReport(Settings):
    """What became of the images of one shard, all of one split.

    `base`: digest of the manifest that the shard was compared with, None for none. `images`, `labels`: new in the data
    set, `newly_labelled`: of these labels, those of images that had none. `skipped`: images that the data set had. `gone`:
    images that were listed and are no longer there. `heights`, `widths`: of the new images.
    `masks`: digest of the masks that its images were given, new or not (`masks_digest`), None for none; `labelled`: how many
    these are; `pixels`: their pixels of each class.
    """

    base: str | None
    split: SplitName
    files: tuple[DataFile, ...] = ()
    images: int = 0
    labels: int = 0
    newly_labelled: int = 0
    skipped: int = 0
    gone: int = 0
    heights: Extent = Extent()
    widths: Extent = Extent()
    rejected: tuple[Reject, ...] = ()
    masks: str | None = None
    labelled: int = 0
    pixels: tuple[int, ...] = ()

    @property
    def checked(self) -> int:
        return sum(file.rows for file in self.files) + self.skipped + self.gone + len(self.rejected)

    def published(self) -> "ShardReport":
        """The same once the data set holds what it wrote: nothing is new in it."""
        nothing = {"files": (), "images": 0, "labels": 0, "newly_labelled": 0, "heights": Extent(), "widths": Extent()}
        skipped = self.checked - self.gone - len(self.rejected)
        return self.model_copy(update={**nothing, "skipped": skipped})


class Writer:
    """Collects the rows of one shard into files of at most `rows_per_file` rows and MAX_FILE_BYTES, and counts them."""

    def __init__(self, root: str, split: SplitName, rows_per_file: int) -> None:
        self._root = root
        self._split = split
        self._rows_per_file = rows_per_file
        self._files: list[DataFile] = []
        self._waiting: dict[Kind, list[Row]] = {"images": [], "labels": []}
        self._bytes: dict[Kind, int] = {"images": 0, "labels": 0}
        self._labels = self._newly_labelled = 0
        self._heights: list[int] = []
        self._widths: list[int] = []

    def add(self, row: Row) -> None:
        self._waiting[row.kind].append(row)
        self._bytes[row.kind] += row.size
        self._count(row)
        if len(self._waiting[row.kind]) >= self._rows_per_file or self._bytes[row.kind] >= MAX_FILE_BYTES:
            self._write(row.kind)

    def report(self, base: str | None, rejected: Sequence[Reject], **others: Any) -> ShardReport:
        """Write what waits, however little; say what was written. `others`: further fields of the report."""
        self._write("images")
        self._write("labels")
        return ShardReport(
            base=base,
            split=self._split,
            files=tuple(self._files),
            images=len(self._heights),
            labels=self._labels,
            newly_labelled=self._newly_labelled,
            heights=Extent.of(self._heights),
            widths=Extent.of(self._widths),
            rejected=tuple(rejected),
            **others,
        )

    def _count(self, row: Row) -> None:
        if row.known is None:
            self._heights.append(row.record["height"])
            self._widths.append(row.record["width"])
        if row.mask_digest is not None:
            self._labels += 1
            self._newly_labelled += row.known is None or row.known.mask_digest is None

    def _write(self, kind: Kind) -> None:
        rows, self._waiting[kind], self._bytes[kind] = self._waiting[kind], [], 0
        if not rows:
            return
        digests = [[row.image_digest, row.mask_digest] for row in rows]
        ids = [row.record["image_id"] for row in rows]
        digest = hashlib.sha256(json.dumps([kind, self._split, ids, digests]).encode()).hexdigest()
        path = f"{kind}/{self._split}-{digest[:16]}.parquet"
        uri = storage.join(self._root, path)
        if not storage.exists(uri):
            schema = RECORD_SCHEMA.with_metadata({ROW_DIGESTS_KEY: json.dumps(digests)})
            storage.write_table(uri, pa.Table.from_pylist([row.record for row in rows], schema=schema))
        labelled = sum(row.mask_digest is not None for row in rows)
        self._files.append(
            DataFile(path=path, kind=kind, split=self._split, rows=len(rows), labelled_rows=labelled, digest=digest)
        )


def row_digests(root: str, file: DataFile) -> list[tuple[str, str, str | None]]:
    """(image id, image digest, mask digest) of every row of a file; reads no image."""
    uri = storage.join(root, file.path)
    table = parquet.read_file(uri, ["image_id"])
    written = storage.parse_json((table.schema.metadata or {}).get(ROW_DIGESTS_KEY, b""), uri)
    ids, digests = (
        table.column("image_id").to_pylist(),
        storage.shaped(written, list[tuple[Digest, Digest | None]], uri),
    )
    if len(ids) != len(digests):
        raise InputError(
            f"{uri}: is damaged, it has {len(ids)} rows and {len(digests)} digests; ingest its images again",
            "data/damaged-file",
        )
    return [(image_id, image, mask) for image_id, (image, mask) in zip(ids, digests, strict=True)]


def masks_digest(masks: Sequence[tuple[str, str | None]]) -> str:
    """Of (image id, digest of its mask) in order."""
    return digest_of(json.dumps(masks).encode())


class Additions:
    """The sum of shard reports, the same in whatever order they come. Of a shard it keeps its files' entries only."""

    def __init__(self) -> None:
        self.checked = self.images = self.labels = self.skipped = self.gone = self.labelled = 0
        self.pixels = np.zeros(0, np.int64)
        self.newly_labelled: dict[SplitName, int] = {"train": 0, "val": 0, "test": 0}
        self.heights = self.widths = Extent()
        self._files: list[DataFile] = []

    def add(self, report: ShardReport) -> None:
        self.checked += report.checked
        self.images += report.images
        self.labels += report.labels
        self.skipped += report.skipped
        self.gone += report.gone
        self.labelled += report.labelled
        if report.pixels:
            pixels = np.array(report.pixels, np.int64)
            self.pixels = pixels + self.pixels if len(self.pixels) else pixels
        self.newly_labelled[report.split] += report.newly_labelled
        self.heights += report.heights
        self.widths += report.widths
        self._files += report.files

    @property
    def files(self) -> tuple[DataFile, ...]:
        return tuple(sorted(self._files, key=lambda file: file.path))


def next_manifest(
    current: Manifest | None, class_map: ClassMap | None, name: str | None, added: Additions
) -> Manifest | None:
    """The data set's next version: what was written, and the name and colours that were given. None if nothing changes."""
    classes, colours = (current.classes, current.colours) if current else ((), ())
    if class_map:
        classes = tuple(entry.name for entry in class_map.classes)
        colours = tuple(entry.colour for entry in class_map.classes)
    name = name or (current.name if current else None)
    if not added.files and (
        current is None or not current.classes or (name, colours) == (current.name, current.colours)
    ):
        return None
    files = (*(current.files if current else ()), *added.files)
    return Manifest(
        version=current.version + 1 if current else 1,
        name=name,
        classes=classes,
        colours=colours,
        files=files,
        counts=_counts(current, added),
        sizes=_sizes(current, added),
        digest=hashlib.sha256(json.dumps([classes, [file.digest for file in files]]).encode()).hexdigest(),
    )


def _counts(current: Manifest | None, added: Additions) -> dict[SplitName, SplitCounts]:
    counts: dict[SplitName, SplitCounts] = {"train": SplitCounts(), "val": SplitCounts(), "test": SplitCounts()}
    counts |= current.counts if current else {}
    for file in added.files:
        if file.kind == "images":
            before = counts[file.split]
            counts[file.split] = before.model_copy(update={"images": before.images + file.rows})
    for split, labelled in added.newly_labelled.items():
        counts[split] = counts[split].model_copy(update={"labelled": counts[split].labelled + labelled})
    return counts


def _sizes(current: Manifest | None, added: Additions) -> SizeStatistics:
    old = current.sizes if current else SizeStatistics()
    before = sum(count.images for count in current.counts.values()) if current else 0
    if not added.images:
        return old
    total = before + added.images
    heights, widths = added.heights, added.widths
    return SizeStatistics(
        min_height=min(heights.smallest, old.min_height if before else heights.smallest),
        max_height=max(heights.largest, old.max_height),
        mean_height=(old.mean_height * before + heights.total) / total,
        min_width=min(widths.smallest, old.min_width if before else widths.smallest),
        max_width=max(widths.largest, old.max_width),
        mean_width=(old.mean_width * before + widths.total) / total,
    )


def publish(root: str, current: Manifest | None, manifest: Manifest | None) -> Manifest:
    """Make a manifest the current one. With none to publish, the current one stays.

    Raises InputError when there is nothing to publish and none before it, or when another ingest published meanwhile: of two
    at once, one fails (`storage.write_if_unchanged`).
    """
    if current is not None and not storage.exists(version_uri(root, current.version)):
        _keep_version(root, current)  # the ingest that published it was killed before it could
    if manifest is None:
        if current is None:
            listed = storage.join(root, "rejected")
            raise InputError(
                f"{root}: no good image was found for it, so no data set was made; fix those that {listed} lists",
                "data/bad-images",
            )
        return current
    uri = storage.join(root, MANIFEST_NAME)
    before = storage.read_bytes(uri) if storage.exists(uri) else None
    now = None if before is None else load_manifest(root)
    if now != current or not storage.write_if_unchanged(
        uri, before, storage.json_bytes(manifest.model_dump(mode="json"))
    ):
        raise InputError(
            f"{root}: another ingest changed it in the meantime; run this one again, what it has checked is kept",
            "data/concurrent-ingest",
        )
    _keep_version(root, manifest)
    return manifest


def _keep_version(root: str, manifest: Manifest) -> None:
    storage.write_json(version_uri(root, manifest.version), manifest.model_dump(mode="json"))
