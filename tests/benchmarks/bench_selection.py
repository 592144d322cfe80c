"""How long `threestage next` takes to choose out of N images whose features are there, and in how much memory.

`python -m tests.benchmarks.bench_selection [--images 10000 100000 1000000] [--count 20]`: synthetic features of 19 classes,
256 rows a file, 40 of the images labelled; each N and strategy in a fresh process. MiB: of the peak above the start.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa

from threestage.data import storage
from threestage.prediction.pool_features import FEATURE_SIZE, feature_schema
from threestage.selection.candidates import CandidateFiles
from threestage.selection.choice import STRATEGIES, StrategyName, choose_images, survey

ROWS, CLASSES, LABELLED = 256, 19, 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "STRATEGY"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(_choose(given.one[0], given.one[1], given.count)))
        return
    print("| images | strategy | seconds | MiB above the start |\n|---|---|---|---|")
    for images in given.images:
        with tempfile.TemporaryDirectory() as folder:
            _write(folder, images)
            for strategy in get_args(StrategyName):
                command = [sys.executable, "-m", __spec__.name, "--count", str(given.count), "--one", folder, strategy]
                found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                print(f"| {images:,} | {strategy} | {found['seconds']:.1f} | {found['mib']:.0f} |", flush=True)


def _write(folder: str, images: int) -> None:
    """Clusters of frames around 500 places."""
    random = np.random.default_rng(0)
    places = random.standard_normal((500, FEATURE_SIZE))
    for start in range(0, images, ROWS):
        rows = min(ROWS, images - start)
        features = places[random.integers(0, 500, rows)] + 0.2 * random.standard_normal((rows, FEATURE_SIZE))
        features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float16)
        shares = random.dirichlet(np.full(CLASSES, 0.3), rows).astype(np.float32)
        ids = [f"image{number:09d}" for number in range(start, start + rows)]
        columns = [ids, [f"s3://bucket/pool/{name}.jpg" for name in ids], [row.tobytes() for row in shares],
                   *random.random((2, rows)).astype(np.float32), [row.tobytes() for row in features]]  # fmt: skip
        table = pa.Table.from_arrays([pa.array(c, f.type) for c, f in zip(columns, feature_schema(CLASSES), strict=True)],
                                     schema=feature_schema(CLASSES))  # fmt: skip
        storage.write_table(f"{folder}/{start:09d}.parquet", table)


def _choose(folder: str, strategy: StrategyName, count: int) -> dict[str, float]:
    covered = pa.array([f"image{number:09d}" for number in range(LABELLED)])
    files = CandidateFiles(sorted(str(path) for path in Path(folder).iterdir()), covered, 0)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    chosen = choose_images(files, survey(files), STRATEGIES[strategy], count)
    assert len(chosen) == count
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}


if __name__ == "__main__":
    main()
