"""The unlabelled stream in steady state, against a plain loop over the same shards and a DataLoader over the objects.

    python -m tests.benchmarks.bench_input [--images 1024] [--json FILE]

Everything lies on a real S3 endpoint on this machine, whose own processor time is not counted. All three decode and crop
480×360 JPEGs to the same canvas; the stream and the loop read and decode the pseudo-masks too.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.benchmarks.measure import cpu_seconds, report, tree, write_jpegs
from tests.conftest import tiny_config
from tests.s3 import s3_server, variables

BATCH = 8
CROP = 256
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1024, help="in the pool")
    parser.add_argument("--measured", type=int, default=1500, help="images of each round, after a warm-up of as many")
    parser.add_argument("--json")
    parser.add_argument("--source", choices=SOURCES, help=argparse.SUPPRESS)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.source:
        print(json.dumps(measured(SOURCES[options.source](json.loads(options.task)), options.measured)))
        return
    with s3_server() as endpoint, tempfile.TemporaryDirectory() as folder:
        os.environ |= variables(endpoint)
        kind = write_jpegs(Path(folder, "jpegs"), options.images)
        task = prepare(Path(folder, "jpegs"), "s3://bucket/data", "s3://bucket/run")
        upload(Path(folder, "jpegs"), "bucket/jpegs")
        rounds = [{name: in_a_fresh_process(name, task, options.measured) for name in SOURCES} for _ in range(ROUNDS)]
    rows: list[dict[str, Any]] = [
        {"source": name} | {key: float(np.median([r[name][key] for r in rounds])) for key in rounds[0][name]}
        for name in SOURCES
    ]
    for row in rows:
        for key, other in (("per CPU-second", "plain"), ("per CPU-second", "DataLoader"), ("per second", "DataLoader")):
            base = next(r for r in rows if r["source"] == other)
            row[f"{key} / {other}"] = row[f"images {key}"] / base[f"images {key}"]
    report(f"Input in steady state ({kind}, {options.images} images, median of {ROUNDS} rounds)", rows, options.json)


def in_a_fresh_process(source: str, task: Any, images: int) -> dict[str, float]:
    command = [sys.executable, "-m", __spec__.name, "--source", source, "--task", task.model_dump_json()]
    done = subprocess.run([*command, "--measured", str(images)], check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def prepare(jpegs: Path, root: str, out: str) -> Any:
    """A data set on S3 with pseudo-masks of a random network; returns the task of a stage 2 that never ends."""
    from threestage.data.ingest import IngestSettings, ingest
    from threestage.data.pool import data_set_files, write_pool
    from threestage.data.split import Split
    from threestage.models.network import build_network
    from threestage.models.settings import NetworkSettings
    from threestage.prediction.pool_prediction import predict_files
    from threestage.prediction.pseudo_masks import PoolTask, gather
    from threestage.run.stages import StageTask

    manifest = ingest(str(jpegs), root, IngestSettings(format="images", rows_per_file=256)).manifest
    files = data_set_files(root, manifest)
    network = build_network(NetworkSettings(encoder="test_resnet", dilations=[1, 2]), 11, "none", 0)
    task = PoolTask(
        destination=f"{out}/pseudo_masks1", model_digest="random", num_classes=11, downscale=1, batch_size=8,
        max_image_pixels=10**8, used_ids=frozenset(), excluded_ids=frozenset(),
    )  # fmt: skip
    gather(task, files, predict_files(network.eval(), task, files, torch.device("cpu")), 0.0)
    write_pool(f"{out}/pool.parquet", files, None)
    config = tiny_config(
        Path(root), stage2__unlabelled_batch=BATCH, stage2__steps=10_000, augment__crop_size=[CROP] * 2
    )
    config = config.model_copy(update={"data": config.data.model_copy(update={"root": root})})
    return StageTask(
        stage="stage2", config=config.model_dump(mode="json"), manifest_version=1, folder=f"{out}/stage2",
        split=Split(labelled=("none",), validation=("none",), validation_split="val"),
        pool=f"{out}/pool.parquet", pseudo_masks=task.destination, previous_model=None,
    )  # fmt: skip


def upload(folder: Path, prefix: str) -> None:
    from threestage.data import storage

    for path in sorted(folder.iterdir()):
        storage.write_bytes(f"s3://{prefix}/{path.name}", path.read_bytes())


def stream(task: dict[str, Any]) -> Iterator[int]:
    """One for every image that the training worker gets."""
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
    dataset = unlabelled_stream(StageTask.model_validate(task), Pointer())
    dataset.context.execution_options = stream_options(1)  # as Ray Train does
    shard = dataset.streaming_split(1, equal=True)[0]
    for batch, _ in stream_batches(shard, BATCH, (0,), 0):
        yield from [1] * len(batch.image_ids)


def plain_loop(task: dict[str, Any]) -> Iterator[int]:
    """The same shards in this process: read, decode image, pseudo-mask and confidence, crop, stack."""
    from threestage.data import storage
    from threestage.data.pool import load_pool

    rng = np.random.default_rng(0)
    waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for file in cycle(load_pool(task["pool"])):
        images = storage.read_table(file.uri, ["image"]).to_pylist()
        masks = storage.read_table(f"{task['pseudo_masks']}/{file.name}").to_pylist()
        for image_row, mask_row in zip(images, masks, strict=True):
            image = np.asarray(Image.open(io.BytesIO(image_row["image"])).convert("RGB"))
            mask = np.asarray(Image.open(io.BytesIO(mask_row["pseudo_mask"])))
            confidence = np.frombuffer(mask_row["confidence"], np.uint8).reshape(mask.shape)
            window = crop(image.shape, rng)
            waiting.append((image[window], mask[window], confidence[window]))
            if len(waiting) == BATCH:
                [torch.from_numpy(np.stack(parts)) for parts in zip(*waiting, strict=True)]
                waiting = []
            yield 1


def crop(shape: tuple[int, ...], rng: np.random.Generator) -> tuple[slice, slice]:
    """The window that the stream cuts: CROP / 0.5, or the image where that is smaller."""
    height, width = min(shape[0], 2 * CROP), min(shape[1], 2 * CROP)
    top, left = int(rng.integers(0, shape[0] - height + 1)), int(rng.integers(0, shape[1] - width + 1))
    return slice(top, top + height), slice(left, left + width)


class Objects(torch.utils.data.Dataset[torch.Tensor]):
    """One GET per image."""

    def __init__(self, prefix: str) -> None:
        from threestage.data import storage

        self.uris = storage.list_files(f"s3://{prefix}")

    def __len__(self) -> int:
        return len(self.uris)

    def __getitem__(self, index: int) -> torch.Tensor:
        from threestage.data import storage

        image = np.asarray(Image.open(io.BytesIO(storage.read_bytes(self.uris[index]))).convert("RGB"))
        return torch.from_numpy(image[crop(image.shape, np.random.default_rng(index))].copy())


def data_loader(prefix: str) -> Iterator[int]:
    loader = torch.utils.data.DataLoader(
        Objects(prefix), BATCH, shuffle=True, num_workers=2, persistent_workers=True, multiprocessing_context="spawn"
    )
    while True:
        for batch in loader:
            yield from [1] * len(batch)


SOURCES: dict[str, Callable[[Any], Iterator[int]]] = {
    "stream": stream,
    "plain": plain_loop,
    "DataLoader": lambda task: data_loader("bucket/jpegs"),
}


def measured(source: Iterator[int], images: int) -> dict[str, float]:
    """Images per second and per CPU-second of this process and of all that it has started, once warm."""
    next(islice(source, images, None))
    cpu, start = cpu_seconds(tree(os.getpid())), time.monotonic()
    next(islice(source, images - 1, None))
    seconds, cpu = time.monotonic() - start, cpu_seconds(tree(os.getpid())) - cpu
    return {"images per second": images / seconds, "images per CPU-second": images / cpu}


if __name__ == "__main__":
    main()
