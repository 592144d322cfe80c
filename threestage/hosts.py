"""Hosts that get the user's credentials: only those that the user has named, on the command line or in the environment.

A configuration or a run's folder may be somebody else's. A host that only such a file names gets no credential. Whoever
may write to MLflow may name any place as that of a model's files: only the store's own are read.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from threestage.errors import InputError
from threestage.redaction import redact

TRUSTED = "THREESTAGE_TRUSTED_HOSTS"
CODE = "hosts/not-confirmed"
OF_THIS_MACHINE = ("", "file", "sqlite")  # schemes that name no host
OVER_HTTP = ("http", "https", "mlflow-artifacts")
MLFLOW_CREDENTIALS = (
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_AUTH",
    "MLFLOW_TRACKING_AWS_SIGV4",
    "MLFLOW_TRACKING_CLIENT_CERT_PATH",
)
CONFIRMING = {
    "registry.tracking_uri": ("MLFLOW_TRACKING_URI",),
    "storage.endpoint": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    "cluster.address": ("RAY_ADDRESS",),
}
"""Settings that name a host which gets credentials, and the variables that may name the same host."""


def refuse_unconfirmed(key: str, uri: str | None, file: str | None, on_cluster: bool = False) -> None:
    """Raise InputError if `uri`, the value of the setting `key`, would send credentials to a host that only `file` names.

    `file` is None for a value that the user gave otherwise. MLflow over HTTP is refused only where credentials for it are
    set up: without them none is sent. What is set up `elsewhere`, on a cluster, is not known here.
    """
    if uri is None or file is None or (host := host_of(key, uri)) is None:
        return
    variables = CONFIRMING[key]
    if uri in map(os.environ.get, variables) or is_trusted(host, filter(None, map(os.environ.get, variables)), key):
        return
    if (
        key == "registry.tracking_uri"
        and host.startswith(("http://", "https://"))
        and not (on_cluster or _mlflow_credentials())
    ):
        return
    raise InputError(
        f"{key}={redact(uri)}: {file} names this host, and your credentials would be sent to it; if you trust it, set "
        f"{TRUSTED}={host.rpartition('//')[2]}, or set {variables[-1]}={redact(uri)}",
        CODE,
    )


def refuse_foreign_source(what: str, source: str, tracking_uri: str, locations: Callable[[], Iterable[str]]) -> None:
    """Raise InputError for a source outside the registry: another host, which MLflow would send the user's credentials to,
    or another bucket than those of `locations`.

    `what` names the source in the message; `locations` returns where the registry's experiments keep their files.
    """
    scheme, place, _, _, _ = parts_of(source)
    if "\\" not in source and scheme in OF_THIS_MACHINE:
        return
    if scheme in OVER_HTTP:
        own = parts_of(tracking_uri)
        proxied = scheme == "mlflow-artifacts"
        same = place.rpartition("@")[2] == own.netloc.rpartition("@")[2] and (proxied or scheme == own.scheme)
        inside = same or (proxied and not place)
    else:
        inside = place != "" and (scheme, place) in {parts_of(location)[:2] for location in locations()}
    host = f"{scheme}://{place}"
    if "\\" in source or not (inside or is_trusted(host)):
        raise InputError(
            f"{what}: its files are at {redact(source)}, which is not a place of {redact(tracking_uri)}; if you trust it, "
            f"set {TRUSTED}={redact(host)}",
            "hosts/foreign-source",
        )


def host_of(key: str, uri: str) -> str | None:
    """`scheme://host:port` of a URI, without credentials; None if it is on this machine alone.

    A URI that clients may read differently (a backslash, a space) is its own host: it equals no other.
    """
    if key == "cluster.address":
        return None if uri in ("auto", "local") else uri if "://" in uri else f"ray://{uri}"
    if re.search(r"[\s\\]", uri):
        return uri
    parts = parts_of(uri)
    if parts.scheme in OF_THIS_MACHINE:
        return None
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2].lower()}"


def parts_of(uri: str) -> SplitResult:
    """The parts of a URI. Raises InputError for one that has none, such as `http://[x` or a port of 99999."""
    try:
        parts = urlsplit(uri)
        _ = parts.port  # only then it is read
    except ValueError as error:
        raise InputError(f"{redact(uri)}: not a URI ({error}); correct it", "hosts/not-a-uri") from None
    return parts


def is_trusted(host: str, named: Iterator[str] | Sequence[str] = (), key: str = "") -> bool:
    """Whether the host is one of `named` (URIs), or is listed in THREESTAGE_TRUSTED_HOSTS: `host`, `host:port` or
    `scheme://host:port`, with commas between them."""
    if host in (host_of(key, uri) for uri in named):
        return True
    with_port = host.rpartition("//")[2]
    without_port = re.sub(r":\d+$", "", with_port)
    listed = (entry.strip().rstrip("/").lower() for entry in os.environ.get(TRUSTED, "").split(","))
    return any(entry in (host.lower(), with_port.lower(), without_port.lower()) for entry in listed if entry)


def _mlflow_credentials() -> bool:
    """Whether MLflow would send credentials to any server."""
    return any(map(os.environ.get, MLFLOW_CREDENTIALS)) or (Path.home() / ".mlflow" / "credentials").exists()
