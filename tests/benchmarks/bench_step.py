"""What a training step costs beside its networks: the real loop against bare compute, in turns of a few steps within one run.

    python -m tests.benchmarks.bench_step [--preset camvid] [--data DATASET] [--set a.b=c …] [--steps 60] [--json FILE]

Bare: the teacher's forward pass (stages 2 and 3), forward, loss, backward and optimiser step of copies of the same networks on
the step's own tensors. Without --data: CamVid where it lies beside the project, else synthetic scenes. One torch thread on a
CPU. Figures are medians over the turns; shares are of the whole step.
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tests.benchmarks.measure import CAMVID, report
from threestage import pipeline
from threestage.config import Config, load
from threestage.data.ingest import IngestSettings, ingest
from threestage.data.synthetic import write_scenes
from threestage.local import predict_pool
from threestage.stages import StageTask, build_state, load_data, local_unlabelled, make_source, train_stage
from threestage.training import losses
from threestage.training.checkpoint import TrainState
from threestage.training.ema import update_teacher
from threestage.training.loop import autocast_dtype, fit
from threestage.training.step import StepInputs, StepSource, piece_sums
from threestage.training.worker import LocalWorker

TURN = 5  # steps
NEVER = 10**9


class InTurns:
    """A stage's source that stops after every TURN steps for as many bare ones, and keeps the seconds of each turn."""

    def __init__(self, source: StepSource, state: TrainState, precision: str, device: torch.device) -> None:
        self._source, self._device = source, device
        self._dtype = autocast_dtype(precision, device)
        self._student, self._teacher = copy.deepcopy(state.student), copy.deepcopy(state.teacher)
        groups = [{**group, "params": []} for group in state.optimiser.param_groups]
        parameters = dict(zip(state.student.parameters(), self._student.parameters(), strict=True))
        for group, like in zip(groups, state.optimiser.param_groups, strict=True):
            group["params"] = [parameters[parameter] for parameter in like["params"]]
        self._optimiser = torch.optim.AdamW(groups)
        self._began, self._drawn, self._waited = 0.0, 0.0, 0.0
        self.seconds: dict[str, list[float]] = {"step": [], "bare": [], "draw": [], "data wait": [], "EMA": []}

    @property
    def waited(self) -> float:
        return self._source.waited

    def draw(self, step: int) -> StepInputs:
        if step % TURN == 0 and step > 0:
            self._turn()
        began = time.perf_counter()
        self._inputs = self._source.draw(step)
        self._drawn += time.perf_counter() - began
        return self._inputs

    def _turn(self) -> None:
        _wait(self._device)
        if self._began:
            self.seconds["step"].append((time.perf_counter() - self._began) / TURN)
            self.seconds["draw"].append(self._drawn / TURN)
            self.seconds["data wait"].append((self.waited - self._waited) / TURN)
        self.seconds["bare"].append(_timed(self._device, self._bare))
        if self._teacher is not None:
            move = partial(update_teacher, self._teacher, self._student, 0.99)
            self.seconds["EMA"].append(_timed(self._device, move))
        self._began, self._drawn, self._waited = time.perf_counter(), 0.0, self.waited

    def _bare(self) -> None:
        inputs = self._inputs
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            if self._teacher is not None:
                with torch.no_grad():
                    self._teacher(inputs.image)
            sums = piece_sums(self._student, inputs, slice(0, len(inputs.image)))
        counts = {name: losses.valid_pixels(target) for name, target in inputs.targets.items()}
        losses.total_loss(sums, counts, inputs.weights, 1).backward()
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timed(device: torch.device, act: Callable[[], None]) -> float:
    """Seconds of one call, of TURN in a row."""
    _wait(device)
    began = time.perf_counter()
    for _ in range(TURN):
        act()
    _wait(device)
    return (time.perf_counter() - began) / TURN


def measure(task: StageTask, steps: int) -> dict[str, Any]:
    """One stage's figures."""
    config = task.settings()
    worker = LocalWorker(tempfile.mkdtemp(), 1, local_unlabelled(task))
    data = load_data(task, config)
    state = build_state(task, config, len(data.manifest.classes), worker.device)
    worker.checkpoints.claim()
    source = make_source(task, config, state, data, worker)
    turns = InTurns(source, state, config.training.precision, worker.device)
    loop = config.training.model_copy(update={"log_every": TURN, "checkpoint_every": NEVER, "evaluate_every": NEVER})
    fit(
        state, worker, turns, lambda network: {}, steps=steps + 2 * TURN, images_per_step=(0, 0),
        seed_place=(config.seed, task.stage), loop=loop, optimiser=config.optimiser, ema=config.ema,
    )  # fmt: skip
    step, bare = (median(turns.seconds[name][1:]) for name in ("step", "bare"))
    pairs = zip(turns.seconds["bare"][1:], turns.seconds["step"], strict=False)
    shares = {f"{name}, share": median(turns.seconds[name][1:] or [0.0]) / step for name in ("data wait", "EMA")}
    began = time.perf_counter()
    worker.checkpoints.save(state.snapshot())
    stall = time.perf_counter() - began
    worker.checkpoints.wait()
    return {
        "stage": task.stage,
        "step, ms": 1000 * step,
        "bare, ms": 1000 * bare,
        "bare / step": median(b / s for b, s in pairs),
        "views and targets with the teacher, share": median(turns.seconds["draw"][1:]) / step,
        **shares,
        "checkpoint, share at its default interval": stall / (step * config.training.checkpoint_every),
    }


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        config = _config(options, folder)

        def run_stage(task: StageTask) -> None:
            rows.append(measure(task, options.steps))
            worker = LocalWorker(task.folder, 1, local_unlabelled(task))
            train_stage(task, worker)

        pipeline.run(config, f"{folder}/run", run_stage, predict_pool, lambda outcome: None, lambda text: None)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    title = f"{options.preset}, {config.network.encoder}, crops of {config.augment.crop_size}, on {device}"
    report(title, rows, options.json)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="camvid")
    parser.add_argument("--data")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--json")
    return parser.parse_args()


def _config(options: argparse.Namespace, folder: str) -> Config:
    """The preset with random weights, few steps of its own (they only make the next stage's pseudo-masks), a small pool."""
    data = options.data or _make_data(Path(folder))
    few = [f"{stage}.steps=2" for stage in ("stage1", "stage2", "stage3")]
    quick = ["network.batch_norm=live", "pseudo_mask.of_last_stage=false", "pseudo_mask.guard=ignore"]
    return load(options.preset, [f"data.root={data}", *few, *quick, *options.set])


def _make_data(folder: Path) -> str:
    if CAMVID.is_dir():
        ingest(str(CAMVID.parents[1]), str(folder / "data"), IngestSettings(format="camvid"))
    else:
        write_scenes(str(folder / "scenes"), {"train": 100, "val": 10, "test": 1}, seed=0)
        settings = IngestSettings(format="camvid", class_map=str(folder / "scenes" / "class_map.yaml"))
        ingest(str(folder / "scenes"), str(folder / "data"), settings)
    return str(folder / "data")


if __name__ == "__main__":
    main()
