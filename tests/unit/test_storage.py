"""Why: a killed write must leave the old file or the new one, and both kinds of URI must answer alike."""

import contextlib
import io
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

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
    storage.delete(f"{root}/manifest.json")
    storage.delete(f"{root}/images")
    storage.delete(f"{root}/absent")
    assert storage.list_files(root) == []


def test_local_round_trip(tmp_path: Path) -> None:
    round_trip(str(tmp_path / "root"))


def test_s3_round_trip(bucket: str) -> None:
    round_trip(bucket)


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
        threading.Thread(target=server.serve_forever, daemon=True).start()
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
        assert signed and set(signed) == {not anonymous}
        assert storage.s3fs_filesystem().anon is anonymous


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
    assert storage.join("/", "b") == "/b"


def test_a_relative_path_and_a_file_uri_are_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage.write_bytes("folder/a.txt", b"a")
    assert storage.read_bytes(f"file://{tmp_path}/folder/a.txt") == b"a"
    assert storage.list_files("folder") == [f"{storage.absolute('folder/')}/a.txt"]


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
