"""Every file the project reads or writes goes through here: a local path, or s3://bucket/key.

A write is published whole or not at all: temporary name and rename on a local disk, one object put on S3.
"""

import contextlib
import json
import os
import secrets
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from threestage.errors import InputError

S3_SCHEME = "s3://"
FILE_SCHEME = "file://"
TEMPORARY_SUFFIX = ".tmp"
ROW_GROUP_ROWS = 64


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """File system of a URI and the path in it ("bucket/key" on S3, an absolute path locally).

    S3 credentials come from the environment or the node's role and are never part of the object (it may be pickled).
    The endpoint of a store that is not AWS comes from AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, which pyarrow ignores.
    """
    if is_s3(uri):
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        return _s3(endpoint or None, region or None), uri.removeprefix(S3_SCHEME).strip("/")
    return pafs.LocalFileSystem(), os.path.abspath(uri.removeprefix(FILE_SCHEME))


def is_s3(uri: str) -> bool:
    return uri.startswith(S3_SCHEME)


@lru_cache
def _s3(endpoint: str | None, region: str | None) -> pafs.S3FileSystem:
    if endpoint:
        # Stores other than AWS refuse (Ceph: 411) or corrupt the checksummed chunks that the SDK sends by default.
        os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        return pafs.S3FileSystem(endpoint_override=endpoint, region=region or "us-east-1")
    return pafs.S3FileSystem(region=region)


def join(uri: str, *names: str) -> str:
    """`uri/name/…`, for both kinds of URI."""
    return "/".join([uri.rstrip("/"), *(name.strip("/") for name in names)])


def absolute(uri: str) -> str:
    """The URI as `list_files` begins its answers with it: no trailing slash, a local path from the root."""
    return (S3_SCHEME if is_s3(uri) else "") + filesystem(uri)[1]


def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    files, path = filesystem(uri)
    return bool(files.get_file_info(path).type != pafs.FileType.NotFound)


def read_bytes(uri: str) -> bytes:
    """The whole file. Raises FileNotFoundError when it is absent."""
    files, path = filesystem(uri)
    with files.open_input_file(path) as stream:
        return bytes(stream.read())


def read_json(uri: str) -> Any:
    return json.loads(read_bytes(uri))


def write_bytes(uri: str, data: bytes | pa.Buffer) -> None:
    """Publish a file whole; a reader sees the old content, or none, until the new one is complete. Creates parents."""
    files, path = filesystem(uri)
    if is_s3(uri):
        _write(files, path, data)
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = os.path.join(
        os.path.dirname(path), f".{os.path.basename(path)}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}"
    )
    try:
        with open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        raise


def _write(files: pafs.FileSystem, path: str, data: bytes | pa.Buffer) -> None:
    with files.open_output_stream(path) as stream:
        stream.write(data)


def write_json(uri: str, value: Any) -> None:
    write_bytes(uri, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def list_files(uri: str, recursive: bool = True) -> list[str]:
    """Full URIs of the files below a folder, sorted; [] when the folder is absent. Unfinished writes are left out."""
    files, path = filesystem(uri)
    infos = files.get_file_info(pafs.FileSelector(path, allow_not_found=True, recursive=recursive))
    prefix = S3_SCHEME if is_s3(uri) else ""
    return sorted(prefix + info.path for info in infos if info.type == pafs.FileType.File and not _unfinished(info))


def _unfinished(info: pafs.FileInfo) -> bool:
    return bool(info.base_name.startswith(".") and info.base_name.endswith(TEMPORARY_SUFFIX))


def delete(uri: str) -> None:
    """Remove a file, or a folder with all that is in it; absent is fine."""
    files, path = filesystem(uri)
    kind = files.get_file_info(path).type
    with contextlib.suppress(FileNotFoundError):
        if kind == pafs.FileType.Directory:
            files.delete_dir(path)
        elif kind == pafs.FileType.File:
            files.delete_file(path)


def read_table(uri: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet file, or some of its columns. Raises FileNotFoundError when it is absent."""
    files, path = filesystem(uri)
    with files.open_input_file(path) as stream, pq.ParquetFile(stream) as parquet:
        return parquet.read(columns=None if columns is None else list(columns))


def write_table(uri: str, table: pa.Table) -> None:
    """Publish a Parquet file whole. Row groups are small, so that a reader can stream images."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        table, sink, compression="zstd", use_dictionary=False, write_statistics=False, row_group_size=ROW_GROUP_ROWS
    )
    write_bytes(uri, sink.getvalue())


def read_metadata(uri: str) -> dict[bytes, bytes] | None:
    """The key-value metadata of a Parquet file, without its rows; None when the file is absent."""
    files, path = filesystem(uri)
    try:
        with files.open_input_file(path) as stream, pq.ParquetFile(stream) as parquet:
            return dict(parquet.schema_arrow.metadata or {})
    except FileNotFoundError:
        return None


def local_path(uri: str, why: str) -> str:
    """The path of a local URI. InputError with the reason when it is an s3:// one."""
    if is_s3(uri):
        raise InputError(f"{uri}: {why}; give a local path")
    return filesystem(uri)[1]
