"""How many pixels a forward pass may have: measured on the device with the network itself, before the first image."""

import contextlib
import ctypes
import os
import resource
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from threestage.data.bands import RGB
from threestage.models.network import channels_of

PROBE_SIDES = (192, 448)
"""Of the images that are predicted to measure: what the larger takes more is of its pixels alone."""
MARGIN = 1.25
"""A pass over millions of pixels takes up to a third more for each than one over the probe."""
SHARE = {"cpu": 0.6, "cuda": 0.8}
"""Of the memory that is free: decoded images and what is encoded take the rest."""
LEAST_PIXELS = 2**16
RESET_PEAK = "5"  # proc(5), clear_refs

_bytes_per_pixel: dict[tuple[object, ...], float] = {}
"""By the modules of a network, the device, and what else decides; what weights a network has does not."""

Ask = Callable[[Tensor], object]
"""Predicts images (1,C,H,W) uint8 on the device."""


def most_pixels(network: nn.Module, ask: Ask, device: torch.device, key: tuple[object, ...] = ()) -> int:
    """How many pixels fit into the memory that is free now. `key`: what else than the network decides how much one takes; it
    is measured once in a process for each."""
    place = (str(network), device, *key)
    if place not in _bytes_per_pixel:
        try:
            _bytes_per_pixel[place] = bytes_per_pixel(ask, device, channels_of(network))
        except (torch.OutOfMemoryError, MemoryError):
            return LEAST_PIXELS
    return max(LEAST_PIXELS, int(SHARE[device.type] * free_bytes(device) / _bytes_per_pixel[place]))


def bytes_per_pixel(ask: Ask, device: torch.device, channels: int = RGB) -> float:
    """The most that a forward pass holds at once, for each pixel of its image, in bytes."""
    small, large = PROBE_SIDES
    ask(
        torch.zeros(1, channels, small, small, dtype=torch.uint8, device=device)
    )  # what the first pass of all takes stays
    growth = _probe(ask, device, large, channels) - _probe(ask, device, small, channels)
    return MARGIN * max(growth / (large**2 - small**2), 1.0)


def free_bytes(device: torch.device) -> int:
    """Of the device; of the CPU this process's share by its threads, as the container or the machine allows."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    share = min(1.0, torch.get_num_threads() / len(os.sched_getaffinity(0)))
    return int(share * min(_proc_bytes("meminfo", "MemAvailable"), _free_of_container(), _free_of_process()))


def _probe(ask: Ask, device: torch.device, side: int, channels: int) -> int:
    """Bytes that a pass over a square image takes at its peak."""
    image = torch.zeros(1, channels, side, side, dtype=torch.uint8, device=device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        ask(image)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    return _resident_growth(lambda: ask(image))


def _resident_growth(action: Callable[[], object]) -> int:
    """By how much this process's resident memory grows at its peak, in bytes: as the kernel counts it, or, where that cannot be
    reset, by looking every millisecond."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # or freed memory that is kept would be used, and not grow
    try:
        Path("/proc/self/clear_refs").write_text(RESET_PEAK)
        before = _proc_bytes("self/status", "VmRSS")
    except (OSError, KeyError):
        return _watched_growth(action)
    action()
    return _proc_bytes("self/status", "VmHWM") - before


def _watched_growth(action: Callable[[], object]) -> int:
    before, ended = _resident_bytes(), threading.Event()

    def watch() -> int:
        peak = _resident_bytes()
        while not ended.wait(0.001):
            peak = max(peak, _resident_bytes())
        return peak

    with ThreadPoolExecutor(1) as thread:
        peak = thread.submit(watch)
        try:
            action()
        finally:
            ended.set()
    return peak.result() - before


def _proc_bytes(file: str, name: str) -> int:
    """A number of kB below /proc. In self/status, VmRSS: what is resident now; VmHWM: the most that was since the peak was
    reset. KeyError where the system has none."""
    lines = (line.partition(":") for line in Path("/proc", file).read_text().splitlines())
    return int({key: value for key, _, value in lines}[name].split()[0]) * 1024


def _resident_bytes() -> int:
    """Of this process, less files that are mapped, such as code."""
    _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
    return (int(resident) - int(shared)) * resource.getpagesize()


def _free_of_container() -> float:
    """By the limits of the control groups that this process is in, versions 2 and 1; what can be reclaimed is free."""
    free = float("inf")
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kinds, below = line.split(":", 2)
            if kinds and "memory" not in kinds.split(","):
                continue
            root = Path("/sys/fs/cgroup/memory" if kinds else "/sys/fs/cgroup")
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if kinds else ("memory.max", "memory.current")
            folder = root / below.strip("/")
            for group in (folder, *folder.parents):
                if group.is_relative_to(root):
                    free = min(free, _free_of_group(group, *names))
    return free


def _free_of_group(group: Path, limit: str, usage: str) -> float:
    with contextlib.suppress(OSError, ValueError, KeyError):  # no limit, or none that can be seen from here
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        reclaimable = int(counts.get("total_inactive_file") or counts["inactive_file"])
        return int((group / limit).read_text()) - int((group / usage).read_text()) + reclaimable
    return float("inf")


def _free_of_process() -> float:
    """By `ulimit -v`."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return float("inf")
    return limit - int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
