"""Why: who may write images, tables, class maps or links into a bucket or a folder must not read, run or exhaust more by it
(docs/security.md)."""

import json
import os
import struct
import zlib
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.refusals import refused
from tests.unit.data.test_formats import encoded, photo
from threestage.config import load
from threestage.data import listing, pool, storage
from threestage.data.classes import load_class_map
from threestage.data.formats import IngestSettings, discover
from threestage.data.headers import BadImage
from threestage.data.image_validation import BadFile, check_image
from threestage.data.ingest import ingest
from threestage.data.listing import ListedFile
from threestage.data.records import decode_image, load_manifest
from threestage.data.safe_walk import NOT_INSIDE, WHY_NOT, walk
from threestage.mlflow_sync.model_registry import PULLED, Models
from threestage.prediction import input_parts
from threestage.prediction.input_parts import PATH_BYTES, Part, crowded_names, plan_parts, read_part, safe_name
from threestage.sweeps.space import load_space

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"

# ---- Images


def tiled_tiff(width: int, height: int, kind: int = 4) -> bytes:
    """An image of 64x64 pixels in one tile of another size; `kind`: how the tile's sides are written."""
    data = zlib.compress(b"\0" * 64)
    tags = {256: 64, 257: 64, 258: 8, 259: 8, 262: 1, 277: 1, 284: 1, 322: width, 323: height, 325: len(data)}
    start = 8 + 2 + 12 * (len(tags) + 1) + 4
    tags[324] = start
    lines = [
        struct.pack("<HHII", tag, kind if tag in (322, 323) else 4, 1, value) for tag, value in sorted(tags.items())
    ]
    return b"II" + struct.pack("<HIH", 42, 8, len(lines)) + b"".join(lines) + struct.pack("<I", 0) + data


def many_frames(count: int) -> bytes:
    """A TIFF whose frames are all the same few bytes."""
    first = encoded(photo(), "TIFF")
    (start,) = struct.unpack_from("<I", first, 4)
    (entries,) = struct.unpack_from("<H", first, start)
    size, place = 2 + 12 * entries + 4, len(first)
    body = first[start : start + size - 4]
    chain = [body + struct.pack("<I", place + size * (i + 1)) for i in range(count - 1)]
    head = first[: start + size - 4] + struct.pack("<I", place) + first[start + size :]
    return head + b"".join([*chain, body + struct.pack("<I", 0)])


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (EPS, "image/undecodable"),  # Pillow would start Ghostscript
        (encoded(photo(), "GIF"), "image/undecodable"),
        (tiled_tiff(16384, 16384), "image/too-many-pixels"),  # 268 MB of zeros in half a kilobyte
        (tiled_tiff(64, 64, kind=2), "image/undecodable"),
    ],
)
def test_no_image_costs_more_than_its_pixels(data: bytes, code: str) -> None:
    with refused(code, error=BadImage):
        decode_image(data)
    with refused(code, error=BadFile):
        check_image(data)


@pytest.mark.timeout(20)
def test_frames_are_not_counted() -> None:
    with refused("image/frames", error=BadFile):
        check_image(many_frames(100_000))


# ---- Tables


def table(folder: Path, **columns: object) -> list[Part]:
    """Parts of a Parquet file with these columns."""
    pq.write_table(pa.table(columns), folder / "a.parquet", store_schema=False)
    return plan_parts(str(folder / "a.parquet"), "parquet", "", 1000, map)


def rows_of(folder: Path, parts: list[Part]) -> list[list[pool.PoolRow]]:
    return [chunk for part in parts for chunk in read_part(str(folder / "a.parquet"), part)]


def test_a_table_of_a_few_bytes_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_parts, "CHUNK_BYTES", 25_000_000)
    same = pa.DictionaryArray.from_arrays(pa.array([0] * 64, pa.int32()), pa.array([b"\0" * 10_000_000], pa.binary()))
    parts = table(tmp_path, image=same)
    assert (tmp_path / "a.parquet").stat().st_size < 1_000_000
    before = pa.total_allocated_bytes()
    for part in parts:
        for chunk in read_part(str(tmp_path / "a.parquet"), part):
            assert sum(len(row.image) for row in chunk) <= 30_000_000
            assert pa.total_allocated_bytes() - before < 150_000_000


def test_a_row_that_is_too_large_costs_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "MAX_IMAGE_BYTES", 100)
    ((first, second),) = rows_of(tmp_path, table(tmp_path, image=[b"x" * 101, b"x" * 100]))
    assert first.problem == "has 101 bytes, more than 100 [image/too-large]" and first.image == b""
    assert second.problem is None and len(second.image) == 100


def test_an_id_that_is_no_text_is_shown_escaped(tmp_path: Path) -> None:
    offsets = pa.array([0, 2], pa.int32()).buffers()[1]
    parts = table(tmp_path, image_id=pa.StringArray.from_buffers(1, offsets, pa.py_buffer(b"\xffa")), image=[b"x"])
    assert [row.image_id for (row,) in rows_of(tmp_path, parts)] == ["\\xffa"]
    assert not crowded_names(parts, str(tmp_path / "a.parquet"), "parquet")


# ---- Text


LAUGHS = "a: &a [lol,lol,lol,lol,lol,lol,lol,lol,lol]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGED = "a: &a {k: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{','.join(['*' + before] * 9)}]}}\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("text", "code"),
    [
        (f"{LAUGHS}classes: *i\n", "config/too-large"),
        (MERGED, "config/too-large"),
        ("classes: &x [*x]", "config/too-large"),
        ("a: " + "[" * 2000, "config/not-yaml"),
        ("a: " + "9" * 5000, "config/not-yaml"),
        ("a: 2024-99-99", "config/not-yaml"),
        ("a: !!python/object/apply:os.system [id]", "config/not-yaml"),
        ("a" * (2**20 + 1), "config/too-large"),
    ],
)
def test_a_bomb_of_yaml_is_one_line(text: str, code: str, tmp_path: Path) -> None:
    file = tmp_path / "bomb.yaml"
    file.write_text(text)
    for read in (load, load_class_map, load_space):
        with refused(code, file) as error:
            read(str(file))
        assert len(str(error.value)) < 1000


def test_a_wrong_value_is_not_shown_whole() -> None:
    with refused("config/invalid-value", "seed=[1, 1") as error:
        load("demo", [f"seed=[{','.join(['1'] * 5000)}]"])
    assert len(str(error.value)) < 1000


# ---- Paths


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with an image; beside it, a folder that is nobody else's business."""
    folder, private = tmp_path / "photos", tmp_path / "private"
    for place in (folder, private):
        place.mkdir()
        (place / "a.png").write_bytes(encoded(photo()))
    return folder


def listed(folder: Path, destination: Path) -> dict[str, int]:
    files = listing.list_images(str(folder), str(destination), 100)
    parts = [pq.read_table(destination / file.path).to_pylist() for file in files]
    return {row["image_id"]: row["bytes"] for part in parts for row in part}


def test_a_link_that_leads_out_costs_itself(source: Path, tmp_path: Path) -> None:
    (source / "out.png").symlink_to("../private/a.png")
    (source / "passwords.png").symlink_to("/etc/passwd")
    (source / "in.png").symlink_to("a.png")
    (source / "nowhere.png").symlink_to("nothing")
    os.mkfifo(source / "waits.png")
    bad = {"out", "passwords", "waits"}
    found = listed(source, tmp_path / "listing")
    assert {name for name, size in found.items() if size == NOT_INSIDE} == bad
    assert set(found) == bad | {"a", "in"}
    (file,) = pool.listed_pool(str(tmp_path / "listing"))
    problems = {row.image_id: row.problem or "" for rows in pool.read_pool_rows(file) for row in rows}
    assert {name for name, problem in problems.items() if "leads out of its folder" in problem} == bad
    settings = IngestSettings(format="images", max_bad_fraction=0.9)
    report = ingest(str(source), str(tmp_path / "data"), settings)
    assert {reject.image_id for reject in report.rejected} == bad and report.added_images == 2


def test_neither_images_nor_masks_nor_lists_of_a_data_set_lead_out(source: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    (masks / "a.png").symlink_to("../private/a.png")
    (source / "b.png").symlink_to("../private/a.png")
    items = discover(str(source), IngestSettings(format="folders", masks=str(masks)))
    assert [(item.image_id, item.size == NOT_INSIDE, bool(item.problem)) for item in items] == [
        ("a", False, True),
        ("b", True, False),
    ]
    (masks / "a.png").unlink()
    with open(masks / "a.png", "wb") as large:
        large.truncate(2**30)  # of which the disk holds nothing
    (item, _) = discover(str(source), IngestSettings(format="folders", masks=str(masks)))
    assert item.problem == f"its mask has {2**30} bytes, more than {2**28} [image/too-large]"
    lists = tmp_path / "voc" / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").symlink_to("/etc/passwd")
    with refused("data/link", "train.txt:"):
        discover(str(tmp_path / "voc"), IngestSettings(format="voc"))


def test_a_folder_that_is_a_link(source: Path, tmp_path: Path) -> None:
    """Inside: its files are there already, in circles else for ever. Outside: the user is to say so."""
    (source / "again").symlink_to(".")
    (source / "round").symlink_to("again/again")
    assert list(walk(str(source))) == ["a.png"]
    linked = tmp_path / "linked"
    linked.symlink_to(source)
    assert list(walk(str(linked))) == ["a.png"], "the folder that the user names may be a link"
    (source / "out").symlink_to("../private")
    for look in (
        lambda: listed(source, tmp_path / "l"),
        lambda: discover(str(source), IngestSettings(format="images")),
    ):
        with refused("data/link", source / "out", tmp_path / "private"):
            look()


def test_tables_that_are_links_out_are_not_read(source: Path, tmp_path: Path) -> None:
    table(tmp_path / "private", image=[b"x"])
    table(source, image=[b"x"])
    (source / "b.parquet").symlink_to("../private/a.parquet")
    problems = {Path(part.uri).name: part.problem for part in plan_parts(str(source), "parquet", "", 10, map)}
    assert problems.pop("b.parquet") == WHY_NOT[NOT_INSIDE] and problems == {"a.parquet": None}


def test_a_key_that_leads_out_is_not_asked_for(bucket: str, tmp_path: Path) -> None:
    """curl makes /a/b/../c into /a/c: whoever writes below a prefix would have other objects read."""
    storage.write_bytes("s3://bucket/private.png", encoded(photo()))
    storage.write_bytes(f"{bucket}/a.png", encoded(photo()))
    boto3.client("s3").put_object(Bucket="bucket", Key="some/folder/../../private.png", Body=b"x")
    for place in ("s3://bucket/some/../private.png", "s3://bucket/./private.png"):
        with pytest.raises(FileNotFoundError, match="cannot be asked for"):
            storage.read_bytes(place)
    report = ingest(bucket, str(tmp_path / "data"), IngestSettings(format="images", max_bad_fraction=0.9))
    assert report.added_images == 1 and not report.rejected, "it counts as hidden"


@given(
    st.text(max_size=40)
    | st.lists(st.sampled_from(["..", ".", "", "a", "y" * 300, "\0", "\n"]), max_size=60).map("/".join)
)
def test_no_id_names_a_file_elsewhere(name: str) -> None:
    safe = safe_name(name.encode(errors="ignore").decode())
    assert os.path.normpath(f"/out/{safe}") == f"/out/{safe}" and len(safe.encode()) <= PATH_BYTES + 20
    assert "\0" not in safe


@pytest.mark.parametrize("path", ["../other/a.parquet", "/etc/a.parquet", "images/../../a.parquet"])
def test_no_manifest_names_a_file_elsewhere(path: str, tmp_path: Path) -> None:
    file = {"path": path, "kind": "images", "split": "train", "rows": 1, "labelled_rows": 0, "digest": "d"}
    manifest = {"format": 1, "version": 1, "classes": [], "colours": [], "files": [file], "counts": {}, "sizes": {}}
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "digest": "d"}))
    with refused("data/not-a-data-set", tmp_path, path):
        load_manifest(str(tmp_path))
    with pytest.raises(ValueError, match="leads out of its folder"):
        ListedFile(path=path, rows=1, digest="d")


def test_a_pulled_model_brings_its_own_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = tmp_path / "fetched"
    fetched.mkdir()
    for name in (*PULLED, "sitecustomize.py", ".envrc"):
        (fetched / name).write_bytes(b"x")
    version = type("Version", (), {"source": "", "tags": {}})
    monkeypatch.setattr(Models, "_find", lambda self, uri: version)
    monkeypatch.setattr(Models, "_download", lambda self, source, name, temporary: fetched / name)
    folder = Models(f"sqlite:///{tmp_path}/mlflow.db", None, "threestage").pull("models:/a/1", tmp_path / "work")
    assert {file.name for file in folder.iterdir()} == set(PULLED) - {"program.pt2", "calibration.json"}
