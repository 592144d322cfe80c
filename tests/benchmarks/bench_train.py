"""What Ray Train costs: one worker of it against the same loop with `--local`, and how long a stage takes to start.

    python -m tests.benchmarks.bench_train [--steps 300] [--rounds 3] [--json FILE]

Scenes of 128×128, ResNet-18, a batch of 4 labelled (and 4 unlabelled) images, one torch thread. Both train stages 1 and 2
of one run; they take turns. Figures are medians: images a second over rows of 20 steps after the first two, seconds from the
call to the first step and from the last step to the return.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tests.benchmarks.measure import inside_cluster, report
from tests.conftest import tiny_config
from tests.runs import run_trained_by
from threestage.allocator import disable_malloc_trim
from threestage.config import Config
from threestage.data.ingest import IngestSettings, ingest
from threestage.data.synthetic import SceneSettings, write_scenes
from threestage.ray_backend.connect import quiet_ray_data
from threestage.ray_backend.train import train_on_ray
from threestage.run.stages import StageTask, local_unlabelled, train_stage
from threestage.training.worker import LocalWorker

ROW = 20  # steps


class Watch:
    """When rows of a stage came."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.rows: list[Mapping[str, float]] = []
        self.times: list[float] = []

    def show(self, row: Mapping[str, float]) -> None:
        self.rows.append(row)
        self.times.append(time.monotonic() - self.start)

    def figures(self) -> dict[str, float]:
        end = time.monotonic() - self.start
        steady = [row["images_per_second"] for row in self.rows[2:]]
        first = self.times[0] - self.rows[0]["step_seconds"] * ROW
        return {"images/s": median(steady), "start, s": first, "end, s": end - self.times[-1]}


def measured(config: Config, out: str, run: Callable[[StageTask, Watch], None]) -> dict[str, dict[str, float]]:
    """The figures of each stage."""
    found: dict[str, dict[str, float]] = {}

    def run_stage(task: StageTask) -> None:
        watch = Watch()
        run(task, watch)
        found[task.stage] = watch.figures()

    run_trained_by(run_stage, config, out)
    return found


def locally(task: StageTask, watch: Watch) -> None:
    train_stage(task, LocalWorker(task.folder, 2, local_unlabelled(task), watch.show))


def on_ray(task: StageTask, watch: Watch) -> None:
    train_on_ray(task, lambda stage, row: watch.show(row), print)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json")
    options = parser.parse_args()
    if not inside_cluster(nodes=1, cpus=4):
        return
    torch.set_num_threads(1)
    disable_malloc_trim()  # as Ray's worker does, and run_local
    quiet_ray_data()
    folder = Path(tempfile.mkdtemp())
    write_scenes(str(folder / "scenes"), {"train": 200, "val": 8, "test": 4}, 1, SceneSettings(size=128))
    settings = IngestSettings(format="camvid", class_map=str(folder / "scenes" / "class_map.yaml"), rows_per_file=50)
    ingest(str(folder / "scenes"), str(folder / "data"), settings)
    config = tiny_config(
        folder / "data", stages=2, augment={"crop_size": [128, 128]}, data={"root": str(folder / "data"), "labelled": 32},
        network={"encoder": "resnet18", "batch_norm": "live", "output_stride": 16},
        stage1={"steps": options.steps, "labelled_batch": 4},
        stage2={"steps": options.steps, "labelled_batch": 4, "unlabelled_batch": 4},
        training={"log_every": ROW, "checkpoint_every": 100, "evaluate_every": 10**6},
    )  # fmt: skip
    rounds: dict[str, list[dict[str, dict[str, float]]]] = {"--local": [], "Ray Train": []}
    for number in range(options.rounds):
        rounds["--local"].append(measured(config, str(folder / f"local{number}"), locally))
        rounds["Ray Train"].append(measured(config, str(folder / f"ray{number}"), on_ray))
    rows: list[dict[str, Any]] = []
    for stage in ("stage1", "stage2"):
        for name, found in rounds.items():
            figures = {key: median(each[stage][key] for each in found) for key in found[0][stage]}
            rows.append({"stage": stage, "variant": name, **figures})
        ratios = [
            ray_[stage]["images/s"] / local[stage]["images/s"]
            for local, ray_ in zip(rounds["--local"], rounds["Ray Train"], strict=True)
        ]
        rows[-1]["of --local"] = median(ratios)
        rows[-2]["of --local"] = 1.0
    report("one worker of Ray Train against the same loop in this process", rows, options.json)


if __name__ == "__main__":
    main()
