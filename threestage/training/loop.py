"""The one training loop. A stage hands it a state, a source of steps and a way to evaluate."""

import math
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from threestage.errors import StageFailure
from threestage.private_folder import private_folder
from threestage.seeds import derive_seed
from threestage.settings import Settings
from threestage.training import losses
from threestage.training.checkpoint import Row, TrainState, not_finite
from threestage.training.ema import update_teacher
from threestage.training.schedule import EmaSettings, OptimiserSettings, ema_decay, learning_rate_factor
from threestage.training.step import StepInputs, StepSource, piece_sums, pieces
from threestage.training.window import Window, how_to_go_on
from threestage.training.worker import Worker

NOTICE_LAG = 3  # steps that a GPU may run behind before the loop waits to read its notice


class LoopSettings(Settings):
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: bfloat16 on GPUs that have it, else float32"
    )
    channels_last: bool = Field(False, description="memory format of networks and views; faster on GPUs with bfloat16")
    compile: bool = Field(
        False, description="torch.compile student and teacher: minutes at a stage's start, faster steps"
    )
    batch: Literal["per_worker", "global"] = Field(
        "per_worker", description="whether a stage's batch sizes are each worker's, or all workers' together"
    )
    learning_rate_rule: Literal["none", "sqrt", "linear"] = Field(
        "none", description="what a per_worker batch multiplies the learning rates by: 1, √workers or workers"
    )
    accumulate: int = Field(1, ge=1, description="pieces that a worker computes its batch in, to need less memory")
    log_every: int = Field(50, ge=1, description="steps")
    checkpoint_every: int = Field(500, ge=1, description="steps")
    checkpoints_kept: int = Field(2, ge=1, description="newest checkpoints of a stage that stay")
    evaluate_every: int = Field(1000, ge=1, description="steps; the last step is always evaluated")
    loss_limit: float = Field(100.0, gt=0, description="mean nats per pixel of a term; above it the stage has diverged")


def fit(
    state: TrainState,
    worker: Worker,
    source: StepSource,
    evaluate: Callable[[nn.Module], Row],
    *,
    steps: int,
    images_per_step: tuple[int, int],
    seed_place: tuple[int | str, ...],
    loop: LoopSettings,
    optimiser: OptimiserSettings,
    ema: EmaSettings,
    at_half: Callable[[], None] = lambda: None,
) -> None:
    """Train from the state's step to `steps`. Metrics since the last checkpoint are published with the next one.

    images_per_step: labelled and unlabelled ones of all workers. at_half: rank 0 calls it after half of the steps.
    StageFailure, on all workers alike, when the loss is not finite or above the limit.
    """
    wrapped = worker.wrap(state.student).train()
    network = compiled(wrapped, loop)
    window = Window(worker, state.step, loop.loss_limit)
    dtype = autocast_dtype(loop.precision, worker.device)
    rate = rate_factor(loop, worker.world_size)
    notices = _Notices(worker)
    while state.step < steps:
        torch.manual_seed(derive_seed(*seed_place, "torch", state.step, worker.rank))
        _set_learning_rate(state.optimiser, rate * learning_rate_factor(state.step, steps, optimiser))
        inputs = _draw(source, state.step, worker, dtype)
        pixels = {name: losses.valid_pixels(target) for name, target in inputs.targets.items()}
        counts, noticed = notices.agree({**pixels, **inputs.divisors})
        sums = _backward(wrapped, network, worker, inputs, counts, dtype, state.scaler, loop.accumulate)
        _update(state, worker, optimiser.clip_norm, ema)
        if state.step == max(1, steps // 2) and worker.rank == 0:
            at_half()
        state.labelled_images += images_per_step[0]
        state.unlabelled_images += images_per_step[1]
        window.add(inputs, sums, pixels, counts)

        evaluating = state.step % loop.evaluate_every == 0 or state.step == steps
        saving = noticed or state.step % loop.checkpoint_every == 0 or state.step == steps
        if evaluating or saving or state.step % loop.log_every == 0:
            row = window.close(state, source.waited)
            if evaluating:
                row |= _evaluated(state, worker, evaluate)
                wrapped.train()
            state.history.append(row)
            worker.log(row)
        if saving:
            _save(state, worker)
        if noticed:
            _wait_for_checkpoint(state.step, worker)
        if evaluating or saving:
            window.restart(state)


def _draw(source: StepSource, step: int, worker: Worker, dtype: torch.dtype) -> StepInputs:
    worker.doing(step, "data")
    with torch.autocast(worker.device.type, dtype, enabled=dtype != torch.float32):
        inputs = source.draw(step)
    worker.doing(step, "step")
    return inputs


def _backward(
    wrapped: nn.Module,
    network: nn.Module,
    worker: Worker,
    inputs: StepInputs,
    counts: Mapping[str, Tensor],
    dtype: torch.dtype,
    scaler: torch.amp.GradScaler,
    accumulate: int,
) -> dict[str, Tensor]:
    """Gradients of the whole batch, piece by piece; returns each term's sum over this worker's pixels."""
    sums = {name: torch.zeros((), device=worker.device, dtype=torch.float64) for name in inputs.targets}
    cut = list(pieces(len(inputs.image), accumulate))
    for number, piece in enumerate(cut, 1):
        with nullcontext() if number == len(cut) else worker.hold_gradients(wrapped):
            with torch.autocast(worker.device.type, dtype, enabled=dtype != torch.float32):
                found = piece_sums(network, inputs, piece)
                loss = losses.total_loss(found, counts, inputs.weights, worker.world_size)
            scaler.scale(loss).backward()
        for name, value in found.items():
            sums[name] += value.detach()
    return sums


def _update(state: TrainState, worker: Worker, clip_norm: float | None, ema: EmaSettings) -> None:
    """The student from its gradients, then the teacher; the step is done."""
    _optimise(state, clip_norm)
    worker.share_buffers(state.student)
    if state.teacher is not None:
        update_teacher(state.teacher, state.student, ema_decay(state.step, ema))
    state.step += 1


def _optimise(state: TrainState, clip_norm: float | None) -> None:
    if clip_norm is not None:
        state.scaler.unscale_(state.optimiser)
        nn.utils.clip_grad_norm_(state.student.parameters(), clip_norm)
    state.scaler.step(state.optimiser)
    state.scaler.update()
    state.optimiser.zero_grad(set_to_none=True)


def _evaluated(state: TrainState, worker: Worker, evaluate: Callable[[nn.Module], Row]) -> Row:
    """What the shipped network scores; rank 0 keeps the best weights."""
    worker.doing(state.step, "evaluation")
    row = evaluate(state.shipped)
    if worker.rank == 0:
        state.keep_best(row.get("mean_iou", math.nan))
    return row


def _save(state: TrainState, worker: Worker) -> None:
    """A checkpoint that can be gone on from: weights that are not finite are not saved (on all workers alike)."""
    worker.doing(state.step, "checkpoint")
    if not_finite(state.student.parameters()):
        raise StageFailure(
            f"weights became infinite or NaN before step {state.step} while the losses were finite; {how_to_go_on(worker)}",
            "stage/diverged",
        )
    if worker.rank == 0 and (problem := worker.checkpoints.save(state.snapshot())) is not None:
        worker.warn(f"a checkpoint before step {state.step} could not be written, the next one is tried: {problem}")


def _wait_for_checkpoint(step: int, worker: Worker) -> None:
    try:
        worker.checkpoints.wait()
    except OSError as error:
        worker.warn(f"the checkpoint of step {step} could not be written: {error}")
        return
    worker.noticed(step)


def resume(state: TrainState, worker: Worker) -> None:
    """Continue from the stage's last checkpoint, if it has one: the one that rank 0 sees. It alone keeps the best weights."""
    latest = None
    if worker.rank == 0:
        worker.checkpoints.claim()
        latest = worker.checkpoints.latest()
    step = worker.gather(None if latest is None else latest.step)[0]
    if step is not None:
        state.restore(worker.checkpoints.read(step))
    if worker.rank != 0:
        state.best = None


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype:
    """float32 means no autocast."""
    if precision == "auto":
        capable = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if capable else torch.float32
    return getattr(torch, precision)


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Keeps float16 gradients from vanishing; does nothing in other precisions."""
    return torch.amp.GradScaler(device.type, enabled=autocast_dtype(precision, device) == torch.float16)


def compiled(network: nn.Module, loop: LoopSettings) -> nn.Module:
    """The network as it is called, of the same parameters."""
    if not loop.compile:
        return network
    # torch's own choice is a predictable folder in /tmp, whose code another user could write first
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(private_folder() / "torchinductor"))
    return torch.compile(network)  # type: ignore[return-value]


def laid_out(image: Tensor, loop: LoopSettings) -> Tensor:
    """The views in the memory format of the networks."""
    layout = torch.channels_last if loop.channels_last else torch.contiguous_format
    return image.contiguous(memory_format=layout)


def rate_factor(loop: LoopSettings, world_size: int) -> float:
    """What the learning rates are multiplied by: a global batch keeps its size whatever the number of workers."""
    if loop.batch == "global":
        return 1.0
    return {"none": 1.0, "sqrt": math.sqrt(world_size), "linear": float(world_size)}[loop.learning_rate_rule]


def _set_learning_rate(optimiser: torch.optim.Optimizer, factor: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = group["initial_lr"] * factor


class _Notices:
    """The workers' one agreement per step: what each term is divided by, and how many notices rank 0 knows of.

    Every rank hears of a notice in the same step. A GPU's answer is read NOTICE_LAG steps late, so that nothing waits.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._waiting: list[tuple[Tensor, torch.cuda.Event | None]] = []
        self._heard = 0

    def agree(self, pixels: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
        """Valid pixels of the global batch by term; True once for each notice that has come."""
        known = self._worker.notices() if self._worker.rank == 0 else 0
        told = torch.full((), float(known), dtype=torch.float64, device=self._worker.device)
        *counts, notices = self._worker.sum(torch.stack([*pixels.values(), told])).unbind()
        return dict(zip(pixels, counts, strict=True)), self._news(notices)

    def _news(self, notices: Tensor) -> bool:
        self._waiting.append(_on_its_way(notices))
        if len(self._waiting) <= (NOTICE_LAG if notices.is_cuda else 0):
            return False
        value, arrived = self._waiting.pop(0)
        if arrived is not None:
            arrived.synchronize()
        before, self._heard = self._heard, max(self._heard, int(value))
        return self._heard > before


def _on_its_way(value: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """The value in host memory, and the event after which it is there."""
    if not value.is_cuda:
        return value, None
    host = torch.empty_like(value, device="cpu", pin_memory=True)
    host.copy_(value, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event
