"""Labels that came later lie anywhere in the pool: what their pseudo-masks cost before a stage's first step.

    python -m tests.benchmarks.bench_scattered_labels [--labels 200] [--latency-ms 30] [--workers 4] [--json FILE]

A stand-in for S3 on this machine answers each request after a latency. Each label lies in a file of its own, of 256 rows of
67 KB that do not compress. Then the labelled images of a node: memory of each worker, alone and together.
"""

import argparse
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.benchmarks.measure import report
from tests.s3 import variables

ROWS, ROW_BYTES = 256, 67_000
IMAGES, IMAGE_BYTES = 1000, 250_000
LABEL = "000000128"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--labels", type=int, default=200)
    parser.add_argument("--latency-ms", type=float, default=30)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--json")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--hold", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.labels, options.latency_ms / 1000)
    elif options.hold:
        hold(options.workers, options.hold == "together")
    else:
        rows = read(options.labels, options.latency_ms)
        report(f"{options.labels} labels in as many files, {options.latency_ms:g} ms a request", rows, options.json)
        report(f"{IMAGES} images of {IMAGE_BYTES // 1000} KB in {options.workers} workers", held(options.workers), None)


# ---- Requests


def read(labels: int, latency_ms: float) -> list[dict[str, Any]]:
    """With one request at a time, as before, and with today's."""
    from threestage.data import datasets

    rows = []
    with stand_in(labels, latency_ms) as (endpoint, counted):
        os.environ |= variables(endpoint)
        for threads in (1, datasets.LABEL_THREADS):
            datasets.LABEL_THREADS = threads
            before, began = counted(), time.monotonic()
            datasets._pseudo_mask_rows("s3://bucket/masks")
            seconds = time.monotonic() - began
            rows.append({
                "at a time": threads, "s": seconds, "ms a label": 1000 * seconds / labels,
                "requests a label": (counted() - before) / labels, "min for 10,000": 10_000 * seconds / labels / 60,
            })  # fmt: skip
    return rows


@contextlib.contextmanager
def stand_in(labels: int, latency_ms: float) -> Iterator[tuple[str, Any]]:
    """Its URL, and how many requests it has had."""
    import urllib.request

    command = [sys.executable, "-m", __spec__.name, "--serve", f"--labels={labels}", f"--latency-ms={latency_ms}"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        endpoint = server.stdout.readline().strip()
        yield endpoint, lambda: int(urllib.request.urlopen(f"{endpoint}/count").read())
    finally:
        server.terminate()
        server.wait()


def serve(labels: int, latency_s: float) -> None:
    from threestage.data.pool import INDEX_SCHEMA, PSEUDO_MASK_SCHEMA

    draws = np.random.default_rng(0)
    columns = [
        [f"{row:09d}" for row in range(ROWS)], [b"mask"] * ROWS, [draws.bytes(ROW_BYTES) for _ in range(ROWS)]
    ]  # fmt: skip
    index = [
        {
            "file": f"{label}.parquet",
            "images": ROWS,
            "max_height": 9,
            "max_width": 9,
            "labelled_ids": [LABEL],
            "agreement": [],
        }
        for label in range(labels)
    ]
    masks = parquet_bytes(pa.table(columns, PSEUDO_MASK_SCHEMA))
    contents = {"index.parquet": parquet_bytes(pa.Table.from_pylist(index, INDEX_SCHEMA))}
    requests: list[None] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path == "/count":
                self.answer(200, str(len(requests)).encode())
                return
            requests.append(None)
            time.sleep(latency_s)
            whole = memoryview(contents.get(self.path.rsplit("/", 1)[-1], masks))
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
            if wanted is None:
                self.answer(200, whole)
            else:
                first, last = int(wanted[1]), min(int(wanted[2]), len(whole) - 1)
                self.answer(206, whole[first : last + 1], f"bytes {first}-{last}/{len(whole)}")

        do_HEAD = do_GET

        def answer(self, status: int, body: bytes | memoryview, content_range: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Last-Modified", "Tue, 01 Dec 2026 00:00:00 GMT")
            self.send_header("ETag", '"1"')
            if content_range:
                self.send_header("Content-Range", content_range)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()


def parquet_bytes(table: pa.Table) -> bytes:
    from threestage.data.storage import ROW_GROUP_ROWS

    stream = io.BytesIO()
    pq.write_table(table, stream, compression="zstd", use_dictionary=False, row_group_size=ROW_GROUP_ROWS)
    return stream.getvalue()


# ---- Memory


def held(workers: int) -> list[dict[str, Any]]:
    rows = []
    for way in ("alone", "together"):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", __spec__.name, f"--hold={way}", f"--workers={workers}"]
            environment = os.environ | {"TMPDIR": folder}
            processes = [
                subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(workers)
            ]
            grown = [json.loads(process.communicate()[0]) for process in processes]
        rows.append({"way": way, "MiB a worker": sum(grown) / workers, "MiB of all": sum(grown)})
    return rows


def hold(workers: int, together: bool) -> None:
    """Print how much memory of its own the labelled images of a worker take."""
    from threestage.data.node_tables import node_table
    from threestage.data.samples import TableSamples

    def make() -> pa.Table:
        image = os.urandom(IMAGE_BYTES)
        return pa.table({"image_id": list(map(str, range(IMAGES))), "image": [image] * IMAGES})

    before = own_mib()
    samples = TableSamples(node_table("bench", workers, make, print) if together else make())
    pa.default_memory_pool().release_unused()
    assert sum(len(sample.image) for sample in samples) == IMAGES * IMAGE_BYTES
    print(own_mib() - before)


def own_mib() -> float:
    found = re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) / 1024 if found else 0.0


if __name__ == "__main__":
    main()
