"""How fast the pool is predicted, against a plain loop and the bare forward pass, all on one thread.

    python -m tests.benchmarks.bench_pseudo_masks [--images 512] [--encoder NAME …] [--rounds 3] [--json FILE]

The variants take turns, so that what else runs on the machine slows all of them; the figures are medians over the rounds.
CPU time tells what a variant costs also on a machine that is busy with other things.
"""

import argparse
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
import ray
import torch

from tests.benchmarks.measure import cpu_seconds, report, tree, write_jpegs
from threestage.allocator import disable_malloc_trim
from threestage.data.ingest import IngestSettings, ingest
from threestage.data.pool import PoolFile, data_set_files, read_pool_rows, rows_of
from threestage.data.records import decode_image, encode_mask, load_manifest
from threestage.models.export import ModelCard, save_model
from threestage.models.network import Network, build_network
from threestage.models.settings import NetworkSettings
from threestage.prediction.pool_prediction import predict_files
from threestage.prediction.pseudo_masks import PoolTask, quantise
from threestage.ray_backend.connect import quiet_ray_data
from threestage.ray_backend.predict import predict_pool
from threestage.ray_settings import ClusterSettings
from threestage.training.worker import default_device

BATCH = 8
ROWS_PER_FILE = 64
CLASSES = 11

Figures = tuple[float, float]
"""Images a second, CPU milliseconds an image."""


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
            destination=tempfile.mkdtemp(dir=self.folder), model_digest="random", num_classes=CLASSES, downscale=1,
            batch_size=BATCH, max_image_pixels=10**9, used_ids=frozenset(), excluded_ids=frozenset(),
        )  # fmt: skip

    def encoded(self) -> Iterator[bytes]:
        return (row.image for file in self.files for rows in read_pool_rows(file) for row in rows)

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Meter:
    """Wall and CPU time from its making on, the latter of this process, with the children that it has then or without."""

    def __init__(self, children: bool = False) -> None:
        self._pids = tree(os.getpid()) if children else [os.getpid()]
        self._wall, self._cpu = time.perf_counter(), cpu_seconds(self._pids)

    def per(self, images: int) -> Figures:
        """Images a second, CPU milliseconds an image."""
        wall, cpu = time.perf_counter() - self._wall, cpu_seconds(self._pids) - self._cpu
        return images / wall, 1000 * cpu / images


def make_pool(folder: Path, number: int) -> list[PoolFile]:
    source, root = folder / "source", folder / "data"
    write_jpegs(source, number)
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
def plain_loop(bench: Bench) -> dict[str, Figures]:
    """Decode a batch, predict it, encode it, in one thread; nothing is read or written."""
    images = list(bench.encoded())
    meter = Meter()
    for first in range(0, len(images), BATCH):
        batch = np.stack([decode_image(image) for image in images[first : first + BATCH]])
        pixels = torch.from_numpy(batch).to(bench.device).permute(0, 3, 1, 2)
        logits, _ = bench.network(pixels.float() / 255)
        confidence, class_ids = logits.softmax(1).max(1)
        for mask, values in zip(class_ids.to(torch.uint8).cpu(), quantise(confidence).cpu(), strict=True):
            encode_mask(mask.numpy()), values.numpy().tobytes()
    return {"plain loop": meter.per(len(images))}


@torch.inference_mode()
def bare_forward(bench: Bench) -> dict[str, Figures]:
    """The network's forward pass alone, on one batch after the other that lies on the device already."""
    images = np.stack([decode_image(image) for image in islice(bench.encoded(), 8 * BATCH)])
    batches = torch.from_numpy(images).to(bench.device).permute(0, 3, 1, 2).split(BATCH)
    number = rows_of(bench.files) // BATCH
    bench.synchronise()
    meter = Meter()
    for index in range(number):
        bench.network(batches[index % len(batches)].float() / 255)
    bench.synchronise()
    return {"bare forward": meter.per(number * BATCH)}


def in_process(bench: Bench) -> dict[str, Figures]:
    meter = Meter()
    for found in predict_files(bench.network, bench.task(), bench.files, bench.device):
        assert not found.rejects
    return {"predict_files": meter.per(rows_of(bench.files))}


def ray_job(bench: Bench) -> dict[str, Figures]:
    """A job with one predictor: from its first report to its last, when it is warm, and all of it but its CPU time."""
    cluster = ClusterSettings(predictors=1, gpus_per_worker=1 if bench.device.type == "cuda" else 0)
    whole = Meter()
    reports = predict_pool(bench.model, bench.task(), bench.files, cluster)
    first = next(reports).statistics.images
    warm, rest = Meter(children=True), 0
    for found in reports:
        rest += found.statistics.images
        figures = warm.per(rest)  # now, for the predictor ends with the last report
    assert first + rest == rows_of(bench.files)
    return {"Ray, warm": figures, "Ray, with its start": (whole.per(first + rest)[0], math.nan)}


VARIANTS: list[Callable[[Bench], dict[str, Figures]]] = [plain_loop, bare_forward, in_process, ray_job]


def measured(bench: Bench, rounds: int) -> dict[str, Figures]:
    """Medians over the rounds, of every variant."""
    found: dict[str, list[Figures]] = {}
    for turn in range(rounds):
        first = turn % len(VARIANTS)
        for variant in VARIANTS[first:] + VARIANTS[:first]:
            for name, figures in variant(bench).items():
                found.setdefault(name, []).append(figures)
    return {name: (median(rate for rate, _ in rows), median(cpu for _, cpu in rows)) for name, rows in found.items()}


def table(encoder: str, figures: dict[str, Figures]) -> list[dict[str, object]]:
    plain, forward = figures["plain loop"], figures["bare forward"]
    return [
        {
            "encoder": encoder,
            "variant": name,
            "images/s": rate,
            "of plain loop": rate / plain[0],
            "of bare forward": rate / forward[0],
            "CPU ms/image": cpu,
            "plain loop's CPU / its": plain[1] / cpu,
        }
        for name, (rate, cpu) in figures.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--encoder", nargs="+", default=["mobilenetv2_100", "test_resnet"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="write the figures here too")
    options = parser.parse_args()
    if options.images < 2 * ROWS_PER_FILE:
        parser.error(
            f"--images: at least {2 * ROWS_PER_FILE}, two files: the first starts the job, the others are measured"
        )
    disable_malloc_trim()  # in all variants
    torch.set_num_threads(1)
    quiet_ray_data()
    ray.init(address="local", num_cpus=max(2, os.cpu_count() or 1), log_to_driver=False, dashboard_host="127.0.0.1")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = make_pool(folder, options.images)
        for encoder in options.encoder:
            model, network = make_model(folder, encoder)
            device = default_device()
            bench = Bench(folder, files, model, network.to(device), device)
            rows += table(encoder, measured(bench, options.rounds))
    report(f"Pseudo-masks of {options.images} images of 480x360, {options.rounds} rounds", rows, options.json)


if __name__ == "__main__":
    main()
