"""The one training loop. A stage hands it a state, a step and a way to evaluate."""

import math
import time
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from threestage.errors import StageFailure
from threestage.seeds import derive_seed
from threestage.settings import Settings
from threestage.training.checkpoint import TrainState, load_checkpoint, save_checkpoint
from threestage.training.ema import update_teacher
from threestage.training.schedule import EmaSettings, OptimiserSettings, ema_decay, learning_rate_factor
from threestage.training.worker import Row, Worker


class LoopSettings(Settings):
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: bfloat16 on GPUs that have it")
    log_every: int = Field(50, ge=1, description="steps")
    checkpoint_every: int = Field(500, ge=1, description="steps")
    evaluate_every: int = Field(1000, ge=1, description="steps; the last step is always evaluated")


# (network to call, step number) → (loss of this worker to differentiate, mean of each term over the global batch)
StepLoss = Callable[[nn.Module, int], tuple[Tensor, dict[str, Tensor]]]


def fit(
    state: TrainState,
    worker: Worker,
    step_loss: StepLoss,
    evaluate: Callable[[nn.Module], Row],
    *,
    steps: int,
    seed_place: tuple[int | str, ...],
    loop: LoopSettings,
    optimiser: OptimiserSettings,
    ema: EmaSettings,
) -> None:
    """Train from the state's step to `steps`. Metrics since the last save are published with the next checkpoint."""
    network = worker.wrap(state.student).train()
    window = _Window(worker.device)
    dtype = autocast_dtype(loop.precision, worker.device)
    while state.step < steps:
        torch.manual_seed(derive_seed(*seed_place, "torch", state.step, worker.rank))
        _set_learning_rate(state.optimiser, learning_rate_factor(state.step, steps, optimiser))
        with torch.autocast(worker.device.type, dtype, enabled=dtype != torch.float32):
            loss, means = step_loss(network, state.step)
        state.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        if optimiser.clip_norm is not None:
            nn.utils.clip_grad_norm_(state.student.parameters(), optimiser.clip_norm)
        state.optimiser.step()
        worker.share_buffers(state.student)
        if state.teacher is not None:
            update_teacher(state.teacher, state.student, ema_decay(state.step, ema))
        state.step += 1
        window.add(means)

        evaluating = state.step % loop.evaluate_every == 0 or state.step == steps
        saving = state.step % loop.checkpoint_every == 0 or state.step == steps
        if evaluating or saving or state.step % loop.log_every == 0:
            row = window.close(state)
            if evaluating:
                row |= evaluate(state.shipped)
                network.train()
            state.history.append(row)
            if saving:
                worker.save(row, lambda file: save_checkpoint(state, file))
            else:
                worker.log(row)


def resume(state: TrainState, worker: Worker) -> None:
    """Continue from the worker's last checkpoint, if it has one."""
    if (content := worker.latest_checkpoint()) is not None:
        load_checkpoint(state, content)


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype:
    """float32 means no autocast."""
    if precision == "auto":
        capable = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if capable else torch.float32
    return getattr(torch, precision)


def _set_learning_rate(optimiser: torch.optim.Optimizer, factor: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = group["initial_lr"] * factor


class _Window:
    """Means of the loss terms since the last row; they stay on the device until a row is written."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._start = time.monotonic()

    def add(self, means: dict[str, Tensor]) -> None:
        self._steps += 1
        for name, value in means.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def close(self, state: TrainState) -> Row:
        """The row of the steps since the last one. StageFailure when a loss is not finite."""
        values = torch.stack(list(self._sums.values())).tolist()
        row = {name: value / self._steps for name, value in zip(self._sums, values, strict=True)}
        for name, value in row.items():
            if not math.isfinite(value):
                raise StageFailure(
                    f"{name} became {value} between steps {state.step - self._steps} and {state.step}: "
                    "lower optimiser.learning_rate, set optimiser.clip_norm, or go on from the last checkpoint by rerunning"
                )
        elapsed = time.monotonic() - self._start
        state.seconds += elapsed
        row |= {
            "step": state.step,
            "steps_per_second": self._steps / elapsed,
            "learning_rate": state.optimiser.param_groups[0]["lr"],
        }
        self._reset()
        return row
