"""Endpoints that fail as stores, proxies and networks do, and that no store for tests can be made to fail as."""

import contextlib
import socket
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

EMPTY_LISTING = b"<?xml version='1.0'?><ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"


class Answer(NamedTuple):
    """`code` None: an answer without S3's XML."""

    status: int
    code: str | None = None
    message: str = ""
    region: str | None = None


NO_SUCH_KEY = Answer(404, "NoSuchKey", "The specified key does not exist.")
WRONG_REGION = Answer(
    400,
    "AuthorizationHeaderMalformed",
    "The authorization header is malformed; the region 'us-east-1' is wrong; expecting 'eu-central-1'",
    "eu-central-1",
)
ERRORS = {
    "key id": Answer(403, "InvalidAccessKeyId", "The AWS Access Key Id you provided does not exist in our records."),
    "secret": Answer(403, "SignatureDoesNotMatch", "The request signature we calculated does not match."),
    "denied": Answer(403, "AccessDenied", "Access Denied"),
    "bucket": Answer(404, "NoSuchBucket", "The specified bucket does not exist"),
    "region": WRONG_REGION,
    "redirect": Answer(301, "PermanentRedirect", "Must be addressed using the specified endpoint.", "eu-central-1"),
    "busy": Answer(503, "SlowDown", "Please reduce your request rate."),
    "clock": Answer(403, "RequestTimeTooSkewed", "The difference to the current time is too large."),
    "token": Answer(400, "ExpiredToken", "The provided token has expired."),
    "web site": Answer(404),
}


@contextlib.contextmanager
def failing_s3(answers: Answer | Mapping[str, Answer]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """(URL, the requests seen as method and path). One answer for all, or one for each method that fails.

    A method that does not fail finds a bucket that was empty, and whose listing stays so.
    """
    seen: list[tuple[str, str]] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(answers, seen))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def silent_server() -> Iterator[str]:
    """An endpoint that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@contextlib.contextmanager
def black_hole() -> Iterator[str]:
    """An endpoint to which connecting takes for ever, as to an address that nobody has: its queue is full."""
    with contextlib.ExitStack() as opened:
        server = opened.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(4):
            waiting = opened.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(server.getsockname())
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def _handler(answers: Answer | Mapping[str, Answer], seen: list[tuple[str, str]]) -> type[BaseHTTPRequestHandler]:
    objects: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            seen.append((self.command, path))
            answer = answers if isinstance(answers, Answer) else answers.get(self.command)
            if answer is not None:
                self._fail(answer)
            elif self.command == "PUT":
                objects[path] = body
                self._send(200, b"")
            elif self.command == "DELETE":
                objects.pop(path, None)
                self._send(204, b"")
            elif path in objects or "list-type" in self.path:
                self._send(200, objects.get(path, EMPTY_LISTING))
            else:
                self._fail(NO_SUCH_KEY)

        do_GET = do_PUT = do_DELETE = do_HEAD = _any

        def _fail(self, answer: Answer) -> None:
            text = f"<Error><Code>{answer.code}</Code><Message>{answer.message}</Message></Error>"
            body = b"<html>nothing here</html>" if answer.code is None else f"<?xml version='1.0'?>{text}".encode()
            region = [] if answer.region is None else [("x-amz-bucket-region", answer.region)]
            self._send(answer.status, body, region)

        def _send(self, status: int, body: bytes, headers: list[tuple[str, str]] | None = None) -> None:
            self.send_response(status)
            for name, value in [("Content-Type", "application/xml"), *(headers or [])]:
                self.send_header(name, value)
            if status != 204:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD" and status != 204:
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler
