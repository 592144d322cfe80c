"""How long one training step of a stage takes on a device: the stage's own networks, optimiser and loop, on random images."""

import contextlib
import itertools
import tempfile
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from threestage.augment.draws import Draws
from threestage.augment.views import AugmentSettings, Extent
from threestage.config import Config, StageName
from threestage.data.batches import Batch, BatchSlice, TimedIterator, canvas_size, share_of
from threestage.data.records import Manifest
from threestage.data.split import Split
from threestage.models.network import build_network
from threestage.prediction.pseudo_masks import predict_images
from threestage.run.stages import StageTask, build_state
from threestage.training.checkpoint import TrainState
from threestage.training.loop import StageLength, compiled, fit
from threestage.training.step import StepInputs, StepSource
from threestage.training.step_inputs import BatchStream, SupervisedSteps, ThreeTaskSteps
from threestage.training.worker import LocalWorker

WARM_UP_STEPS = 2
LEAST_STEPS, MOST_STEPS = 3, 30
LIMIT_SECONDS = 20.0
IMAGE_TURNS = 5
NEVER = 10**9  # a step that is not reached

Mark = float | torch.cuda.Event


@dataclass(frozen=True)
class StepTime:
    """`seconds` of a step and the `images` that a worker takes in it. `memory_bytes`: the most that the device's allocator
    held, None on a CPU. `device`: its name."""

    seconds: float
    memory_bytes: int | None
    images: int
    device: str


def measure_step(config: Config, stage: StageName, manifest: Manifest, device: torch.device) -> StepTime:
    """The median of 3 to 30 steps of one worker with its share of the batch, after 2 that do not count; no new step begins
    once 20 s have passed and 3 were measured.

    The batch is random, on the device already, and of the size of the data set's canvas: no waiting for data is in the
    figure, no averaging of gradients over workers, no evaluation, no checkpoint and no start-up. Pretrained weights are not
    read. Writes nothing.
    """
    config = _without_weights(config.for_stage(stage))
    with tempfile.TemporaryDirectory() as folder:
        state = build_state(_task(config, stage, folder), config, len(manifest.classes), device)
        worker = LocalWorker(folder, config.training.checkpoints_kept, lambda share, first_image: iter(()))
        worker.device = device
        source = _Watched(_source(config, stage, state, manifest, device), device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with contextlib.suppress(_Enough):
            _train(config, stage, state, worker, source)
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return StepTime(source.seconds(), memory, source.images, _name(device))


def measure_image(config: Config, manifest: Manifest, device: torch.device) -> float:
    """Seconds of predicting one random image of the data set's mean size: the median of IMAGE_TURNS forward passes of two
    images, after one that does not count."""
    settings, sizes = _without_weights(config).network, manifest.sizes
    network = build_network(settings, len(manifest.classes)).to(device).eval()
    height, width = (max(1, round(side / config.data.downscale)) for side in (sizes.mean_height, sizes.mean_width))
    images = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seconds = []
    for _ in range(1 + IMAGE_TURNS):
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

    def __init__(self, source: StepSource, device: torch.device) -> None:
        self._source, self._device = source, device
        self._marks: list[Mark] = []
        self._started = time.perf_counter()
        self.images = 0

    @property
    def waited(self) -> float:
        return self._source.waited

    def draw(self, step: int) -> StepInputs:
        if step >= WARM_UP_STEPS:
            self._marks.append(self._mark())
        else:
            self._started = time.perf_counter()
        measured, late = len(self._marks) - 1, time.perf_counter() - self._started > LIMIT_SECONDS
        if measured >= MOST_STEPS or (late and measured >= LEAST_STEPS):
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
        return median(_between(*pair) for pair in itertools.pairwise(self._marks))


def _between(start: Any, end: Any) -> float:
    """Seconds between two marks of one device."""
    return start.elapsed_time(end) / 1000 if isinstance(start, torch.cuda.Event) else end - start


def _source(
    config: Config, stage: StageName, state: TrainState, manifest: Manifest, device: torch.device
) -> StepSource:
    """What make_source gives, over one random batch for ever."""
    settings, classes = config.stage(stage), len(manifest.classes)
    canvas = _canvas(manifest, config.data.downscale, config.augment)

    def feed(batch_size: int, *maps: str) -> BatchStream:
        last = config.cluster.most_workers - 1  # of shares that differ it has the largest
        share = share_of(batch_size, config.training.batch_scope, last, last + 1)
        return BatchStream(
            TimedIterator(itertools.repeat(_random_batch(share, canvas, classes, maps).to(device))), share
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


def _random_batch(share: BatchSlice, canvas: tuple[int, int], classes: int, maps: tuple[str, ...]) -> Batch:
    """Full canvases of noise; every pixel of a mask has a class."""
    random = torch.Generator().manual_seed(0)

    def draw(end: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, end, shape, generator=random, dtype=torch.uint8)

    ends = {"mask": classes, "pseudo_mask": classes, "confidence": 256}
    return Batch(
        draw(256, share.count, 3, *canvas),
        Extent.whole(torch.tensor([canvas] * share.count), Draws(random)),
        {name: draw(ends[name], share.count, *canvas) for name in maps},
        tuple(f"random{number}" for number in range(share.count)),
    )
