"""What the coordination of a step costs: a step that only sleeps, with 1, 2, 4 and 8 workers under Ray Train.

    python -m tests.benchmarks.bench_coordination [--steps 300] [--sleep-ms 50] [--json FILE]

The network has three parameters, so the rest of a step is the loop's own: the all-reduce of the loss counts, DDP, the gathering
of rows, the heartbeats. With more workers than cores it is dear, because they take turns. docs/scaling.md reads the file.
"""

import argparse
import datetime
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from tests.benchmarks.measure import inside_cluster, report
from tests.conftest import tiny_config
from threestage.data.split import Split
from threestage.run.stages import StageTask
from threestage.training.step import StepInputs

WORKERS = (1, 2, 4, 8)
ROW = 20  # steps


class Point(nn.Module):
    """Logits of two classes from one pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, image: Tensor, with_auxiliary: bool = False) -> tuple[Tensor, None]:
        return image[:, :2] * self.weight[None, :, None, None], None


class Sleeping:
    """Steps that take a fixed time."""

    waited = 0.0

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def draw(self, step: int) -> StepInputs:
        time.sleep(self._seconds)
        mask = torch.zeros(1, 1, 1, dtype=torch.uint8)
        return StepInputs(torch.rand(1, 3, 1, 1), {"supervised_loss": mask}, {"supervised_loss": 1.0}, ("point",))


def train_sleeping(arguments: dict[str, Any]) -> None:
    import ray.train

    from threestage.ray_backend.heartbeat import Heartbeat
    from threestage.ray_backend.worker import RayWorker
    from threestage.training.checkpoint import TrainState
    from threestage.training.loop import StageLength, fit, make_scaler, resume
    from threestage.training.schedule import EmaSettings, OptimiserSettings

    torch.set_num_threads(1)
    task, monitor = StageTask.model_validate(arguments["task"]), arguments["monitor"]
    config, context = task.settings(), ray.train.get_context()
    with Heartbeat(monitor, task, context.get_world_rank(), context.get_world_size()) as pulse:
        worker, student = RayWorker(task, monitor, pulse, arguments["driver"]), Point()
        optimiser = torch.optim.AdamW([{"params": student.parameters(), "initial_lr": 1e-3}])
        state = TrainState(student, None, optimiser, make_scaler("float32", worker.device))
        resume(state, worker)
        fit(
            state, worker, Sleeping(config.optimiser.weight_decay), lambda network: {},
            StageLength(config.stage1.steps, (1, 0), (0,)), config.training, OptimiserSettings(), EmaSettings(),
        )  # fmt: skip
        if worker.rank == 0:
            worker.checkpoints.wait()


def step_seconds(workers: int, steps: int, sleep_s: float) -> float:
    """Median over the rows after the first."""
    from threestage.ray_backend.train import train_on_ray

    folder = tempfile.mkdtemp()
    config = tiny_config(
        Path(folder), cluster={"workers": workers}, optimiser={"weight_decay": sleep_s}, stage1={"steps": steps},
        training={"log_every": ROW, "checkpoint_every": 10**6, "evaluate_every": 10**6},
    )  # fmt: skip
    task = StageTask(
        stage="stage1", config=config.model_dump(mode="json"), manifest_version=1, folder=folder, pool=None,
        split=Split(labelled=("a",), validation=("b",), validation_split="val"), pseudo_masks=None, previous_model=None,
    )  # fmt: skip
    rows: list[float] = []
    train_on_ray(task, lambda stage, row: rows.append(row["step_seconds"]), print, train_sleeping)
    return median(rows[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--sleep-ms", type=float, default=50)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    if not inside_cluster(nodes=1, cpus=12):
        return
    overhead = [
        1000 * step_seconds(workers, options.steps, options.sleep_ms / 1000) - options.sleep_ms for workers in WORKERS
    ]
    rows = [{"workers": w, "beyond the sleep, ms a step": o} for w, o in zip(WORKERS, overhead, strict=True)]
    report(f"a step that sleeps {options.sleep_ms:g} ms, on {os.cpu_count()} cores", rows, None)
    if options.json:
        cores, today = os.cpu_count(), datetime.date.today().isoformat()
        found = {
            "workers": WORKERS, "overhead_ms_per_step": overhead, "sleep_ms": options.sleep_ms, "date": today,
            "machine": f"{cores} cores, {platform.machine()}", "cores": cores,
        }  # fmt: skip
        options.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
