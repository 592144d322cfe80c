"""The one training loop: steps, evaluations, checkpoints, resuming, and the metrics between two rows.

A stage hands `fit` a state, a source of steps (step_inputs.py) and a way to evaluate. After a kill, `resume` continues from
the last checkpoint.
"""

import math
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import torch
from pydantic import Field
from torch import Tensor, nn

from threestage.errors import StageFailure
from threestage.private_folder import private_folder, reserve_compile_cache
from threestage.seeds import derive_seed
from threestage.settings import Settings
from threestage.training import losses
from threestage.training.background_writer import WriteState
from threestage.training.checkpoint import Pointer, Row, TrainState, not_finite
from threestage.training.ema import update_teacher
from threestage.training.schedule import EmaSettings, OptimiserSettings, ema_decay, learning_rate_factor
from threestage.training.step import StepInputs, StepSource, micro_batches, piece_sums
from threestage.training.worker import Worker

NOTICE_LAG = 3  # steps that a GPU may run behind before the loop waits to read its notice
POLL_S = 1.0  # how often workers that wait for a checkpoint hear of it

Read = TypeVar("Read")


class LoopSettings(Settings):
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="number format; auto: bfloat16 on GPUs that support it, else float32"
    )
    channels_last: bool = Field(
        False, description="channels-last memory format of networks and views; faster on GPUs with bfloat16"
    )
    compile: bool = Field(
        False, description="compile student and teacher (torch.compile): minutes at a stage's start, faster steps"
    )
    batch_scope: Literal["per_worker", "global"] = Field(
        "per_worker", description="batch sizes of a stage count per worker, or for all workers together"
    )
    learning_rate_rule: Literal["none", "sqrt", "linear"] = Field(
        "none", description="factor on the learning rates for per_worker batches: 1, √workers or workers"
    )
    accumulate: int = Field(1, ge=1, description="pieces of a worker's batch, computed one by one to save memory")
    log_every: int = Field(50, ge=1, description="steps between logged rows")
    checkpoint_every: int = Field(500, ge=1, description="steps between checkpoints")
    checkpoints_kept: int = Field(2, ge=1, description="newest checkpoints of a stage to keep")
    evaluate_every: int = Field(1000, ge=1, description="steps between evaluations; the last step is always evaluated")
    unsaved_limit_s: float = Field(
        900, gt=0, description="seconds of unsaved work before training waits for an unreachable store"
    )
    loss_limit: float = Field(
        100.0, gt=0, description="mean nats per pixel of a loss term above which the stage has diverged"
    )


# ---- The loop


@dataclass(frozen=True)
class StageLength:
    """How far a stage trains. images_per_step: labelled and unlabelled ones of all workers. seed_place: of its random draws.
    at_half: rank 0 calls it after half of the steps."""

    steps: int
    images_per_step: tuple[int, int]
    seed_place: tuple[int | str, ...]
    at_half: Callable[[], None] = lambda: None


def fit(
    state: TrainState, worker: Worker, source: StepSource, evaluate: Callable[[nn.Module], Row], length: StageLength,
    loop: LoopSettings, optimiser: OptimiserSettings, ema: EmaSettings,
) -> None:  # fmt: skip
    """Train from the state's step to the stage's last. Metrics since the last checkpoint are published with the next one.

    StageFailure, on all workers alike, when the loss is not finite or above the limit.
    """
    wrapped = worker.wrap(state.student).train()
    network = compiled(wrapped, loop)
    window = Window(worker, state.step, loop.loss_limit)
    dtype = autocast_dtype(loop.precision, worker.device)
    rate = lr_scale(loop, worker.world_size)
    checkpoint_requests = _SyncFlags(worker)
    while state.step < length.steps:
        torch.manual_seed(derive_seed(*length.seed_place, "torch", state.step, worker.rank))
        _set_learning_rate(state.optimiser, rate * learning_rate_factor(state.step, length.steps, optimiser))
        inputs = _draw(source, state.step, worker, dtype)
        pixels = {name: losses.valid_pixels(target) for name, target in inputs.targets.items()}
        counts, noticed = checkpoint_requests.sync_flags({**pixels, **inputs.divisors})
        sums = _backward(wrapped, network, worker, inputs, counts, dtype, state.scaler, loop.accumulate)
        _update(state, worker, optimiser.clip_norm, ema)
        _count(state, worker, length)
        window.add(inputs, sums, pixels, counts)

        last = state.step == length.steps
        evaluating = last or state.step % loop.evaluate_every == 0
        saving = last or noticed or state.step % loop.checkpoint_every == 0
        if evaluating or saving or state.step % loop.log_every == 0:
            row = window.close(state, source.waited)
            if evaluating:
                row |= _evaluated(state, worker, evaluate)
                wrapped.train()
            state.history.append(row)
            worker.log(row)
        if saving:
            _save(state, worker, wait=noticed)
        if evaluating or saving:
            window.restart(state)


def _count(state: TrainState, worker: Worker, length: StageLength) -> None:
    """What a step has used, and what half of the stage is followed by."""
    if state.step == max(1, length.steps // 2) and worker.rank == 0:
        length.at_half()
    state.labelled_images += length.images_per_step[0]
    state.unlabelled_images += length.images_per_step[1]


def _draw(source: StepSource, step: int, worker: Worker, dtype: torch.dtype) -> StepInputs:
    worker.set_phase(step, "data")
    with torch.autocast(worker.device.type, dtype, enabled=dtype != torch.float32):
        inputs = source.draw(step)
    worker.set_phase(step, "step")
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
    cut = list(micro_batches(len(inputs.image), accumulate))
    for number, piece in enumerate(cut, 1):
        with nullcontext() if number == len(cut) else worker.no_sync(wrapped):
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
    worker.sync_buffers(state.student)
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
    worker.set_phase(state.step, "evaluation")
    row = evaluate(state.shipped)
    if worker.rank == 0:
        state.keep_best(row.get("mean_iou", math.nan))
    return row


def _save(state: TrainState, worker: Worker, wait: bool) -> None:
    """A checkpoint, once the one before is written or the store is away: weights that are not finite are not saved (on all
    workers alike). `wait`: until it is written."""
    worker.set_phase(state.step, "checkpoint")
    if not_finite(state.student.parameters()):
        raise StageFailure(
            f"weights became infinite or NaN before step {state.step} while the losses were finite; {recovery_hint(worker)}",
            "stage/diverged",
        )
    _wait_for_store(state.step, worker, ("written", "failing"))
    state.stream = worker.stream_state(state.step)
    if worker.rank == 0:
        worker.checkpoints.save(state.snapshot())
    if wait and _wait_for_store(state.step, worker, ("written", "failing")) == "written":
        worker.noticed(state.step, True)


def _wait_for_store(step: int, worker: Worker, until: Sequence[WriteState]) -> WriteState:
    """All workers wait alike until what each has to do with the store has come so far; the worst state of any."""
    while True:
        worker.set_phase(step, "checkpoint")
        state = max(worker.gather(worker.checkpoints.wait(POLL_S)), key=get_args(WriteState).index)
        if state in ("failing", "overdue"):
            worker.noticed(step, False)
        if state in until:
            return state


def await_written(step: int, worker: Worker) -> None:
    """All workers wait until what was saved is written, however long the store is away."""
    _wait_for_store(step, worker, ("written",))
    worker.noticed(step, True)


def read_together(what: str, read: Callable[[], Read], worker: Worker) -> Read:
    """What `read` returns, on each worker its own. While a store is away it is tried again, and all workers wait alike."""
    found: list[Read] = []
    worker.checkpoints.in_background(what, lambda: found.append(read()))
    _wait_for_store(0, worker, ("written",))
    return found[-1]


def resume(state: TrainState, worker: Worker) -> None:
    """Continue from the stage's last checkpoint, if it has one: the one that rank 0 sees. It alone keeps the best weights."""

    def claim() -> Pointer | None:
        worker.checkpoints.claim()
        return worker.checkpoints.latest()

    latest = read_together("the last checkpoint", claim if worker.rank == 0 else lambda: None, worker)
    step = worker.gather(None if latest is None else latest.step)[0]
    if step is not None:
        state.restore(read_together(f"the checkpoint of step {step}", lambda: worker.checkpoints.read(step), worker))
    if worker.rank != 0:
        state.best = None


# ---- Precision, compilation, memory format, learning rate


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
    private_folder()
    reserve_compile_cache()  # a process of ours has done that before threads began
    return torch.compile(network)  # type: ignore[return-value]


def to_memory_format(image: Tensor, loop: LoopSettings) -> Tensor:
    """The views in the memory format of the networks."""
    layout = torch.channels_last if loop.channels_last else torch.contiguous_format
    return image.contiguous(memory_format=layout)


def lr_scale(loop: LoopSettings, world_size: int) -> float:
    """What the learning rates are multiplied by: a global batch keeps its size whatever the number of workers."""
    if loop.batch_scope == "global":
        return 1.0
    return {"none": 1.0, "sqrt": math.sqrt(world_size), "linear": float(world_size)}[loop.learning_rate_rule]


def _set_learning_rate(optimiser: torch.optim.Optimizer, factor: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = group["initial_lr"] * factor


# ---- What the workers agree on in every step


class _SyncFlags:
    """The workers' one agreement per step: what each term is divided by, and how many notices rank 0 knows of: of processes
    that will be taken away, and of a store that is away for too long.

    Every rank hears of a notice in the same step. A GPU's answer is read NOTICE_LAG steps late, so that nothing waits.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._waiting: list[tuple[Tensor, torch.cuda.Event | None]] = []
        self._heard = 0

    def sync_flags(self, pixels: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
        """Valid pixels of the global batch by term; True once for each notice that has come."""
        worker = self._worker
        known = worker.checkpoint_requests() + worker.checkpoints.times_overdue() if worker.rank == 0 else 0
        told = torch.full((), float(known), dtype=torch.float64, device=self._worker.device)
        *counts, checkpoint_requests = self._worker.sum(torch.stack([*pixels.values(), told])).unbind()
        return dict(zip(pixels, counts, strict=True)), self._news(checkpoint_requests)

    def _news(self, checkpoint_requests: Tensor) -> bool:
        self._waiting.append(copy_to_host_async(checkpoint_requests))
        if len(self._waiting) <= (NOTICE_LAG if checkpoint_requests.is_cuda else 0):
            return False
        value, arrived = self._waiting.pop(0)
        if arrived is not None:
            arrived.synchronize()
        before, self._heard = self._heard, max(self._heard, int(value))
        return self._heard > before


def copy_to_host_async(value: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """The value in host memory, and the event after which it is there."""
    if not value.is_cuda:
        return value, None
    host = torch.empty_like(value, device="cpu", pin_memory=True)
    host.copy_(value, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event


# ---- Metrics between two rows, and divergence

NAMED_IMAGES = 8


class Window:
    """What is known of the steps since the last row; losses stay on the device until the row is written."""

    def __init__(self, worker: Worker, step: int, loss_limit: float) -> None:
        self._worker = worker
        self._loss_limit = loss_limit
        self._waited_before = 0.0
        self._reset(step)

    def _reset(self, step: int) -> None:
        self._first_step = step
        self._means: list[Tensor] = []
        self._image_ids: list[tuple[str, ...]] = []
        self._valid: dict[str, Tensor] = {}
        self._pixels: dict[str, int] = {}
        self._images = 0
        self._start = time.perf_counter()

    def add(
        self, inputs: StepInputs, sums: dict[str, Tensor], valid: dict[str, Tensor], counts: dict[str, Tensor]
    ) -> None:
        """A step: this worker's sum and valid pixels of each term, and the valid pixels of all workers."""
        self._means.append(torch.stack([sums[name] / counts[name].clamp(min=1) for name in sums]))
        self._image_ids.append(inputs.image_ids)
        self._images += len(inputs.image)
        for name, target in inputs.targets.items():
            self._valid[name] = valid[name] + self._valid.get(name, 0)
            self._pixels[name] = target.numel() + self._pixels.get(name, 0)

    def close(self, state: TrainState, waited: float) -> Row:
        """The row of the steps since the last one. StageFailure when a loss is not finite or above the limit.

        waited: seconds that this worker has waited for data since it started.
        """
        means = self._worker.sum(torch.stack(self._means)).tolist()
        self._refuse_divergence(means)
        mine = self._mine(waited)
        row: Row = {"step": state.step}
        row |= {
            name: sum(values) / len(means) for name, values in zip(self._valid, zip(*means, strict=True), strict=True)
        }
        row |= _together(self._worker.gather(mine))
        row["learning_rate"] = state.optimiser.param_groups[0]["lr"]
        self._worker.measured(row | _together([mine]))
        state.seconds += row["step_seconds"] * len(means)
        self._waited_before = waited
        self._reset(state.step)
        return row

    def restart(self, state: TrainState) -> None:
        """Let the next row begin now: what came after the last one was no step, but the stage's time."""
        state.seconds += time.perf_counter() - self._start
        self._start = time.perf_counter()

    def _mine(self, waited: float) -> dict[str, Any]:
        """What this worker measured: plain numbers; seconds, bytes, and pixels by term."""
        valid = torch.stack(list(self._valid.values())).tolist()
        return {
            "steps": len(self._means),
            "images": self._images,
            "seconds": time.perf_counter() - self._start,
            "waited": waited - self._waited_before,
            "memory": _peak_memory(self._worker.device),
            "valid": dict(zip(self._valid, valid, strict=True)),
            "pixels": self._pixels,
        }

    def _refuse_divergence(self, means: Sequence[Sequence[float]]) -> None:
        """means: by step, then by term, of the global batch: the same on all workers."""
        for number, step in enumerate(means):
            for name, value in zip(self._valid, step, strict=True):
                if not math.isfinite(value) or value > self._loss_limit:
                    raise self._diverged(number, name, value)

    def _diverged(self, number: int, name: str, value: float) -> StageFailure:
        ids = [image_id for ids in self._worker.gather(list(self._image_ids[number])) for image_id in ids]
        more = f" and {len(ids) - NAMED_IMAGES} more" if len(ids) > NAMED_IMAGES else ""
        above = f", above training.loss_limit={self._loss_limit:g}" if math.isfinite(value) else ""
        return StageFailure(
            f"{name} became {value:.3g}{above} in step {self._first_step + number + 1}, with the images "
            f"{', '.join(ids[:NAMED_IMAGES])}{more}; {recovery_hint(self._worker)}",
            "stage/diverged",
        )


def recovery_hint(worker: Worker) -> str:
    """What the user of a stage that diverged can do."""
    latest = worker.checkpoints.latest()
    good = "no checkpoint was saved before" if latest is None else f"the last good checkpoint is of step {latest.step}"
    return (
        f"{good}. Lower optimiser.learning_rate or set optimiser.clip_norm, and give another --out; the same command tries again "
        "from the checkpoint"
    )


def _together(workers: Sequence[dict[str, Any]]) -> Row:
    """The figures of one row from those of its workers, by rank. Waiting is per step; the worst rank is named."""
    steps = workers[0]["steps"]
    seconds = max(worker["seconds"] for worker in workers)
    waits = [worker["waited"] / steps for worker in workers]
    row = {
        "steps_per_second": steps / seconds,
        "step_seconds": seconds / steps,
        "images_per_second": sum(worker["images"] for worker in workers) / seconds,
        "data_wait_seconds": sum(waits) / len(waits),
        "data_wait_seconds_most": max(waits),
        "data_wait_rank": float(waits.index(max(waits))),
        "memory_bytes": float(max(worker["memory"] for worker in workers)),
        "workers": float(len(workers)),
    }
    for name in workers[0]["valid"]:
        kept, all_ = (sum(worker[key][name] for worker in workers) for key in ("valid", "pixels"))
        row[f"kept_share/{name.removesuffix('_loss')}"] = kept / max(all_, 1)
    return row


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the device's allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
