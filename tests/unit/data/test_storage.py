"""Why: a killed write must leave the old file or the new one, and both kinds of URI must answer alike."""

import contextlib
import io
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError, ReadTimeoutError
from PIL import Image

from tests.conditional_write import one_of_two_writes, the_store_compares
from tests.failing_s3 import ERRORS, failing_s3
from tests.faulty_s3 import faulty_s3
from tests.refusals import refused
from tests.s3 import variables
from threestage.data import storage
from threestage.data.ingest import IngestSettings, ingest
from threestage.data.records import labelled_rows


def round_trip(root: str) -> None:
    table = pa.table({"image_id": ["a", "b"], "image": pa.array([b"1", None], pa.binary())})
    storage.write_json(storage.join(root, "manifest.json"), {"version": 1, "name": "Straße"})
    storage.write_table(storage.join(root, "images", "part.parquet"), table)
    assert storage.list_files(root) == [f"{root}/images/part.parquet", f"{root}/manifest.json"]
    assert storage.list_files(root, recursive=False) == [f"{root}/manifest.json"]
    assert storage.list_files(storage.join(root, "absent")) == []
    assert storage.read_json(storage.join(root, "manifest.json")) == {"version": 1, "name": "Straße"}
    assert storage.read_table(f"{root}/images/part.parquet") == table
    assert storage.read_table(f"{root}/images/part.parquet", ["image"]).column_names == ["image"]
    assert storage.exists(root) and storage.exists(f"{root}/images") and not storage.exists(f"{root}/im")
    storage.write_bytes(f"{root}/manifest.json", b"new")
    assert storage.read_bytes(f"{root}/manifest.json") == b"new"
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{root}/absent")
    storage.delete(f"{root}/manifest.json", root)
    storage.delete(f"{root}/images", root)
    storage.delete(f"{root}/absent", root)
    assert storage.list_files(root) == []


def put(uri: str, data: bytes, **arguments: object) -> None:
    """An object as other programs put it."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    storage.ask_s3("put_object", bucket, Key=key, Body=data, **arguments)


def client_error(status: int) -> ClientError:
    answer = {"Error": {"Code": str(status), "Message": "No"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(answer, "ListObjectsV2")


def test_local_round_trip(tmp_path: Path) -> None:
    round_trip(str(tmp_path / "root"))


def test_s3_round_trip(bucket: str) -> None:
    round_trip(bucket)


def test_what_is_deleted_is_a_name_not_a_pattern(bucket: str) -> None:
    others = [f"{bucket}/runs/{name}" for name in ("a1/b", "a[1]c/b", "abc/b")]
    for uri in (*others, *(f"{bucket}/runs/a[1]/{number}" for number in range(3)), f"{bucket}/runs/a*/b"):
        storage.write_bytes(uri, b"x")
    put(f"{bucket}/runs/a[1]/folder/", b"")  # as consoles make folders
    storage.delete(f"{bucket}/runs/a[1]", bucket)
    storage.delete(f"{bucket}/runs/a*/b", bucket)
    assert storage.list_files(bucket) == others
    answer = storage.ask_s3("list_objects_v2", "bucket", Prefix="some/folder/runs/")
    assert [f"s3://bucket/{entry['Key']}" for entry in answer["Contents"]] == others


def test_a_store_that_does_not_answer_is_an_os_error_of_deleting_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Away:
        def call_s3(self, operation: str, **arguments: object) -> object:
            raise EndpointConnectionError(endpoint_url="http://s3")

    monkeypatch.setattr(storage, "s3fs_filesystem", Away)
    monkeypatch.setattr(storage, "PATIENCE_S", 0)
    with pytest.raises(OSError, match=r"^s3://bucket/a: Could not connect"):
        storage.delete("s3://bucket/a", "s3://bucket")


def test_more_than_a_page_is_deleted(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ask_s3 = storage.ask_s3
    for number in range(5):
        storage.write_bytes(f"{bucket}/a/{number}", b"x")

    def small_pages(operation: str, name: str, **arguments: object) -> object:
        return ask_s3(operation, name, **arguments, **({"MaxKeys": 2} if operation == "list_objects_v2" else {}))

    monkeypatch.setattr(storage, "ask_s3", small_pages)
    storage.delete(f"{bucket}/a", bucket)
    assert not storage.exists(f"{bucket}/a")


@contextlib.contextmanager
def public_store() -> Iterator[tuple[str, list[bool]]]:
    """An endpoint that gives "abc" to everybody, and for each request whether it was signed."""
    signed: list[bool] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            signed.append("Authorization" in self.headers)
            self.send_response(200)
            self.send_header("Content-Length", "3")
            self.send_header("Last-Modified", "Sat, 21 Nov 2026 00:00:00 GMT")
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(b"abc")

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", signed
        server.shutdown()


@pytest.mark.parametrize("anonymous", [True, False])
def test_an_anonymous_reader_sends_no_credentials(monkeypatch: pytest.MonkeyPatch, anonymous: bool) -> None:
    monkeypatch.delenv(storage.ANONYMOUS_VARIABLE, raising=False)
    with public_store() as (endpoint, signed):
        told = storage.environment(storage.StorageSettings(anonymous=anonymous))
        for name, value in (told | variables(endpoint)).items():
            monkeypatch.setenv(name, value)
        assert storage.read_bytes("s3://bucket/a") == b"abc"
        assert storage.ask_s3("head_object", "bucket", Key="a")["ContentLength"] == 3
        assert len(signed) >= 2 and set(signed) == {not anonymous}


def test_what_a_killed_write_left_is_removed_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shards").mkdir()
    left, mine = tmp_path / "shards" / ".a.json.0123abcd.tmp", tmp_path / ".notes.tmp"
    for file in (left, mine):
        file.write_bytes(b"")
    (tmp_path / ".link.0123abcd.tmp").symlink_to(mine)
    replace, found = os.replace, list[int]()

    def while_it_is_written(*arguments: str) -> None:
        found.append(storage.remove_unfinished(str(tmp_path)))
        replace(*arguments)

    monkeypatch.setattr("os.replace", while_it_is_written)
    storage.write_bytes(f"{tmp_path}/shards/b.json", b"whole")
    assert found == [1] and not left.exists() and mine.exists() and (tmp_path / ".link.0123abcd.tmp").is_symlink()
    assert storage.read_bytes(f"{tmp_path}/shards/b.json") == b"whole"


def test_a_data_set_from_s3_to_s3(bucket: str) -> None:
    for name, shade in (("train/a", 0), ("train/b", 9), ("val/c", 5)):
        stream = io.BytesIO()
        Image.new("L", (4, 3), shade).save(stream, "PNG")
        split, stem = name.split("/")
        storage.write_bytes(f"{bucket}/camvid/{split}/images/{stem}.png", stream.getvalue())
        storage.write_bytes(f"{bucket}/camvid/{split}/masks/{stem}.png", stream.getvalue())
    settings = IngestSettings(format="camvid")
    report = ingest(f"{bucket}/camvid/", f"{bucket}/ds", settings)
    assert report.added_labels == 3 and ingest(f"{bucket}/camvid", f"{bucket}/ds", settings).skipped == 3
    rows = labelled_rows(f"{bucket}/ds", report.manifest, "train").to_pylist()
    assert [row["image_id"] for row in rows] == ["train/images/a", "train/images/b"]
    assert rows[0]["source"] == f"{bucket}/camvid/train/images/a.png"


def test_row_groups_come_one_by_one(tmp_path: Path) -> None:
    uri = f"{tmp_path}/a.parquet"
    storage.write_table(uri, pa.table({"image": [b"x"] * 150, "row": range(150)}))
    assert [len(group) for group in storage.read_groups(uri)] == [64, 64, 22]
    assert storage.read_table(uri, ["row"]) == pa.concat_tables(storage.read_groups(uri, ["row"]))


def test_join() -> None:
    assert storage.join("s3://b/a/", "c", "d.json") == "s3://b/a/c/d.json"
    assert storage.join("a", "/b/") == "a/b"
    assert storage.join("X/X/", "/X/X/") == "X/X/X/X"
    assert storage.join("/", "b") == "/b"


def test_a_relative_path_and_a_file_uri_are_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage.write_bytes("folder/a.txt", b"a")
    assert storage.read_bytes(f"file://{tmp_path}/folder/a.txt") == b"a"
    assert storage.list_files("folder") == [f"{storage.absolute('folder/')}/a.txt"]


def test_what_is_no_place_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for uri in ("gs://bucket/a", "abfs://account/c", "s3:/bucket/a", "S3://bucket/a", "a+b-c.9:/d", "file:/a"):
        with refused("storage/scheme", uri, "s3://bucket/prefix"):
            storage.write_bytes(uri, b"")
    with refused("storage/scheme", "s3://bucket/prefix"):
        storage.exists("")
    with refused("storage/not-a-bucket", "s3://bucket/prefix"):
        storage.exists("s3://")
    with pytest.raises(FileNotFoundError, match=r"s3://bucket/a/../b: a name with \. or \.\. between slashes"):
        storage.exists("s3://bucket/a/../b")
    storage.write_bytes("9a:b/c:d", b"a name with a colon")
    assert storage.list_files(".") == [str(tmp_path / "9a:b" / "c:d")]


CHECKSUMS = {"AWS_REQUEST_CHECKSUM_CALCULATION": "when_required", "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required"}
OURS = {"AWS_ENDPOINT_URL_S3": "http://a", "MLFLOW_S3_ENDPOINT_URL": "http://a"}
REGION = {"AWS_REGION": "here", "AWS_DEFAULT_REGION": "here"}
PATH_STYLE = {storage.STYLE_VARIABLE: "path", "MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE": "path"}


@pytest.mark.parametrize(
    ("settings", "now", "told"),
    [
        ({}, {}, {}),
        (
            {"endpoint": "http://a"},
            {"AWS_ENDPOINT_URL": "http://b", "AWS_ENDPOINT_URL_S3": "http://c"},
            OURS | CHECKSUMS,
        ),
        ({}, {"AWS_ENDPOINT_URL": "http://b", "AWS_ENDPOINT_URL_S3": "http://a"}, OURS | CHECKSUMS),
        ({}, {"AWS_ENDPOINT_URL": "http://a"}, OURS | CHECKSUMS),
        (
            {"endpoint": "http://a"},
            {"MLFLOW_S3_ENDPOINT_URL": "http://b", **dict.fromkeys(CHECKSUMS, "when_supported")},
            OURS | {"MLFLOW_S3_ENDPOINT_URL": "http://b"} | dict.fromkeys(CHECKSUMS, "when_supported"),
        ),
        ({"region": "here"}, {"AWS_REGION": "there", "AWS_DEFAULT_REGION": "elsewhere"}, REGION),
        ({}, {"AWS_REGION": "here", "AWS_DEFAULT_REGION": "there"}, REGION),
        ({}, {"AWS_DEFAULT_REGION": "here"}, REGION),
        ({"addressing_style": "path"}, {storage.STYLE_VARIABLE: "virtual"}, PATH_STYLE),
        ({"addressing_style": "auto"}, {storage.STYLE_VARIABLE: "path"}, PATH_STYLE),
        ({"anonymous": True}, {}, {storage.ANONYMOUS_VARIABLE: "1"}),
        ({"anonymous": False}, {storage.ANONYMOUS_VARIABLE: "1"}, {storage.ANONYMOUS_VARIABLE: "1"}),
        ({}, {"AWS_SECRET_ACCESS_KEY": "x", "AWS_ACCESS_KEY_ID": "x"}, {}),
    ],
)
def test_what_the_settings_leave_open_comes_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, object], now: dict[str, str], told: dict[str, str]
) -> None:
    monkeypatch.setattr(os, "environ", now)
    assert storage.environment(storage.StorageSettings.model_validate(settings)) == told


@pytest.mark.parametrize("style", ["path", "virtual", None])
@pytest.mark.parametrize("endpoint", ["http://store.internal:9", None])
def test_s3fs_reaches_the_same_store(monkeypatch: pytest.MonkeyPatch, endpoint: str | None, style: str | None) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL_S3", storage.STYLE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    told = storage.environment(
        storage.StorageSettings.model_validate(
            {"endpoint": endpoint, "addressing_style": style or "auto", "region": "eu-central-1"}
        )
    )
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    files = storage.s3fs_filesystem()
    assert files.endpoint_url == endpoint and files.client_kwargs == {"region_name": "eu-central-1"}
    assert files.config_kwargs["s3"] == {"addressing_style": style or ("path" if endpoint else "auto")}
    assert not files.dircache.use_listings_cache, "a listing of before would hide what was written since"
    assert storage.s3fs_filesystem() is files, "one for all threads"
    monkeypatch.delenv("AWS_REGION")
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    assert storage.s3fs_filesystem().client_kwargs == {}


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_what_may_not_be_read_is_a_permission_error(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    with failing_s3({method: ERRORS["denied"]}) as (endpoint, _):
        for name, value in variables(endpoint).items():
            monkeypatch.setenv(name, value)
        storage.write_bytes("s3://bucket/a", bytes(1000))
        with pytest.raises(PermissionError, match="AWS Error ACCESS_DENIED during "):
            storage.read_bytes("s3://bucket/a")


def test_an_object_in_an_archive_may_not_be_read(bucket: str) -> None:
    put(f"{bucket}/a", bytes(1000), StorageClass="GLACIER")
    # pyarrow's SDK does not always read the answer's body before it looks at the status, which is 403
    with pytest.raises(
        PermissionError, match=r"not valid for the object's storage class|ACCESS_DENIED during GetObject"
    ):
        storage.read_bytes(f"{bucket}/a")


def test_a_damaged_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    with refused("storage/damaged-json", "a.json"):
        storage.read_json(str(tmp_path / "a.json"))


def test_a_json_can_be_read_by_people(tmp_path: Path) -> None:
    storage.write_json(f"{tmp_path}/a.json", {"name": "Straße"})
    assert (tmp_path / "a.json").read_text() == '{\n "name": "Straße"\n}\n'


def test_an_unfinished_write_lies_beside_its_target_and_is_on_the_disk_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rename from another folder may be from another disk, and one of bytes not yet on the disk may leave an empty file."""
    events: list[str] = []
    replace, synchronise = os.replace, os.fsync

    def watched(source: str, target: str) -> None:
        events.append("replace")
        assert Path(source).parent == Path(target).parent and Path(source).read_bytes() == b"new"
        assert not storage.list_files(str(tmp_path)), "an unfinished write is listed"
        replace(source, target)

    def synchronised(descriptor: int) -> None:
        events.append("fsync")
        synchronise(descriptor)

    monkeypatch.setattr(os, "replace", watched)
    monkeypatch.setattr(os, "fsync", synchronised)
    storage.write_bytes(f"{tmp_path}/folder/a", b"new")
    assert events == ["fsync", "replace"]


def test_a_write_whose_rest_is_gone_says_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(source: str, destination: str) -> None:
        os.remove(source)
        raise OSError("disk is gone")

    monkeypatch.setattr(os, "replace", lose)
    with pytest.raises(OSError, match="disk is gone"):
        storage.write_bytes(f"{tmp_path}/a", b"new")


def test_images_are_stored_as_they_are_and_the_rest_is_compressed(tmp_path: Path) -> None:
    uri = f"{tmp_path}/a.parquet"
    storage.write_table(
        uri, pa.table({"image_id": ["a"] * 3, "image": [b"x" * 999] * 3, "confidence": [b"y" * 999] * 3})
    )
    group = pq.read_metadata(uri).row_group(0)
    columns = [group.column(index) for index in range(group.num_columns)]
    assert [column.compression for column in columns] == ["ZSTD", "UNCOMPRESSED", "ZSTD"]
    assert not any("DICTIONARY" in str(column.encodings) or column.is_stats_set for column in columns)


def test_only_the_wanted_rows_come(tmp_path: Path) -> None:
    uri = f"{tmp_path}/a.parquet"
    table = pa.table({"image_id": [f"{row:03}" for row in range(150)], "row": range(150)})
    storage.write_table(uri, table)
    assert storage.read_rows(uri, "image_id", {"149", "002", "absent", "001"}).to_pydict() == {
        "image_id": ["001", "002", "149"],
        "row": [1, 2, 149],
    }
    nothing = storage.read_rows(uri, "image_id", {"absent"})
    assert nothing.num_rows == 0 and nothing.schema == table.schema


def test_metadata_comes_without_rows(tmp_path: Path) -> None:
    table = pa.table({"row": [1]})
    storage.write_table(f"{tmp_path}/a.parquet", table.replace_schema_metadata({"key": "value"}))
    storage.write_table(f"{tmp_path}/b.parquet", table)
    assert storage.read_metadata(f"{tmp_path}/a.parquet") == {b"key": b"value"}
    assert storage.read_metadata(f"{tmp_path}/b.parquet") == {}
    assert storage.read_metadata(f"{tmp_path}/absent.parquet") is None


def test_a_write_that_fails_leaves_the_old_file_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "manifest.json"
    storage.write_bytes(str(target), b"old")

    def refuse(source: str, destination: str) -> None:
        raise OSError("disk is full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk is full"):
        storage.write_bytes(str(target), b"new")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_what_a_killed_write_left_is_not_listed(tmp_path: Path) -> None:
    (tmp_path / ".part.parquet.1a2b3c4d.tmp").write_bytes(b"half")
    assert storage.list_files(str(tmp_path)) == []
    (tmp_path / ".hidden.png").write_bytes(b"somebody's")
    (tmp_path / "a.tmp").write_bytes(b"somebody's")
    assert storage.list_files(str(tmp_path)) == [f"{tmp_path}/.hidden.png", f"{tmp_path}/a.tmp"]


def test_no_deletion_follows_a_link(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "stage1", outside / "checkpoints"):
        folder.mkdir(parents=True)
    (outside / "checkpoints" / "thesis.txt").write_text("mine")
    (root / "stage2").symlink_to(outside)
    (root / "stage1" / "checkpoints").symlink_to(outside / "checkpoints")
    (root / "stage1" / "thesis.txt").symlink_to(outside / "checkpoints" / "thesis.txt")
    for below in ("stage2/checkpoints", "stage2/checkpoints/thesis.txt"):
        with refused("data/link", root / "stage2"):
            storage.delete(f"{root}/{below}", str(root))
    storage.delete(f"{root}/stage1/checkpoints", str(root))
    storage.delete(f"{root}/stage1", str(root))
    storage.delete(f"{root}/stage2", str(root))
    storage.delete(str(root), str(root))
    assert not root.exists() and (outside / "checkpoints" / "thesis.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="is not within"):
        storage.delete(str(outside), str(root))


def test_one_of_two_writers_replaces_a_file(tmp_path: Path) -> None:
    one_of_two_writes(f"{tmp_path}/new/manifest.json")


def test_one_of_two_writers_replaces_an_object(bucket: str) -> None:
    one_of_two_writes(f"{bucket}/manifest.json")


@pytest.mark.parametrize("before", [None, b"1"])
def test_the_store_compares_not_the_client(bucket: str, monkeypatch: pytest.MonkeyPatch, before: bytes | None) -> None:
    the_store_compares(f"{bucket}/manifest.json", before, monkeypatch)


@pytest.mark.parametrize("before", [None, b"1"])
def test_a_store_without_conditional_writes(bucket: str, monkeypatch: pytest.MonkeyPatch, before: bytes | None) -> None:
    uri = f"{bucket}/manifest.json"
    if before is not None:
        storage.write_bytes(uri, before)
    ask_s3 = storage.ask_s3

    def without(operation: str, name: str, **arguments: object) -> object:
        if operation != "put_object":
            return ask_s3(operation, name, **arguments)
        raise OSError("A header you provided implies functionality that is not implemented") from client_error(501)

    monkeypatch.setattr(storage, "ask_s3", without)
    assert storage.write_if_unchanged(uri, before, b"ours") and storage.read_bytes(uri) == b"ours"
    assert not storage.write_if_unchanged(uri, before, b"others")


def test_a_store_that_compares_etags_without_their_quotes(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceph's gateway, release 16."""
    ask_s3, uri = storage.ask_s3, f"{bucket}/manifest.json"

    def without_quotes(operation: str, name: str, **arguments: object) -> object:
        etag = str(arguments.get("IfMatch", ""))
        if etag:
            arguments["IfMatch"] = '"other"' if etag.startswith('"') else f'"{etag}"'
        return ask_s3(operation, name, **arguments)

    monkeypatch.setattr(storage, "ask_s3", without_quotes)
    one_of_two_writes(uri)


@pytest.mark.timeout(60)
def test_json_of_strangers_is_refused_in_one_line(tmp_path: Path) -> None:
    """A pipe, a device, more than fits into the limit (of which the disk holds nothing), 100,000 brackets, no JSON."""
    file = tmp_path / "manifest.json"
    for make, code in (
        (lambda: os.mkfifo(file), "storage/not-a-file"),
        (lambda: file.symlink_to("/dev/zero"), "storage/not-a-file"),
        (lambda: os.truncate(os.open(file, os.O_CREAT | os.O_WRONLY), 40 * 2**30), "storage/too-large"),
        (lambda: file.write_text("[" * 100_000), "storage/damaged-json"),
        (lambda: file.write_text("{"), "storage/damaged-json"),
        (lambda: file.write_bytes(b'"\xff"'), "storage/damaged-json"),
        (lambda: file.write_text("9" * 5_000), "storage/damaged-json"),
    ):
        file.unlink(missing_ok=True)
        make()
        with refused(code, file) as error:
            storage.read_json(str(file))
        assert len(str(error.value)) < 400


# Requests through s3fs


def waits_of_a_request(monkeypatch: pytest.MonkeyPatch, *errors: Exception) -> list[float]:
    """The waits of one request to a store that raises these errors first, with a clock that only the waits move."""
    waits, left = list[float](), list(errors)

    class Client:
        def call_s3(self, operation: str, **arguments: object) -> dict[str, object]:
            if left:
                raise left.pop(0)
            return arguments

    monkeypatch.setattr(storage, "s3fs_filesystem", Client)
    monkeypatch.setattr(storage, "time", SimpleNamespace(sleep=waits.append, monotonic=lambda: sum(waits)))
    assert storage.ask_s3("list_objects_v2", "bucket", Prefix="pool/") == {"Bucket": "bucket", "Prefix": "pool/"}
    return waits


def test_5xx_and_time_outs_are_waited_for_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = ReadTimeoutError(endpoint_url="http://s3")
    assert waits_of_a_request(monkeypatch, client_error(503), slow, client_error(500)) == [1, 2, 4]
    with pytest.raises(OSError, match=r"^s3://bucket/pool/: No$"):
        waits_of_a_request(monkeypatch, *[client_error(503)] * 100)
    with pytest.raises(OSError, match=r"s3://bucket/pool/: Could not connect to the endpoint URL"):
        waits_of_a_request(monkeypatch, *[EndpointConnectionError(endpoint_url="http://127.0.0.1:1")] * 100)


def test_other_errors_are_raised_at_once_as_os_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    again = ValueError("asked again")
    for error in (client_error(400), client_error(501), NoCredentialsError()):
        with pytest.raises(OSError, match=r"^s3://bucket/pool/: [^\n]+$"):
            waits_of_a_request(monkeypatch, error, again)
    for status, kind in ((403, PermissionError), (404, FileNotFoundError)):
        with pytest.raises(kind, match=r"^s3://bucket/pool/: No$"):
            waits_of_a_request(monkeypatch, client_error(status), again)
    with pytest.raises(ZeroDivisionError):
        waits_of_a_request(monkeypatch, ZeroDivisionError(), again)


def test_a_store_behind_a_proxy(bucket: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By pyarrow and by s3fs alike; NO_PROXY counts."""
    with faulty_s3(s3_endpoint) as (proxy, faults):
        for name, value in variables("http://s3.corp.invalid:9000").items():
            monkeypatch.setenv(name, value)
        for name in ("HTTP_PROXY", "http_proxy"):
            monkeypatch.setenv(name, proxy)
        monkeypatch.setenv("NO_PROXY", "")
        monkeypatch.delenv("no_proxy", raising=False)
        storage.s3_filesystem.cache_clear()
        assert storage.proxy() == proxy
        uri = "s3://bucket/behind/a"
        storage.write_bytes(uri, b"proxied")
        by_pyarrow = faults.proxied
        storage.delete(uri, "s3://bucket/behind")  # s3fs
        assert by_pyarrow and faults.proxied > by_pyarrow and not storage.exists(uri)
        monkeypatch.setenv("NO_PROXY", "corp.invalid")
        assert storage.proxy() is None
    storage.s3_filesystem.cache_clear()
