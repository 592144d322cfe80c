"""What the training loop needs from its surroundings, and the version of it for a single process."""

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import pyarrow as pa
import torch
from torch import Tensor, nn

from threestage.data.batches import Batch, BatchSlice
from threestage.errors import Stopped
from threestage.termination import STOPPED, sigterm_noted
from threestage.training.checkpoint import Checkpoints, Row, StreamState, TrainState, checkpoint_folder


class Worker(Protocol):
    """One process of a stage. Every rank makes the same calls in the same order."""

    rank: int
    world_size: int
    device: torch.device
    checkpoints: Checkpoints

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network as it is called in a step: gradients averaged over the workers, batch norm synchronised."""

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[object]:
        """Inside it, backward passes add to this worker's gradients without averaging: for all pieces but the last."""

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor's sum over all workers."""

    def gather(self, value: Any) -> list[Any]:
        """What each worker has to say (plain values), by rank."""

    def sync_buffers(self, network: nn.Module) -> None:
        """Make the network's running statistics the same on all workers."""

    def once_per_node(self, name: str, make: Callable[[], pa.Table]) -> pa.Table:
        """What `make` returns: one worker of each node makes it, and all of that node hold it together."""

    def unlabelled(self, share: BatchSlice, begin: TrainState) -> Iterator[Batch]:
        """This worker's share of the unlabelled batches, from the state's step on."""

    def stream_state(self, step: int) -> StreamState | None:
        """Where the unlabelled batches of all workers continue after a step; None where the number of images says it."""

    def checkpoint_requests(self) -> int:
        """How many reasons for a checkpoint at once have come so far: processes that will soon be taken away."""

    def noticed(self, step: int, saved: bool) -> None:
        """What follows from a notice, if there was one, once the checkpoint of `step` (0: there is none yet) is written, or
        could not be."""

    def warn(self, text: str) -> None:
        """Tell the user."""

    def set_phase(self, step: int, what: str) -> None:
        """Where the loop is, for whoever watches it."""

    def measured(self, values: Mapping[str, float]) -> None:
        """Figures of this worker alone since the last row, for the cluster's metrics."""

    def log(self, row: Row) -> None:
        """Show how far the stage is. Losing it loses nothing."""


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class LocalWorker:
    """A Worker that is alone. A SIGTERM is its notice: the stage saves a checkpoint and stops."""

    rank = 0
    world_size = 1

    def __init__(
        self,
        folder: str,
        keep: int,
        unlabelled: Callable[[BatchSlice, int], Iterator[Batch]],
        show: Callable[[Mapping[str, float]], None] = lambda row: None,
        warn: Callable[[str], None] = print,
        unsaved_limit_s: float = math.inf,
    ) -> None:
        self.device = default_device()
        self.checkpoints = Checkpoints(checkpoint_folder(folder), keep, unsaved_limit_s=unsaved_limit_s, warn=warn)
        self._unlabelled = unlabelled
        self._show = show
        self.warn = warn
        self._terminated = threading.Event()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """SIGTERM is a notice inside it. One that no step has answered ends it with Stopped."""
        with sigterm_noted() as self._terminated:
            yield
        self.noticed(0, False)

    def wrap(self, network: nn.Module) -> nn.Module:
        return network

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[object]:
        return contextlib.nullcontext()

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def sync_buffers(self, network: nn.Module) -> None:
        pass

    def once_per_node(self, name: str, make: Callable[[], pa.Table]) -> pa.Table:
        return make()

    def unlabelled(self, share: BatchSlice, begin: TrainState) -> Iterator[Batch]:
        return self._unlabelled(share, begin.unlabelled_images)

    def stream_state(self, step: int) -> StreamState | None:
        return None

    def checkpoint_requests(self) -> int:
        return int(self._terminated.is_set())

    def noticed(self, step: int, saved: bool) -> None:
        if not self._terminated.is_set():
            return
        if step == 0:
            raise Stopped(STOPPED, "stage/stopped")
        checkpoint = "is saved, the same command continues from it" if saved else "could not be written"
        raise Stopped(f"stopped by SIGTERM; the checkpoint of step {step} {checkpoint}", "stage/stopped")

    def set_phase(self, step: int, what: str) -> None:
        pass

    def measured(self, values: Mapping[str, float]) -> None:
        pass

    def log(self, row: Row) -> None:
        self._show(row)
