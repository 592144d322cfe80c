"""List the images of a bucket prefix or a local folder into Parquet shards (LISTED_SCHEMA) that a rerun extends.

A prefix is cut into ranges of keys, which are listed in parallel and resumed one by one; `list_images` says how. A single
paginator over a prefix would be less code, but it is slower where it matters: a page follows from the one before, so 100 ms
a request are 10,000 keys a second, 3 hours for 10⁸ of them, however many processes there are (docs/performance.md).
Also: whether a folder is a data set or holds images.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, pairwise, takewhile
from os.path import splitext
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from threestage.data import safe_walk, storage
from threestage.data.outputs import LISTING, claim
from threestage.data.pairs import IMAGE_SUFFIXES
from threestage.data.parallel import map_ahead
from threestage.data.records import MANIFEST_NAME, PREVIEW_NAME, PathBelow, load_manifest
from threestage.errors import InputError
from threestage.settings import Settings

LISTED_SCHEMA = pa.schema(
    [("image_id", pa.string()), ("image_uri", pa.string()), ("bytes", pa.int64()), ("stamp", pa.int64())]
)
"""`stamp`: another one for another content, as far as the store shows it; older listings have none. See `ListedObjects`."""
FILES_SCHEMA = pa.schema(
    [("path", pa.string()), ("rows", pa.int64()), ("digest", pa.string()), ("replaced", pa.list_(pa.int64()))]
)
WINDOW = 2**15
PAGE = 1000
THREADS = 8

FEW_KEYS = 10_000
MIN_RANGES = 48
MAX_RANGES = 256
LEVELS = 8
MOST_SUFFIXES, OTHER_SUFFIXES = 64, ".…"
LAST_CHARACTER = chr(0x10FFFF)

Each = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]
"""Like map(), possibly parallel (threads, Ray tasks) and in any order. What it is handed can be pickled."""

Keys = Callable[[str, str | None, int], Iterator[str]]
"""(prefix, after, keys per request) → the keys with that prefix that come after `after`, in order, one request at a time."""

ListedObjects = tuple[str, int, int]
"""A file: its key, or its path below the source; bytes, or a key of safe_walk.WHY_NOT; its stamp: the time of its last change in
ns, on S3 a hash of its ETag."""

NO_STAMP = 0
KNOWN_SCHEMA = pa.schema([("uri", pa.uint64()), ("bytes", pa.int64()), ("stamp", pa.int64())])
"""A listed image. `uri`: a hash of it, null where the image was replaced since; `stamp`: null where the listing has none."""


class ListedFile(Settings):
    """A shard. `path`: below the destination. `digest`: see `rows_digest`. `replaced`: numbers of the rows whose images were
    replaced in place since; a later shard lists them anew."""

    path: PathBelow
    rows: int
    digest: str
    replaced: tuple[int, ...] = ()


class KeyRange(Settings):
    """The keys k with after < k ≤ until, in the order of code points, which is that of S3; null: no bound."""

    after: str | None = None
    until: str | None = None


class RangeRecord(Settings):
    """`ranges/<n>.json`: the shards of a range, and how many files there are no images, by suffix."""

    files: tuple[ListedFile, ...]
    passed_over: dict[str, int] | None = None


class Partition(Settings):
    """`partitions.json`: what is listed, and how its key space is cut."""

    version: Literal[1] = 1
    source: str
    rows_per_file: int
    ranges: tuple[KeyRange, ...]


@dataclass(frozen=True)
class RangeTask:
    """One range to list. Strings and whole numbers only, so that it may travel to another process."""

    source: str
    destination: str
    rows_per_file: int
    number: int
    after: str | None
    until: str | None

    def __str__(self) -> str:
        return f"the listing of {self.source} after {self.after or 'its beginning'}"


# ---- The listing and its files


def list_images(source: str, destination: str, rows_per_file: int, each: Each = map_ahead) -> list[ListedFile]:
    """List the images below a source, or one image file, into shards of `rows_per_file` rows; the shards of this and all
    earlier runs.

    The keys below a prefix are cut once into ranges without gaps (`partitions.json`). Each range is listed page by page,
    gathered into windows, mixed within a window and written as shards; then `ranges/<n>.json` names its shards. At the
    end `files.parquet` names all. A killed listing continues with the ranges that are not done. A finished one is
    extended: every range is listed again, and new images become new shards. So do images that were replaced in place
    (other bytes, modification time or ETag): their old rows are then `replaced`. Memory of a range: one window of rows,
    and when it is extended another one, and 24 bytes for each of its images.

    Shards that were there stay as they are; images that were deleted from the source stay listed. Raises InputError
    when the source holds no image, or when the destination holds a listing of something else; OSError, naming the
    URI, when the source cannot be listed. What a killed run wrote of a range that changed meanwhile stays there unused.
    """
    source = storage.absolute(source)
    partition = _partition(source, destination, rows_per_file)
    before = listed_files(destination) if storage.exists(_files_uri(destination)) else None
    done = set() if before is not None else set(storage.list_files(storage.join(destination, "ranges")))
    tasks = [
        RangeTask(source, destination, rows_per_file, number, keys.after, keys.until)
        for number, keys in enumerate(partition.ranges)
        if storage.absolute(_range_uri(destination, number)) not in done
    ]
    for _ in each(list_range, tasks):
        pass
    files = sorted((file for record in _records(destination) for file in record.files), key=lambda file: file.path)
    if not files:
        storage.delete(destination, destination)  # another cut may fit the images that come
        expected = ", ".join(sorted(IMAGE_SUFFIXES))
        raise InputError(f"{source}: no image below it; files in {expected} are expected", "data/no-images")
    if files != before:
        rows = pa.Table.from_pylist([file.model_dump() for file in files], FILES_SCHEMA)
        storage.write_table(_files_uri(destination), rows)
    return files


def listed_files(destination: str) -> list[ListedFile]:
    """The shards of a finished listing, sorted by path. Raises FileNotFoundError when it is not finished."""
    return storage.read_models(_files_uri(destination), ListedFile)


def first_image(source: str) -> str | None:
    """URI of some image below the source, None where there is none, "" where 10,000 other files come first. The picture of a
    data set's labels is none of its images.

    Raises OSError.
    """
    source = storage.absolute(source)

    def is_preview(path: str) -> bool:
        return path == PREVIEW_NAME and storage.is_file(storage.join(source, MANIFEST_NAME))

    pages = _pages_of(source, KeyRange())
    found = next((_uri(source, path) for page in islice(pages, 10) for path, *_ in page if not is_preview(path)), None)
    return "" if found is None and next(pages, None) is not None else found


def list_range(task: RangeTask) -> int:
    """List one range, write what is new in it as shards, then say so in `ranges/<n>.json`. Returns the new rows."""
    uri = _range_uri(task.destination, task.number)
    before = storage.read_json(uri, RangeRecord) if storage.exists(uri) else None
    files = () if before is None else before.files
    folder, others, replaced = folder_of(task.source), Counter[str](), list[int]()
    found = _pages_of(task.source, KeyRange(after=task.after, until=task.until), others)
    pages = (_table(folder, page) for page in found)
    if files:
        known = _known_images(task.destination, files)
        pages = (_without(window, known, replaced) for window in _windows(pages, WINDOW))
    windows = _windows(pages, _window_rows(task.rows_per_file))
    write = partial(_write_window, task.destination, task.rows_per_file, len(files))
    added = list(chain.from_iterable(map(write, windows)))
    record = RangeRecord(files=(*_with_replaced(files, replaced), *added), passed_over=dict(sorted(others.items())))
    if record != before:
        storage.write_json(uri, record.model_dump(mode="json"))
    return sum(file.rows for file in added)


def folder_of(source: str) -> str:
    """The folder below which the ids of a source are paths: itself, or that of an image file."""
    return source.rstrip("/").rpartition("/")[0] if is_image_file(source) else source


def is_image_file(source: str) -> bool:
    """Whether a source is one file with the suffix of an image."""
    return _is_image(source.rpartition("/")[2]) and storage.is_file(source)


def _partition(source: str, destination: str, rows_per_file: int) -> Partition:
    """The partition that is there, else a new one. InputError when the one there is of another listing."""
    claim(destination, LISTING)
    uri = storage.join(destination, "partitions.json")
    if not storage.exists(uri):
        partition = Partition(source=source, rows_per_file=rows_per_file, ranges=_cut(source))
        storage.write_json(uri, partition.model_dump(mode="json"))
        return partition
    partition = storage.read_json(uri, Partition)
    if (partition.source, partition.rows_per_file) != (source, rows_per_file):
        raise InputError(
            f"{uri}: the listing there is of {partition.source} with rows_per_file {partition.rows_per_file}, not of "
            f"{source} with rows_per_file {rows_per_file}; give another folder",
            "data/foreign-folder",
        )
    return partition


def _cut(source: str) -> tuple[KeyRange, ...]:
    if is_image_file(source):
        return (KeyRange(),)
    if not storage.is_s3(source):
        os.scandir(storage.filesystem(source)[1]).close()  # raises where there is no such folder
        return (KeyRange(),)
    bucket, prefix = _bucket_and_prefix(source)
    return cut_key_space(partial(_keys, bucket), prefix)


def forget(destination: str) -> None:
    """Make a rerun list everything again. What shows that the folder is a listing stays."""
    for name in ("ranges", "files.parquet"):
        storage.delete(storage.join(destination, name), destination)


def _range_uri(destination: str, number: int) -> str:
    return storage.join(destination, "ranges", f"{number}.json")


def _files_uri(destination: str) -> str:
    return storage.join(destination, "files.parquet")


def suffixes_passed_over(destination: str) -> Counter[str]:
    """How many files of a finished listing's source are no images, by suffix."""
    return sum((Counter(record.passed_over or {}) for record in _records(destination)), Counter[str]())


def _records(destination: str) -> Iterator[RangeRecord]:
    uris = storage.list_files(storage.join(destination, "ranges"))
    return map_ahead(lambda uri: storage.read_json(uri, RangeRecord), uris)


# ---- Pages → windows → shards


def _pages_of(source: str, keys: KeyRange, others: Counter[str] | None = None) -> Iterator[list[ListedObjects]]:
    """The images of each 1000 files of a range: paths below the source, bytes, stamps. Counts the suffixes of others."""
    others = Counter[str]() if others is None else others
    if is_image_file(source):
        yield [_image_file(source)]
        return
    if not storage.is_s3(source):
        yield from _local_pages(storage.filesystem(source)[1], others)
        return
    bucket, prefix = _bucket_and_prefix(source)
    for page in _s3_pages(bucket, prefix, keys.after, PAGE):
        inside = page if keys.until is None else [found for found in page if found[0] <= keys.until]
        paths = ((key[len(prefix) :], size, stamp) for key, size, stamp in inside)
        yield [found for found in paths if _is_image(found[0], others)]
        if len(inside) < len(page):
            return


def _is_image(path: str, others: Counter[str] | None = None) -> bool:
    """`others`: counts the suffix of a file that is none, unless it is hidden."""
    suffix, hidden = splitext(path)[1].lower(), path.startswith(".") or "/." in path
    if others is not None and not hidden and suffix not in IMAGE_SUFFIXES and not path.endswith("/"):
        others[suffix if suffix in others or len(others) < MOST_SUFFIXES else OTHER_SUFFIXES] += 1
    return not hidden and suffix in IMAGE_SUFFIXES


def _uri(source: str, path: str) -> str:
    return f"{source.rstrip('/')}/{path}"


def _table(source: str, found: list[ListedObjects]) -> pa.Table:
    ids = [splitext(path)[0] for path, *_ in found]
    uris = [_uri(source, path) for path, *_ in found]
    sizes, stamps = [size for _, size, _ in found], [stamp for *_, stamp in found]
    return pa.table([ids, uris, sizes, stamps], schema=LISTED_SCHEMA)


def _without(table: pa.Table, known: pa.Table, replaced: list[int]) -> pa.Table:
    """The rows that are not known as they are; `replaced` gets the known rows in whose place they come."""
    rows = pc.index_in(pa.array(_hashes(table.column("image_uri"))), known.column("uri"))
    before = known.take(rows)
    is_same = pc.equal(before.column("bytes"), table.column("bytes"))
    is_same = pc.and_(is_same, pc.fill_null(pc.equal(before.column("stamp"), table.column("stamp")), True))
    is_other = pc.invert(pc.fill_null(is_same, False))
    replaced += rows.filter(is_other).drop_null().to_pylist()
    return table.filter(is_other)


def _known_images(destination: str, files: Sequence[ListedFile]) -> pa.Table:
    """What some shards list, in their order."""
    return pa.concat_tables(map_ahead(partial(_known_in, destination), files)).combine_chunks()


def _known_in(destination: str, file: ListedFile) -> pa.Table:
    table = storage.read_table(storage.join(destination, file.path), ["image_uri", "bytes", "stamp"])
    stamps = table.column("stamp").to_numpy() if "stamp" in table.column_names else np.full(len(table), NO_STAMP)
    uris = pa.array(_hashes(table.column("image_uri")), mask=np.isin(np.arange(len(table)), file.replaced))
    return pa.table([uris, table.column("bytes"), pa.array(stamps, mask=stamps == NO_STAMP)], schema=KNOWN_SCHEMA)


def _with_replaced(files: Sequence[ListedFile], rows: list[int]) -> list[ListedFile]:
    """The shards of a range, with the rows (numbers in the range) that are replaced now."""
    found, start, replaced = list[ListedFile](), 0, np.array(rows, np.int64)
    for file in files:
        inside = replaced[(start <= replaced) & (replaced < start + file.rows)] - start
        every = tuple(sorted({*file.replaced, *inside.tolist()}))
        found.append(file.model_copy(update={"replaced": every}))
        start += file.rows
    return found


def _hashes(texts: pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    """(rows,) the first 8 bytes of each text's SHA-256, most significant first."""
    digests = (hashlib.sha256(text.encode()).digest()[:8] for text in texts.to_pylist())
    return np.frombuffer(b"".join(digests), ">u8").astype(np.uint64)


def _window_rows(rows_per_file: int) -> int:
    """WINDOW rounded down to whole shards; at least one."""
    return rows_per_file * max(1, WINDOW // rows_per_file)


def _windows(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of `rows` rows; the last may be shorter."""
    waiting, count = [LISTED_SCHEMA.empty_table()], 0
    for table in tables:
        waiting.append(table)
        count += table.num_rows
        while count >= rows:
            waiting = [pa.concat_tables(waiting)]
            yield waiting[0].slice(0, rows)
            waiting, count = [waiting[0].slice(rows)], count - rows
    if count:
        yield pa.concat_tables(waiting)


def _write_window(destination: str, rows_per_file: int, before: int, window: pa.Table) -> list[ListedFile]:
    """Shards of a window's rows in the order of the ids' SHA-256: neighbours in a film come apart, each time alike. `before`:
    shards that the range has had."""
    order = np.argsort(_hashes(window.column("image_id")), kind="stable")
    mixed = window.combine_chunks().take(order)
    shards = (mixed.slice(start, rows_per_file) for start in range(0, mixed.num_rows, rows_per_file))
    return list(map_ahead(partial(_write_shard, destination, before), shards))


def _write_shard(destination: str, before: int, shard: pa.Table) -> ListedFile:
    digest = rows_digest(shard, before)
    file = ListedFile(path=f"listed-{digest[:16]}.parquet", rows=shard.num_rows, digest=digest)
    storage.write_table(storage.join(destination, file.path), shard)
    return file


def rows_digest(shard: pa.Table, before: int = 0) -> str:
    """SHA-256 (hex) of [ids, URIs, sizes] as JSON, in an extended range (`before` shards) of [ids, URIs, sizes, stamps, before]:
    an image that was replaced by one of its size, or comes back, makes another shard."""
    columns = [shard.column(name).to_pylist() for name in ("image_id", "image_uri", "bytes")]
    columns += [shard.column("stamp").to_pylist(), [before]] if before else []
    return hashlib.sha256(json.dumps(columns, ensure_ascii=False).encode()).hexdigest()


# ---- A local folder


def _local_pages(folder: str, others: Counter[str]) -> Iterator[list[ListedObjects]]:
    paths = safe_walk.walk(folder)
    while page := list(islice(paths, PAGE)):
        found = (safe_walk.entry(folder, path) for path in page if _is_image(safe_walk.readable(path), others))
        yield [(entry.path, entry.size, entry.changed_ns) for entry in found if entry is not None]


def _image_file(source: str) -> ListedObjects:
    """A file that is the whole source, also where it is a link."""
    files, path = storage.filesystem(source)
    name = path.rpartition("/")[2]
    if storage.is_s3(source):
        bucket, _, key = path.partition("/")
        found = (one for page in _s3_pages(bucket, key, None, PAGE) for one in page)
        return next((name, size, stamp) for other, size, stamp in found if other == key)
    info = files.get_file_info(path)
    return name, info.size, info.mtime_ns


# ---- Pages of S3, and where to cut the keys


def _bucket_and_prefix(source: str) -> tuple[str, str]:
    bucket, _, path = storage.filesystem(source)[1].partition("/")
    return bucket, path + "/" if path else ""


def _s3_pages(bucket: str, prefix: str, after: str | None, limit: int) -> Iterator[list[ListedObjects]]:
    """Keys, bytes and stamps, `limit` or fewer a page; a store may send an empty page that is not the last."""
    place = {} if after is None else {"StartAfter": after}
    while True:
        answer = storage.ask_s3("list_objects_v2", bucket, Prefix=prefix, MaxKeys=limit, **place)
        yield [(entry["Key"], entry["Size"], _stamp(entry.get("ETag"))) for entry in answer.get("Contents", ())]
        if not answer.get("IsTruncated"):
            return
        place = {"ContinuationToken": answer["NextContinuationToken"]}


def _stamp(tag: str | None) -> int:
    return NO_STAMP if tag is None else int.from_bytes(hashlib.sha256(tag.encode()).digest()[:8], "big", signed=True)


def _keys(bucket: str, prefix: str, after: str | None, limit: int) -> Iterator[str]:
    return (key for page in _s3_pages(bucket, prefix, after, limit) for key, *_ in page)


class _Part(NamedTuple):
    """The keys with a prefix: the first, the last and the number of those on the first page; whether more follow."""

    prefix: str
    first: str
    last: str
    seen: int
    is_large: bool


def cut_key_space(keys: Keys, prefix: str) -> tuple[KeyRange, ...]:
    """Ranges side by side, from the first possible key to the last, about `MIN_RANGES` or more where there are many keys.

    Prefixes with more than 1000 keys are cut at each next character, level by level; small neighbours share a range.
    """
    if sum(1 for _ in islice(keys(prefix, None, PAGE), FEW_KEYS + 1)) <= FEW_KEYS:
        return (KeyRange(),)
    parts = [_part(keys, prefix)]
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in range(LEVELS):
            large = [part for part in parts if part.is_large]
            if len(_starts(parts)) >= MIN_RANGES or not large:
                break
            children = pool.map(partial(_children, keys, max(2, MAX_RANGES // len(large))), large)
            found = pool.map(partial(_part, keys), list(chain.from_iterable(children)))
            parts = sorted([*(part for part in parts if not part.is_large), *found])
    return tuple(KeyRange(after=after, until=until) for after, until in pairwise([None, *_starts(parts)[1:], None]))


def _part(keys: Keys, prefix: str) -> _Part:
    seen = list(islice(keys(prefix, None, PAGE), PAGE)) or [prefix]
    more = len(seen) == PAGE and _first_after(keys, prefix, seen[-1]) is not None
    return _Part(prefix, seen[0], seen[-1], len(seen), more)


def _starts(parts: list[_Part]) -> list[str]:
    """The prefixes at which a range begins, when neighbours of together `FEW_KEYS` or fewer share one."""
    starts: list[str] = []
    in_range = FEW_KEYS
    for part in parts:
        size = FEW_KEYS if part.is_large else part.seen
        if in_range + size > FEW_KEYS:
            starts.append(part.prefix)
            in_range = 0
        in_range += size
    return starts


def _children(keys: Keys, most: int, part: _Part) -> list[str]:
    """What all keys of a part begin with, longer by one character: the first `most` that occur, one request each."""
    stem = _shared(part.first, part.last)
    while (beyond := _first_after(keys, part.prefix, stem + LAST_CHARACTER)) and not beyond.startswith(stem):
        stem = _shared(stem, beyond)
    children: list[str] = []
    key = _first_after(keys, stem, stem)
    # a key that goes on with U+10FFFF lies beyond the jump and still in the last child
    while key is not None and len(children) < most and key[: len(stem) + 1] not in children[-1:]:
        children.append(key[: len(stem) + 1])
        key = _first_after(keys, stem, children[-1] + LAST_CHARACTER)
    return children


def _shared(left: str, right: str) -> str:
    return left[: sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))]


def _first_after(keys: Keys, prefix: str, after: str) -> str | None:
    return next(keys(prefix, after, 1), None)


# ---- A data set, or images?


def holds_data_set(folder: str) -> bool:
    """Whether `folder` is a data set. A manifest.json of somebody else's beside images is no reason to say so.

    Raises InputError where a manifest cannot be read and there is no image.
    """
    if not storage.is_file(storage.join(folder, MANIFEST_NAME)):
        return False
    try:
        load_manifest(folder)
    except InputError:
        if not first_image(folder):
            raise
        return False
    return True
