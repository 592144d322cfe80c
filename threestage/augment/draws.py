"""Random numbers for the rows of a worker's batch, from a place (threestage/seeds.py)."""

import torch

from threestage.seeds import derive_seed


def generator(*place: int | str) -> torch.Generator:
    """A CPU generator seeded for that place."""
    return torch.Generator().manual_seed(derive_seed(*place))


class Draws:
    """Random numbers for the rows of one worker's batch.

    With a share (first row, rows of all workers), a draw is made for the whole global batch and this worker's rows are cut
    out of it: what an image is given does not depend on how many workers there are. Every worker makes the same draws in
    the same order.
    """

    def __init__(self, generator: torch.Generator, first: int = 0, total: int | None = None) -> None:
        self._generator = generator
        self._first = first
        self._total = total

    def uniform(self, count: int, *shape: int) -> torch.Tensor:
        """(count, *shape) float32 in [0,1)."""
        return self._mine(torch.rand(self._rows(count), *shape, generator=self._generator), count)

    def integers(self, low: int, high: int, count: int, *shape: int) -> torch.Tensor:
        """(count, *shape) int64 in [low, high)."""
        return self._mine(torch.randint(low, high, (self._rows(count), *shape), generator=self._generator), count)

    def _rows(self, count: int) -> int:
        return count if self._total is None else self._total

    def _mine(self, drawn: torch.Tensor, count: int) -> torch.Tensor:
        return drawn[self._first : self._first + count]
