"""What clients meet while a server swaps its model and a replica is killed: failed requests, and how long the others took.

    python -m tests.benchmarks.bench_serve [--seconds 600] [--clients 8] [--replicas 2 | --local] [--json FILE]

`threestage serve` on this machine, with a small random network and a registry in SQLite. Each client sends its next image
when it has the answer to the last one. After a third of the time another version becomes the champion. After two thirds a
replica gets SIGKILL (with --local there is none).
"""

import argparse
import http.client
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from tests.images import encoded
from tests.servers.test_serve import register, server
from threestage.mlflow_sync.client import open_registry
from threestage.mlflow_sync.records import RegistrySettings

REPLICA = b"ray::ServeReplica"
TOKEN = "of-the-benchmark"


class Request(NamedTuple):
    """`status`: of HTTP; 0 where no answer came."""

    began: float
    seconds: float
    status: int
    version: str


def ask_until(end: float, host: str, image: bytes, found: list[Request]) -> None:
    """One client: its requests, one after the other, on one connection."""
    headers = {"Authorization": f"Bearer {TOKEN}", "Accept": "image/png"}
    connection = http.client.HTTPConnection(host, timeout=120)
    while (began := time.monotonic()) < end:
        status, version = 0, ""
        try:
            connection.request("POST", "/predict", image, headers)
            reply = connection.getresponse()
            reply.read()
            status, version = reply.status, reply.headers.get("X-Threestage-Model", "")
        except (OSError, http.client.HTTPException):
            connection.close()
        found.append(Request(began, time.monotonic() - began, status, version))


def kill_a_replica() -> None:
    """SIGKILL to one of the processes that Ray Serve has named so."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_bytes().startswith(REPLICA):
                os.kill(int(folder.name), signal.SIGKILL)
                return
        except OSError:  # it ended meanwhile
            continue
    raise RuntimeError("no replica runs")


def summary(found: list[Request], events: dict[str, float]) -> dict[str, object]:
    """Counts, and seconds at the 50th and 99th percentile: of all, and of those that began within 20 s of each event."""

    def percentiles(chosen: list[Request]) -> dict[str, float]:
        seconds = [request.seconds for request in chosen] or [float("nan")]
        return {f"p{share}": round(float(np.percentile(seconds, share)), 3) for share in (50, 99, 100)}

    near = {
        name: percentiles([request for request in found if at <= request.began < at + 20])
        for name, at in events.items()
    }
    return {
        "requests": len(found),
        "failed": sum(request.status != 200 for request in found),
        "statuses": dict(Counter(request.status for request in found)),
        "versions": dict(Counter(request.version for request in found)),
        "all": percentiles(found),
        **near,
    }


def measured(host: str, arguments: argparse.Namespace, swap: Callable[[], object]) -> dict[str, object]:
    random = np.random.default_rng(0).integers(0, 255, (arguments.side, arguments.side, 3), np.uint8)
    image, found, events = encoded(Image.fromarray(random), "JPEG"), list[Request](), dict[str, float]()
    start = time.monotonic()
    end = start + arguments.seconds
    clients = [
        threading.Thread(target=ask_until, args=(end, host, image, found), daemon=True)
        for _ in range(arguments.clients)
    ]
    for client in clients:
        client.start()
    actions: list[tuple[str, Callable[[], object]]] = [("swap", swap)]
    actions += [] if arguments.local else [("kill", kill_a_replica)]
    for number, (name, action) in enumerate(actions, 1):
        time.sleep(max(0, start + number * arguments.seconds / 3 - time.monotonic()))
        events[name] = time.monotonic()
        action()
    for client in clients:
        client.join()
    return summary(found, events)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--side", type=int, default=256, help="of the images, in pixels")
    parser.add_argument("--local", action="store_true")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    store = f"sqlite:///{folder}/mlflow.db"
    registry = open_registry(RegistrySettings(tracking_uri=store))
    for seed, stage in ((2, "stage2"), (1, "stage3")):  # the first scores higher, and is the champion
        register(registry, folder / str(seed), seed, stage)
    where = ["--local"] if arguments.local else ["--replicas", str(arguments.replicas)]
    command = [sys.executable, "-m", "threestage", "serve", "shapes@champion", "--port", "0", "--tracking-uri", store]
    with server([*command, *where], folder / "log", THREESTAGE_SERVE_TOKEN=TOKEN) as (url, process):
        host = url.removeprefix("http://")
        result = measured(host, arguments, lambda: registry.models.promote("models:/shapes/2"))
        process.send_signal(signal.SIGTERM)
        result["exit_code"] = process.wait(120)
    print((folder / "log").read_text()[-2000:], file=sys.stderr)
    shutil.rmtree(folder)
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.json:
        Path(arguments.json).write_text(text)


if __name__ == "__main__":
    main()
