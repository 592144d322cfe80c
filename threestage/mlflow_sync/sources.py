"""Refuse files of a model version that lie on another host or bucket: whoever may write to MLflow may name any."""

from collections.abc import Callable, Iterable

from threestage.errors import InputError
from threestage.hosts import OF_THIS_MACHINE, TRUSTED, is_trusted, parts_of
from threestage.mlflow_sync.connection import redact

OVER_HTTP = ("http", "https", "mlflow-artifacts")


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
