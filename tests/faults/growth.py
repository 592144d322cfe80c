"""How fast processes grow: memory and open files, sampled for as long as they live."""

import os
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

WARM_UP_S = 60.0  # of each process: imports, caches, buffers


class Sample(NamedTuple):
    second: float
    memory_mib: float  # of its own: without files and shared memory
    open_files: int


class Growth(NamedTuple):
    """`hours`: of all processes of the kind together, after their warm-up."""

    hours: float
    processes: int
    mib_per_hour: float
    files_per_hour: float
    most_mib: float
    most_files: int


class GrowthWatch:
    """Samples of processes by kind; a process that ends, and one that comes, have other ids."""

    def __init__(self) -> None:
        self._samples: dict[str, dict[int, list[Sample]]] = defaultdict(lambda: defaultdict(list))

    def look(self, kind: str, processes: Iterable[int]) -> None:
        for process in processes:
            try:
                status = Path(f"/proc/{process}/status").read_text()
                files = len(os.listdir(f"/proc/{process}/fd"))
            except OSError:  # it has just ended
                continue
            if (found := re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)) is not None:
                sample = Sample(time.monotonic(), int(found[1]) / 1024, files)
                self._samples[kind][process].append(sample)

    def growth(self) -> dict[str, Growth]:
        """Of each kind that was seen for longer than the warm-up."""
        found = {kind: _growth(list(of_kind.values())) for kind, of_kind in self._samples.items()}
        return {kind: growth for kind, growth in found.items() if growth is not None}


def _growth(processes: list[list[Sample]]) -> Growth | None:
    """One slope for all processes of a kind: each has its own level, so that a restart is no growth and hides none."""
    warm = [[sample for sample in samples if sample.second - samples[0].second > WARM_UP_S] for samples in processes]
    warm = [samples for samples in warm if len(samples) > 2]
    if not warm:
        return None
    over = product = of_files = 0.0
    for samples in warm:
        second, mib, files = (statistics.fmean(values) for values in zip(*samples, strict=True))
        for sample in samples:
            over += (sample.second - second) ** 2
            product += (sample.second - second) * (sample.memory_mib - mib)
            of_files += (sample.second - second) * (sample.open_files - files)
    every = [sample for samples in warm for sample in samples]
    return Growth(
        hours=sum(samples[-1].second - samples[0].second for samples in warm) / 3600,
        processes=len(warm),
        mib_per_hour=3600 * product / over,
        files_per_hour=3600 * of_files / over,
        most_mib=max(sample.memory_mib for sample in every),
        most_files=max(sample.open_files for sample in every),
    )
