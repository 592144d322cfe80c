"""What the benchmarks share: real images, CPU seconds and memory of whole process trees, tables."""

import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

CAMVID = Path(__file__).parents[3] / "shared" / "data" / "camvid" / "train" / "images"
TICK = os.sysconf("SC_CLK_TCK")


def write_jpegs(folder: Path, count: int) -> str:
    """`count` JPEG files of 480×360 named at random places; returns what they show: CamVid's streets, else noise."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = sorted(CAMVID.glob("*.jpg"))[:200]
    contents = [path.read_bytes() for path in sources] or [_noise(seed) for seed in range(20)]
    for index in range(count):
        (folder / f"{(index * 2654435761) % 2**32:010d}.jpg").write_bytes(contents[index % len(contents)])
    return "CamVid" if sources else "noise"


def _noise(seed: int) -> bytes:
    import io

    stream = io.BytesIO()
    small = np.random.default_rng(seed).integers(0, 255, (45, 60, 3), np.uint8)
    Image.fromarray(small).resize((480, 360)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def tree(root: int, without: Sequence[int] = ()) -> list[int]:
    """Pids of a process and all that descend from it, less some subtrees."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (fields := _stat(int(entry))):
            children.setdefault(int(fields[1]), []).append(int(entry))
    found, waiting = [], [root]
    while waiting:
        pid = waiting.pop()
        if pid not in without:
            found.append(pid)
            waiting += children.get(pid, [])
    return found


def cpu_seconds(pids: Sequence[int]) -> float:
    """User and system time of the processes and of their children that have ended."""
    return sum(sum(map(int, fields[11:15])) for pid in pids if (fields := _stat(pid))) / TICK


def resident_mib(pid: int) -> float:
    """Resident memory that is the process's own (what it shares through the object store is not), in MiB."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the command's name."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def inside_cluster(nodes: int, cpus: int) -> bool:
    """True in the driver of a cluster, the one that RAY_ADDRESS names, and connected to it. Where none is named, starts one
    (cluster/local.py) and this program again as its driver, and returns False when that has ended."""
    if "RAY_ADDRESS" in os.environ:
        import ray

        ray.init(log_to_driver=False, logging_level=logging.ERROR)
        return True
    from cluster.local import local_cluster

    with local_cluster(tempfile.mkdtemp(), nodes, cpus, s3={}, mlflow=False) as cluster:
        subprocess.run([sys.executable, *sys.orig_argv[1:]], env=os.environ | cluster.environment, check=True)
    return False


def report(title: str, rows: Sequence[Mapping[str, object]], to: str | None) -> None:
    """Print the rows as a table; write them, with the machine's facts, as JSON to a file where one is named."""
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=140).print(table)
    if to:
        machine = {"cpus": os.cpu_count(), "processor": platform.processor() or platform.machine()}
        Path(to).write_text(json.dumps({"title": title, "machine": machine, "rows": rows}, indent=1) + "\n")
