"""Write a data set: check the images of a shard, write its Parquet files, sum up the shards, publish the manifest.

Also the index of what a data set already holds, by image id. `data/ingest.py` decides what a shard is and runs them.
"""

import hashlib
import io
import json
import operator
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import lru_cache, partial
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from threestage import IGNORE_INDEX
from threestage.data import parquet, storage
from threestage.data.bands import Bands, BandSample, Numbers, measured, sampled
from threestage.data.classes import MAX_UNKNOWN, ClassMap, Lookup
from threestage.data.drawings import read_drawings
from threestage.data.formats import SPLITS, SourceItem, each_id_once
from threestage.data.headers import BadImage
from threestage.data.image_validation import BadFile, UnknownValues, check_bands, check_image, check_mask
from threestage.data.parallel import Item, Result, map_ahead
from threestage.data.records import (
    MANIFEST_NAME,
    MAX_IMAGE_BYTES,
    RECORD_SCHEMA,
    DataFile,
    Manifest,
    SizeStatistics,
    SplitCounts,
    SplitName,
    encode_mask,
    load_manifest,
    version_uri,
)
from threestage.data.rejects import Reject
from threestage.data.safe_walk import WHY_NOT
from threestage.data.scenes import is_tile, read_tile, read_tile_mask
from threestage.errors import InputError
from threestage.labels.rasterise import draw
from threestage.settings import Settings

MAX_FILE_BYTES = 128 * 1024**2
ROW_DIGESTS_KEY = b"threestage.row_digests"
FIELDS_ADDED_LATER = ("unknown", "class_images", "labelled_sizes", "bands")  # of ShardReport

Kind = Literal["images", "labels"]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
"""128 bits of a SHA-256, in hexadecimal."""


# ---- Rows, and the Parquet files and report of one shard


def digest_of(data: bytes) -> str:
    """128 bits of the SHA-256, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()[:32]


@dataclass(frozen=True)
class ExistingRecord:
    """What the data set holds under an image id: digests of the source file's bytes and of the mask's class ids."""

    split: SplitName
    image_digest: str
    mask_digest: str | None


@dataclass(frozen=True)
class NewRow:
    """A row to write; `known` is what the data set has of the image already, whose mask is then new or corrected."""

    record: dict[str, Any]
    image_digest: str
    mask_digest: str | None
    known: ExistingRecord | None

    @property
    def kind(self) -> Kind:
        return "labels" if self.known else "images"

    @property
    def size(self) -> int:
        return len(self.record["image"]) + len(self.record["mask"] or b"")


class SizeRange(Settings):
    """Of some lengths in pixels; zeros for none."""

    smallest: int = 0
    largest: int = 0
    total: int = 0

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Self:
        return cls(smallest=min(lengths), largest=max(lengths), total=sum(lengths)) if lengths else cls()

    def __add__(self, other: "SizeRange") -> "SizeRange":
        known = [extent.smallest for extent in (self, other) if extent.total]
        return SizeRange(
            smallest=min(known, default=0),
            largest=max(self.largest, other.largest),
            total=self.total + other.total,
        )


class ShardReport(Settings):
    """What became of the images of one shard, all of one split.

    `base`: digest of the manifest that the shard was compared with, None for none. `images`, `labels`: new in the data
    set, `newly_labelled`: of these labels, those of images that had none, less the images that lost theirs. `skipped`: images
    that the data set had. `gone`: images that were listed and are no longer there. `heights`, `widths`: of the new images.
    `masks`: digest of the masks that its images were given, new or not (`masks_digest`), None for none; `labelled`: how many
    these are; `pixels`: their pixels of each class; `class_images`: how many of them show it; `labelled_sizes`: heights and
    widths of these. `unknown`: pixels and masks of each value that the class map does not know. `bands`: of the new images.
    """

    base: str | None
    split: SplitName
    files: tuple[DataFile, ...] = ()
    images: int = 0
    labels: int = 0
    newly_labelled: int = 0
    skipped: int = 0
    gone: int = 0
    heights: SizeRange = SizeRange()
    widths: SizeRange = SizeRange()
    rejected: tuple[Reject, ...] = ()
    masks: str | None = None
    labelled: int = 0
    pixels: tuple[int, ...] = ()
    class_images: tuple[int, ...] = ()
    labelled_sizes: tuple[SizeRange, ...] = ()
    unknown: dict[str, tuple[int, int]] = Field({})
    bands: BandSample | None = None

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without empty fields that came later: an earlier version reads it."""
        return {key: value for key, value in handler(self).items() if key not in FIELDS_ADDED_LATER or value}

    @property
    def checked(self) -> int:
        return sum(file.rows for file in self.files) + self.skipped + self.gone + len(self.rejected)

    def published(self) -> "ShardReport":
        """The same once the data set holds what it wrote: nothing is new in it."""
        return ShardReport(
            base=self.base,
            split=self.split,
            skipped=self.checked - self.gone - len(self.rejected),
            gone=self.gone,
            rejected=self.rejected,
            masks=self.masks,
            labelled=self.labelled,
            pixels=self.pixels,
            class_images=self.class_images,
            labelled_sizes=self.labelled_sizes,
            unknown=self.unknown,
        )


class Writer:
    """Collects the rows of one shard into files of at most `rows_per_file` rows and MAX_FILE_BYTES, and counts them."""

    def __init__(self, root: str, split: SplitName, rows_per_file: int) -> None:
        self._root, self._split, self._rows_per_file = root, split, rows_per_file
        self._files: list[DataFile] = []
        self._waiting: dict[Kind, list[NewRow]] = {"images": [], "labels": []}
        self._heights: list[int] = []
        self._widths: list[int] = []
        self._newly_labelled = 0

    def add(self, row: NewRow) -> None:
        waiting = self._waiting[row.kind]
        waiting.append(row)
        if row.known is None:
            self._heights.append(row.record["height"])
            self._widths.append(row.record["width"])
        had_mask = row.known is not None and row.known.mask_digest is not None
        self._newly_labelled += (row.mask_digest is not None) - had_mask
        if len(waiting) >= self._rows_per_file or sum(one.size for one in waiting) >= MAX_FILE_BYTES:
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
            labels=sum(file.labelled_rows for file in self._files),
            newly_labelled=self._newly_labelled,
            heights=SizeRange.of(self._heights),
            widths=SizeRange.of(self._widths),
            rejected=tuple(rejected),
            **others,
        )

    def _write(self, kind: Kind) -> None:
        rows, self._waiting[kind] = self._waiting[kind], []
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
    ids = table.column("image_id").to_pylist()
    digests = storage.shaped(written, list[tuple[Digest, Digest | None]], uri)
    if len(ids) != len(digests):
        raise InputError(
            f"{uri}: is damaged, it has {len(ids)} rows and {len(digests)} digests; ingest its images again",
            "data/damaged-file",
        )
    return [(image_id, image, mask) for image_id, (image, mask) in zip(ids, digests, strict=True)]


def add_unknown(total: dict[str, tuple[int, int]], more: Mapping[str, tuple[int, int]]) -> None:
    """Add pixels and masks of unknown values; of MAX_UNKNOWN values at most."""
    for value, (pixels, masks) in more.items():
        if value in total or len(total) < MAX_UNKNOWN:
            before = total.get(value, (0, 0))
            total[value] = (before[0] + pixels, before[1] + masks)


def masks_digest(masks: Sequence[tuple[str, str | None]]) -> str:
    """Of (image id, digest of its mask) in order."""
    return digest_of(json.dumps(masks).encode())


# ---- All shards together: the next version of the manifest


class Additions:
    """The sum of shard reports, the same in whatever order they come. Of a shard it keeps its files' entries only."""

    def __init__(self) -> None:
        self.checked = self.images = self.labels = self.skipped = self.gone = self.labelled = 0
        self.pixels = self.class_images = np.zeros(0, np.int64)
        self.newly_labelled: dict[SplitName, int] = {"train": 0, "val": 0, "test": 0}
        self.heights = self.widths = SizeRange()
        self.labelled_sizes: tuple[SizeRange, ...] = (SizeRange(), SizeRange())
        self.unknown: dict[str, tuple[int, int]] = {}
        self.bands: list[BandSample] = []
        self._files: list[DataFile] = []

    def add(self, report: ShardReport) -> None:
        add_unknown(self.unknown, report.unknown)
        self.checked += report.checked
        self.images += report.images
        self.labels += report.labels
        self.skipped += report.skipped
        self.gone += report.gone
        self.labelled += report.labelled
        if report.pixels:
            pixels, images = np.array(report.pixels, np.int64), np.array(report.class_images, np.int64)
            self.pixels = pixels + self.pixels if len(self.pixels) else pixels
            self.class_images = images + self.class_images if len(self.class_images) else images
            self.labelled_sizes = tuple(map(operator.add, self.labelled_sizes, report.labelled_sizes))
        self.newly_labelled[report.split] += report.newly_labelled
        self.heights += report.heights
        self.widths += report.widths
        self.bands += [] if report.bands is None else [report.bands]
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
    bands = current.bands if current else measured(added.bands)
    return Manifest(
        version=current.version + 1 if current else 1,
        name=name,
        classes=classes,
        colours=colours,
        files=files,
        counts=_counts(current, added),
        sizes=_sizes(current, added),
        digest=_digest_of(classes, files, bands),
        bands=bands,
    )


def _digest_of(classes: Sequence[str], files: Sequence[DataFile], bands: Bands | None) -> str:
    parts: list[Any] = [classes, [file.digest for file in files]]
    parts += [] if bands is None else [bands.model_dump(mode="json")]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


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


# ---- The index: what a data set already holds, by image id

# A hash of 64 bits: two ids in 10⁸ share one with a probability of 3·10⁻⁴, and then one of the images is refused.
ENTRY = np.dtype([("key", "<u8"), ("split", "u1"), ("labelled", "?"), ("image", "V16"), ("mask", "V16")])
PART_ENTRIES = 2**18

Entries = npt.NDArray[np.void]


def build_index(root: str, manifest: Manifest) -> str:
    """The folder of the index of a data set, which is made unless it is there."""
    folder = storage.join(root, "index", manifest.digest[:16])
    if not storage.exists(storage.join(folder, "index.json")):
        entries = _sorted_entries(root, manifest)
        bits = (len(entries) // PART_ENTRIES).bit_length()
        starts = [part << (64 - bits) for part in range(1, 2**bits)]
        ends = np.searchsorted(entries["key"], np.array(starts, np.uint64))
        for number, part in enumerate(np.split(entries, ends)):
            storage.write_bytes(_part_uri(folder, number), _saved(part))
        storage.write_json(storage.join(folder, "index.json"), {"bits": bits})
    return folder


def look_up_ids(folder: str | None, ids: Sequence[str]) -> dict[str, ExistingRecord]:
    """What an index holds of the ids, by id; nothing where there is no index. InputError when it was deleted meanwhile."""
    found: dict[str, ExistingRecord] = {}
    if folder is None or not ids:
        return found
    try:
        bits = _bits(folder)
        for key, image_id in sorted((id_hash(image_id), image_id) for image_id in ids):  # part by part
            part = _part(folder, key >> (64 - bits))
            place = bisect_left(part["key"], key)
            if place < len(part) and part["key"][place] == key:
                found[image_id] = _known(part[place])
    except FileNotFoundError:
        raise _overtaken(folder) from None
    return found


def index_parts(folder: str) -> Iterator[Entries]:
    """All entries of an index, one part in memory at a time. InputError when it was deleted meanwhile."""
    try:
        for number in range(2 ** _bits(folder)):
            yield _loaded(folder, number)
    except FileNotFoundError:
        raise _overtaken(folder) from None


def _overtaken(folder: str) -> InputError:
    return InputError(
        f"{folder}: another ingest has changed the data set meanwhile; run this one again", "data/concurrent-ingest"
    )


def _sorted_entries(root: str, manifest: Manifest) -> Entries:
    """Sorted by key, one for each id: a mask that came later wins."""
    entries = entries_of_files(root, sorted(manifest.files, key=lambda file: file.kind == "labels"))
    entries = entries[np.argsort(entries["key"], kind="stable")]
    last = np.append(entries["key"][1:] != entries["key"][:-1], True)
    return entries[last[: len(entries)]]


def entries_of_files(root: str, files: Sequence[DataFile]) -> Entries:
    """The entries of all rows, in their order; reads no image."""
    entries = np.empty(sum(file.rows for file in files), ENTRY)
    ends = np.cumsum([file.rows for file in files])
    for file, end, rows in zip(files, ends, map_ahead(partial(_entries_of, root), files), strict=True):
        entries[end - file.rows : end] = rows
    return entries


def _entries_of(root: str, file: DataFile) -> Entries:
    split = SPLITS.index(file.split)
    nothing = bytes(16)
    return np.array(
        [
            (id_hash(image_id), split, mask is not None, bytes.fromhex(image), bytes.fromhex(mask) if mask else nothing)
            for image_id, image, mask in row_digests(root, file)
        ],
        ENTRY,
    )


def _known(entry: np.void) -> ExistingRecord:
    mask = bytes(entry["mask"]).hex() if entry["labelled"] else None
    return ExistingRecord(SPLITS[entry["split"]], bytes(entry["image"]).hex(), mask)


def id_hash(image_id: str) -> int:
    """The first 8 bytes of its SHA-256."""
    return int.from_bytes(hashlib.sha256(image_id.encode()).digest()[:8], "big")


def _saved(part: Entries) -> bytes:
    stream = io.BytesIO()
    np.save(stream, part, allow_pickle=False)
    return stream.getvalue()


def _part_uri(folder: str, number: int) -> str:
    return storage.join(folder, f"{number}.npy")


@lru_cache(maxsize=4)
def _bits(folder: str) -> int:
    return int(storage.read_value(storage.join(folder, "index.json"), "bits", Annotated[int, Field(ge=0, le=48)]))


@lru_cache(maxsize=64)
def _part(folder: str, number: int) -> Entries:
    return _loaded(folder, number)


def _loaded(folder: str, number: int) -> Entries:
    uri = _part_uri(folder, number)
    try:
        part: Entries = np.load(io.BytesIO(storage.read_bytes(uri)), allow_pickle=False)
    except (ValueError, EOFError):
        part = np.empty((), ENTRY)
    if part.dtype != ENTRY or part.ndim != 1:
        raise InputError(f"{uri}: is damaged; delete {folder}, which is made again", "data/damaged-file")
    return part


# ---- One shard from its list of images to its report

SHARDS_AT_ONCE = 2
REPORT_FORMAT, LABELLED_REPORT_FORMAT = 1, 3


@dataclass(frozen=True)
class IngestJob:
    """What all shards of an ingest share. `index`: folder of what the data set, whose digest is `base`, holds already.
    `unlabelled`: class id of a tile's pixels without a polygon. `bands`: how many each
    image has; None: 8-bit RGB."""

    root: str
    rows_per_file: int
    class_map: ClassMap | None
    map_name: str
    base: str | None
    index: str | None
    unlabelled: int = IGNORE_INDEX
    bands: int | None = None


@dataclass(frozen=True)
class Shard:
    """Some images of one split: `items`, or where `listed` names a Parquet file of a listing, those in it, less the rows
    `replaced`. `drawings`: the folder of what their masks are drawn from (`write_drawings`)."""

    split: SplitName
    digest: str
    items: tuple[SourceItem, ...] = ()
    listed: str | None = None
    replaced: tuple[int, ...] = ()
    drawings: str | None = None

    def __str__(self) -> str:
        return self.listed or f"images {self.items[0].image_id} to {self.items[-1].image_id}"


def shard_digest(job: IngestJob, split: SplitName, content: Sequence[SourceItem] | str) -> str:
    """Of what decides what a shard writes: its items (or the digest of its listing), its split, the classes."""
    classes = job.class_map.model_dump(mode="json") if job.class_map else None
    images = content if isinstance(content, str) else [astuple(item) for item in content]
    labelled = not isinstance(content, str) and any(item.mask_uri for item in content)
    version = LABELLED_REPORT_FORMAT if labelled else REPORT_FORMAT
    parts = [version, split, classes, images, *([] if job.bands is None else [job.bands])]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def few_at_once(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """map() over shards in this process, few at a time."""
    return map_ahead(function, items, SHARDS_AT_ONCE)


def write_shard(job: IngestJob, shard: Shard) -> ShardReport:
    """Check the images of a shard, write the good and new ones as Parquet, then the report.

    Memory: the rows of one file, three times. Raises OSError when a store fails; doing it again does no harm.
    """
    items = _items(shard)
    writer = Writer(job.root, shard.split, job.rows_per_file)
    rejected: list[Reject] = []
    masks: list[LabelledItem] = []
    samples: list[Numbers] = []
    unknown: dict[str, tuple[int, int]] = {}
    skipped = gone = 0
    for item, outcome in zip(items, _outcomes(job, shard, items), strict=True):
        if isinstance(outcome, Gone):
            gone += 1
            continue
        if isinstance(outcome, BadFile):
            rejected.append(Reject(image_id=item.image_id, source=item.image_uri, reason=str(outcome)))
            if isinstance(outcome, UnknownValues):
                add_unknown(unknown, {value: (number, 1) for value, number in outcome.pixels.items()})
            continue
        if outcome.row is None:
            skipped += 1
        else:
            writer.add(outcome.row)
            samples += [] if outcome.sample is None else [outcome.sample]
        if outcome.pixels is not None:
            masks.append(LabelledItem(item.image_id, outcome.mask_digest, outcome.pixels, outcome.size))
    counts = (counts_of_masks(masks) if masks else {}) | ({"bands": sampled(samples)} if samples else {})
    report = writer.report(job.base, rejected, skipped=skipped, gone=gone, unknown=unknown, **counts)
    storage.write_json(report_uri(job.root, shard.digest), report.model_dump(mode="json"))
    return report


class LabelledItem(NamedTuple):
    """What a shard keeps of a mask. `pixels`: of each class; `size`: (height, width)."""

    image_id: str
    mask_digest: str | None
    pixels: npt.NDArray[np.int64]
    size: tuple[int, int]


def counts_of_masks(masks: Sequence[LabelledItem]) -> dict[str, Any]:
    """The fields of a ShardReport that sum masks up; of one or more."""
    pixels = np.stack([mask.pixels for mask in masks])
    labelled = [mask for mask in masks if mask.mask_digest is not None]
    return {
        "masks": masks_digest([(mask.image_id, mask.mask_digest) for mask in masks]),
        "labelled": len(labelled),
        "pixels": tuple(pixels.sum(0).tolist()),
        "class_images": tuple(np.count_nonzero(pixels, axis=0).tolist()),
        "labelled_sizes": tuple(SizeRange.of([mask.size[side] for mask in labelled]) for side in (0, 1)),
    }


def finished(job: IngestJob, shard: Shard) -> tuple[str, ShardReport | None]:
    """The digest of a shard and its report, None when one of the images that it rejected is good by now, or gone.

    Reads the rejected images again, and no other.
    """
    report: ShardReport = storage.read_json(report_uri(job.root, shard.digest), ShardReport)
    if report.rejected:
        uris = {reject.source for reject in report.rejected}
        items = [item for item in _items(shard) if item.image_uri in uris]
        if not all(isinstance(outcome, BadFile) for outcome in _outcomes(job, shard, items)):
            return shard.digest, None
    if report.masks is not None and _is_held(report, job, shard):
        return shard.digest, report.published()
    if report.base != job.base and _is_still_new(report, job, shard):
        report = report.model_copy(update={"base": job.base})
    return shard.digest, report


def _outcomes(job: IngestJob, shard: Shard, items: Sequence[SourceItem]) -> Iterator["Checked | BadFile | Gone"]:
    known = look_up_ids(job.index, [item.image_id for item in items])
    lookup = Lookup(job.class_map, job.map_name) if job.class_map else None

    def check(drawn: tuple[SourceItem, bytes | None]) -> Checked | BadFile | Gone:
        item, drawing = drawn
        return _check(job, item, known.get(item.image_id), lookup, drawing)

    return map_ahead(check, _with_drawings(shard, items))


def _with_drawings(shard: Shard, items: Sequence[SourceItem]) -> Iterator[tuple[SourceItem, bytes | None]]:
    """The items, in the order of their shard, with what is to be drawn of each."""
    drawings = iter(()) if shard.drawings is None else read_drawings(drawings_uri(shard.drawings, shard))
    for item in items:
        drawn = shard.drawings is not None and item.mask_uri is not None
        yield item, next((data for image_id, data in drawings if image_id == item.image_id), None) if drawn else None


def _is_held(report: ShardReport, job: IngestJob, shard: Shard) -> bool:
    """Whether the data set holds the masks that a shard's images were given: other masks may have come since."""
    rejected = {reject.source for reject in report.rejected}
    ids = [item.image_id for item in _items(shard) if item.mask_uri and item.image_uri not in rejected]
    known = look_up_ids(job.index, ids)
    return masks_digest([(i, known[i].mask_digest if i in known else None) for i in ids]) == report.masks


def _is_still_new(report: ShardReport, job: IngestJob, shard: Shard) -> bool:
    """Whether a shard that was all new when it was written is so now that the data set has grown."""
    was_new = not report.skipped and all(file.kind == "images" for file in report.files)
    return was_new and not look_up_ids(job.index, [item.image_id for item in _items(shard)])


def report_uri(root: str, digest: str) -> str:
    return storage.join(root, "shards", f"{digest[:16]}.json")


def drawings_uri(folder: str, shard: Shard) -> str:
    return storage.join(folder, f"{shard.digest[:16]}.parquet")


def _items(shard: Shard) -> Sequence[SourceItem]:
    if shard.listed is None:
        return shard.items
    table: list[dict[str, Any]] = storage.read_table(shard.listed).to_pylist()
    rows = [row for number, row in enumerate(table) if number not in shard.replaced]
    return each_id_once(
        [SourceItem(row["image_id"], row["image_uri"], None, shard.split, size=row["bytes"]) for row in rows]
    )


class Gone:
    """Of an image that was listed, and that its owner has deleted since."""


@dataclass(frozen=True)
class Checked:
    """A good image. `row`: what to write, None when the data set has it already. `pixels`: of each class in its mask; `size`:
    (height, width) of the mask. `sample`: see `CheckedImage`."""

    row: NewRow | None
    mask_digest: str | None = None
    pixels: npt.NDArray[np.int64] | None = None
    size: tuple[int, int] = (0, 0)
    sample: Numbers | None = None


def _check(
    job: IngestJob, item: SourceItem, known: ExistingRecord | None, lookup: Lookup | None, drawn: bytes | None
) -> Checked | BadFile | Gone:
    try:
        return _checked(job, item, known, lookup, drawn)
    except _Vanished:
        return Checked(None) if known else Gone()
    except BadFile as bad:
        return bad


def _checked(
    job: IngestJob, item: SourceItem, known: ExistingRecord | None, lookup: Lookup | None, drawn: bytes | None
) -> Checked:
    if item.problem:
        raise BadFile(item.problem)
    if item.size in WHY_NOT:
        raise BadFile(WHY_NOT[item.size], "image/place")
    if item.size > MAX_IMAGE_BYTES:
        raise BadFile(f"has {item.size} bytes, more than {MAX_IMAGE_BYTES}", "image/too-large")
    data, content = _read(item.image_uri, "it", _Vanished, partial(_image_at, job.bands))
    image_digest = digest_of(content)
    if known:
        _check_same(item, known, image_digest)
        if item.mask_uri is None:
            return Checked(None)
    image = check_image(data) if job.bands is None else check_bands(data, job.bands)
    mask = mask_digest = pixels = None
    if item.mask_uri is not None and lookup is not None:
        mask = _mask_of(job, item, item.mask_uri, lookup, (image.height, image.width), drawn)
        pixels = np.bincount(mask.ravel(), minlength=256)[: lookup.classes]
        if (drawn is not None or is_tile(item.image_uri)) and not pixels.any():
            mask = None  # its labels have no region of it, so it is unlabelled
        mask_digest = None if mask is None else digest_of(mask.tobytes())
    if known and known.mask_digest == mask_digest:
        return Checked(None, mask_digest, pixels, (image.height, image.width))
    record = {
        "image_id": item.image_id,
        "image": image.data,
        "mask": None if mask is None else encode_mask(mask),
        "height": image.height,
        "width": image.width,
        "source": item.image_uri,
    }
    row, size = NewRow(record, image_digest, mask_digest, known), (image.height, image.width)
    return Checked(row, mask_digest, pixels, size, None if known else image.sample)


def _mask_of(
    job: IngestJob, item: SourceItem, uri: str, lookup: Lookup, size: tuple[int, int], drawn: bytes | None
) -> npt.NDArray[np.uint8]:
    name = uri.removesuffix(f"#{item.image_id}").rsplit("/", 1)[-1]
    if drawn is not None:
        return draw(drawn, size, f"its annotation in {name}")
    if is_tile(item.image_uri):
        return _read(uri, f"mask {name}", BadFile, lambda _: read_tile_mask(item, lookup, job.unlabelled))
    return check_mask(_read(uri, f"mask {name}", BadFile, storage.read_bytes), lookup, size, name)


def _image_at(bands: int | None, uri: str) -> tuple[bytes, bytes]:
    """An encoded image, and what its digest is of: the file's bytes, or a tile's pixels."""
    if is_tile(uri):
        return read_tile(uri, bands)
    data = storage.read_bytes(uri)
    return data, data


class _Vanished(BadFile):
    """The image's file is not there."""


def _read(uri: str, what: str, absent: type[BadFile], read: Callable[[str], Result]) -> Result:
    """A store that fails is no bad file: such an error goes up. Raises `absent` where nothing is there."""
    try:
        return read(uri)
    except BadImage as error:
        raise BadFile(error.message, error.code) from None
    except FileNotFoundError as error:
        kind = BadFile if error.__cause__ else absent  # with a cause: a name that cannot be asked for
        raise kind(f"{what} cannot be read: {error}", "image/unreadable") from None
    except (PermissionError, InputError) as error:
        reason = error.message if isinstance(error, InputError) else error
        raise BadFile(f"{what} cannot be read: {reason}", "image/unreadable") from None


def _check_same(item: SourceItem, known: ExistingRecord, image_digest: str) -> None:
    if known.image_digest != image_digest:
        raise BadFile(
            f"the data set has another image under the id {item.image_id} (split {known.split}): rename this one; of "
            "<split>/images and <split>/masks, make a new data set from the folder above with --format camvid, whose ids begin "
            "with the split",
            "image/same-id",
        )
    if known.split != item.split:
        raise BadFile(f"the data set has it in split {known.split}, and here it is in {item.split}", "image/same-id")
