"""Make or extend a data set: list a source, check every file, write immutable Parquet files, publish a manifest last.

A killed ingest leaves the data set as it was; the same command, run again, finds its finished files by their names (the
digest of what is in them) and completes. Images are stored in the order of sha256(image_id): a file is then a fair
sample of its split, not one film's neighbouring frames, and shuffling files and a small buffer is enough for training.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from typing import TypeVar

from threestage.data import storage
from threestage.data.check import BadFile, check_image, check_mask
from threestage.data.classes import ClassMap, Lookup, load_class_map, shipped_class_map
from threestage.data.formats import IngestSettings, SourceItem, discover
from threestage.data.publish import Known, Row, Writer, digest_of, next_manifest, publish, row_digests
from threestage.data.records import MANIFEST_NAME, Manifest, encode_mask, load_manifest
from threestage.errors import InputError
from threestage.settings import Settings

__all__ = ["IngestReport", "IngestSettings", "ingest"]

WORKERS = 8
SHIPPED = ("camvid", "voc", "cityscapes")

Progress = Callable[[int, int], None]
Rejected = tuple[tuple[str, str], ...]
Item = TypeVar("Item")
Result = TypeVar("Result")


class IngestReport(Settings):
    """`added_labels`: masks new to the set, of new or of known images. `skipped`: images that it had already.

    `manifest` is the one before when nothing was added. `rejected`: (file, reason).
    """

    manifest: Manifest
    added_images: int
    added_labels: int
    skipped: int
    rejected: Rejected


def ingest(source: str, root: str, settings: IngestSettings, progress: Progress | None = None) -> IngestReport:
    """Check the images and masks of `source` and add what is new to the data set at `root`, as a new version of it.

    `progress` is called with (images done, images in all). Refused files are listed in root/rejected/v000N.json.
    Raises InputError when the source is not as its format says, when its classes are not the data set's, or when more
    than the share `max_bad_share` of it is bad; the data set is then as it was.
    """
    current = load_manifest(root) if storage.exists(storage.join(root, MANIFEST_NAME)) else None
    class_map, lookup = _class_map(settings)
    _check_classes(root, current, class_map)
    items = sorted(discover(source, settings), key=lambda item: (item.split, _order(item.image_id)))
    writer = Writer(root, settings.rows_per_file)
    rejected = _add(root, current, lookup, items, writer, progress)
    listed = _list_rejected(root, current, rejected)
    if len(rejected) > settings.max_bad_share * len(items):
        writer.discard()
        raise _too_many_bad(source, listed, rejected, len(items), settings.max_bad_share)
    manifest = publish(root, current, next_manifest(current, class_map, settings.name, writer))
    return IngestReport(
        manifest=manifest,
        added_images=writer.images,
        added_labels=writer.labels,
        skipped=len(items) - len(rejected) - writer.rows,
        rejected=rejected,
    )


def _order(image_id: str) -> str:
    return hashlib.sha256(image_id.encode()).hexdigest()


def _add(
    root: str,
    current: Manifest | None,
    lookup: Lookup | None,
    items: list[SourceItem],
    writer: Writer,
    progress: Progress | None,
) -> Rejected:
    """Write the good and new ones of the items; one split at a time, so that one file's rows are in memory."""
    rejected: list[tuple[str, str]] = []
    done = 0
    with ThreadPoolExecutor(WORKERS) as pool:
        known = _index(root, current, pool)
        for _, group in groupby(items, key=lambda item: item.split):
            for item, outcome in _ahead(pool, lambda item: _check(item, known.get(item.image_id), lookup), group):
                if isinstance(outcome, BadFile):
                    rejected.append((item.image_uri, str(outcome)))
                elif outcome is not None:
                    writer.add(outcome)
                done += 1
                if progress:
                    progress(done, len(items))
            writer.flush()
    return tuple(sorted(rejected))


def _list_rejected(root: str, current: Manifest | None, rejected: Rejected) -> str:
    version = current.version + 1 if current else 1
    uri = storage.join(root, "rejected", f"v{version:04d}.json")
    if rejected:
        storage.write_json(uri, [{"file": file, "reason": reason} for file, reason in rejected])
    return uri


def _too_many_bad(source: str, listed: str, rejected: Rejected, total: int, max_bad_share: float) -> InputError:
    file, reason = rejected[0]
    return InputError(
        f"{source}: {len(rejected)} of {total} files are bad ({len(rejected) / total:.1%}, max_bad_share is "
        f"{max_bad_share:.1%}), the first is {file}: {reason}; all are listed in {listed}"
    )


def _class_map(settings: IngestSettings) -> tuple[ClassMap | None, Lookup | None]:
    if settings.class_map is not None:
        class_map = load_class_map(settings.class_map)
        return class_map, Lookup(class_map, settings.class_map)
    if settings.format in SHIPPED:
        class_map = shipped_class_map(settings.format)
        return class_map, Lookup(class_map, settings.format)
    if settings.format == "folders":
        raise InputError(
            "class_map is not given: format folders needs a YAML that says which id or colour is which class"
        )
    return None, None


def _check_classes(root: str, current: Manifest | None, class_map: ClassMap | None) -> None:
    if current is None or class_map is None or not current.classes:
        return
    names = tuple(entry.name for entry in class_map.classes)
    if names != current.classes:
        theirs = next((pair for pair in zip(names, current.classes, strict=False) if pair[0] != pair[1]), None)
        difference = f"{theirs[0]} in place of {theirs[1]}" if theirs else f"{len(names)}, not {len(current.classes)}"
        raise InputError(f"class_map: its classes are not those of the data set {root} ({difference}); mend the map")


# Checking.


def _check(item: SourceItem, known: Known | None, lookup: Lookup | None) -> Row | BadFile | None:
    """A row to write, why the item is refused, or None: the data set has it already."""
    try:
        return _checked(item, known, lookup)
    except BadFile as bad:
        return bad


def _checked(item: SourceItem, known: Known | None, lookup: Lookup | None) -> Row | None:
    if item.problem:
        raise BadFile(item.problem)
    data = _read(item.image_uri, "it")
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
    return Row(record, item.split, image_digest, mask_digest, known)


def _read(uri: str, what: str) -> bytes:
    """A store that fails is no bad file: such an error goes up."""
    try:
        return storage.read_bytes(uri)
    except (FileNotFoundError, PermissionError) as error:
        raise BadFile(f"{what} cannot be read: {error}") from None


def _check_same(item: SourceItem, known: Known, image_digest: str) -> None:
    if known.image_digest != image_digest:
        raise BadFile(f"the data set has another image under the id {item.image_id}: rename this one")
    if known.split != item.split:
        raise BadFile(f"the data set has it in split {known.split}, and here it is in {item.split}")


def _ahead(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[tuple[Item, Result]]:
    """Items with their results, in order, with few of them worked on or waiting, so that memory stays bounded."""
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) >= 2 * WORKERS:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    finally:
        for _, future in waiting:
            future.cancel()


def _index(root: str, current: Manifest | None, pool: ThreadPoolExecutor) -> dict[str, Known]:
    """What the data set holds, by image id; a mask that came later wins."""
    files = sorted(current.files if current else (), key=lambda file: file.kind == "labels")
    known: dict[str, Known] = {}
    for file, rows in _ahead(pool, lambda file: row_digests(root, file), files):
        known.update((image_id, Known(file.split, image, mask)) for image_id, image, mask in rows)
    return known
