"""Memory of driver and workers, and time to the first batch, against the number of images in the pool.

    python -m tests.benchmarks.bench_scale [--images 1000 10000 100000] [--json FILE]

The pool lies on a real S3 endpoint on this machine: shards of 256 images of 64×64 with pseudo-masks. Each size runs in
fresh processes, ROUNDS times; a figure is the median. (bench_listing.py does the listing of a prefix.)
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tests.benchmarks.measure import report, resident_mib, tree
from tests.conftest import tiny_config
from tests.s3 import s3_server, variables

ROWS = 256
MEASURED = 4000
ROUNDS = 3
SIDE = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--json")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        print(json.dumps(measured(json.loads(options.task))))
        return
    rows: list[dict[str, Any]] = []
    with s3_server() as endpoint:
        os.environ |= variables(endpoint)
        tasks = {images: make_pool(f"s3://bucket/{images}", images) for images in options.images}
        rounds = [{images: in_fresh_processes(task) for images, task in tasks.items()} for _ in range(ROUNDS)]
    for images in options.images:
        figures = {key: float(np.median([r[images][key] for r in rounds])) for key in rounds[0][images]}
        rows.append({"images": images, **figures})
    for row in rows:
        for key in [key for key in rows[0] if key != "images" and "/" not in key]:
            row[f"{key} / smallest"] = row[key] / rows[0][key]
    report(f"Stream against pool size (median of {ROUNDS} rounds)", rows, options.json)


def make_pool(root: str, images: int) -> Any:
    """Shards with their pseudo-masks, written straight: every image is the same picture under an id of its own."""
    from threestage.data import storage
    from threestage.data.pool import PSEUDO_MASK_SCHEMA, PoolFile, write_pool
    from threestage.data.records import encode_mask
    from threestage.data.split import Split
    from threestage.run.stages import StageTask

    jpeg, pixels = _jpeg(), np.zeros((SIDE, SIDE), np.uint8)
    files, index = [], []
    for start in range(0, images, ROWS):
        count = min(ROWS, images - start)
        ids = [f"{start + i:09d}" for i in range(count)]
        name = f"train-{start:09d}.parquet"
        table = {"image_id": ids, "source": ids, "image": [jpeg] * count}
        storage.write_table(f"{root}/images/{name}", pa.table(table))
        masks = [ids, [encode_mask(pixels)] * count, [pixels.tobytes()] * count]
        storage.write_table(f"{root}/pseudo_masks1/{name}", pa.table(masks, PSEUDO_MASK_SCHEMA))
        files.append(PoolFile(uri=f"{root}/images/{name}", rows=count, digest=name))
        index.append({"file": name, "images": count, "max_height": SIDE, "max_width": SIDE, "labelled_ids": []})
    write_pool(f"{root}/pool.parquet", files, None)
    storage.write_table(f"{root}/pseudo_masks1/index.parquet", pa.Table.from_pylist(index))
    config = tiny_config(Path("/"), stage2__unlabelled_batch=8, stage2__steps=100_000)
    return StageTask(
        stage="stage2", config=config.model_dump(mode="json"), manifest_version=1, folder=f"{root}/stage2",
        split=Split(labelled=("none",), validation=("none",), validation_split="val"),
        pool=f"{root}/pool.parquet", pseudo_masks=f"{root}/pseudo_masks1", previous_model=None,
    )  # fmt: skip


def _jpeg() -> bytes:
    from tests.benchmarks.measure import write_jpegs

    with tempfile.TemporaryDirectory() as folder:
        from io import BytesIO

        from PIL import Image

        write_jpegs(Path(folder), 1)
        stream = BytesIO()
        Image.open(next(Path(folder).iterdir())).resize((SIDE, SIDE)).save(stream, "JPEG", quality=90)
        return stream.getvalue()


def in_fresh_processes(task: Any) -> dict[str, float]:
    command = [sys.executable, "-m", __spec__.name, "--task", task.model_dump_json()]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measured(task: dict[str, Any]) -> dict[str, float]:
    """Seconds to the first batch once Ray is up, and peak memory (MiB) while MEASURED images stream."""
    import logging

    import ray

    from threestage.ray_backend.connect import quiet_ray_data
    from threestage.ray_backend.pool_stream import stream_batches, stream_options, unlabelled_stream
    from threestage.run.stages import StageTask
    from threestage.training.checkpoint import Pointer

    ray.init(
        "local", num_cpus=os.cpu_count(), dashboard_host="127.0.0.1", log_to_driver=False, logging_level=logging.ERROR
    )
    quiet_ray_data()
    with Peaks() as peaks:
        start = time.monotonic()
        dataset = unlabelled_stream(StageTask.model_validate(task), Pointer())
        dataset.context.execution_options = stream_options(1)  # as Ray Train does
        shard = dataset.streaming_split(1, equal=True)[0]
        batches = stream_batches(shard, 8, (0,), 0)
        next(batches)
        first = time.monotonic() - start
        next(islice(batches, MEASURED // 8, None))
    workers = [peak for name, peak in peaks.by_process.items() if name[1].startswith("ray::")]
    driver = peaks.by_process[os.getpid(), "driver"]
    return {
        "first batch s": first,
        "driver MiB": driver,
        "largest worker MiB": max(workers),
        "workers MiB": sum(workers),
    }


class Peaks:
    """The most resident memory of every process below this one, looked at five times a second."""

    def __init__(self) -> None:
        self.by_process: dict[tuple[int, str], float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Peaks":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.2):
            for pid in tree(os.getpid()):
                try:
                    command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
                except OSError:
                    continue
                key = (pid, "driver" if pid == os.getpid() else _kind(command))
                self.by_process[key] = max(self.by_process.get(key, 0.0), resident_mib(pid))


def _kind(command: str) -> str:
    return "ray::worker" if command.startswith("ray::") else "other"


if __name__ == "__main__":
    main()
