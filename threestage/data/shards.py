"""The work of an ingest, cut into shards: each is fetched, checked and written apart from the others, anywhere.

A shard's report, root/shards/<digest>.json, is written when its files are. Its name covers the images (ids, URIs, and
sizes and times as the listing gives them), masks, split and classes, so that a rerun knows what is done without reading
an image.
"""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass
from typing import Any, TypeVar

from threestage.data import storage
from threestage.data.check import BadFile, check_image, check_mask
from threestage.data.classes import ClassMap, Lookup
from threestage.data.folders import NOT_INSIDE, WHY_NOT_INSIDE
from threestage.data.formats import SourceItem, each_id_once
from threestage.data.known import look_up
from threestage.data.publish import Known, Row, ShardReport, Writer, digest_of
from threestage.data.records import MAX_IMAGE_BYTES, SplitName, encode_mask
from threestage.data.rejects import Reject

SHARDS_AT_ONCE = 2
FETCH_THREADS = 8
REPORT_FORMAT = 1

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
    """Some images of one split: `items`, or where `listed` names a Parquet file of a listing, those in it."""

    split: SplitName
    digest: str
    items: tuple[SourceItem, ...] = ()
    listed: str | None = None

    def __str__(self) -> str:
        return self.listed or f"images {self.items[0].image_id} to {self.items[-1].image_id}"


def shard_digest(job: Job, split: SplitName, content: Sequence[SourceItem] | str) -> str:
    """Of what decides what a shard writes: its items (or the digest of its listing), its split, the classes."""
    classes = job.class_map.model_dump(mode="json") if job.class_map else None
    images = content if isinstance(content, str) else [astuple(item) for item in content]
    return hashlib.sha256(json.dumps([REPORT_FORMAT, split, classes, images]).encode()).hexdigest()


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
    known = look_up(job.index, [item.image_id for item in items])
    lookup = _lookup(job)
    writer = Writer(job.root, shard.split, job.rows_per_file)
    rejected: list[Reject] = []
    skipped = 0
    outcomes = ahead(lambda item: _check(item, known.get(item.image_id), lookup), items, FETCH_THREADS)
    for item, outcome in zip(items, outcomes, strict=True):
        if isinstance(outcome, BadFile):
            rejected.append(Reject(image_id=item.image_id, source=item.image_uri, reason=str(outcome)))
        elif outcome is None:
            skipped += 1
        else:
            writer.add(outcome)
    report = writer.report(job.base, skipped, rejected)
    storage.write_json(report_uri(job.root, shard.digest), report.model_dump(mode="json"))
    return report


def finished(job: Job, shard: Shard) -> tuple[str, ShardReport | None]:
    """The digest of a shard and its report, None when one of the images that it rejected is good by now.

    Reads the rejected images again, and no other.
    """
    report = ShardReport.model_validate(storage.read_json(report_uri(job.root, shard.digest)))
    if report.rejected:
        uris = {reject.source for reject in report.rejected}
        items = [item for item in _items(shard) if item.image_uri in uris]
        known = look_up(job.index, [item.image_id for item in items])
        lookup = _lookup(job)
        outcomes = ahead(lambda item: _check(item, known.get(item.image_id), lookup), items, FETCH_THREADS)
        if not all(isinstance(outcome, BadFile) for outcome in outcomes):
            return shard.digest, None
    if report.base != job.base and _is_still_new(report, job, shard):
        report = report.model_copy(update={"base": job.base})
    return shard.digest, report


def _is_still_new(report: ShardReport, job: Job, shard: Shard) -> bool:
    """Whether a shard that was all new when it was written is so now that the data set has grown."""
    was_new = not report.skipped and all(file.kind == "images" for file in report.files)
    return was_new and not look_up(job.index, [item.image_id for item in _items(shard)])


def report_uri(root: str, digest: str) -> str:
    return storage.join(root, "shards", f"{digest[:16]}.json")


def _lookup(job: Job) -> Lookup | None:
    return Lookup(job.class_map, job.map_name) if job.class_map else None


def _items(shard: Shard) -> Sequence[SourceItem]:
    if shard.listed is None:
        return shard.items
    rows: list[dict[str, Any]] = storage.read_table(shard.listed).to_pylist()
    return each_id_once(
        [SourceItem(row["image_id"], row["image_uri"], None, shard.split, size=row["bytes"]) for row in rows]
    )


def _check(item: SourceItem, known: Known | None, lookup: Lookup | None) -> Row | BadFile | None:
    """A row to write, why the item is refused, or None: the data set has it already."""
    try:
        return _checked(item, known, lookup)
    except BadFile as bad:
        return bad


def _checked(item: SourceItem, known: Known | None, lookup: Lookup | None) -> Row | None:
    if item.problem:
        raise BadFile(item.problem)
    if item.size == NOT_INSIDE:
        raise BadFile(WHY_NOT_INSIDE)
    if item.size > MAX_IMAGE_BYTES:
        raise BadFile(f"has {item.size} bytes, more than {MAX_IMAGE_BYTES}")
    try:
        data = _read(item.image_uri, "it")
    except _Vanished:
        if known:
            return None
        raise
    image_digest = digest_of(data)
    if known:
        _check_same(item, known, image_digest)
        if item.mask_uri is None:
            return None
    image = check_image(data)
    mask = None
    mask_digest = None
    if item.mask_uri is not None and lookup is not None:
        name = item.mask_uri.rsplit("/", 1)[-1]
        mask = check_mask(_read(item.mask_uri, f"mask {name}"), lookup, (image.height, image.width), name)
        mask_digest = digest_of(mask.tobytes())
    if known and known.mask_digest == mask_digest:
        return None
    record = {
        "image_id": item.image_id,
        "image": image.data,
        "mask": None if mask is None else encode_mask(mask),
        "height": image.height,
        "width": image.width,
        "source": item.image_uri,
    }
    return Row(record, image_digest, mask_digest, known)


class _Vanished(BadFile):
    """The file is not there."""


def _read(uri: str, what: str) -> bytes:
    """A store that fails is no bad file: such an error goes up."""
    try:
        return storage.read_bytes(uri)
    except FileNotFoundError as error:
        raise _Vanished(f"{what} cannot be read: {error}") from None
    except PermissionError as error:
        raise BadFile(f"{what} cannot be read: {error}") from None


def _check_same(item: SourceItem, known: Known, image_digest: str) -> None:
    if known.image_digest != image_digest:
        raise BadFile(f"the data set has another image under the id {item.image_id}: rename this one")
    if known.split != item.split:
        raise BadFile(f"the data set has it in split {known.split}, and here it is in {item.split}")
