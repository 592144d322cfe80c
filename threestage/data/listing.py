"""List the images of a bucket prefix or a local folder into Parquet shards (LISTED_SCHEMA) that a rerun extends.

A prefix is cut into ranges of keys, which are listed in parallel and resumed one by one; `list_images` says how.
Also: requests to S3, and whether a folder is a data set or holds images.
"""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache, partial
from itertools import chain, islice, pairwise, takewhile
from os.path import splitext
from threading import Lock
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from threestage.data import safe_walk, storage
from threestage.data.outputs import LISTING, claim
from threestage.data.pairs import IMAGE_SUFFIXES
from threestage.data.records import MANIFEST_NAME, PathBelow, load_manifest
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
_ONE_STORE = Lock()
PATIENCE_S = 60.0
LONGEST_WAIT_S = 15.0

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

Hashes = npt.NDArray[np.uint64]
KNOWN = np.dtype([("uri", "<u8"), ("bytes", "<i8"), ("stamp", "<i8"), ("row", "<i8")])
"""A listed image. `uri`: a hash of it; `row`: its number in the range."""
NO_STAMP = 0

Entries = npt.NDArray[np.void]


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


def in_threads(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """map() in a few threads of this process."""
    with ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(function, items)


def list_images(source: str, destination: str, rows_per_file: int, each: Each = in_threads) -> list[ListedFile]:
    """List the images below a source, or one image file, into shards of `rows_per_file` rows; the shards of this and all
    earlier runs.

    The keys below a prefix are cut once into ranges without gaps (`partitions.json`). Each range is listed page by page,
    gathered into windows, mixed within a window and written as shards; then `ranges/<n>.json` names its shards. At the
    end `files.parquet` names all. A killed listing continues with the ranges that are not done. A finished one is
    extended: every range is listed again, and new images become new shards. So do images that were replaced in place
    (other bytes, modification time or ETag): their old rows are then `replaced`. Memory of a range: one window of rows,
    and when it is extended 32 bytes for each of its images.

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
    files = _files_of_all(destination, len(partition.ranges))
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
    """URI of some image below the source, None where there is none, "" where 10,000 other files come first.

    Raises OSError.
    """
    source = storage.absolute(source)
    pages = _pages_of(source, KeyRange())
    found = next((_uri(source, path) for page in islice(pages, 10) for path, *_ in page), None)
    return "" if found is None and next(pages, None) is not None else found


def list_range(task: RangeTask) -> int:
    """List one range, write what is new in it as shards, then say so in `ranges/<n>.json`. Returns the new rows."""
    uri = _range_uri(task.destination, task.number)
    started = storage.exists(uri)
    before, others_before = (_files_of_range(uri), _others_of_range(uri)) if started else ([], Counter[str]())
    known, replaced = _known_images(task.destination, before), list[int]()
    folder = folder_of(task.source)
    others = Counter[str]()
    found = _pages_of(task.source, KeyRange(after=task.after, until=task.until), others)
    pages = (_table(folder, page) for page in found)
    windows = _windows((_without(page, known, replaced) for page in pages), _window_rows(task.rows_per_file))
    write = partial(_write_window, task.destination, task.rows_per_file, len(before))
    added = list(chain.from_iterable(map(write, windows)))
    if added or others != others_before or not started:
        files = [*_with_replaced(before, replaced), *added]
        storage.write_json(
            uri, {"files": [file.model_dump() for file in files], "passed_over": dict(sorted(others.items()))}
        )
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


def _files_of_range(uri: str) -> list[ListedFile]:
    return list(storage.read_value(uri, "files", list[ListedFile]))


def _others_of_range(uri: str) -> Counter[str]:
    return Counter(storage.read_value(uri, "passed_over", dict[str, int] | None))


def suffixes_passed_over(destination: str) -> Counter[str]:
    """How many files of a finished listing's source are no images, by suffix."""
    uris = storage.list_files(storage.join(destination, "ranges"))
    with ThreadPoolExecutor(THREADS) as pool:
        return sum(pool.map(_others_of_range, uris), Counter[str]())


def _files_of_all(destination: str, ranges: int) -> list[ListedFile]:
    with ThreadPoolExecutor(THREADS) as pool:
        parts = pool.map(_files_of_range, (_range_uri(destination, number) for number in range(ranges)))
        return sorted(chain.from_iterable(parts), key=lambda file: file.path)


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


def _without(table: pa.Table, known: Entries, replaced: list[int]) -> pa.Table:
    """The rows that are not known as they are; `replaced` gets the known rows in whose place they come."""
    if not len(known) or not table.num_rows:
        return table
    hashes = _hashes(table.column("image_uri"))
    entries = known[np.searchsorted(known["uri"], hashes).clip(max=len(known) - 1)]
    is_known = entries["uri"] == hashes
    changed = entries["bytes"] != table.column("bytes").to_numpy()
    changed |= (entries["stamp"] != NO_STAMP) & (entries["stamp"] != table.column("stamp").to_numpy())
    replaced += entries["row"][is_known & changed].tolist()
    return table.filter(pa.array(~is_known | changed))


def _known_images(destination: str, files: list[ListedFile]) -> Entries:
    """What some shards list, sorted by the hash of the URI; of an image that was replaced the last."""
    if not files:
        return np.empty(0, KNOWN)
    with ThreadPoolExecutor(THREADS) as pool:
        entries = np.concatenate(list(pool.map(lambda file: _entries(storage.join(destination, file.path)), files)))
    entries["row"] = np.arange(len(entries))
    entries = entries[np.argsort(entries["uri"], kind="stable")]
    last = np.append(entries["uri"][1:] != entries["uri"][:-1], True)
    return entries[last]


def _entries(uri: str) -> Entries:
    table = storage.read_table(uri, ["image_uri", "bytes", "stamp"])
    entries = np.zeros(len(table), KNOWN)
    entries["uri"] = _hashes(table.column("image_uri"))
    entries["bytes"] = table.column("bytes").to_numpy()
    entries["stamp"] = table.column("stamp").to_numpy() if "stamp" in table.column_names else NO_STAMP
    return entries


def _with_replaced(files: list[ListedFile], rows: list[int]) -> list[ListedFile]:
    """The shards of a range, with the rows (numbers in the range) that are replaced now."""
    starts, by_file = np.cumsum([0, *(file.rows for file in files)]), dict[int, set[int]]()
    for row in rows:
        number = int(np.searchsorted(starts, row, side="right")) - 1
        by_file.setdefault(number, set()).add(row - int(starts[number]))
    return [
        file.model_copy(update={"replaced": tuple(sorted({*file.replaced, *by_file[number]}))})
        if number in by_file
        else file
        for number, file in enumerate(files)
    ]


def _hashes(texts: pa.ChunkedArray) -> Hashes:
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
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(partial(_write_shard, destination, before), shards))


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


# ---- Requests to S3


def _bucket_and_prefix(source: str) -> tuple[str, str]:
    bucket, _, path = storage.filesystem(source)[1].partition("/")
    return bucket, path + "/" if path else ""


def _keys(bucket: str, prefix: str, after: str | None, limit: int) -> Iterator[str]:
    return (key for page in _s3_pages(bucket, prefix, after, limit) for key, *_ in page)


def _s3_pages(bucket: str, prefix: str, after: str | None, limit: int) -> Iterator[list[ListedObjects]]:
    """Keys, bytes and stamps, `limit` or fewer a page; a store may send an empty page that is not the last."""
    place = {} if after is None else {"StartAfter": after}
    while True:
        answer = _request(Bucket=bucket, Prefix=prefix, MaxKeys=limit, **place)
        yield [(entry["Key"], entry["Size"], _stamp(entry.get("ETag"))) for entry in answer.get("Contents", ())]
        if not answer.get("IsTruncated"):
            return
        place = {"ContinuationToken": answer["NextContinuationToken"]}


def _stamp(tag: str | None) -> int:
    return NO_STAMP if tag is None else int.from_bytes(hashlib.sha256(tag.encode()).digest()[:8], "big", signed=True)


def _request(**arguments: Any) -> dict[str, Any]:
    """One ListObjectsV2, repeated for a minute while the store is busy (the SDK gives up early when threads share it).

    Raises OSError (also FileNotFoundError, PermissionError) that names the URI.
    """
    uri = f"{storage.S3_SCHEME}{arguments['Bucket']}/{arguments['Prefix']}"
    give_up, wait = time.monotonic() + PATIENCE_S, 1.0
    while True:
        try:
            answer: dict[str, Any] = _store().call_s3("list_objects_v2", **arguments)
            return answer
        except Exception as error:
            if not storage.of_the_store(error):
                raise
            if not _is_passing(error) or time.monotonic() > give_up:
                kind = type(error) if isinstance(error, FileNotFoundError | PermissionError) else OSError
                raise kind(f"{uri}: {error}") from error
        time.sleep(wait)
        wait = min(2 * wait, LONGEST_WAIT_S)


def _store() -> Any:
    with _ONE_STORE:
        return _store_of(os.getpid(), tuple(sorted(storage.environment(storage.StorageSettings()).items())))


@lru_cache(maxsize=1)
def _store_of(process: int, variables: tuple[tuple[str, str], ...]) -> Any:
    """One client for all threads of a process: each would load the SDK's description of S3 anew."""
    from aiobotocore.session import AioSession  # type: ignore[import-untyped]

    session = AioSession()
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_timestamp)
    store = storage.s3fs_filesystem()
    store.session = session
    store.retries = 1  # `_request` and the SDK repeat; five times both of them would be five minutes
    return store


def _timestamp(text: Any) -> Any:
    """What the SDK makes of it, but not by way of dateutil, which takes two thirds of the time of a page."""
    from botocore.utils import parse_timestamp

    try:
        return datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return parse_timestamp(text)


def _is_passing(error: Exception) -> bool:
    """Whether the same request may succeed later: 5xx, 429, time-outs, broken connections."""
    from botocore import exceptions

    response = getattr(error.__cause__ or error, "response", None)
    if response is None:
        return isinstance(error, TimeoutError | exceptions.HTTPClientError | exceptions.ConnectionError)
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return bool(status >= 500 or status == 429)


# ---- Where to cut the keys


@dataclass(frozen=True)
class _Part:
    """The keys with a prefix: the first, the last and the number of those on the first page; whether more follow."""

    prefix: str
    seen: int
    first: str
    last: str
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
            if len(_starts(parts)) >= MIN_RANGES or not any(part.is_large for part in parts):
                break
            parts = _next_level(pool, keys, parts)
    return tuple(KeyRange(after=after, until=until) for after, until in pairwise([None, *_starts(parts)[1:], None]))


def _next_level(pool: ThreadPoolExecutor, keys: Keys, parts: list[_Part]) -> list[_Part]:
    large = [part for part in parts if part.is_large]
    limit = max(2, MAX_RANGES // len(large))
    prefixes = chain.from_iterable(list(pool.map(partial(_children, keys, limit), large)))
    small = [part for part in parts if not part.is_large]
    return sorted([*small, *pool.map(partial(_part, keys), prefixes)], key=lambda part: part.prefix)


def _part(keys: Keys, prefix: str) -> _Part:
    seen = list(islice(keys(prefix, None, PAGE), PAGE)) or [prefix]
    more = len(seen) == PAGE and _first_after(keys, prefix, seen[-1]) is not None
    return _Part(prefix, len(seen), seen[0], seen[-1], more)


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


def _children(keys: Keys, limit: int, part: _Part) -> list[str]:
    """What the keys of a part share, longer by one character: the first `limit` that occur, one request each."""
    stem = _common(keys, part)
    children: list[str] = []
    key = _first_after(keys, stem, stem)
    while key is not None and len(children) < limit:
        child = key[: len(stem) + 1]
        if children and child <= children[-1]:
            break  # the key goes on with U+10FFFF, so it lies beyond the jump and still in the last child
        children.append(child)
        key = _first_after(keys, stem, child + LAST_CHARACTER)
    return children


def _common(keys: Keys, part: _Part) -> str:
    """The longest beginning that all keys of the part share."""
    stem = _shared(part.first, part.last)
    while len(stem) > len(part.prefix):
        beyond = _first_after(keys, part.prefix, stem + LAST_CHARACTER)
        if beyond is None or beyond.startswith(stem):
            break
        stem = _shared(stem, beyond)
    return stem


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
