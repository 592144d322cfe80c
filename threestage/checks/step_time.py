"""How long one training step of a stage takes on a device, and in what memory: the stage's own networks, optimiser and loop,
on random images. In this process, or in one of its own:

echo SPECIFICATION | python -m threestage.checks.step_time      # prints a MeasuredStep per stage, each a line of JSON
"""

import contextlib
import itertools
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import IO, Any

import torch

from threestage.allocator import disable_malloc_trim
from threestage.augment.draws import Draws
from threestage.augment.views import AugmentSettings, Extent
from threestage.config import Config, StageName
from threestage.data.batches import Batch, BatchSlice, TimedIterator, canvas_size, share_of
from threestage.data.records import Manifest
from threestage.data.split import Split
from threestage.errors import reason_of
from threestage.models.network import build_network
from threestage.prediction.pseudo_masks import predict_images
from threestage.run.stages import StageTask, build_state
from threestage.settings import Settings
from threestage.training.checkpoint import TrainState
from threestage.training.loop import StageLength, compiled, fit
from threestage.training.step import StepInputs, StepSource
from threestage.training.step_inputs import BatchStream, SupervisedSteps, ThreeTaskSteps
from threestage.training.worker import LocalWorker

WARM_UP_STEPS = 2
MOST_STEPS = 30
LIMIT_SECONDS = 20.0
IMAGE_TURNS, IMAGE_SECONDS = 5, 2.0
NEVER = 10**9  # a step that is not reached

START_S, STEP_S = 60.0, 40.0  # of the process, and of a step

Mark = float | torch.cuda.Event


@dataclass(frozen=True)
class StepTime:
    """`seconds` of a step and the `images` that a worker takes in it. `memory_bytes`: the most that the device's allocator
    held, None on a CPU. `device`: its name."""

    seconds: float
    memory_bytes: int | None
    images: int
    device: str


def measure_step(
    config: Config, stage: StageName, manifest: Manifest, device: torch.device, limit_s: float = LIMIT_SECONDS
) -> StepTime:
    """The median of up to 30 steps of one worker with its share of the batch, after 2 that do not count. No new step begins
    once `limit_s` have passed and there was one; where only the first 2 were made, the last of them counts.

    The batch is random, on the device already, and of the size of the data set's canvas: no waiting for data is in the
    figure, no averaging of gradients over workers, no evaluation, no checkpoint and no start-up. Pretrained weights are not
    read. Writes nothing.
    """
    config = _without_weights(config.for_stage(stage))
    with tempfile.TemporaryDirectory() as folder:
        state = build_state(_task(config, stage, folder), config, len(manifest.classes), device)
        worker = LocalWorker(folder, config.training.checkpoints_kept, lambda share, first_image: iter(()))
        worker.device = device
        source = _Watched(_source(config, stage, state, manifest, device), device, limit_s)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with contextlib.suppress(_Enough):
            _train(config, stage, state, worker, source)
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return StepTime(source.seconds(), memory, source.images, _name(device))


def measure_image(config: Config, manifest: Manifest, device: torch.device) -> float:
    """Seconds of predicting one random image of the data set's mean size: the median of at most IMAGE_TURNS forward passes of
    two images in IMAGE_SECONDS, after one that does not count."""
    settings, sizes = _without_weights(config).network, manifest.sizes
    network = build_network(settings, len(manifest.classes)).to(device).eval()
    height, width = (max(1, round(side / config.data.downscale)) for side in (sizes.mean_height, sizes.mean_width))
    shape, random = (2, settings.channels, height, width), torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)
    seconds = list[float]()
    while len(seconds) < 2 or (len(seconds) <= IMAGE_TURNS and sum(seconds) * len(images) < IMAGE_SECONDS):
        start = time.perf_counter()
        list(predict_images(network, list(images.movedim(1, 3).numpy()), 2, device))
        seconds.append((time.perf_counter() - start) / len(images))
    return median(seconds[1:])


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"a CPU with {threads} thread{'s' if threads > 1 else ''}"


def _train(config: Config, stage: StageName, state: TrainState, worker: LocalWorker, source: StepSource) -> None:
    never = {"log_every": NEVER, "checkpoint_every": NEVER, "evaluate_every": NEVER}
    fit(
        state, worker, source, lambda network: {}, StageLength(NEVER, (0, 0), (config.seed, stage)),
        config.training.model_copy(update=never), config.optimiser, config.ema,
    )  # fmt: skip


def _without_weights(config: Config) -> Config:
    network = config.network.model_copy(update={"weights": None, "pretrained": False})
    return config.model_copy(update={"network": network})


def _task(config: Config, stage: StageName, folder: str) -> StageTask:
    return StageTask(
        stage=stage,
        config=config.model_dump(mode="json"),
        manifest_version=1,
        split=Split(labelled=(), validation=(), validation_split="carved"),
        folder=folder,
        pool=None,
        pseudo_masks=None,
        previous_model=None,
    )


class _Enough(Exception):
    """Enough steps were measured."""


class _Watched:
    """A source that marks when each step begins, and ends the loop after enough of them.

    On a GPU the marks are events of its stream: nothing is made to wait that would not wait in training.
    """

    def __init__(self, source: StepSource, device: torch.device, limit_s: float) -> None:
        self._source, self._device = source, device
        self._marks: list[Mark] = []
        self._end = time.perf_counter() + limit_s
        self.images = 0

    @property
    def waited(self) -> float:
        return self._source.waited

    def draw(self, step: int) -> StepInputs:
        self._marks.append(self._mark())
        late = time.perf_counter() > self._end and len(self._marks) > 1
        if late or len(self._marks) > WARM_UP_STEPS + MOST_STEPS:
            raise _Enough
        inputs = self._source.draw(step)
        self.images = len(inputs.image_ids)
        return inputs

    def _mark(self) -> Mark:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        """Of the median step."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        steps = [_between(*pair) for pair in itertools.pairwise(self._marks)]
        return median(steps[WARM_UP_STEPS:] or steps[-1:])


def _between(start: Any, end: Any) -> float:
    """Seconds between two marks of one device."""
    return start.elapsed_time(end) / 1000 if isinstance(start, torch.cuda.Event) else end - start


def _source(
    config: Config, stage: StageName, state: TrainState, manifest: Manifest, device: torch.device
) -> StepSource:
    """What make_source gives, over one random batch for ever."""
    settings, classes = config.stage(stage), len(manifest.classes)
    shape = (config.network.channels, *_canvas(manifest, config.data.downscale, config.augment))

    def feed(batch_size: int, *maps: str) -> BatchStream:
        last = config.cluster.most_workers - 1  # of shares that differ it has the largest
        share = share_of(batch_size, config.training.batch_scope, last, last + 1)
        return BatchStream(
            TimedIterator(itertools.repeat(_random_batch(share, shape, classes, maps).to(device))), share
        )

    if settings.unlabelled_batch == 0:
        return SupervisedSteps(config, feed(settings.labelled_batch, "mask"))
    assert state.teacher is not None
    labelled = feed(settings.labelled_batch, "mask", "pseudo_mask", "confidence")
    unlabelled = feed(settings.unlabelled_batch, "pseudo_mask", "confidence")
    return ThreeTaskSteps(stage, config, compiled(state.teacher, config.training), labelled, unlabelled)


def _canvas(manifest: Manifest, downscale: int, augment: AugmentSettings) -> tuple[int, int]:
    sizes = manifest.sizes
    return canvas_size((sizes.max_height // downscale, sizes.max_width // downscale), augment)


def _random_batch(share: BatchSlice, shape: tuple[int, int, int], classes: int, maps: tuple[str, ...]) -> Batch:
    """Full canvases (C,H,W) of noise; every pixel of a mask has a class."""
    random, canvas = torch.Generator().manual_seed(0), shape[1:]

    def draw(end: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, end, shape, generator=random, dtype=torch.uint8)

    ends = {"mask": classes, "pseudo_mask": classes, "confidence": 256}
    return Batch(
        draw(256, share.count, *shape),
        Extent.whole(torch.tensor([canvas] * share.count), Draws(random)),
        {name: draw(ends[name], share.count, *canvas) for name in maps},
        tuple(f"random{number}" for number in range(share.count)),
    )


# ---- All stages, in this process or in one of its own


class MeasuredStep(Settings):
    """Of one stage. `seconds`: of a step; beside a `warning` it takes longer. `image_seconds`: of predicting one image.
    `memory_bytes`: on a GPU the most that torch held of it, else the
    most that the process was resident in, libraries included; `device_bytes`: what the GPU, or the machine, has. `problem`:
    why no step could be computed; `warning`: why none was."""

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
    """`use_gpu`: the workers have one. `stage_seconds`: after which no new step of a stage begins."""

    config: Config
    manifest: Manifest
    use_gpu: bool
    stage_seconds: float = LIMIT_SECONDS


def measure_steps(specification: StepSpecification) -> Iterator[MeasuredStep]:
    """In this process, whose memory is kept and whose threads are those of a worker."""
    disable_malloc_trim()
    torch.set_num_threads(max(1, int(specification.config.cluster.cpus_per_worker)))
    device = torch.device("cuda" if specification.use_gpu else "cpu")
    image_seconds = 0.0  # the same for all stages
    for stage in specification.config.stage_names:
        measured = _measured(specification, stage, device, image_seconds)
        image_seconds = measured.image_seconds
        yield measured


def _measured(
    specification: StepSpecification, stage: StageName, device: torch.device, image_seconds: float
) -> MeasuredStep:
    """`image_seconds`: as it is known already, or 0."""
    capacity = torch.cuda.get_device_properties(device).total_memory if specification.use_gpu else machine_bytes()
    try:
        config = specification.config.for_manifest(specification.manifest)
        step = measure_step(config, stage, specification.manifest, device, specification.stage_seconds)
        image_seconds = image_seconds or measure_image(config, specification.manifest, device)
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
    """In a new process, which is ended when a stage takes longer than its seconds and STEP_S."""
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
                yield from _read(process, specification, complaints)
            finally:
                process.kill()


def _read(
    process: "subprocess.Popen[bytes]", specification: StepSpecification, complaints: IO[bytes]
) -> Iterator[MeasuredStep]:
    lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    threading.Thread(target=_pass_on, args=(process.stdout, lines), daemon=True).start()
    limit = START_S + specification.stage_seconds + STEP_S
    for stage in specification.config.stage_names:
        try:
            line = lines.get(timeout=limit)
        except queue.Empty:
            yield too_slow(stage)
            return
        if line is None:
            yield MeasuredStep(stage=stage, problem=_why_it_ended(process.wait(), complaints))
            return
        yield MeasuredStep.model_validate_json(line)
        limit = specification.stage_seconds + STEP_S


def too_slow(stage: StageName) -> MeasuredStep:
    return MeasuredStep(
        stage=stage, seconds=STEP_S, warning=f"not measured: its first step takes longer than {STEP_S:.0f} s"
    )


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


if __name__ == "__main__":
    main()
