"""How fast the pool is predicted, against a plain loop and the bare forward pass, all on one thread.

    python -m tests.benchmarks.bench_pseudo_masks [--images 512] [--encoder NAME …] [--rounds 3] [--json FILE]

The variants take turns, so that what else runs on the machine slows all of them; the figures are medians over the rounds.
Images are CamVid's (480x360 JPEG) where ../shared/data/camvid is there, else noise of that size.
"""

import argparse
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import ray
import torch
from PIL import Image

from threestage.data.ingest import IngestSettings, ingest
from threestage.data.pool import PoolFile, data_set_files, read_rows, rows_of
from threestage.data.records import decode_image, encode_mask, load_manifest
from threestage.models.export import ModelCard, save_model
from threestage.models.network import Network, NetworkSettings, build_network
from threestage.on_ray.predict import predict_pool
from threestage.on_ray.settings import ClusterSettings
from threestage.on_ray.train import quiet_ray_data
from threestage.pool_prediction import predict_files
from threestage.pseudo_masks import PoolTask, quantise
from threestage.training.worker import default_device

CAMVID = Path(__file__).parents[3] / "shared" / "data" / "camvid"
BATCH = 8
ROWS_PER_FILE = 64
CLASSES = 11
SIZE = (360, 480)


@dataclass(frozen=True)
class Bench:
    """What every variant works on. `folder`: for what they write."""

    folder: Path
    files: list[PoolFile]
    model: str
    network: Network
    device: torch.device

    def task(self) -> PoolTask:
        """One that writes into a new folder."""
        return PoolTask(
            destination=tempfile.mkdtemp(dir=self.folder), model_digest="random", num_classes=CLASSES, downscale=1, batch_size=BATCH,
            max_image_pixels=10**9, used_ids=frozenset(), excluded_ids=frozenset(),
        )  # fmt: skip

    def encoded(self) -> Iterator[bytes]:
        return (row.image for file in self.files for rows in read_rows(file) for row in rows)

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def jpegs(number: int) -> Iterator[bytes]:
    """So many images of SIZE; CamVid's are repeated where they do not suffice."""
    found = sorted(CAMVID.glob("*/images/*.jpg"))
    rng = np.random.default_rng(0)
    for index in range(number):
        if found:
            yield found[index % len(found)].read_bytes()
            continue
        stream = io.BytesIO()
        coarse = Image.fromarray(rng.integers(0, 256, (45, 60, 3), dtype=np.uint8))
        coarse.resize(SIZE[::-1], Image.Resampling.BICUBIC).save(stream, "JPEG", quality=95)
        yield stream.getvalue()


def make_pool(folder: Path, number: int) -> list[PoolFile]:
    source, root = folder / "source", folder / "data"
    source.mkdir()
    for index, image in enumerate(jpegs(number)):
        (source / f"{index:06d}.jpg").write_bytes(image)
    ingest(str(source), str(root), IngestSettings(format="images", rows_per_file=ROWS_PER_FILE))
    return data_set_files(str(root), load_manifest(str(root)))


def make_model(folder: Path, encoder: str) -> tuple[str, Network]:
    """A network of random weights whose logits are spread as a trained one's are, saved as a model folder."""
    settings = NetworkSettings(encoder=encoder, output_stride=16, batch_norm="live")
    network = build_network(settings, CLASSES)
    names = tuple(f"class {i}" for i in range(CLASSES))
    card = ModelCard(network=settings, classes=names, colours=((0, 0, 0),) * CLASSES, downscale=1, stage="stage1")
    uri = str(folder / f"model-{encoder}")
    save_model(uri, network, card)
    return uri, network.eval()


@torch.inference_mode()
def plain_loop(bench: Bench) -> dict[str, float]:
    """Decode a batch, predict it, encode it, in one thread; nothing is read or written."""
    images = list(bench.encoded())
    start = time.perf_counter()
    for first in range(0, len(images), BATCH):
        batch = np.stack([decode_image(image) for image in images[first : first + BATCH]])
        pixels = torch.from_numpy(batch).to(bench.device).permute(0, 3, 1, 2)
        logits, _ = bench.network(pixels.float() / 255)
        confidence, class_ids = logits.softmax(1).max(1)
        for mask, values in zip(class_ids.to(torch.uint8).cpu(), quantise(confidence).cpu(), strict=True):
            encode_mask(mask.numpy()), values.numpy().tobytes()
    return {"plain loop": len(images) / (time.perf_counter() - start)}


@torch.inference_mode()
def bare_forward(bench: Bench) -> dict[str, float]:
    """The network's forward pass alone, on one batch after the other that lies on the device already."""
    images = np.stack([decode_image(image) for image in islice(bench.encoded(), 8 * BATCH)])
    batches = torch.from_numpy(images).to(bench.device).permute(0, 3, 1, 2).split(BATCH)
    number = rows_of(bench.files) // BATCH
    bench.synchronise()
    start = time.perf_counter()
    for index in range(number):
        bench.network(batches[index % len(batches)].float() / 255)
    bench.synchronise()
    return {"bare forward": number * BATCH / (time.perf_counter() - start)}


def in_process(bench: Bench) -> dict[str, float]:
    start = time.perf_counter()
    for report in predict_files(bench.network, bench.task(), bench.files, bench.device):
        assert not report.rejects
    return {"predict_files": rows_of(bench.files) / (time.perf_counter() - start)}


def ray_job(bench: Bench) -> dict[str, float]:
    """A job with one predictor: all of it, and from its first report to its last, when it is warm."""
    cluster = ClusterSettings(predictors=1, gpus_per_worker=1 if bench.device.type == "cuda" else 0)
    start = time.perf_counter()
    times, images = [], []
    for report in predict_pool(bench.model, bench.task(), bench.files, cluster):
        times.append(time.perf_counter())
        images.append(report.statistics.images)
    assert sum(images) == rows_of(bench.files)
    return {
        "Ray, warm": sum(images[1:]) / (times[-1] - times[0]),
        "Ray, with its start": sum(images) / (times[-1] - start),
    }


def measure(bench: Bench, rounds: int) -> dict[str, float]:
    """Images per second of every variant."""
    variants: Sequence[Callable[[Bench], dict[str, float]]] = (plain_loop, bare_forward, in_process, ray_job)
    found: dict[str, list[float]] = {}
    for turn in range(rounds):
        for variant in variants[turn % len(variants) :] + variants[: turn % len(variants)]:
            for name, rate in variant(bench).items():
                found.setdefault(name, []).append(rate)
    return {name: statistics.median(rates) for name, rates in found.items()}


def show(encoder: str, rates: dict[str, float]) -> None:
    print(f"\n{encoder}\n{'':22s}{'images/s':>10s}{'of plain loop':>15s}{'of forward':>12s}")
    for name, rate in sorted(rates.items(), key=lambda item: -item[1]):
        print(
            f"{name:22s}{rate:10.1f}{rate / rates['plain loop']:15.2f}{rate / rates['bare forward']:12.2f}", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--encoder", nargs="+", default=["mobilenetv2_100", "test_resnet"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet_ray_data()
    ray.init(address="local", num_cpus=max(2, os.cpu_count() or 1), log_to_driver=False, dashboard_host="127.0.0.1")
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = make_pool(folder, options.images)
        for encoder in options.encoder:
            model, network = make_model(folder, encoder)
            device = default_device()
            bench = Bench(folder, files, model, network.to(device), device)
            results[encoder] = measure(bench, options.rounds)
            show(encoder, results[encoder])
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
