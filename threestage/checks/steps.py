"""A dry forward and backward pass of each stage's network, in a process of its own: its memory, and how long a step takes.
Also the lines that `threestage check` prints of it.

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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import torch

from threestage.allocator import disable_malloc_trim
from threestage.checks.result import CheckResult, gibibytes
from threestage.checks.step_time import measure_image, measure_step
from threestage.config import Config, StageName
from threestage.data.records import Manifest
from threestage.errors import reason_of
from threestage.format import duration
from threestage.settings import Settings

START_S, STAGE_S = 60.0, 60.0  # of the process, and of each stage


class MeasuredStep(Settings):
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
    warning: str | None = None


class StepSpecification(Settings):
    """`use_gpu`: the workers have one."""

    config: Config
    manifest: Manifest
    use_gpu: bool


def measure_steps(specification: StepSpecification) -> Iterator[MeasuredStep]:
    """In this process, whose memory is kept and whose threads are those of a worker."""
    disable_malloc_trim()
    torch.set_num_threads(max(1, int(specification.config.cluster.cpus_per_worker)))
    device = torch.device("cuda" if specification.use_gpu else "cpu")
    for stage in specification.config.stage_names:
        yield _measured(specification, stage, device)


def _measured(specification: StepSpecification, stage: StageName, device: torch.device) -> MeasuredStep:
    capacity = torch.cuda.get_device_properties(device).total_memory if specification.use_gpu else machine_bytes()
    try:
        step = measure_step(specification.config, stage, specification.manifest, device)
        image_seconds = measure_image(specification.config, specification.manifest, device)
    except torch.OutOfMemoryError as error:
        return MeasuredStep(
            stage=stage, on_gpu=True, device_bytes=capacity, problem=f"does not fit: {_first_line(error)}"
        )
    except Exception as error:  # whatever a step of the run would end with
        return MeasuredStep(stage=stage, problem=f"no step could be computed: {_first_line(error)}")
    return MeasuredStep(
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


def measure_here(specification: StepSpecification) -> Iterator[MeasuredStep]:
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
) -> Iterator[MeasuredStep]:
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
            yield MeasuredStep(stage=stage, problem=_why_it_ended(process.wait(), complaints))
            return
        yield MeasuredStep.model_validate_json(line)
        limit = STAGE_S


def too_slow(stage: StageName) -> MeasuredStep:
    return MeasuredStep(stage=stage, warning=f"not measured: its first steps take longer than {STAGE_S:.0f} s")


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
    for measured in measure_steps(StepSpecification.model_validate_json(sys.stdin.read())):
        print(measured.model_dump_json(), flush=True)


# ---- What threestage check prints of it

LESS = (
    "ask for less memory: training.accumulate=2, a smaller {stage}.labelled_batch{or_unlabelled} or augment.crop_size"
)
LEFT_OUT = "besides: the pseudo-masks, waiting for data, evaluation, averaging gradients over workers, start-up"


def step_line(config: Config, measured: MeasuredStep, workers: int, seconds: float) -> CheckResult:
    """`workers`: those that share the machine on which it was measured."""
    line = CheckResult(measured.stage, "", seconds, warning=measured.warning)
    if measured.problem is not None:
        if measured.on_gpu or "memory" in measured.problem:
            return line._replace(problem=f"{measured.problem}; {_less(measured)}", code="check/memory")
        return line._replace(problem=measured.problem, code="check/no-step")
    if measured.warning is not None:
        return line
    what = "torch's tensors" if measured.on_gpu else "the process's resident memory, libraries included"
    value = (
        f"{measured.images} images a step: {duration_of(measured.seconds)} on {measured.device}, at most "
        f"{gibibytes(measured.memory_bytes)} of {gibibytes(measured.device_bytes)} ({what})"
    )
    too_much = _too_much(config, measured, workers)
    return line._replace(value=value, problem=too_much, code=too_much and "check/memory")


def _too_much(config: Config, measured: MeasuredStep, workers: int) -> str | None:
    """Of several workers on one device."""
    sharing = max(1, int(1 / config.cluster.gpus_per_worker)) if 0 < config.cluster.gpus_per_worker < 1 else 1
    together = measured.memory_bytes * (sharing if measured.on_gpu else workers)
    if together <= measured.device_bytes:
        return None
    many = sharing if measured.on_gpu else workers
    whose = f"a GPU (cluster.gpus_per_worker={config.cluster.gpus_per_worker:g})" if measured.on_gpu else "this machine"
    return (
        f"{many} workers on {whose} need {gibibytes(together)} and there are {gibibytes(measured.device_bytes)}: "
        f"fewer cluster.workers, or {_less(measured)}"
    )


def _less(measured: MeasuredStep) -> str:
    unlabelled = "" if measured.stage == "stage1" else f" or {measured.stage}.unlabelled_batch"
    return LESS.format(stage=measured.stage, or_unlabelled=unlabelled)


def duration_line(config: Config, measured: Sequence[MeasuredStep]) -> CheckResult:
    """Of all stages whose step was measured, one after the other."""
    known = {one.stage: one.seconds for one in measured if one.seconds}
    missing = [stage for stage in config.stage_names if stage not in known]
    if not known:
        return CheckResult("duration", "", warning="not estimated: no step was measured")
    each = {stage: config.stage(stage).steps * seconds for stage, seconds in known.items()}
    parts = " + ".join(
        f"{stage} {config.stage(stage).steps:,} steps {duration_of(seconds)}" for stage, seconds in each.items()
    )
    total = f" = {duration_of(sum(each.values()))}" if len(each) > 1 else ""
    value = f"{parts}{total}; {LEFT_OUT}"
    if missing:
        return CheckResult("duration", value, warning=f"{value}; {' and '.join(missing)} could not be measured")
    return CheckResult("duration", value)


def duration_of(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else duration(seconds / 3600)


if __name__ == "__main__":
    main()
