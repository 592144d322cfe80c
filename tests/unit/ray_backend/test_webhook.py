"""Why: a page at night must come, hold no secret, and never change how a job ends."""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.failing_s3 import silent_server
from tests.refusals import refused
from tests.s3 import free_port
from threestage.ray_backend import webhook
from threestage.ray_backend.webhook import Webhooks

REPORT = {
    "command": "run", "name": "demo", "out": "s3://KEY:SECRET@bucket/run", "cluster": "http://head:8265", "job": "demo-1",
    "reason": "stage1: token=hunter2-secret\nno room [ray/no-room]",
}  # fmt: skip


@contextlib.contextmanager
def receiver(status: int = 200, location: str = "") -> Iterator[tuple[str, list[tuple[str, dict[str, Any]]]]]:
    """A real HTTP server: its URL, and what was posted to it as path and JSON."""
    seen: list[tuple[str, dict[str, Any]]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            self.send_response(status)
            if location:
                self.send_header("Location", location)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/hook/s3cret-path", seen
    finally:
        server.shutdown()
        server.server_close()


def test_each_end_has_its_url_and_no_secret_travels() -> None:
    said: list[str] = []
    with receiver() as (url, failures), receiver() as (other, successes):
        hooks = Webhooks(url, other)
        hooks.post(75, REPORT, said.append)
        hooks.post(0, REPORT | {"reason": ""}, said.append)
        Webhooks(on_success=other).post(1, REPORT, said.append)
    (path, body), (_, success) = failures[0], successes[0]
    assert path == "/hook/s3cret-path" and len(failures) == len(successes) == 1 and said == []
    assert body == {
        "event": "failure", "exit_code": 75, "command": "run", "name": "demo", "job": "demo-1", "out": "s3://bucket/run",
        "cluster": "http://head:8265", "reason": "stage1: token=… no room [ray/no-room]",
        "text": "threestage run demo (demo-1) failed with exit code 75: stage1: token=… no room [ray/no-room]",
    }  # fmt: skip
    assert success["event"] == "success" and success["text"] == "threestage run demo (demo-1) succeeded"


def test_a_post_that_fails_is_one_warning_without_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "POST_S", 0.3)
    said: list[str] = []
    with receiver() as (elsewhere, reached), receiver(302, elsewhere) as (moved, _), receiver(500) as (broken, _):
        with silent_server() as silent:
            for url in (moved, broken, f"{silent}/s3cret-path", f"http://127.0.0.1:{free_port()}/s3cret-path"):
                Webhooks(on_failure=url).post(1, REPORT, said.append)
        assert reached == [], "no redirect is followed"
    assert len(said) == 4 and all("--on-failure 127.0.0.1" in line and "s3cret" not in line for line in said)
    assert "302" in said[0] and "500" in said[1]


@pytest.mark.parametrize("url", ["hooks.example.com/x", "file:///etc/passwd", "http:///x", "ftp://host/x"])
def test_only_a_url_of_http_is_posted_to(url: str) -> None:
    with refused("submit/not-a-webhook", f"--on-success {url}"):
        Webhooks(on_success=url).check()
