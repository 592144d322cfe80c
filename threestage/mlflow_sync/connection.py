"""Around MLflow, without importing it: text fit to be logged, and quiet calls to the tracking server that fail fast.
Also the thread that sends in the background."""

import contextlib
import http.client
import json
import logging
import os
import re
import sqlite3
import ssl
import threading
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from threestage.errors import InputError
from threestage.hosts import parts_of, refuse_unconfirmed
from threestage.redaction import redact as redact

MAX_PARAM, MAX_TAG, MAX_KEY = 500, 5000, 250
PROBE_S, CONNECT_S, CALL_S, TRANSFER_S = 5, 10, 30, 600
END_S = 300.0  # a run or a sweep that ends waits so long for a slow store
NOISY_LOGGERS = ("mlflow", "alembic", "sqlalchemy", "urllib3")
PROBE_ERRORS = (OSError, sqlite3.Error, http.client.HTTPException)
TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
VARIABLES = {
    TIMEOUT: (str(CALL_S), "120"),
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": ("2", "7"),
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": ("1", "2"),
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": ("false", "true"),
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": ("true", "false"),
    "MLFLOW_UV_AUTO_DETECT": ("false", "true"),
    "MLFLOW_DISABLE_TELEMETRY": ("true", "false"),
}
"""MLflow's variables: our value during a call, and what MLflow takes where nothing is set. A variable with the latter counts as
not set."""
FOREIGN_ERRORS = ("mlflow", "sqlalchemy", "requests", "urllib3", "botocore", "boto3")

MetricPoint = tuple[str, float, int, int]  # key, value, step, milliseconds after the run's start


# ---- Text that is logged


def redact_tree(value: Any) -> Any:
    """The same nested value as plain JSON types, every string redacted."""
    if isinstance(value, Mapping):
        return {str(key): redact_tree(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact_tree(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float) else redact(str(value))


def params_of(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """MLflow's params of a nested config: dotted keys and printable values; lists stay whole, secrets in URIs are stripped."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= params_of(value, f"{prefix}{key}.")
        else:
            plain = redact_tree(value)
            text = plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False)
            flat[key_of(f"{prefix}{key}")] = shortened(text, MAX_PARAM)
    return flat


def metric_points(rows: Sequence[Mapping[str, float]], summary: Mapping[str, float]) -> list[MetricPoint]:
    """Every value of a history of rows; then those of the summary, after the last step, unless they are there already.

    A point's time is its step: the same row gives the same points, whenever it is sent.
    """
    points = [
        (key_of(key), float(value), int(row["step"]), int(row["step"]))
        for row in rows
        for key, value in row.items()
        if key != "step" and value is not None
    ]
    last = max((int(row["step"]) for row in rows), default=0)
    known = {point[:3] for point in points}
    finals = [(key_of(key), float(value), last, last + 1) for key, value in summary.items()]
    return points + [point for point in finals if point[:3] not in known]


def model_name_of(run_name: str) -> str:
    """A registered model's name, which models:/NAME@ALIAS must be able to hold."""
    return re.sub(r"[/:@]", "-", run_name)


def resolve_uri(setting: str | None) -> str:
    """The setting, else MLFLOW_TRACKING_URI, else ./mlflow.db; a relative sqlite path is made absolute."""
    uri = setting or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    path, (_, mark, query) = sqlite_path(uri), uri.partition("?")
    return uri if path is None else f"sqlite:///{path}{mark}{query}"


def confirmed_uri(setting: str | None, file: str | None) -> str:
    """As `resolve_uri`. Raise InputError for a host that only `file` names and that would get credentials."""
    refuse_unconfirmed("registry.tracking_uri", setting, file)
    return resolve_uri(setting)


def sqlite_path(uri: str) -> Path | None:
    """Of the file, without what the URI has after it, such as ?timeout=60."""
    file = uri.partition("?")[0]
    return Path(file.removeprefix("sqlite:///")).absolute() if file.startswith("sqlite:///") else None


def key_of(name: str) -> str:
    """MLflow's names are paths of word characters, dots, dashes and spaces, of 250 characters at most."""
    return re.sub(r"/{2,}", "/", re.sub(r"[^\w./ -]", "_", name)).strip("/")[:MAX_KEY]


def shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def clean_tags(tags: Mapping[str, Any]) -> dict[str, str]:
    return {key_of(key): shortened(redact(str(value)), MAX_TAG) for key, value in tags.items()}


def quoted(value: str) -> str:
    return f'"{value}"' if "'" in value else f"'{value}'"


# ---- Talking to the store


@contextlib.contextmanager
def mlflow_session(uri: str, timeout_s: int = CALL_S) -> Iterator[None]:
    """Quiet, few retries, every failure of the store an InputError. What it changes is put back when it ends."""
    try:
        with quietly(timeout_s):
            _probe(uri)
            yield
    except InputError:
        raise
    except Exception as error:
        if not (isinstance(error, (*PROBE_ERRORS, ImportError)) or type(error).__module__.startswith(FOREIGN_ERRORS)):
            raise
        raise _explained(uri, error) from error


def _explained(uri: str, error: Exception) -> InputError:
    """What a store, or the connection to it, does, as one line with its fix."""
    store, reason = redact(uri), shortened(redact(str(error)).partition("\n")[0], 300)
    status = _http_status(error)
    if "out-of-date database schema" in str(error):
        return InputError(
            f"tracking store {store}: an older MLflow made its tables; back it up, then run `mlflow db upgrade {store}`",
            "mlflow/old-schema",
        )
    if status == 401:
        return InputError(
            f"tracking store {store}: refuses the credentials (401); set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, "
            "or MLFLOW_TRACKING_TOKEN",
            "mlflow/credentials",
        )
    if status == 403:
        return InputError(
            f"tracking store {store}: denies it (403: {reason}); give that user the right, choose another registry.experiment, "
            "or name this host in the server's --allowed-hosts",
            "mlflow/denied",
        )
    if status == 413:
        return InputError(
            f"tracking store {store}: takes no upload of this size (413); raise the limit of the proxy before it (nginx: "
            "client_max_body_size)",
            "mlflow/too-large",
        )
    return InputError(
        f"tracking store {store}: {type(error).__name__}: {reason}; is it up, and does registry.tracking_uri "
        "(MLFLOW_TRACKING_URI) name it?",
        "mlflow/unavailable",
    )


def _http_status(error: Exception) -> int | None:
    """That a server, or a proxy before it, has answered with."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is None and (found := re.search(r"error code (\d{3})\b", str(error))):
        status = found[1]
    named = {"UNAUTHENTICATED": 401, "PERMISSION_DENIED": 403}.get(str(getattr(error, "error_code", "")))
    return named if status is None else int(status)


@contextlib.contextmanager
def quietly(timeout_s: int = CALL_S) -> Iterator[None]:
    """MLflow without progress bars, warnings, telemetry and long retries, unless the environment wants them."""
    reserve_variables()
    quiet = {name: ours for name, (ours, own) in VARIABLES.items() if os.environ[name] == own}
    os.environ.update(quiet | ({TIMEOUT: str(timeout_s)} if TIMEOUT in quiet else {}))
    loggers = [logging.getLogger(name) for name in NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        os.environ.update({name: VARIABLES[name][1] for name in quiet})


def reserve_variables() -> None:
    """Give MLflow's variables their places in the environment, at MLflow's own values: before threads begin.

    A variable that is new, or that comes back, moves the table in which C code of other threads may be looking one up just
    then (glibc before 2.41), as every request to S3 does: the process ends with a segmentation fault. Another value for one
    that is there moves nothing.
    """
    for name, (_, own) in VARIABLES.items():
        os.environ.setdefault(name, own)


def _probe(uri: str) -> None:
    """Fail now, with one of PROBE_ERRORS, where MLflow would retry for minutes."""
    scheme, path = parts_of(redact(uri)).scheme, sqlite_path(uri)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA schema_version")
    elif scheme in ("http", "https"):
        _get_health(redact(uri))
    elif scheme.partition("+")[0] in ("postgresql", "mysql"):  # once: MLflow tries it ten times with doubling pauses
        import sqlalchemy

        log_in = {"connect_timeout": PROBE_S}
        sqlalchemy.create_engine(uri, connect_args=log_in, poolclass=sqlalchemy.pool.NullPool).connect().close()


def _get_health(uri: str) -> None:
    """Any answer, a refusal or a certificate that only MLflow's settings accept too, shows that somebody is there."""
    try:
        urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=PROBE_S).close()
    except urllib.error.HTTPError as error:
        error.close()
    except urllib.error.URLError as error:
        if not isinstance(error.reason, ssl.SSLError):
            raise


# ---- In the background


class Background:
    """Calls `work` in a thread after each `notify`, at most every `between_s` seconds; after a failure again in `retry_s`
    seconds. `failed` gets the error, once until it works again; whatever `work` raises, nobody else hears of it."""

    def __init__(
        self,
        name: str,
        work: Callable[[], None],
        failed: Callable[[Exception], None],
        between_s: float,
        retry_s: float,
    ) -> None:
        self._work, self._failed, self._between_s, self._retry_s = work, failed, between_s, retry_s
        self._has_work = False
        self._last: Callable[[], None] | None = None
        self._ended: Future[None] = Future()
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def notify(self) -> None:
        """There is something to do; returns at once."""
        with self._changed:
            self._has_work = True
            self._changed.notify_all()

    def close(self, last: Callable[[], None], within_s: float = END_S) -> None:
        """Do `last` in the thread, once the call that it is in has returned, and end it. What `last` raises is raised;
        TimeoutError where all this takes longer than `within_s`: nobody waits for it then."""
        with self._changed:
            self._last = last
            self._changed.notify_all()
        if not wait([self._ended], within_s).done:
            raise TimeoutError(f"no end within {within_s:.0f} s")
        self._ended.result()

    def _run(self) -> None:
        lost = False
        while (last := self._wait_for_work()) is None:
            pause = self._between_s
            try:
                self._work()
                lost = False
            except Exception as error:
                pause = self._retry_s
                if not lost:
                    self._failed(error)
                lost = True
                self.notify()
            with self._changed:
                self._changed.wait_for(lambda: self._last is not None, timeout=pause)
        try:
            self._ended.set_result(last())
        except BaseException as error:
            self._ended.set_exception(error)

    def _wait_for_work(self) -> Callable[[], None] | None:
        """What to do last, when it is being closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._has_work or self._last is not None)
            self._has_work = False
            return self._last
