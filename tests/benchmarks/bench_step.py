"""What a training step costs beside its networks: the real loop against bare compute, in turns of a few steps within one run.

    python -m tests.benchmarks.bench_step [--preset camvid] [--data DATASET] [--set a.b=c …] [--steps 60] [--json FILE]

Bare: the teacher's forward pass (stages 2 and 3), forward, loss, backward and optimiser step of copies of the same networks on
the step's own tensors. Without --data: CamVid where it lies beside the project, else synthetic scenes. On a CPU one torch
thread, and seconds are CPU seconds of the process, its decoding threads included; data wait alone is time that passed. Medians
over the turns, shares are of the whole step. Memory: the most that tensors take during a step, with the networks, the teacher
and the optimiser's moments.
"""

import argparse
import copy
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.measure import CAMVID, report
from tests.benchmarks.on_device import PeakMemory, bytes_of, clock
from tests.runs import run_trained_by
from threestage.allocator import disable_malloc_trim
from threestage.config import STAGES, Config, load
from threestage.data.ingest import IngestSettings, ingest
from threestage.data.synthetic import write_scenes
from threestage.run.stages import StageTask, build_state, load_data, local_unlabelled, make_source, train_stage
from threestage.training import losses
from threestage.training.checkpoint import TrainState
from threestage.training.ema import update_teacher
from threestage.training.loop import StageLength, Window, autocast_dtype, fit
from threestage.training.step import StepInputs, StepSource, piece_sums
from threestage.training.worker import LocalWorker

TURN = 5  # steps
NEVER = 10**9
SHARES = ("views", "teacher", "loss", "EMA", "data wait", "logging")


class InTurns:
    """A stage's source that stops after every TURN steps for as many bare ones, and keeps the seconds of each turn."""

    def __init__(self, source: StepSource, state: TrainState, config: Config, worker: LocalWorker) -> None:
        self._source, self._state, self._worker, self._device = source, state, worker, worker.device
        self._now = clock(self._device)
        self._dtype = autocast_dtype(config.training.precision, self._device)
        self._log_every = config.training.log_every
        self._student, self._teacher = copy.deepcopy(state.student), copy.deepcopy(state.teacher)
        groups = [{**group, "params": []} for group in state.optimiser.param_groups]
        parameters = dict(zip(state.student.parameters(), self._student.parameters(), strict=True))
        for group, like in zip(groups, state.optimiser.param_groups, strict=True):
            group["params"] = [parameters[parameter] for parameter in like["params"]]
        self._optimiser = torch.optim.AdamW(groups)
        self._began, self._drawn, self._waited = 0.0, 0.0, 0.0
        self._memory: PeakMemory | None = None
        self.seconds: dict[str, list[float]] = {"step": [], "bare": [], **{name: [] for name in SHARES}}
        self.bytes: dict[str, int] = {}

    @property
    def waited(self) -> float:
        return self._source.waited

    def draw(self, step: int) -> StepInputs:
        if step % TURN == 0 and step > 0:
            self._turn()
        if step == TURN + 1:
            self._memory = PeakMemory(self._device)
        elif self._memory is not None:
            self._measure_memory(self._memory)
            self._memory = None
        began = self._now()
        self._inputs = self._source.draw(step)
        self._drawn += self._now() - began
        return self._inputs

    def _measure_memory(self, whole_step: PeakMemory) -> None:
        """Of a step from draw to draw, which has just ended, and of a bare one."""
        held = bytes_of(self._state.student, self._state.teacher, self._state.optimiser)
        self.bytes["step"] = held + whole_step.stop()
        bare = PeakMemory(self._device)
        self._bare()
        self.bytes["bare"] = held + bare.stop()

    def _turn(self) -> None:
        draw = self._drawn / TURN
        if self._began:
            self.seconds["step"].append((self._now() - self._began) / TURN)
            self.seconds["data wait"].append((self.waited - self._waited) / TURN)
        self.seconds["bare"].append(self._timed(self._bare))
        teacher = self._timed(self._teacher_forward)
        self.seconds["teacher"].append(teacher)
        if self._began:
            self.seconds["views"].append(max(0.0, draw - teacher - self.seconds["data wait"][-1]))
        self.seconds["loss"].append(self._timed(self._loss(*self._logits())))
        if self._teacher is not None:
            self.seconds["EMA"].append(self._timed(partial(update_teacher, self._teacher, self._student, 0.99)))
        self.seconds["logging"].append(self._timed(self._log))
        self._began, self._drawn, self._waited = self._now(), 0.0, self.waited

    def _bare(self) -> None:
        inputs = self._inputs
        self._teacher_forward()
        with self._autocast():
            sums = piece_sums(self._student, inputs, slice(0, len(inputs.image)))
        self._total(sums).backward()
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _teacher_forward(self) -> None:
        if self._teacher is not None:
            with self._autocast():
                self._teacher(self._inputs.image)

    @torch.no_grad()
    def _logits(self) -> tuple[Tensor, Tensor | None]:
        with self._autocast():
            return self._student(self._inputs.image, with_auxiliary="pseudo_mask_loss" in self._inputs.targets)

    def _loss(self, main: Tensor, auxiliary: Tensor | None) -> Callable[[], None]:
        """Forward and backward of the step's terms, from given logits on."""

        class Given(torch.nn.Module):
            def forward(self, image: Tensor, **switches: object) -> tuple[Tensor, Tensor | None]:
                return main, auxiliary

        for logits in (main, auxiliary):
            if logits is not None:
                logits.requires_grad_()

        def act() -> None:
            with self._autocast():
                sums = piece_sums(Given(), self._inputs, slice(0, len(self._inputs.image)))
            self._total(sums).backward()

        return act

    def _total(self, sums: dict[str, Tensor]) -> Tensor:
        counts = {name: losses.valid_pixels(target) for name, target in self._inputs.targets.items()}
        return losses.total_loss(sums, counts, self._inputs.weights, 1)

    def _log(self) -> None:
        """What the loop notes of `log_every` steps, and their row: seconds are those of one of these steps."""
        ones = {name: torch.ones((), device=self._device) for name in self._inputs.targets}
        state = copy.copy(self._state)
        for _ in range(TURN):
            window = Window(self._worker, state.step, 1e9)
            for _ in range(self._log_every // TURN):
                window.add(self._inputs, ones, ones, ones)
            window.close(state, 0.0)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32)

    def _timed(self, act: Callable[[], None]) -> float:
        """Seconds of one call, of TURN in a row."""
        began = self._now()
        for _ in range(TURN):
            act()
        return (self._now() - began) / TURN


def measure(task: StageTask, steps: int) -> dict[str, Any]:
    """One stage's figures."""
    config = task.settings()
    worker = LocalWorker(tempfile.mkdtemp(), 1, local_unlabelled(task))
    data = load_data(task, config, worker)
    state = build_state(task, config, len(data.manifest.classes), worker.device)
    worker.checkpoints.claim()
    source = make_source(task, config, state, data, worker)
    turns = InTurns(source, state, config, worker)
    loop = config.training.model_copy(update={"log_every": TURN, "checkpoint_every": NEVER, "evaluate_every": NEVER})
    fit(
        state, worker, turns, lambda network: {}, StageLength(steps + 2 * TURN, (0, 0), (config.seed, task.stage)),
        loop, config.optimiser, config.ema,
    )  # fmt: skip
    now = clock(worker.device)
    began = now()
    worker.checkpoints.save(state.snapshot())
    stall = now() - began
    worker.checkpoints.wait()
    # The first turn warms up; the second holds the step whose memory was measured.
    step, bare = (median(turns.seconds[name][2:]) for name in ("step", "bare"))
    shares = {f"{name}, share": median(turns.seconds[name][2:] or [0.0]) / step for name in SHARES}
    return {
        "stage": task.stage,
        "step, ms": 1000 * step,
        "bare, ms": 1000 * bare,
        "bare / step": bare / step,
        **shares,
        "checkpoint, share": stall / (step * config.training.checkpoint_every),
        "memory, MiB": turns.bytes["step"] / 2**20,
        "memory / bare": turns.bytes["step"] / turns.bytes["bare"],
    }


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        config = quick_config(options.preset, options.data or make_data(Path(folder)), options.set)
        rows = measure_stages(config, options.steps)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    title = f"{options.preset}, {config.network.encoder}, crops of {config.augment.crop_size}, on {device}"
    report(title, rows, options.json)


def measure_stages(config: Config, steps: int) -> list[dict[str, Any]]:
    """A row for each stage, each after a few steps of the stage before."""
    disable_malloc_trim()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    rows: list[dict[str, Any]] = []

    def run_stage(task: StageTask) -> None:
        rows.append(measure(task, steps))
        worker = LocalWorker(task.folder, 1, local_unlabelled(task))
        train_stage(task, worker)

    with tempfile.TemporaryDirectory() as folder:
        run_trained_by(run_stage, config, folder, lambda text: None)
    return rows


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="camvid")
    parser.add_argument("--data")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--json")
    return parser.parse_args()


def quick_config(preset: str, data: str, changes: Sequence[str]) -> Config:
    """The preset with random weights and few steps of its own (they only make the next stage's pseudo-masks)."""
    few = [f"{stage}.steps=2" for stage in STAGES]
    quick = ["network.batch_norm=live", "pseudo_mask.final_stage=false", "pseudo_mask.on_collapse=ignore"]
    return load(preset, [f"data.root={data}", *few, *quick, *changes])


def make_data(folder: Path) -> str:
    """A data set in the folder: CamVid where it lies beside the project, else synthetic scenes."""
    if not CAMVID.is_dir():
        return make_scenes(folder)
    ingest(str(CAMVID.parents[1]), str(folder / "data"), IngestSettings(format="camvid"))
    return str(folder / "data")


def make_scenes(folder: Path) -> str:
    """A data set of synthetic scenes in the folder, the same on every machine."""
    write_scenes(str(folder / "scenes"), {"train": 100, "val": 10, "test": 1}, seed=0)
    settings = IngestSettings(format="camvid", class_map=str(folder / "scenes" / "class_map.yaml"))
    ingest(str(folder / "scenes"), str(folder / "data"), settings)
    return str(folder / "data")


if __name__ == "__main__":
    main()
