"""Every file the project reads or writes goes through here: a local path, or s3://bucket/key.

A write is published whole or not at all: temporary name and rename on a local disk, one object put on S3.

How s3:// is reached is said once, in the settings or in the usual AWS variables. It travels as environment variables
(`configure`, `environment`), since pyarrow, s3fs, Ray and MLflow each want it elsewhere; credentials are never part of it.
"""

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, Literal, NamedTuple, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from pydantic import Field, TypeAdapter, ValidationError, field_validator

from threestage.errors import InputError
from threestage.hosts import refuse_unconfirmed
from threestage.redaction import redact
from threestage.settings import Settings, raised_by
from threestage.user_files import lines_of

Model = TypeVar("Model", bound=Settings)

S3_SCHEME = "s3://"
FILE_SCHEME = "file://"
TEMPORARY_SUFFIX = ".tmp"
UNFINISHED = re.compile(r"\..+\.[0-9a-f]{8}\.tmp", re.DOTALL)
ROW_GROUP_ROWS = 64
MAX_JSON_BYTES = 2**28
S3_ATTEMPTS = 12
PATIENCE_S, LONGEST_WAIT_S = 60.0, 15.0
DELETES_AT_ONCE = 16
SCHEME_CODE = "storage/scheme"
NO_BUCKET = "NO_SUCH_BUCKET"
"""In pyarrow's errors."""
DENIED = ("ACCESS_DENIED", "AccessDenied", "The operation is not valid for the object's")
"""In pyarrow's errors. The last is of S3's InvalidObjectState, an object in an archive: pyarrow has no name for the code."""
STYLE_VARIABLE = "THREESTAGE_S3_ADDRESSING_STYLE"
ANONYMOUS_VARIABLE = "THREESTAGE_S3_ANONYMOUS"


class StorageSettings(Settings):
    """Access to s3://. Credentials come from the environment or the node's role, never from settings."""

    endpoint: str | None = Field(None, description="URL of a store that is not AWS; null: AWS_ENDPOINT_URL")
    region: str | None = Field(None, description="region; null: AWS_REGION, else us-east-1")
    addressing_style: Literal["auto", "path", "virtual"] = Field(
        "auto", description="URL style of buckets; auto: path if an endpoint is set, else virtual"
    )
    anonymous: bool = Field(False, description="send no credentials (public buckets)")

    @field_validator("endpoint")
    @classmethod
    def _is_a_url(cls, value: str | None) -> str | None:
        parts = urlsplit(value or "http://host")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError("write the endpoint as http://host:port or https://host", "storage/endpoint")
        if parts.username or parts.password:
            raise InputError(
                "an endpoint holds no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY", "storage/endpoint"
            )
        return value


def environment(settings: StorageSettings) -> dict[str, str]:
    """The settings as environment variables, for any process of ours and of the libraries; no credential is in it.

    What the settings leave open is taken from this process's own variables.
    """
    now = os.environ
    endpoint = settings.endpoint or now.get("AWS_ENDPOINT_URL_S3") or now.get("AWS_ENDPOINT_URL")
    region = settings.region or now.get("AWS_REGION") or now.get("AWS_DEFAULT_REGION")
    style = settings.addressing_style if settings.addressing_style != "auto" else now.get(STYLE_VARIABLE)
    variables = {
        "AWS_ENDPOINT_URL_S3": endpoint,
        "MLFLOW_S3_ENDPOINT_URL": now.get("MLFLOW_S3_ENDPOINT_URL") or endpoint,
        "AWS_REGION": region,
        "AWS_DEFAULT_REGION": region,
        STYLE_VARIABLE: style,
        "MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE": style,
        ANONYMOUS_VARIABLE: "1" if settings.anonymous else now.get(ANONYMOUS_VARIABLE),
    }
    if endpoint:
        variables |= _without_checksums()
    return {name: value for name, value in variables.items() if value}


def _without_checksums() -> dict[str, str]:
    """Stores other than AWS refuse (Ceph: 411) or corrupt the checksummed chunks that the SDK sends by default."""
    names = ("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION")
    return {name: os.environ.get(name, "when_required") for name in names}


def configure(settings: StorageSettings) -> None:
    """Make the settings this process's own, and those of the processes that it starts.

    Raises InputError for an endpoint that only a file names (hosts.py).
    """
    refuse_unconfirmed("storage.endpoint", settings.endpoint, settings.host_from)
    os.environ.update(environment(settings))


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """File system of a URI and the path in it ("bucket/key" on S3, an absolute path locally).

    It may be pickled: it holds no credentials, and in another process it is made anew with the same endpoint. Raises
    InputError for what is neither a path nor s3://bucket/key, and FileNotFoundError for a name on S3 that leads out of its
    folder.
    """
    if not is_s3(uri):
        _refuse_other_schemes(uri)
        return pafs.LocalFileSystem(), os.path.abspath(uri.removeprefix(FILE_SCHEME))
    path = uri.removeprefix(S3_SCHEME).strip("/")
    if not {".", ".."}.isdisjoint(path.split("/")):  # the client would ask for another object
        raise FileNotFoundError(f"{uri}: a name with . or .. between slashes cannot be asked for: rename it")
    if re.search("[:@]", path.partition("/")[0]):
        raise InputError(
            f"{redact(uri)}: a bucket's name has no : and no @; write s3://bucket/prefix, and set credentials with "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
            "storage/not-a-bucket",
        )
    if not path or uri.startswith(f"{S3_SCHEME}/"):
        raise InputError(f"{uri}: names no bucket; write s3://bucket/prefix", "storage/not-a-bucket")
    return s3_filesystem(_chosen()), path


def _refuse_other_schemes(uri: str) -> None:
    """s3:/bucket would be a folder of this machine, and gs://bucket too."""
    if not uri:
        raise InputError("an empty text is no place; give a path or s3://bucket/prefix", SCHEME_CODE)
    if has_scheme(uri) and not uri.startswith(f"{FILE_SCHEME}/"):
        raise InputError(
            f"{redact(uri)}: not supported; give a local path or s3://bucket/prefix (AWS S3 or a store with its API), or "
            f"./{redact(uri)} for a path of that name",
            SCHEME_CODE,
        )


def path_here(uri: str, what: str) -> Path:
    """A path on this machine. Raises InputError for any URI."""
    if has_scheme(uri):
        raise InputError(f"{redact(uri)}: {what} must lie on this machine; give a local path", SCHEME_CODE)
    return Path(uri)


def has_scheme(uri: str) -> bool:
    """Whether a text begins like s3://bucket or gs:/bucket, as no path does."""
    return bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", uri))


def is_s3(uri: str) -> bool:
    return uri.startswith(S3_SCHEME)


class _S3(NamedTuple):
    endpoint: str | None
    region: str | None
    style: str
    anonymous: bool


def _chosen() -> _S3:
    variables = environment(StorageSettings())
    return _S3(
        variables.get("AWS_ENDPOINT_URL_S3"),
        variables.get("AWS_REGION"),
        variables.get(STYLE_VARIABLE, "auto"),
        ANONYMOUS_VARIABLE in variables,
    )


def proxy() -> str | None:
    """The URL of the proxy to the store that HTTP_PROXY, HTTPS_PROXY and NO_PROXY name, which s3fs reads itself and pyarrow does
    not; it may hold a password."""
    url = urlsplit(_chosen().endpoint or "https://s3.amazonaws.com")
    return None if proxy_bypass(url.netloc) else getproxies().get(url.scheme)


@lru_cache
def s3_filesystem(
    chosen: _S3, attempts: int = S3_ATTEMPTS, connect_timeout_s: float = 10, request_timeout_s: float = 60
) -> "_S3FileSystem":
    """pyarrow's file system of S3. It outlives about a minute of 503s (25 ms, doubled `attempts` times)."""
    endpoint, region, style, anonymous = chosen
    if endpoint:
        os.environ.update(_without_checksums())
    files = _S3FileSystem(
        endpoint_override=endpoint,
        region=region or ("us-east-1" if endpoint else None),
        anonymous=anonymous,
        force_virtual_addressing=style == "virtual",
        retry_strategy=pafs.AwsDefaultS3RetryStrategy(max_attempts=attempts),
        connect_timeout=connect_timeout_s,
        request_timeout=request_timeout_s,
        proxy_options=proxy(),
        allow_delayed_open=True,  # a small object is one request, not the three of a multipart upload
    )
    files.chosen = chosen
    return files


class _S3FileSystem(pafs.S3FileSystem):
    """Pickles as what was chosen: pyarrow's own pickle forgets the retries, and the checksum variables beside it."""

    chosen: _S3

    def __reduce__(self) -> tuple[Any, ...]:
        return s3_filesystem, (self.chosen,)


_ONE_STORE = Lock()


def ask_s3(operation: str, bucket: str, **arguments: Any) -> dict[str, Any]:
    """One request through s3fs, for what pyarrow does not offer: a page of a listing, a condition, a name that is deleted.

    Repeated for a minute while the store is busy: the SDK gives up early when threads share its client. Raises OSError that
    names the URI: FileNotFoundError for what is absent, PermissionError for what is denied.
    """
    uri = f"{S3_SCHEME}{bucket}/{arguments.get('Key', arguments.get('Prefix', ''))}"
    give_up, wait = time.monotonic() + PATIENCE_S, 1.0
    while True:
        try:
            return dict(s3fs_filesystem().call_s3(operation, Bucket=bucket, **arguments))
        except Exception as error:
            cause = error.__cause__ or error  # s3fs translates what the store answered, and hands on the rest
            if not isinstance(error, OSError) and not type(cause).__module__.startswith("botocore"):
                raise
            if not _is_passing(cause) or time.monotonic() > give_up:
                kind = {403: PermissionError, 404: FileNotFoundError}.get(_status(cause) or 0, OSError)
                raise kind(f"{uri}: {_answer(cause).get('Error', {}).get('Message') or error}") from cause
        time.sleep(wait)
        wait = min(2 * wait, LONGEST_WAIT_S)


def _is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed later: 5xx, 429, time-outs, broken connections."""
    from botocore import exceptions

    status = _status(error)
    if status is None:
        return isinstance(error, TimeoutError | exceptions.HTTPClientError | exceptions.ConnectionError)
    return status == 429 or (status >= 500 and status != 501)


def _status(error: BaseException | None) -> int | None:
    """The HTTP status of an error of botocore's; None for one without an answer."""
    status: int | None = _answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status


def _answer(error: BaseException | None) -> dict[str, Any]:
    return getattr(error, "response", None) or {}


def s3fs_filesystem() -> Any:
    """The same store through s3fs: one for all threads of a process, for each loads the SDK's description of S3 anew."""
    with _ONE_STORE:
        return _s3fs_of(os.getpid(), _chosen())


@lru_cache(maxsize=1)
def _s3fs_of(process: int, chosen: _S3) -> Any:
    import s3fs
    from aiobotocore.session import AioSession  # type: ignore[import-untyped]

    session = AioSession()
    # nobody reads the times of a listing, whose parsing takes two thirds of the time of a page
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=str)
    style = "path" if chosen.endpoint and chosen.style == "auto" else chosen.style
    store = s3fs.S3FileSystem(
        anon=chosen.anonymous,
        use_listings_cache=False,
        endpoint_url=chosen.endpoint,
        client_kwargs={"region_name": chosen.region} if chosen.region else {},
        config_kwargs={
            "s3": {"addressing_style": style},
            "retries": {"total_max_attempts": 1},  # `ask_s3` repeats
            "connect_timeout": 10,
            "read_timeout": 60,
            "max_pool_connections": DELETES_AT_ONCE,
        },
    )
    store.session, store.retries = session, 1
    return store


def join(uri: str, *names: str) -> str:
    """`uri/name/…`, for both kinds of URI."""
    return "/".join([uri.rstrip("/"), *(name.strip("/") for name in names)])


def absolute(uri: str) -> str:
    """The URI as `list_files` begins its answers with it: no trailing slash, a local path from the root."""
    return (S3_SCHEME if is_s3(uri) else "") + filesystem(uri)[1]


def exists(uri: str) -> bool:
    """Whether a file or folder is there. Raises OSError when its bucket is missing."""
    files, path = filesystem(uri)
    if files.get_file_info(path).type != pafs.FileType.NotFound:
        return True
    require_bucket(uri)
    return False


def require_bucket(uri: str) -> None:
    """Raise the store's OSError when the bucket of an s3:// URI is missing: S3 answers for its objects that they are."""
    files, path = filesystem(uri)
    if is_s3(uri):
        _look_for_bucket(files.chosen, path.partition("/")[0])


@lru_cache
def _look_for_bucket(chosen: "_S3", bucket: str) -> None:
    """Once for each bucket that is there."""
    try:
        s3_filesystem(chosen).get_file_info(pafs.FileSelector(f"{bucket}/{secrets.token_hex(8)}"))
    except FileNotFoundError:  # the random name, in a bucket that is there
        return
    except OSError as error:
        if NO_BUCKET in str(error):
            raise  # others, such as a listing that is denied, say nothing about the bucket


def is_file(uri: str) -> bool:
    """Whether a plain file, or an object, is there."""
    files, path = filesystem(uri)
    return bool(files.get_file_info(path).is_file)


def read_bytes(uri: str) -> bytes:
    """The whole file. Raises FileNotFoundError when it is absent or has a name that cannot be asked for, PermissionError
    when it may not be read; InputError for a folder, a pipe or a device; other OSErrors are the store's."""
    files, path = filesystem(uri)
    refuse_special_file(uri)
    try:
        with files.open_input_file(path) as stream:
            return bytes(stream.read())
    except FileNotFoundError:
        require_bucket(uri)
        raise
    except pa.ArrowInvalid as error:
        raise FileNotFoundError(f"{uri}: {error}") from error
    except OSError as error:
        if any(code in str(error) for code in DENIED):
            raise PermissionError(str(error)) from error
        raise


def read_small(uri: str, most_bytes: int) -> bytes:
    """As `read_bytes`. Raises InputError for a file of more than `most_bytes` too."""
    files, path = filesystem(uri)
    size = files.get_file_info(path).size or 0
    if size > most_bytes:
        raise InputError(f"{uri}: {size} bytes, more than {most_bytes}; remove it", "storage/too-large")
    return read_bytes(uri)


def refuse_special_file(uri: str) -> None:
    """InputError for a folder, for a pipe, which would wait for a writer, and for a device, which may never end."""
    with contextlib.suppress(OSError):
        if is_s3(uri):
            return
        if not stat.S_ISREG(os.stat(filesystem(uri)[1]).st_mode):
            raise InputError(
                f"{uri}: a folder, a pipe or a device, not a file; give or put a file", "storage/not-a-file"
            )


def read_lines(uri: str) -> list[str]:
    """The lines of a user's text file that are not empty. Raises InputError for one that is not UTF-8, and as `read_bytes`."""
    return lines_of(read_bytes(uri), uri)


def read_json(uri: str, shape: Any = Any) -> Any:
    """A JSON file, which a stranger may have written, as a value of `shape`: a model, or a type such as dict[str, int].

    Raises InputError for one that is damaged, of another shape, nested too deeply or of more than MAX_JSON_BYTES, and as
    `read_bytes`.
    """
    return shaped(parse_json(read_small(uri, MAX_JSON_BYTES), uri), shape, uri)


def read_value(uri: str, key: str, shape: Any) -> Any:
    """The value of one key of a JSON file. Raises InputError as `read_json`."""
    found = read_json(uri, dict[str, Any])
    return shaped(found.get(key), shape, f"{uri}: {key}")


def shaped(value: Any, shape: Any, where: str) -> Any:
    """What was read from a file as a value of `shape`. Raises InputError, which begins with `where`, for another shape."""
    try:
        return _adapter(shape).validate_python(value)
    except ValidationError as error:
        first, own = error.errors()[0], raised_by(dict(error.errors()[0]))
        place, reason = ".".join(map(str, first["loc"])) or "all of it", first["msg"] if own is None else own.message
        raise InputError(
            f"{where}: is damaged, or another version wrote it ({place}: {reason}); bring it back from a copy",
            "storage/damaged-json",
        ) from None


@lru_cache
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)


def parse_json(content: bytes | str, where: str) -> Any:
    """Raises InputError, which begins with `where`, for what is no JSON or is nested too deeply."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{where}: is damaged, it is no JSON ({error}); bring it back from a copy", "storage/damaged-json"
        ) from None


def write_bytes(uri: str, data: bytes | memoryview | pa.Buffer) -> None:
    """Publish a file whole; a reader sees the old content, or none, until the new one is complete. Creates parents."""
    write_pieces(uri, (data,))


def write_pieces(uri: str, pieces: Iterable[bytes | memoryview | pa.Buffer]) -> None:
    """As `write_bytes`, of what comes piece by piece."""
    files, path = filesystem(uri)
    if is_s3(uri):
        _write(files, path, pieces)
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = os.path.join(
        os.path.dirname(path), f".{os.path.basename(path)}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}"
    )
    try:
        with _locked_file(temporary) as stream:
            for data in pieces:
                stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        raise


def _locked_file(path: str) -> BinaryIO:
    """A new file to write, locked while it is open: `remove_unfinished` leaves it alone."""
    while True:
        stream = open(path, "wb")  # noqa: SIM115 - the caller closes it
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(stream, fcntl.LOCK_EX)
        if os.fstat(stream.fileno()).st_nlink:
            return stream
        stream.close()  # it was removed before it was locked


def remove_unfinished(folder: str) -> int:
    """Delete what killed writes left below a local folder of ours, and nothing that is being written; how many these were."""
    if is_s3(folder):
        return 0  # an object is there whole or not at all
    removed = 0
    for place, _, names in os.walk(filesystem(folder)[1]):
        removed += sum(_remove_unlocked(os.path.join(place, name)) for name in names if UNFINISHED.fullmatch(name))
    return removed


def _remove_unlocked(path: str) -> bool:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.remove(path)
    except OSError:  # locked by its writer, gone, a link, or a file system without locks
        return False
    return True


def _write(files: pafs.FileSystem, path: str, pieces: Iterable[bytes | memoryview | pa.Buffer]) -> None:
    with files.open_output_stream(path) as stream:
        for data in pieces:
            stream.write(data)


def write_json(uri: str, value: Any) -> None:
    write_bytes(uri, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def list_files(uri: str, recursive: bool = True) -> list[str]:
    """Full URIs of the files below a folder, sorted; [] when the folder is absent. Unfinished writes are left out.

    Raises OSError when the bucket is missing.
    """
    files, path = filesystem(uri)
    infos = files.get_file_info(pafs.FileSelector(path, allow_not_found=True, recursive=recursive))
    if not infos:
        require_bucket(uri)
    prefix = S3_SCHEME if is_s3(uri) else ""
    return sorted(prefix + info.path for info in infos if info.type == pafs.FileType.File and not _unfinished(info))


def _unfinished(info: pafs.FileInfo) -> bool:
    return bool(info.base_name.startswith(".") and info.base_name.endswith(TEMPORARY_SUFFIX))


def write_if_unchanged(uri: str, before: bytes | None, data: bytes) -> bool:
    """Replace a file only while it still holds `before` (None: while it is absent); whether that was done.

    Two writers that read the same content cannot both succeed: S3 compares the ETag (If-Match, If-None-Match), a local
    file is locked. A store that refuses every condition, and a file system without locks, compares and writes in two steps.
    """
    files, path = filesystem(uri)
    if is_s3(uri):
        return _write_on_s3_if_unchanged(files, path, before, data)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with _locked(path):
        if _content(uri) != before:
            return False
        write_bytes(uri, data)
        return True


def _content(uri: str) -> bytes | None:
    try:
        return read_bytes(uri)
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
    """Be the only one who replaces a file, among all processes and threads; a killed process releases the lock."""
    folder, name = os.path.split(path)
    with open(os.path.join(folder, f".{name}.lock"), "ab") as lock:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write_on_s3_if_unchanged(files: pafs.FileSystem, path: str, before: bytes | None, data: bytes) -> bool:
    uri = S3_SCHEME + path
    bucket, _, key = path.partition("/")
    conditions, status = [{"IfNoneMatch": "*"}], None
    try:
        if before is not None:
            etag = ask_s3("head_object", bucket, Key=key)["ETag"]
            conditions = [{"IfMatch": etag}, {"IfMatch": etag.strip('"')}]  # Ceph 16 compares it without quotes
    except FileNotFoundError:
        return False
    for condition in conditions:
        if _content(uri) != before:
            break
        try:
            ask_s3("put_object", bucket, Key=key, Body=data, **condition)
            return True
        except OSError as error:
            status = _status(error.__cause__)
            if status not in (404, 409, 412, 501):
                raise
    if status in (412, 501) and _content(uri) == before:  # the store knows no such condition
        _write(files, path, (data,))
    return _content(uri) == data  # a request that was repeated may have been done before


def delete(uri: str, within: str) -> None:
    """Remove a file, or a folder with all that is in it; absent is fine. Raises OSError when it cannot.

    `within`: the folder that the command was given, which holds `uri` or is it. No link is followed below it: one at `uri`
    is removed itself, one on the way there is an InputError.
    """
    path, root = filesystem(uri)[1], filesystem(within)[1]
    if not f"{path}/".startswith(f"{root.rstrip('/')}/"):
        raise ValueError(f"{uri} is not within {within}")
    with contextlib.suppress(FileNotFoundError):
        if is_s3(uri):
            _delete_on_s3(path)
        else:
            root = os.path.dirname(root) if path == root else root
            _delete_locally(root, os.path.relpath(path, root).split("/"))


def _delete_locally(root: str, names: Sequence[str]) -> None:
    *between, last = names
    folder = os.open(root, os.O_DIRECTORY)
    try:
        for number, name in enumerate(between, 1):
            try:
                inner = os.open(name, os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            except NotADirectoryError:
                link = os.path.join(root, *between[:number])
                raise InputError(
                    f"{link}: is a link, and nothing is deleted through links; remove it, or replace it by the folder itself",
                    "data/link",
                ) from None
            os.close(folder)
            folder = inner
        if stat.S_ISDIR(os.stat(last, dir_fd=folder, follow_symlinks=False).st_mode):
            shutil.rmtree(last, dir_fd=folder, onerror=_unless_gone)
        else:
            os.unlink(last, dir_fd=folder)
    finally:
        os.close(folder)


def _unless_gone(function: Any, path: str, raised: Any) -> None:
    if not isinstance(raised[1], FileNotFoundError):
        raise raised[1]


def _delete_on_s3(path: str) -> None:
    """One request an object: stores differ about a bulk delete (some want an MD5 that the SDK no longer sends), and pyarrow
    leaves an empty object in a folder's place."""
    bucket, _, name = path.partition("/")
    ask_s3("delete_object", bucket, Key=name)
    more = True
    with ThreadPoolExecutor(DELETES_AT_ONCE) as threads:
        while more:
            page = ask_s3("list_objects_v2", bucket, Prefix=f"{name}/")
            keys = [entry["Key"] for entry in page.get("Contents", ())]
            list(threads.map(lambda key: ask_s3("delete_object", bucket, Key=key), keys))
            more = page.get("IsTruncated", False)


def first_names(uri: str, most: int = 100) -> list[str]:
    """Sorted names of some files and folders in a folder, folders with a slash; [] when it is absent or empty.

    Raises NotADirectoryError for a file.
    """
    path = filesystem(uri)[1]
    if is_s3(uri):
        return sorted(_first_names_on_s3(path, most))
    try:
        with os.scandir(path) as entries:
            return sorted(entry.name + "/" * entry.is_dir() for entry in islice(entries, most))
    except FileNotFoundError:
        return []


def _first_names_on_s3(path: str, most: int) -> Iterator[str]:
    bucket, _, prefix = path.partition("/")
    prefix += "/" * bool(prefix)
    try:
        page = ask_s3("list_objects_v2", bucket, Prefix=prefix, Delimiter="/", MaxKeys=most)
    except FileNotFoundError:  # no such bucket: whoever writes says so
        return
    yield from (entry["Key"].removeprefix(prefix) for entry in page.get("Contents", ()) if entry["Key"] != prefix)
    yield from (entry["Prefix"].removeprefix(prefix) for entry in page.get("CommonPrefixes", ()))


def read_table(uri: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet file of ours, or some of its columns. Raises FileNotFoundError when it is absent, InputError when damaged."""
    with _open_parquet(uri, pre_buffer=True) as parquet:
        return parquet.read(columns=None if columns is None else list(columns))


@contextlib.contextmanager
def _open_parquet(uri: str, pre_buffer: bool = False) -> Iterator[pq.ParquetFile]:
    files, path = filesystem(uri)
    try:
        with files.open_input_file(path) as stream, pq.ParquetFile(stream, pre_buffer=pre_buffer) as parquet:
            yield parquet
    except pa.ArrowInvalid as error:
        raise InputError(
            f"{uri}: is damaged, it is no Parquet file ({error}); bring it back from a copy", "storage/damaged-file"
        ) from None


def read_models(uri: str, kind: type[Model]) -> list[Model]:
    """The rows of a Parquet file of ours. Raises InputError when they are of another kind, and as `read_table`."""
    return list(shaped(read_table(uri).to_pylist(), list[kind], uri))  # type: ignore[valid-type]


def read_groups(uri: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """The row groups of a Parquet file, or some of their columns, one in memory at a time."""
    with _open_parquet(uri, pre_buffer=True) as parquet:
        for group in range(parquet.num_row_groups):
            yield parquet.read_row_group(group, columns=None if columns is None else list(columns))


def read_rows(uri: str, key: str, values: Collection[str]) -> pa.Table:
    """The rows of a Parquet file whose column `key` is among `values`; only the row groups that hold one are read."""
    wanted = pa.array(sorted(values), pa.string())
    parts = []
    with _open_parquet(uri) as parquet:
        for group in range(parquet.num_row_groups):
            found = pc.is_in(parquet.read_row_group(group, columns=[key]).column(key), value_set=wanted)
            if pc.any(found).as_py():
                parts.append(parquet.read_row_group(group).filter(found))
        return pa.concat_tables(parts) if parts else parquet.schema_arrow.empty_table()


def write_table(uri: str, table: pa.Table) -> None:
    """Publish a Parquet file whole. Row groups are small, so that a reader can stream images."""
    sink = pa.BufferOutputStream()
    compression = {name: "none" if name == "image" else "zstd" for name in table.column_names}  # JPEG and PNG are dense
    pq.write_table(
        table,
        sink,
        compression=compression,
        use_dictionary=False,
        write_statistics=False,
        row_group_size=ROW_GROUP_ROWS,
    )
    write_bytes(uri, sink.getvalue())


def read_metadata(uri: str) -> dict[bytes, bytes] | None:
    """The key-value metadata of a Parquet file, without its rows; None when the file is absent."""
    try:
        with _open_parquet(uri) as parquet:
            return dict(parquet.schema_arrow.metadata or {})
    except FileNotFoundError:
        return None
