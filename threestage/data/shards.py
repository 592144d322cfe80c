"""The work of an ingest, cut into shards: each is fetched, checked and written apart from the others, anywhere.

A shard's report, root/shards/<digest>.json, is written when its files are. Its name covers the images (ids, URIs, and
sizes and times as the listing gives them), masks, split and classes, so that a rerun knows what is done without reading
an image. A report of labelled images counts only while the data set holds the masks that they were given.
"""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from threestage.data import storage
from threestage.data.check import BadFile, check_image, check_mask
from threestage.data.classes import ClassMap, Lookup
from threestage.data.folders import WHY_NOT
from threestage.data.formats import SourceItem, each_id_once
from threestage.data.known import look_up
from threestage.data.publish import Known, Row, ShardReport, Writer, digest_of, masks_digest
from threestage.data.records import MAX_IMAGE_BYTES, SplitName, encode_mask
from threestage.data.rejects import Reject
from threestage.errors import InputError

SHARDS_AT_ONCE = 2
FETCH_THREADS = 8
REPORT_FORMAT, LABELLED_REPORT_FORMAT = 1, 2

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Job:
    """What all shards of an ingest share. `index`: folder of what the data set, whose digest is `base`, holds already."""

    root: str
    rows_per_file: int
    class_map: ClassMap | None
    map_name: str
    base: str | None
    index: str | None


@dataclass(frozen=True)
class Shard:
    """Some images of one split: `items`, or where `listed` names a Parquet file of a listing, those in it, less the rows
    `replaced`."""

    split: SplitName
    digest: str
    items: tuple[SourceItem, ...] = ()
    listed: str | None = None
    replaced: tuple[int, ...] = ()

    def __str__(self) -> str:
        return self.listed or f"images {self.items[0].image_id} to {self.items[-1].image_id}"


def shard_digest(job: Job, split: SplitName, content: Sequence[SourceItem] | str) -> str:
    """Of what decides what a shard writes: its items (or the digest of its listing), its split, the classes."""
    classes = job.class_map.model_dump(mode="json") if job.class_map else None
    images = content if isinstance(content, str) else [astuple(item) for item in content]
    labelled = not isinstance(content, str) and any(item.mask_uri for item in content)
    version = LABELLED_REPORT_FORMAT if labelled else REPORT_FORMAT
    return hashlib.sha256(json.dumps([version, split, classes, images]).encode()).hexdigest()


def few_at_once(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """map() over shards in this process, few at a time."""
    return ahead(function, items, SHARDS_AT_ONCE)


def ahead(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """map() in threads, in order, with few items worked on or waiting, so that memory stays bounded."""
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def write_shard(job: Job, shard: Shard) -> ShardReport:
    """Check the images of a shard, write the good and new ones as Parquet, then the report.

    Memory: the rows of one file, three times. Raises OSError when a store fails; doing it again does no harm.
    """
    items = _items(shard)
    writer = Writer(job.root, shard.split, job.rows_per_file)
    rejected: list[Reject] = []
    masks: list[tuple[str, str | None]] = []
    pixels = np.zeros(len(job.class_map.classes) if job.class_map else 0, np.int64)
    skipped = gone = 0
    for item, outcome in zip(items, _outcomes(job, items), strict=True):
        if isinstance(outcome, Gone):
            gone += 1
            continue
        if isinstance(outcome, BadFile):
            rejected.append(Reject(image_id=item.image_id, source=item.image_uri, reason=str(outcome)))
            continue
        if outcome.row is None:
            skipped += 1
        else:
            writer.add(outcome.row)
        if outcome.pixels is not None:
            masks.append((item.image_id, outcome.mask_digest))
            pixels += outcome.pixels
    given = {"masks": masks_digest(masks), "labelled": len(masks), "pixels": tuple(pixels.tolist())} if masks else {}
    report = writer.report(job.base, rejected, skipped=skipped, gone=gone, **given)
    storage.write_json(report_uri(job.root, shard.digest), report.model_dump(mode="json"))
    return report


def finished(job: Job, shard: Shard) -> tuple[str, ShardReport | None]:
    """The digest of a shard and its report, None when one of the images that it rejected is good by now, or gone.

    Reads the rejected images again, and no other.
    """
    report: ShardReport = storage.read_json(report_uri(job.root, shard.digest), ShardReport)
    if report.rejected:
        uris = {reject.source for reject in report.rejected}
        items = [item for item in _items(shard) if item.image_uri in uris]
        if not all(isinstance(outcome, BadFile) for outcome in _outcomes(job, items)):
            return shard.digest, None
    if report.masks is not None and _is_held(report, job, shard):
        return shard.digest, report.published()
    if report.base != job.base and _is_still_new(report, job, shard):
        report = report.model_copy(update={"base": job.base})
    return shard.digest, report


def _outcomes(job: Job, items: Sequence[SourceItem]) -> Iterator["Checked | BadFile | Gone"]:
    known = look_up(job.index, [item.image_id for item in items])
    lookup = Lookup(job.class_map, job.map_name) if job.class_map else None
    return ahead(lambda item: _check(item, known.get(item.image_id), lookup), items, FETCH_THREADS)


def _is_held(report: ShardReport, job: Job, shard: Shard) -> bool:
    """Whether the data set holds the masks that a shard's images were given: other masks may have come since."""
    rejected = {reject.source for reject in report.rejected}
    ids = [item.image_id for item in _items(shard) if item.mask_uri and item.image_uri not in rejected]
    known = look_up(job.index, ids)
    return masks_digest([(i, known[i].mask_digest if i in known else None) for i in ids]) == report.masks


def _is_still_new(report: ShardReport, job: Job, shard: Shard) -> bool:
    """Whether a shard that was all new when it was written is so now that the data set has grown."""
    was_new = not report.skipped and all(file.kind == "images" for file in report.files)
    return was_new and not look_up(job.index, [item.image_id for item in _items(shard)])


def report_uri(root: str, digest: str) -> str:
    return storage.join(root, "shards", f"{digest[:16]}.json")


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
    """A good image. `row`: what to write, None when the data set has it already. `pixels`: of each class in its mask."""

    row: Row | None
    mask_digest: str | None = None
    pixels: npt.NDArray[np.int64] | None = None


def _check(item: SourceItem, known: Known | None, lookup: Lookup | None) -> Checked | BadFile | Gone:
    try:
        return _checked(item, known, lookup)
    except _Vanished:
        return Checked(None) if known else Gone()
    except BadFile as bad:
        return bad


def _checked(item: SourceItem, known: Known | None, lookup: Lookup | None) -> Checked:
    if item.problem:
        raise BadFile(item.problem)
    if item.size in WHY_NOT:
        raise BadFile(WHY_NOT[item.size], "image/place")
    if item.size > MAX_IMAGE_BYTES:
        raise BadFile(f"has {item.size} bytes, more than {MAX_IMAGE_BYTES}", "image/too-large")
    data = _read(item.image_uri, "it", _Vanished)
    image_digest = digest_of(data)
    if known:
        _check_same(item, known, image_digest)
        if item.mask_uri is None:
            return Checked(None)
    image = check_image(data)
    mask = mask_digest = pixels = None
    if item.mask_uri is not None and lookup is not None:
        name = item.mask_uri.rsplit("/", 1)[-1]
        mask = check_mask(_read(item.mask_uri, f"mask {name}", BadFile), lookup, (image.height, image.width), name)
        mask_digest = digest_of(mask.tobytes())
        pixels = np.bincount(mask.ravel(), minlength=256)[: lookup.classes]
    if known and known.mask_digest == mask_digest:
        return Checked(None, mask_digest, pixels)
    record = {
        "image_id": item.image_id,
        "image": image.data,
        "mask": None if mask is None else encode_mask(mask),
        "height": image.height,
        "width": image.width,
        "source": item.image_uri,
    }
    return Checked(Row(record, image_digest, mask_digest, known), mask_digest, pixels)


class _Vanished(BadFile):
    """The image's file is not there."""


def _read(uri: str, what: str, absent: type[BadFile]) -> bytes:
    """A store that fails is no bad file: such an error goes up. Raises `absent` where nothing is there."""
    try:
        return storage.read_bytes(uri)
    except FileNotFoundError as error:
        kind = BadFile if error.__cause__ else absent  # with a cause: a name that cannot be asked for
        raise kind(f"{what} cannot be read: {error}", "image/unreadable") from None
    except (PermissionError, InputError) as error:
        reason = error.message if isinstance(error, InputError) else error
        raise BadFile(f"{what} cannot be read: {reason}", "image/unreadable") from None


def _check_same(item: SourceItem, known: Known, image_digest: str) -> None:
    if known.image_digest != image_digest:
        raise BadFile(
            f"the data set has another image under the id {item.image_id} (split {known.split}): rename this one; of "
            "<split>/images and <split>/masks, make a new data set from the folder above with --format camvid, whose ids begin "
            "with the split",
            "image/same-id",
        )
    if known.split != item.split:
        raise BadFile(f"the data set has it in split {known.split}, and here it is in {item.split}", "image/same-id")
