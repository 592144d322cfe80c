"""Why: a pool of 10⁸ images is listed once and extended for years; an image lost, doubled or renamed is never noticed."""

import hashlib
import json
import os
import pickle
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.list_objects import Bucket, NumberedKeys, answer, serving
from tests.refusals import refused
from tests.s3 import variables
from threestage.data import listing, pool, storage
from threestage.data.listing import KeyRange, ListedFile, cut_key_space, first_image, list_images, listed_files
from threestage.data.safe_walk import NOT_UTF8, walk

SOURCE = "s3://bucket/pool"


def keys_of(keys: Sequence[str]) -> listing.Keys:
    """Keys by request, as `cut_key_space` asks for them, from memory."""
    bucket = Bucket(sorted(keys))

    def ask(prefix: str, after: str | None, limit: int) -> Iterator[str]:
        while True:
            page, more = bucket.page(prefix, after or "", limit)
            yield from page
            if not more:
                return
            after = page[-1]

    return ask


@pytest.fixture(name="pool")
def numbered_pool(monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A bucket of 25,000 numbered images, without a server."""
    bucket = Bucket(list(NumberedKeys(25_000)))
    serve(monkeypatch, bucket)
    return bucket


@pytest.fixture
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that 300 keys have as many pages and ranges as 30,000."""
    for name, value in {"PAGE": 10, "FEW_KEYS": 20, "WINDOW": 64}.items():
        monkeypatch.setattr(listing, name, value)


def serve(monkeypatch: pytest.MonkeyPatch, bucket: Bucket) -> None:
    monkeypatch.setattr(storage, "ask_s3", lambda operation, name, **arguments: answer(bucket, **arguments))


def rows_of(destination: Path | str) -> list[dict[str, Any]]:
    files = listed_files(str(destination))
    return [row for file in files for row in storage.read_table(f"{destination}/{file.path}").to_pylist()]


def written(destination: Path) -> dict[str, bytes]:
    return {str(path.relative_to(destination)): path.read_bytes() for path in destination.rglob("*") if path.is_file()}


def one_by_one(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    return map(function, items)


def ranges_of(destination: Path) -> list[KeyRange]:
    return [KeyRange(**one) for one in json.loads((destination / "partitions.json").read_text())["ranges"]]


# The cut

names = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
    st.text("ab/", max_size=5),
    st.text(["a", "é", "\uffff", "\U00010000", "\U0010ffff"], max_size=4),
    st.integers(0, 999).map("img_{:03d}.jpg".format),
)


@settings(deadline=None, max_examples=200)
@given(st.sets(names, max_size=120), st.sampled_from(["", "p/", "é/"]), names)
def test_ranges_lie_side_by_side_and_end_nowhere(found: set[str], prefix: str, later: str) -> None:
    keys = [prefix + name for name in found if prefix + name]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"PAGE": 4, "FEW_KEYS": 6, "MIN_RANGES": 12, "MAX_RANGES": 24}.items():
            patch.setattr(listing, name, value)
        ranges = cut_key_space(keys_of(keys), prefix)
    assert ranges[0].after is None and ranges[-1].until is None
    assert all(left.until == right.after for left, right in pairwise(ranges))
    bounds = [one.until for one in ranges[:-1] if one.until is not None]
    assert len(bounds) == len(ranges) - 1 and bounds == sorted(set(bounds))
    for key in [*keys, prefix + later]:
        begun = [one for one in ranges if one.after is None or one.after < key]
        assert sum(one.until is None or key <= one.until for one in begun) == 1


@pytest.mark.parametrize("count", [10_000, 10_001, 100_000, 1_000_000])
def test_numbered_frames_give_few_ranges_when_few_and_even_ones_when_many(count: int) -> None:
    bucket = Bucket(NumberedKeys(count))
    asked = partial(listing._keys, "bucket")
    with pytest.MonkeyPatch.context() as patch:
        serve(patch, bucket)
        ranges = cut_key_space(asked, "pool/")
    assert len(bucket.requests) < 600
    if count <= listing.FEW_KEYS:
        assert ranges == (KeyRange(),) and len(bucket.requests) <= 10
    elif count == 1_000_000:
        assert listing.MIN_RANGES <= len(ranges) <= listing.MAX_RANGES
        places = [keys_before(bucket.keys, one.until) for one in ranges]
        assert max(right - left for left, right in pairwise([0, *places])) <= count // 40
    else:
        assert 2 <= len(ranges) <= 2 * count / 5_000


def keys_before(keys: Sequence[str], until: str | None) -> int:
    return len(keys) if until is None else bisect_right(keys, until)


@pytest.mark.parametrize(
    "alphabet", ["0123456789abcdef", "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"]
)
def test_names_that_are_hashes_are_cut_evenly(alphabet: str) -> None:
    def name(index: int) -> str:
        digest = hashlib.sha256(str(index).encode()).digest()
        return "".join(alphabet[byte % len(alphabet)] for byte in digest[:12])

    found = sorted(f"p/{name(index)}.jpg" for index in range(200_000))
    ranges = cut_key_space(keys_of(found), "p/")
    places = [keys_before(found, one.until) for one in ranges]
    assert 20 <= len(ranges) <= 300
    assert max(right - left for left, right in pairwise([0, *places])) <= listing.FEW_KEYS


def test_one_huge_folder_among_small_ones_is_cut_too() -> None:
    small = [f"p/{letter}{number}.jpg" for letter in "abcdefgh" for number in range(200)]
    found = sorted([*small, *(f"p/train/{number:06d}.jpg" for number in range(150_000))])
    places = [keys_before(found, one.until) for one in cut_key_space(keys_of(found), "p/")]
    assert max(right - left for left, right in pairwise([0, *places])) <= listing.FEW_KEYS


# The listing


def test_every_image_is_listed_once_and_nothing_else(pool: Bucket, tmp_path: Path) -> None:
    extra = ["pool/", "pool/notes.txt", "pool/.hidden/a.jpg", "pool/film/.b.png", "pool/film.jpg/", "pool2/x.jpg"]
    pool.keys = sorted([*pool.keys, *extra, "pool/A.JPEG", "pool/ünï cö+dé/b&<1>.TIFF", "pool/two.dots.webp"])
    files = list_images(SOURCE, str(tmp_path), 256)
    rows = rows_of(tmp_path)
    uris = [row["image_uri"] for row in rows]
    assert sorted(uris) == [f"s3://bucket/{key}" for key in pool.keys if key not in extra]
    assert len(ranges_of(tmp_path)) > 2
    assert {row["bytes"] for row in rows} == {12_345}
    ids = {row["image_uri"]: row["image_id"] for row in rows}
    assert ids["s3://bucket/pool/A.JPEG"] == "A"
    assert ids["s3://bucket/pool/ünï cö+dé/b&<1>.TIFF"] == "ünï cö+dé/b&<1>"
    assert ids["s3://bucket/pool/two.dots.webp"] == "two.dots"
    assert files == listed_files(str(tmp_path)) == sorted(files, key=lambda file: file.path)
    assert sum(file.rows for file in files) == len(rows)


def test_a_shard_is_named_by_its_rows_and_full(pool: Bucket, tmp_path: Path) -> None:
    files = list_images(SOURCE, str(tmp_path), 256)
    for file in files:
        shard = storage.read_table(f"{tmp_path}/{file.path}")
        assert shard.schema.equals(listing.LISTED_SCHEMA) and shard.num_rows == file.rows <= 256
        assert listing.rows_digest(shard) == file.digest and file.path == f"listed-{file.digest[:16]}.parquet"
    assert sum(file.rows < 256 for file in files) <= len(ranges_of(tmp_path))


def test_a_shard_mixes_its_window(pool: Bucket, tmp_path: Path) -> None:
    pool.keys = pool.keys[:8_000]
    for file in list_images(SOURCE, str(tmp_path), 100):
        ids = storage.read_table(f"{tmp_path}/{file.path}").column("image_id").to_pylist()
        hashes = [hashlib.sha256(name.encode()).digest() for name in ids]
        frames = sorted(int(name[-6:]) for name in ids)
        assert hashes == sorted(hashes) and frames[-1] - frames[0] > 4_000
        assert sum(right - left == 1 for left, right in pairwise(frames)) < 20


def test_windows_are_whole_shards(small_ranges: None) -> None:
    assert [listing._window_rows(rows) for rows in (1, 10, 64, 100)] == [64, 60, 64, 100]
    tables = [listing._table("s", [(f"{page}/{row}.jpg", 1, 2) for row in range(7)]) for page in range(10)]
    windows = list(listing._windows(tables, 30))
    assert [window.num_rows for window in windows] == [30, 30, 10]
    assert pa.concat_tables(windows).equals(pa.concat_tables(tables))


def test_a_rerun_without_news_changes_no_byte(pool: Bucket, tmp_path: Path) -> None:
    first = list_images(SOURCE, str(tmp_path), 256)
    before = written(tmp_path)
    assert list_images(SOURCE, str(tmp_path), 256, one_by_one) == first
    assert written(tmp_path) == before


def test_a_rerun_adds_what_is_new_and_takes_nothing_away(pool: Bucket, tmp_path: Path) -> None:
    first = list_images(SOURCE, str(tmp_path), 256)
    before = written(tmp_path)
    new = ["pool/0.png", "pool/film_00001/frame_000000_b.jpg", "pool/film_99999/frame_000000.jpg", "pool/zz.bmp"]
    everything = {*pool.keys, *new}
    pool.keys = sorted({*pool.keys[5_000:], *new})
    again = list_images(SOURCE, str(tmp_path), 256)
    assert set(first) < set(again) and sum(file.rows for file in set(again) - set(first)) == len(new)
    after = written(tmp_path)
    assert {name: after[name] for name in before if name.startswith("listed-")} == {
        name: data for name, data in before.items() if name.startswith("listed-")
    }
    assert sorted(row["image_uri"] for row in rows_of(tmp_path)) == sorted(f"s3://bucket/{key}" for key in everything)
    assert list_images(SOURCE, str(tmp_path), 256) == again


class Killed(Exception):
    pass


def killed_after(ranges: int) -> listing.Each:
    def each(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        yield from map(function, items[:ranges])
        raise Killed

    return each


@pytest.mark.parametrize("done", [0, 1, 4])
def test_a_killed_listing_goes_on_with_what_is_not_done(
    done: int, small_ranges: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bucket = Bucket(list(NumberedKeys(300)))
    serve(monkeypatch, bucket)
    whole = list_images(SOURCE, str(tmp_path / "whole"), 16)
    with pytest.raises(Killed):
        list_images(SOURCE, str(tmp_path / "part"), 16, killed_after(done))
    with pytest.raises(FileNotFoundError):
        listed_files(str(tmp_path / "part"))
    before, ranges = written(tmp_path / "part"), ranges_of(tmp_path / "part")
    assert len(ranges) > 8
    bucket.requests.clear()
    assert list_images(SOURCE, str(tmp_path / "part"), 16) == whole
    starts = {after for _, after, limit in bucket.requests if limit == 10}
    assert not starts & {one.after or "" for one in ranges[:done]}
    assert {one.after or "" for one in ranges[done:]} <= starts
    after = written(tmp_path / "part")
    assert {name: after[name] for name in before} == before
    assert len([name for name in after if name.startswith("listed-")]) == len(whole)


def test_a_killed_extension_is_repeated(small_ranges: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bucket = Bucket(list(NumberedKeys(200)))
    serve(monkeypatch, bucket)
    first = list_images(SOURCE, str(tmp_path), 16)
    bucket.keys = [*NumberedKeys(250), "pool/z.jpg"]
    with pytest.raises(Killed):
        list_images(SOURCE, str(tmp_path), 16, killed_after(len(ranges_of(tmp_path)) - 1))
    assert listed_files(str(tmp_path)) == first
    list_images(SOURCE, str(tmp_path), 16)
    assert sorted(row["image_uri"] for row in rows_of(tmp_path)) == [f"s3://bucket/{key}" for key in bucket.keys]


def test_another_source_or_shard_size_is_refused(pool: Bucket, tmp_path: Path) -> None:
    pool.keys = pool.keys[:50]
    list_images(SOURCE, str(tmp_path), 16)
    assert list_images(SOURCE + "/", str(tmp_path), 16)
    with refused(
        "data/foreign-folder", "partitions.json", "s3://bucket/pool with rows_per_file 16", "s3://bucket/other"
    ):
        list_images("s3://bucket/other", str(tmp_path), 16)
    with refused("data/foreign-folder", "partitions.json", "rows_per_file 16", "rows_per_file 8"):
        list_images(SOURCE, str(tmp_path), 8)


def test_no_image_is_said_and_not_remembered(pool: Bucket, tmp_path: Path) -> None:
    pool.keys = ["pool/notes.txt", "pool2/a.jpg"]
    with refused("data/no-images", "s3://bucket/pool", ".bmp, .jpeg, .jpg, .png"):
        list_images(SOURCE, str(tmp_path), 16)
    assert first_image(SOURCE) is None
    pool.keys = ["pool/a.jpg"]
    assert [file.rows for file in list_images(SOURCE, str(tmp_path), 16)] == [1]


def test_the_first_image_takes_few_requests(pool: Bucket) -> None:
    assert first_image(SOURCE) == "s3://bucket/pool/film_00000/frame_000000.jpg"
    assert len(pool.requests) == 1
    pool.keys = [f"pool/{number:06d}.txt" for number in range(9_000)]
    assert first_image(SOURCE) is None
    pool.keys = [f"pool/{number:06d}.txt" for number in range(12_000)]
    pool.requests.clear()
    assert first_image(SOURCE) == "", "not known: it stops looking"
    assert len(pool.requests) == 11


def test_what_travels_to_another_process_is_small_and_picklable(pool: Bucket, tmp_path: Path) -> None:
    seen: list[tuple[Callable[[Any], Any], Sequence[Any]]] = []

    def each(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        seen.append((function, items))
        return map(pickle.loads(pickle.dumps(function)), pickle.loads(pickle.dumps(items)))

    assert list_images(SOURCE, str(tmp_path), 256, each)
    ((function, items),) = seen
    assert function is listing.list_range
    assert all(json.loads(json.dumps(vars(item))) == vars(item) for item in items)


# Local folders


def local_files(folder: Path, paths: Sequence[str]) -> None:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(path.encode())


def test_a_local_folder_is_listed_and_extended(tmp_path: Path, small_ranges: None) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    images = [f"{film}/{frame}.png" for film in ("a", "a b", "ü") for frame in range(30)]
    local_files(source, [*images, "a/notes.txt", ".cache/x.png", "a/.y.png"])
    (source / "gone.png").symlink_to(source / "nowhere.png")
    first = list_images(str(source), str(out), 16)
    rows = rows_of(out)
    assert sorted(row["image_uri"] for row in rows) == sorted(f"{source}/{path}" for path in images)
    assert all(Path(row["image_uri"]).stat().st_size == row["bytes"] for row in rows)
    assert {row["image_id"] for row in rows} == {path.removesuffix(".png") for path in images}
    local_files(source, ["b/new.jpg"])
    assert sorted(file.rows for file in set(list_images(str(source), str(out), 16)) - set(first)) == [1]
    assert first_image(str(source)) == f"{source}/a b/0.png"


def test_an_image_that_is_replaced_in_place_is_listed_again(tmp_path: Path, small_ranges: None) -> None:
    """Other bytes, or the same number of bytes at another time; the same content again and again; the rest stays."""
    source, out = tmp_path / "in", tmp_path / "out"
    local_files(source, [f"{number}.png" for number in range(40)])
    first = list_images(str(source), str(out), 16)
    image = source / "7.png"
    for time, content in enumerate((b"longer", b"same-1", b"longer", b"same-1"), 1):
        image.write_bytes(content)
        os.utime(image, ns=(time, time))
        again = list_images(str(source), str(out), 16)
        assert list_images(str(source), str(out), 16) == again
        replaced = [
            storage.read_table(f"{out}/{file.path}").column("image_uri")[row].as_py()
            for file in again
            for row in file.replaced
        ]
        assert replaced == [str(image)] * time
        assert len({file.path for file in again}) == len(first) + time and {file.path for file in first} < {
            file.path for file in again
        }
        assert pool.rows_of(pool.listed_pool(str(out))) == 40
    images = {row.image_id: row for file in pool.listed_pool(str(out)) for rows in pool.read_pool_rows(file) for row in rows
              if not row.replaced}  # fmt: skip
    assert len(images) == 40 and images["7"].image == b"same-1" and not any(row.problem for row in images.values())


def test_an_older_listing_without_stamps_notices_another_size(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    local_files(source, ["a.png", "b.png"])
    (file,) = list_images(str(source), str(out), 16)
    shard = f"{out}/{file.path}"
    storage.write_table(shard, storage.read_table(shard).drop_columns(["stamp"]))
    os.utime(source / "a.png", ns=(1, 1))
    assert list_images(str(source), str(out), 16) == [file]
    (source / "b.png").write_bytes(b"of another size")
    assert sorted(len(file.replaced) for file in list_images(str(source), str(out), 16)) == [0, 1]


def test_an_object_that_is_replaced_has_another_etag(bucket: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        storage.write_bytes(f"{bucket}/in/{name}.png", b"first")
    list_images(f"{bucket}/in", str(tmp_path), 16)
    storage.write_bytes(f"{bucket}/in/a.png", b"other")
    assert sorted((file.rows, len(file.replaced)) for file in list_images(f"{bucket}/in", str(tmp_path), 16)) == [
        (1, 0),
        (2, 1),
    ]


def test_one_image_file_is_a_source(bucket: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for folder in (str(tmp_path / "in"), f"{bucket}/in"):
        for name in ("a.png", "a.png.jpg"):
            storage.write_bytes(f"{folder}/{name}", b"image")
        out = f"{tmp_path}/out/{len(folder)}"
        list_images(f"{folder}/a.png", out, 16)
        assert [(row["image_id"], row["image_uri"], row["bytes"]) for row in rows_of(out)] == [
            ("a", f"{folder}/a.png", 5)
        ]


def test_the_walk_has_the_order_of_s3(tmp_path: Path) -> None:
    paths = ["a-b/1.png", "a.png", "a/1.png", "a/2/3.png", "a0.png", "b.png"]
    local_files(tmp_path, paths)
    assert list(walk(str(tmp_path))) == sorted(paths)


def test_local_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list_images(f"{tmp_path}/nowhere", f"{tmp_path}/out", 16)
    (tmp_path / "in").mkdir()
    with refused("data/no-images", tmp_path / "in"):
        list_images(f"{tmp_path}/in", f"{tmp_path}/out", 16)
    (tmp_path / "in" / "bad\udcff.png").write_bytes(b"")
    (tmp_path / "in" / "good.png").write_bytes(b"")
    (file,) = list_images(f"{tmp_path}/in", f"{tmp_path}/out", 16)
    listed = storage.read_table(f"{tmp_path}/out/{file.path}").to_pydict()
    assert dict(zip(listed["image_id"], listed["bytes"], strict=True)) == {r"bad\xff": NOT_UTF8, "good": 0}


# Requests


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """The stand-in behind HTTP, which this process's environment names."""
    bucket = Bucket(NumberedKeys(2_500))
    with serving(bucket) as url:
        for name, value in variables(url).items():
            monkeypatch.setenv(name, value)
        yield bucket


def test_over_http_too_every_image_is_listed_once(endpoint: Bucket, tmp_path: Path) -> None:
    endpoint.keys = sorted([*NumberedKeys(2_500), "pool/ünï cö+dé/b&<1>.TIFF", "pool/\U0001f600 \t%41.png"])
    list_images("s3://bucket", str(tmp_path), 256)
    assert sorted(row["image_uri"] for row in rows_of(tmp_path)) == [f"s3://bucket/{key}" for key in endpoint.keys]
    assert first_image(SOURCE) == "s3://bucket/pool/film_00000/frame_000000.jpg"


def test_a_busy_store_is_waited_for(endpoint: Bucket) -> None:
    endpoint.failures = 1
    assert first_image(SOURCE) is not None
    assert endpoint.failures == 0


def test_an_absent_bucket_is_named(endpoint: Bucket, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^s3://absent/: The specified bucket does not exist$"):
        list_images("s3://absent", str(tmp_path), 16)
    assert not list(tmp_path.iterdir())


def test_listed_files_are_frozen_settings() -> None:
    file = ListedFile(path="listed-0.parquet", rows=1, digest="0")
    assert ListedFile.model_validate(file.model_dump(mode="json")) == file and hash(file)
