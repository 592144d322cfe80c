"""A real `mlflow server` that proxies artifacts, and a client that dies, for tests."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.s3 import free_port


@contextlib.contextmanager
def mlflow_server(
    folder: Path, artifacts: str, port: int | None = None, database: str | None = None
) -> Iterator[tuple[str, int]]:
    """Its URI and its process group. The store is the database, or `folder`/server.db, which may be there already."""
    port = port or free_port()
    store = ["--backend-store-uri", database or f"sqlite:///{folder}/server.db", "--artifacts-destination", artifacts]
    command = [sys.executable, "-m", "mlflow", "server", *store, "--port", str(port), "--workers", "1"]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with open(folder / "server.log", "wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", folder / "server.log")
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        with contextlib.suppress(ProcessLookupError):  # a test has killed it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_for(url: str, log: Path, limit_s: float = 60) -> None:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(f"{url} does not answer: {log.read_text()[-2000:]}")


def die_after(patch: pytest.MonkeyPatch, method: str, number: int) -> None:
    """This process is killed, so to speak, behind the numberth call of a method of MLflow's client."""
    from mlflow import MlflowClient

    original, calls = getattr(MlflowClient, method), []

    def call_then_die(*arguments: Any, **options: Any) -> Any:
        calls.append(original(*arguments, **options))
        if len(calls) == number:
            raise KeyboardInterrupt  # nothing in the program catches it
        return calls[-1]

    patch.setattr(MlflowClient, method, call_then_die)
