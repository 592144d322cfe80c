"""An ingest in threads and as Ray tasks, against a plain loop that reads, checks, collects and writes Parquet.

    python -m tests.benchmarks.bench_ingest [--images 1000] [--json FILE]

Half of the images are JPEGs of 480×360, half the same as PNGs; source and data set lie on the local disk. Ray has 2 CPUs
and is started before; its figures hold what every Ray Data job costs at its start.
"""

import argparse
import io
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.benchmarks.measure import cpu_seconds, report, tree, write_jpegs
from threestage.data.image_validation import check_image
from threestage.data.ingest import IngestSettings, ingest

ROWS_PER_FILE = 128
ROUNDS = 3
SETTINGS = IngestSettings(format="images", rows_per_file=ROWS_PER_FILE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--json")
    options = parser.parse_args()
    import ray

    from threestage.ray_backend.connect import quiet_ray_data

    ray.init("local", num_cpus=2, dashboard_host="127.0.0.1", log_to_driver=False, logging_level=logging.ERROR)
    quiet_ray_data()
    with tempfile.TemporaryDirectory() as folder:
        source, root = Path(folder, "source"), Path(folder, "ds")
        kind = write_images(source, options.images)
        in_ray_tasks(source, root)  # its worker processes are warm then
        rounds = [{name: measured(way, source, root) for name, way in WAYS.items()} for _ in range(ROUNDS)]
    ray.shutdown()
    rows: list[dict[str, object]] = []
    for name in WAYS:
        per_second, per_cpu = (
            options.images / float(np.median([round_[name][i] for round_ in rounds])) for i in range(2)
        )
        ratio = float(np.median([round_["plain loop"][0] / round_[name][0] for round_ in rounds]))
        rows.append({"way": name, "images/s": per_second, "images/CPU-s": per_cpu, "images/s / plain": ratio})
    report(f"Ingest of {options.images} images ({kind}, median of {ROUNDS} rounds)", rows, options.json)


def write_images(folder: Path, count: int) -> str:
    kind = write_jpegs(folder, count)
    for path in sorted(folder.iterdir())[::2]:
        Image.open(path).save(path.with_suffix(".png"))
        path.unlink()
    return kind


def measured(way: Callable[[Path, Path], None], source: Path, root: Path) -> tuple[float, float]:
    """Seconds, and CPU seconds of this process and of those that it has started."""
    shutil.rmtree(root, ignore_errors=True)
    cpu, start = cpu_seconds(tree(os.getpid())), time.monotonic()
    way(source, root)
    return time.monotonic() - start, cpu_seconds(tree(os.getpid())) - cpu


def plain_loop(source: Path, root: Path) -> None:
    root.mkdir()
    rows: list[dict[str, object]] = []
    for path in sorted(source.iterdir()):
        image = check_image(path.read_bytes())
        rows.append({"image_id": path.stem, "image": image.data, "height": image.height, "width": image.width})
        if len(rows) == ROWS_PER_FILE:
            write(rows, root / f"{path.stem}.parquet")
            rows = []
    write(rows, root / "last.parquet")


def write(rows: list[dict[str, object]], path: Path) -> None:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, compression="zstd")
    path.write_bytes(sink.getvalue())


def in_this_process(source: Path, root: Path) -> None:
    ingest(str(source), str(root), SETTINGS)


def in_ray_tasks(source: Path, root: Path) -> None:
    from threestage.ray_backend.tasks import ingest_on_ray
    from threestage.ray_settings import ClusterSettings

    ingest_on_ray(str(source), str(root), SETTINGS, ClusterSettings())


WAYS: dict[str, Callable[[Path, Path], None]] = {
    "plain loop": plain_loop,
    "threads": in_this_process,
    "Ray, 2 tasks": in_ray_tasks,
}


if __name__ == "__main__":
    main()
