"""A proxy in front of an S3 endpoint that fails on command, as stores do."""

import contextlib
import http.client
import socket
import struct
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from tests.failing_s3 import Answer

SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
HOP_BY_HOP = {"connection", "transfer-encoding", "content-length", "date", "server"}


class Faults:
    """What the proxy does; tests change it while it runs."""

    def __init__(self) -> None:
        self.unavailable_until = 0.0
        self.resets_left = 0  # of answers larger than 64 KiB: half of the body, then a reset
        self.refused = self.reset = self.proxied = 0
        self.answer: Answer | None = None  # to every request, instead of the store's

    def unavailable_for(self, seconds: float) -> None:
        self.unavailable_until = time.monotonic() + seconds


@contextlib.contextmanager
def faulty_s3(endpoint: str) -> Iterator[tuple[str, Faults]]:
    """(URL of the proxy, its faults)."""
    faults = Faults()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(urlsplit(endpoint).netloc, faults))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", faults
    finally:
        server.shutdown()
        server.server_close()


def _handler(upstream: str, faults: Faults) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if time.monotonic() < faults.unavailable_until:
                faults.refused += 1
                self._answer(503, [("Content-Type", "application/xml")], SLOW_DOWN)
                return
            if faults.answer is not None:
                text = f"<Error><Code>{faults.answer.code}</Code><Message>{faults.answer.message}</Message></Error>"
                body = b"" if self.command == "HEAD" else f"<?xml version='1.0'?>{text}".encode()
                self._answer(faults.answer.status, [("Content-Type", "application/xml")], body)
                return
            connection = http.client.HTTPConnection(upstream, timeout=60)
            path, headers = self.path, dict(self.headers)
            if path.startswith("http://"):  # as a client asks a proxy
                faults.proxied += 1
                path, headers["Host"] = path.partition(urlsplit(path).netloc)[2], upstream
            connection.request(self.command, path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
            connection.close()
            given = [(name, value) for name, value in answer.getheaders() if name.lower() not in HOP_BY_HOP]
            if self.command == "HEAD":
                content_length = answer.getheader("Content-Length") or "0"
                self._answer(answer.status, given, b"", content_length)
            elif self.command == "GET" and len(content) > 65536 and faults.resets_left > 0:
                faults.resets_left -= 1
                faults.reset += 1
                self._answer(answer.status, given, content[: len(content) // 2], str(len(content)))
                self._break_off()
            else:
                self._answer(answer.status, given, content)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _any

        def _answer(
            self, status: int, headers: list[tuple[str, str]], body: bytes, content_length: str | None = None
        ) -> None:
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Length", content_length or str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _break_off(self) -> None:
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler
