"""A real S3 endpoint for tests: moto's server in a process of its own, with one empty bucket."""

import contextlib
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

SECRET = "wJalrThisSecretMustAppearNowhere"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def variables(endpoint: str) -> dict[str, str]:
    """What a process needs in its environment to use the endpoint."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ENDPOINT_URL_S3": endpoint,
        "MLFLOW_S3_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
    }


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """The URL of an endpoint that holds one empty bucket; it forgets all at the end."""
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(endpoint)
        empty(endpoint)
        yield endpoint
    finally:
        server.terminate()
        server.wait()


def empty(endpoint: str) -> None:
    """Forget all that the endpoint holds; then it has one empty bucket."""
    _send("POST", f"{endpoint}/moto-api/reset")
    _send("PUT", f"{endpoint}/bucket")


def _wait_for(endpoint: str) -> None:
    for _ in range(600):
        try:
            _send("GET", endpoint)
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(f"{endpoint}: the S3 endpoint did not start within 60 s")


def _send(method: str, url: str) -> None:
    urllib.request.urlopen(urllib.request.Request(url, method=method)).close()
