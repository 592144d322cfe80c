"""How fast a prefix of N keys is listed, and in how much memory, beside a plain loop over its pages.

`python -m tests.benchmarks.bench_listing [--keys 1000 10000 100000 1000000] [--latency-ms 0] [--json FILE]`: for each N
a stand-in for the bucket runs in its own process, and each listing in a fresh one. Peak RSS is that of the listing
process. `× loop`: keys per second against the plain loop. `× smallest`: peak RSS against that at the smallest N.
"""

import argparse
import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.s3 import free_port, variables

MIB_KIB = 1024


def main() -> None:
    given = _arguments()
    if given.one:
        print(json.dumps(_one(given.one, given.rows_per_file)))
        return
    rows = [_measure(keys, given) for keys in given.keys]
    for row in rows:
        row["rss_to_smallest"] = row["rss_mib"] / rows[0]["rss_mib"]
    _print(rows)
    if given.json:
        Path(given.json).write_text(json.dumps({"latency_ms": given.latency_ms, "rows": rows}, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--rows-per-file", type=int, default=256)
    parser.add_argument("--latency-ms", type=float, default=0, help="added to each request by the stand-in")
    parser.add_argument("--json", help="file for the numbers")
    parser.add_argument("--one", choices=["listing", "loop"], help=argparse.SUPPRESS)
    return parser.parse_args()


def _measure(keys: int, given: argparse.Namespace) -> dict[str, Any]:
    with _stand_in(keys, given.latency_ms) as endpoint:
        listing, loop = (_in_a_fresh_process(which, endpoint, given.rows_per_file) for which in ("listing", "loop"))
    assert listing["rows"] == loop["rows"] == keys, (listing, loop)
    return {
        "keys": keys,
        "seconds": listing["seconds"],
        "keys_per_s": keys / listing["seconds"],
        "rss_mib": listing["rss_mib"],
        "files": listing["files"],
        "loop_seconds": loop["seconds"],
        "loop_rss_mib": loop["rss_mib"],
        "to_loop": loop["seconds"] / listing["seconds"],
    }


@contextlib.contextmanager
def _stand_in(keys: int, latency_ms: float) -> Iterator[str]:
    port = free_port()
    options = {"keys": keys, "port": port, "latency-ms": latency_ms}
    command = [sys.executable, "-m", "tests.list_objects", *(f"--{name}={value}" for name, value in options.items())]
    server = subprocess.Popen(command)
    try:
        _wait(port)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def _wait(port: int) -> None:
    for _ in range(200):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.05)
    raise TimeoutError(f"port {port}: the stand-in did not start within 10 s")


def _in_a_fresh_process(which: str, endpoint: str, rows_per_file: int) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.bench_listing",
        f"--one={which}",
        f"--rows-per-file={rows_per_file}",
    ]
    done = subprocess.run(command, env=os.environ | variables(endpoint), stdout=subprocess.PIPE, check=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _one(which: str, rows_per_file: int) -> dict[str, Any]:
    """Imports are not timed; the parent imports none of this, since a child's peak starts at its parent's size."""
    from threestage.data import listing

    started = time.perf_counter()
    if which == "loop":
        counts = {"rows": sum(len(page) for page in listing._s3_pages("bucket", "pool/", None, listing.PAGE))}
    else:
        with tempfile.TemporaryDirectory() as folder:
            files = listing.list_images("s3://bucket/pool", folder, rows_per_file)
        counts = {"rows": sum(file.rows for file in files), "files": len(files)}
    seconds = time.perf_counter() - started
    return {**counts, "seconds": seconds, "rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB_KIB}


def _print(rows: list[dict[str, Any]]) -> None:
    print("| keys | seconds | keys/s | shards | peak RSS, MiB | × smallest | loop, s | loop RSS, MiB | × loop |")
    print("|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for row in rows:
        print(
            f"| {row['keys']:,} | {row['seconds']:.1f} | {row['keys_per_s']:,.0f} | {row['files']:,} "
            f"| {row['rss_mib']:.0f} | {row['rss_to_smallest']:.2f} | {row['loop_seconds']:.1f} "
            f"| {row['loop_rss_mib']:.0f} | {row['to_loop']:.2f} |"
        )


if __name__ == "__main__":
    main()
