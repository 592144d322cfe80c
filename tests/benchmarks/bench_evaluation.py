"""Evaluation while training against a plain loop: decode, forward, class, confusion matrix, one after the other.

    python -m tests.benchmarks.bench_evaluation [--images 64] [--encoder NAME …] [--rounds 5] [--json FILE]

CamVid's images where they lie beside the project, else synthetic scenes, at half their size; in turns within one run. On a CPU
one torch thread and CPU seconds of the process.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.benchmarks.bench_step import make_data
from tests.benchmarks.measure import report
from tests.benchmarks.on_device import clock
from threestage.allocator import disable_malloc_trim
from threestage.data.batches import SampleSet
from threestage.data.records import labelled_rows, load_manifest
from threestage.data.samples import Sample, TableSamples, decode_sample
from threestage.evaluation import BATCH, evaluate
from threestage.models.network import Network, build_network
from threestage.models.settings import NetworkSettings
from threestage.training.metrics import confusion_matrix
from threestage.training.worker import default_device

DOWNSCALE = 2


@torch.inference_mode()
def plain_loop(network: Network, samples: list[Sample], classes: int, device: torch.device) -> Tensor:
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    for start in range(0, len(samples), BATCH):
        decoded = [decode_sample(sample, DOWNSCALE) for sample in samples[start : start + BATCH]]
        pixels = torch.from_numpy(np.stack([one.image for one in decoded])).to(device).permute(0, 3, 1, 2)
        class_ids = network(pixels.float() / 255)[0].argmax(dim=1).cpu()
        masks = torch.from_numpy(np.stack([one.maps["mask"] for one in decoded]))
        confusion += confusion_matrix(masks, class_ids, classes)
    return confusion


def measure(encoder: str, samples: list[Sample], classes: int, rounds: int) -> dict[str, Any]:
    device = default_device()
    settings = NetworkSettings(encoder=encoder, output_stride=16, batch_norm="live")
    network = build_network(settings, classes).to(device).eval()
    ways: dict[str, Callable[[], Tensor]] = {
        "evaluate": lambda: evaluate(network, SampleSet(samples, DOWNSCALE), classes, device).confusion,
        "plain loop": lambda: plain_loop(network, samples, classes, device),
    }
    now, seconds, found = clock(device), {name: list[float]() for name in ways}, {}
    for _ in range(rounds):
        for name, act in ways.items():
            began = now()
            found[name] = act()
            seconds[name].append(now() - began)
    assert torch.equal(found["evaluate"], found["plain loop"])
    rates = {name: len(samples) / median(taken) for name, taken in seconds.items()}
    ratio = median(p / e for e, p in zip(seconds["evaluate"], seconds["plain loop"], strict=True))
    return {
        "network": encoder,
        **{f"{name}, images/s": rate for name, rate in rates.items()},
        "of the plain loop": ratio,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--encoder", nargs="+", default=["mobilenetv2_100", "test_resnet"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    disable_malloc_trim()
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(Path(folder))
        manifest = load_manifest(data)
        samples = TableSamples(labelled_rows(data, manifest, "train"))[: options.images]
        rows = [measure(encoder, samples, len(manifest.classes), options.rounds) for encoder in options.encoder]
    report(f"evaluation of {len(samples)} images", rows, options.json)


if __name__ == "__main__":
    main()
