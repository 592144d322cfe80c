"""A stand-in for a bucket of any number of keys: it answers ListObjectsV2 from a sorted sequence that holds no object.

`python -m tests.list_objects --keys 1000000 --port 9100` serves numbered keys, which are computed on the fly.
"""

import argparse
import contextlib
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, overload
from urllib.parse import parse_qs, quote, unquote, urlsplit

BYTES = 12_345
FILM_FRAMES = 10_000


class NumberedKeys(Sequence[str]):
    """pool/film_00012/frame_003456.jpg, of 10,000 frames a film; sorted."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(self._length))]
        if not 0 <= index < self._length:
            raise IndexError(index)
        return f"pool/film_{index // FILM_FRAMES:05d}/frame_{index % FILM_FRAMES:06d}.jpg"


@dataclass
class Bucket:
    """Sorted keys, the requests made to them (prefix, after, limit), and how many of the next are answered 503."""

    keys: Sequence[str]
    requests: list[tuple[str, str, int]] = field(default_factory=list)
    failures: int = 0
    latency_s: float = 0.0

    def page(self, prefix: str, after: str, limit: int) -> tuple[list[str], bool]:
        """The first keys with the prefix that are greater than `after`; whether more follow."""
        self.requests.append((prefix, after, limit))
        if self.latency_s:
            time.sleep(self.latency_s)
        start = max(bisect_left(self.keys, prefix), bisect_right(self.keys, after) if after else 0)
        end = bisect_right(self.keys, prefix, key=lambda key: key[: len(prefix)])
        return list(self.keys[start : min(end, start + limit)]), start + limit < end


def answer(bucket: Bucket, **arguments: Any) -> dict[str, Any]:
    """What `storage.ask_s3("list_objects_v2", …)` would answer; the continuation token is the last key sent."""
    after = arguments.get("ContinuationToken", arguments.get("StartAfter", ""))
    keys, truncated = bucket.page(arguments.get("Prefix", ""), after, arguments.get("MaxKeys", 1000))
    found: dict[str, Any] = {"IsTruncated": truncated, "Contents": [{"Key": key, "Size": BYTES} for key in keys]}
    return found | ({"NextContinuationToken": keys[-1]} if truncated else {})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    bucket: Bucket

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        if self.bucket.failures > 0:
            self.bucket.failures -= 1
            self._send(503, _error("SlowDown", "Please reduce your request rate."))
        elif query.get("list-type") != "2" or "delimiter" in query:
            self._send(501, _error("NotImplemented", "Only ListObjectsV2 without a delimiter is here."))
        elif parts.path.strip("/") != "bucket":
            self._send(404, _error("NoSuchBucket", "The specified bucket does not exist"))
        else:
            self._send(200, self._listing(query))

    def _listing(self, query: dict[str, str]) -> str:
        prefix, limit = query.get("prefix", ""), min(1000, int(query.get("max-keys", 1000)))
        token = query.get("continuation-token")
        keys, truncated = self.bucket.page(prefix, unquote(token) if token else query.get("start-after", ""), limit)
        following = f"<NextContinuationToken>{quote(keys[-1])}</NextContinuationToken>" if truncated else ""
        return (
            '<?xml version="1.0" encoding="UTF-8"?>'
            '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>bucket</Name>'
            f"<Prefix>{quote(prefix)}</Prefix><KeyCount>{len(keys)}</KeyCount><MaxKeys>{limit}</MaxKeys>"
            f"<EncodingType>url</EncodingType><IsTruncated>{str(truncated).lower()}</IsTruncated>{following}"
            f"{''.join(map(_entry, keys))}</ListBucketResult>"
        )

    def _send(self, status: int, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def _entry(key: str) -> str:
    return (
        f"<Contents><Key>{quote(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
        f"<ETag>&quot;0123456789abcdef0123456789abcdef&quot;</ETag><Size>{BYTES}</Size>"
        "<StorageClass>STANDARD</StorageClass></Contents>"
    )


def _error(code: str, message: str) -> str:
    return f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64


def server(bucket: Bucket, port: int = 0) -> ThreadingHTTPServer:
    """A server of the bucket named "bucket"; port 0: any free one."""
    return _Server(("127.0.0.1", port), type("Handler", (_Handler,), {"bucket": bucket}))


@contextlib.contextmanager
def serving(bucket: Bucket) -> Iterator[str]:
    """The URL at which a thread of this process serves the bucket."""
    with server(bucket) as running:
        thread = Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{running.server_address[1]}"
        finally:
            running.shutdown()
            thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--latency-ms", type=float, default=0, help="added to every request")
    given = parser.parse_args()
    with server(Bucket(NumberedKeys(given.keys), latency_s=given.latency_ms / 1000), given.port) as running:
        running.serve_forever()


if __name__ == "__main__":
    main()
