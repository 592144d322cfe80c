"""Time and memory of what torch does on a device."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds: on a CPU those that this process took of it, whatever else runs there; on a GPU once its work is done."""
    if device.type == "cpu":
        return time.process_time

    def now() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


class PeakMemory:
    """Bytes that tensors take at most between its making and `stop`, beyond those that were taken at its making.

    On a GPU by its allocator's own count, on a CPU by the allocations and releases that torch's profiler records.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        else:
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profile.start()

    def stop(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        self._profile.stop()
        assert self._profile.profiler is not None
        results: Any = self._profile.profiler.kineto_results
        changes = [event for event in results.events() if event.name() == "[memory]"]
        taken = most = 0
        for change in sorted(changes, key=lambda event: event.start_ns()):
            taken += change.nbytes()
            most = max(most, taken)
        return most


def bytes_of(*holders: nn.Module | torch.optim.Optimizer | None) -> int:
    """Of the parameters and buffers of networks, and of the moments of optimisers."""
    tensors = {id(tensor): tensor for holder in holders if holder is not None for tensor in _tensors(holder)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _tensors(holder: nn.Module | torch.optim.Optimizer) -> Iterator[Tensor]:
    if isinstance(holder, nn.Module):
        yield from (*holder.parameters(), *holder.buffers())
    else:
        yield from (value for state in holder.state.values() for value in state.values() if isinstance(value, Tensor))
