"""The steps between two rows of a stage's history: losses checked and averaged, times and shares of every worker."""

import math
import resource
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from threestage.errors import StageFailure
from threestage.training.checkpoint import Row, TrainState
from threestage.training.step import StepInputs
from threestage.training.worker import Worker

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
            f"{', '.join(ids[:NAMED_IMAGES])}{more}; {how_to_go_on(self._worker)}",
            "stage/diverged",
        )


def how_to_go_on(worker: Worker) -> str:
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
