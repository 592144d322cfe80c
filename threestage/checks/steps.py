"""A dry forward and backward pass of each stage's network, in a process of its own: its memory, and how long a step takes.

echo SPECIFICATION | python -m threestage.checks.steps      # prints a Measured per stage, each a line of JSON
"""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

from threestage.allocator import keep_freed_memory
from threestage.config import Config, StageName
from threestage.data.records import Manifest
from threestage.errors import reason_of
from threestage.settings import Settings
from threestage.sweeps.step_time import measure_image, measure_step

START_S, STAGE_S = 60.0, 60.0  # of the process, and of each stage


class Measured(Settings):
    """Of one stage. `image_seconds`: of predicting one image. `memory_bytes`: on a GPU the most that torch held of it, else the
    most that the process was resident in, libraries included; `device_bytes`: what the GPU, or the machine, has. `problem`:
    why no step could be computed; `doubt`: why none was."""

    stage: StageName
    seconds: float = 0.0
    images: int = 0
    image_seconds: float = 0.0
    device: str = ""
    on_gpu: bool = False
    memory_bytes: int = 0
    device_bytes: int = 0
    problem: str | None = None
    doubt: str | None = None


class Specification(Settings):
    """`use_gpu`: the workers have one."""

    config: Config
    manifest: Manifest
    use_gpu: bool


def measure(specification: Specification) -> Iterator[Measured]:
    """In this process, whose memory is kept and whose threads are those of a worker."""
    keep_freed_memory()
    torch.set_num_threads(max(1, int(specification.config.cluster.cpus_per_worker)))
    device = torch.device("cuda" if specification.use_gpu else "cpu")
    for stage in specification.config.stage_names:
        yield _measured(specification, stage, device)


def _measured(specification: Specification, stage: StageName, device: torch.device) -> Measured:
    capacity = torch.cuda.get_device_properties(device).total_memory if specification.use_gpu else machine_bytes()
    try:
        step = measure_step(specification.config, stage, specification.manifest, device)
        image_seconds = measure_image(specification.config, specification.manifest, device)
    except torch.OutOfMemoryError as error:
        return Measured(stage=stage, on_gpu=True, device_bytes=capacity, problem=f"does not fit: {_first_line(error)}")
    except Exception as error:  # whatever a step of the run would end with
        return Measured(stage=stage, problem=f"no step could be computed: {_first_line(error)}")
    return Measured(
        stage=stage,
        seconds=step.seconds,
        images=step.images,
        image_seconds=image_seconds,
        device=step.device,
        on_gpu=specification.use_gpu,
        memory_bytes=step.memory_bytes or _peak_resident_bytes(),
        device_bytes=capacity,
    )


def _first_line(error: Exception) -> str:
    return reason_of(error).strip().partition("\n")[0][:300]


def _peak_resident_bytes() -> int:
    """The most that this process was resident in; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def machine_bytes() -> int:
    """Memory of this machine, or of the container that this process is in."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        return min(physical, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return physical


def measure_here(specification: Specification) -> Iterator[Measured]:
    """In a new process, which is ended when a stage takes longer than STAGE_S."""
    hidden = {} if specification.use_gpu else {"CUDA_VISIBLE_DEVICES": ""}
    with (
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as complaints,
    ):
        given.write(specification.model_dump_json().encode())
        given.seek(0)
        command, environment = [sys.executable, "-m", __name__], {**os.environ, **hidden}
        with subprocess.Popen(
            command, stdin=given, stdout=subprocess.PIPE, stderr=complaints, env=environment
        ) as process:
            try:
                yield from _read(process, specification.config.stage_names, complaints)
            finally:
                process.kill()


def _read(
    process: "subprocess.Popen[bytes]", stages: tuple[StageName, ...], complaints: IO[bytes]
) -> Iterator[Measured]:
    lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    threading.Thread(target=_pass_on, args=(process.stdout, lines), daemon=True).start()
    limit = START_S + STAGE_S
    for stage in stages:
        try:
            line = lines.get(timeout=limit)
        except queue.Empty:
            yield too_slow(stage)
            return
        if line is None:
            yield Measured(stage=stage, problem=_why_it_ended(process.wait(), complaints))
            return
        yield Measured.model_validate_json(line)
        limit = STAGE_S


def too_slow(stage: StageName) -> Measured:
    return Measured(stage=stage, doubt=f"not measured: its first steps take longer than {STAGE_S:.0f} s")


def _pass_on(stream: Any, lines: "queue.SimpleQueue[bytes | None]") -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _why_it_ended(code: int, complaints: IO[bytes]) -> str:
    if code == -signal.SIGKILL:
        return "the process was killed, most likely for want of memory"
    complaints.seek(0)
    said = complaints.read().decode(errors="replace").strip().splitlines()
    return f"no step could be computed: {said[-1] if said else f'exit code {code}'}"


def main() -> None:
    for measured in measure(Specification.model_validate_json(sys.stdin.read())):
        print(measured.model_dump_json(), flush=True)


if __name__ == "__main__":
    main()
