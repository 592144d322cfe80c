"""What the training loop needs from its surroundings, and the version of it for a single process."""

import io
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Protocol

import torch
from torch import Tensor, nn

from threestage.data import storage
from threestage.data.batches import Batch

Row = dict[str, float]  # "step" and the values measured there


class Worker(Protocol):
    """One process of a stage. Every rank makes the same calls in the same order."""

    rank: int
    world_size: int
    device: torch.device

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network as it is called in a step: gradients averaged over the workers, batch norm synchronised."""

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor's sum over all workers."""

    def share_buffers(self, network: nn.Module) -> None:
        """Make the network's running statistics the same on all workers."""

    def unlabelled(self, first_step: int) -> Iterator[Batch]:
        """This worker's share of the unlabelled batches from `first_step` on."""

    def latest_checkpoint(self) -> bytes | None:
        """The last checkpoint, or None when the stage has not saved one."""

    def save(self, row: Row, write: Callable[[IO[bytes]], None]) -> None:
        """Keep what `write` puts into a file as the checkpoint of row["step"]; only rank 0's counts."""

    def log(self, row: Row) -> None:
        """Show how far the stage is. Losing it loses nothing."""


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class LocalWorker:
    """A Worker that is alone: checkpoints lie in `<folder>/checkpoints`, the newest two are kept."""

    rank = 0
    world_size = 1

    def __init__(
        self,
        folder: str,
        unlabelled: Callable[[int], Iterator[Batch]],
        show: Callable[[Mapping[str, float]], None] = lambda row: None,
    ) -> None:
        self.device = default_device()
        self._checkpoints = storage.join(folder, "checkpoints")
        self._unlabelled = unlabelled
        self._show = show

    def wrap(self, network: nn.Module) -> nn.Module:
        return network

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def share_buffers(self, network: nn.Module) -> None:
        pass

    def unlabelled(self, first_step: int) -> Iterator[Batch]:
        return self._unlabelled(first_step)

    def latest_checkpoint(self) -> bytes | None:
        saved = self._saved()
        return storage.read_bytes(saved[-1]) if saved else None

    def save(self, row: Row, write: Callable[[IO[bytes]], None]) -> None:
        content = io.BytesIO()
        write(content)
        storage.write_bytes(storage.join(self._checkpoints, f"step-{int(row['step']):09d}.pt"), content.getvalue())
        for old in self._saved()[:-2]:
            storage.delete(old)
        self.log(row)

    def log(self, row: Row) -> None:
        self._show(row)

    def _saved(self) -> list[str]:
        return storage.list_files(self._checkpoints)
