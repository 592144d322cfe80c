"""The GPU's path on a pretended GPU: the numbers are the CPU's to the bit, and no step waits for the device.

A GPU's own kernels round in their own way; what is held here is which operations run, on which device, and in what order.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.conftest import local_config
from tests.pretended_gpu import GPU, pretended_gpu
from tests.unit.run.test_switches import ONE_STAGE, SWITCHES
from threestage.augment import geometry, views
from threestage.augment.draws import Draws, generator
from threestage.augment.plans import StrongSettings
from threestage.augment.views import AugmentSettings, Extent, strong_view, weak_view
from threestage.config import Config, StageName
from threestage.data.batches import Batch, BatchSlice, SampleSet, TimedIterator, send
from threestage.data.pool import data_set_files, pseudo_mask_uri
from threestage.data.records import labelled_rows, load_manifest
from threestage.data.samples import TableSamples
from threestage.data.storage import read_table
from threestage.evaluation import evaluate
from threestage.models.network import Auxiliary, Network, build_network
from threestage.models.settings import InferenceSettings, NetworkSettings
from threestage.prediction import pool_prediction
from threestage.prediction.pseudo_masks import PoolTask, predict_images
from threestage.prediction.tta import TTASettings, predict_in_windows, predict_with_tta
from threestage.run.stages import auxiliary
from threestage.training import losses
from threestage.training.checkpoint import not_finite
from threestage.training.ema import make_teacher, update_teacher
from threestage.training.loop import NOTICE_LAG, _SyncFlags
from threestage.training.metrics import mean_iou, per_class_iou
from threestage.training.step import StepSource, micro_batches, piece_sums
from threestage.training.step_inputs import BatchStream, SupervisedSteps, ThreeTaskSteps

TILED = 1e-6
"""Of probabilities, which the CPU computes tile by tile."""
CPU, CLASSES, CANVAS = torch.device("cpu"), 3, (40, 48)
COLOURS = {"jitter": 1.0, "grey": 0.5, "blur": 0.5}


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views are made on the CPU too as they are on a GPU."""
    monkeypatch.setattr(views, "_by_pillow", lambda image: False)
    monkeypatch.setattr(pool_prediction, "most_pixels", lambda *arguments: 2**62)  # asks the driver
    geometry._scales.cache_clear()


Run = Callable[[torch.device], Any]


def waits_of(run: Run, rounding: float = 0.0) -> list[str]:
    """Where the host waits for the pretended GPU. What `run` gives must be what it gives on the CPU, to the bit unless the
    arithmetic is another."""
    expected = run(CPU)
    with pretended_gpu() as waits:
        found = tree_map_only(Tensor, lambda one: one.cpu(), run(GPU))
    for mine, theirs in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        if isinstance(mine, Tensor):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=rounding, equal_nan=True)
        else:
            assert mine == theirs
    return [f"{line} ×{times}" for line, times in waits.items()]


def batch_of(count: int, *maps: str) -> Batch:
    random = generator(count)
    height = torch.randint(20, CANVAS[0] + 1, (count,), generator=random)
    size = torch.stack([height, height + CANVAS[1] - CANVAS[0]], dim=1)
    return Batch(
        torch.randint(0, 256, (count, 3, *CANVAS), generator=random, dtype=torch.uint8),
        Extent.whole(size, Draws(random)),
        {name: torch.randint(0, CLASSES, (count, *CANVAS), generator=random, dtype=torch.uint8) for name in maps},
        tuple(f"image{number}" for number in range(count)),
    )


# ---- The pretended GPU


def test_two_devices_do_not_mix() -> None:
    with pretended_gpu():
        host = torch.rand(2, 3)
        device = host.to(GPU)
        for mix in (lambda: host + device, lambda: torch.cat([device, host]), lambda: host[device > 0]):
            with pytest.raises(RuntimeError, match="cuda:0 and on the CPU"):
                mix()
        assert torch.equal((device + torch.tensor(1.0)).cpu(), host + 1), "a number may come from anywhere"
        assert torch.equal(device[torch.tensor([1, 0])].cpu(), host.flip(0))
        assert device.is_cuda and (device + 1).device == GPU and device.cpu().device == CPU


def test_a_wait_is_counted_with_its_line() -> None:
    cut = torch.tensor([[1, 1]] * 2)
    with pretended_gpu() as waits:
        device = torch.rand(3).to(GPU)
        assert device.sum().item() > 0 and not waits, "one that the test itself causes is none"
        assert not not_finite([device])
        ((line, times),) = waits.items()
        assert line.startswith("training/checkpoint.py:") and line.endswith("_local_scalar_dense") and times == 1
        waits.clear()
        copied = Extent.whole(cut, Draws(generator())).map(lambda one: one.to(GPU, non_blocking=True))
        assert not waits and copied.size.is_cuda
        per_class_iou(torch.eye(3).to(GPU))  # stays there
        assert not waits and math.isclose(mean_iou(torch.eye(3).to(GPU)), 1) and len(waits) == 1


# ---- Views


@pytest.mark.parametrize(
    "strong", [{}, COLOURS, {"operations": 8, "probability": 1.0, "levels": (0, 10), "cutouts": 0}]
)
@pytest.mark.parametrize("scale", [{}, {"scale": (0.5, 1.5)}, {"scale": (0.6, 1.4), "scale_step": 0}])
def test_views(strong: dict[str, Any], scale: dict[str, Any]) -> None:
    settings, many = AugmentSettings(crop_size=(32, 24), **scale), StrongSettings(**strong)
    batch = batch_of(16, "mask")

    def made(device: torch.device) -> list[Tensor]:
        draws, moved = Draws(generator(5)), batch.to(device)
        weak = weak_view(moved.image, moved.size, settings, draws)
        seen = strong_view(weak, many, draws)
        mask = weak.warp(moved.maps["mask"])
        return [weak.image, weak.valid, weak.theta, mask, seen.image, seen.valid, seen.theta, seen.warp(mask)]

    assert waits_of(made) == [], "not in the first step either"


def test_crops_around_a_pixel() -> None:
    batch, settings = batch_of(6), AugmentSettings(crop_size=(16, 16), scale=(0.5, 2.0))
    extent = batch.size._replace(pixel=torch.tensor([[3, 5]] * 6))

    def made(device: torch.device) -> list[Tensor]:
        held = extent.map(lambda one: send(one, device))
        view = weak_view(send(batch.image, device), held, settings, Draws(generator(1)))
        return [view.image, view.valid, view.theta]

    assert waits_of(made) == []


# ---- Steps


def source_of(stage: StageName, config: Config, teacher: Network, device: torch.device) -> StepSource:
    part, weight = config.stage(stage), None
    if config.supervised.class_weight > 0:
        weight = torch.linspace(100, 255, 256).byte().to(device)

    def stream(count: int, *maps: str) -> BatchStream:
        batches = repeat(batch_of(count, *maps).to(device))
        return BatchStream(TimedIterator(batches), BatchSlice(0, count, count), weight)

    if part.unlabelled_batch == 0:
        return SupervisedSteps(config, stream(part.labelled_batch, "mask"))
    labelled = stream(part.labelled_batch, "mask", "pseudo_mask", "confidence")
    return ThreeTaskSteps(stage, config, teacher, labelled, stream(part.unlabelled_batch, "pseudo_mask", "confidence"))


@cache
def student_of(settings: NetworkSettings, head: Auxiliary) -> Network:
    return build_network(settings, CLASSES, head).eval()


def copy_on(device: torch.device, network: Network) -> Network:
    return make_teacher(network).to(device)  # type: ignore[return-value]


def steps_forward(stage: StageName, config: Config, steps: int, device: torch.device) -> list[Any]:
    """Views, targets, divisors and losses of the first steps, and the teacher that follows the student."""
    student = student_of(config.network, auxiliary(stage, config))
    teacher, student = copy_on(device, student), copy_on(device, student)
    source, found = source_of(stage, config, teacher, device), list[Any]()
    with torch.no_grad():
        for step in range(steps):
            torch.manual_seed(step)
            inputs = source.draw(step)
            counts = {name: losses.valid_pixels(target) for name, target in inputs.targets.items()} | inputs.divisors
            pieces = micro_batches(len(inputs.image), config.training.accumulate)
            sums = [piece_sums(student, inputs, piece) for piece in pieces]
            total = [losses.total_loss(piece, counts, inputs.weights, 1) for piece in sums]
            update_teacher(teacher, student, 0.5)
            found += [inputs.image, inputs.targets, inputs.pixel_weights, counts, sums, total]
    return [*found, list(teacher.parameters())]


UNSEEN = {"SGD", "EMA that warms up", "class-balanced crops"}  # by the device
TOGETHER = (
    ("everything of UniMatch", "jitter, grey, blur", "class weights"),
    ("cutmix", "dynamic thresholds", "weights by confidence", "hard pixels"),
    ("feature dropout", "feature view as a term", "all pixels", "Dice", "strong views of labelled images"),
    ("second strong view", "complementary dropout", "unlabelled images alone"),
    ("mean teacher",),
    ("plain self-training",),
)
CHANGES: dict[str, dict[str, Any]] = {
    "none": {},
    "one stage": {**ONE_STAGE, "stage1__strong_view": True, "augment__scale": [0.5, 1.5]},
    "channels last": {"training__channels_last": True},
    **{" + ".join(names): {k: v for name in names for k, v in SWITCHES[name].items()} for names in TOGETHER},
}


@pytest.mark.parametrize("name", CHANGES)
def test_steps_forward(name: str) -> None:
    config = local_config(Path("data"), augment__crop_size=[24, 24], **CHANGES[name])
    stages = [stage for stage in config.stage_names if name == "none" or stage != "stage3"]
    steps = 3 if name == "none" else 1
    waits = {stage: waits_of(partial(steps_forward, stage, config, steps)) for stage in stages}
    assert waits == {stage: [] for stage in stages}


def test_every_switch_is_among_them() -> None:
    assert UNSEEN | {name for names in TOGETHER for name in names} == SWITCHES.keys()


def test_a_notice_is_read_late() -> None:
    """A step waits for nothing but the answer of NOTICE_LAG steps before, which has long come."""
    checkpoints = SimpleNamespace(times_overdue=lambda: 0)
    worker: Any = SimpleNamespace(
        rank=0, device=GPU, checkpoints=checkpoints, checkpoint_requests=lambda: 1, sum=lambda one: one
    )
    with pretended_gpu() as waits:
        flags, pixels = _SyncFlags(worker), {"supervised_loss": torch.tensor(7.0, dtype=torch.float64).to(GPU)}
        heard = [flags.sync_flags(pixels)[1] for _ in range(NOTICE_LAG)]
        assert not waits and not any(heard)
        counts, noticed = flags.sync_flags(pixels)
        assert noticed and counts["supervised_loss"].item() == 7
    assert [line.split()[1] for line in waits] == ["event"]


# ---- Evaluation and prediction


@pytest.fixture(scope="module")
def network() -> Network:
    return build_network(local_config(Path("data")).network, 4, "none", 0).eval()


@pytest.fixture(scope="module")
def samples(scenes: Path) -> SampleSet:
    return SampleSet(TableSamples(labelled_rows(str(scenes), load_manifest(str(scenes)), "train"))[:12], 1)


@pytest.mark.parametrize("window", [None, (48, 40)])
def test_evaluation(network: Network, samples: SampleSet, window: tuple[int, int] | None) -> None:
    inference = InferenceSettings(window=window, overlap="mean" if window is None else "hann")

    def counted(device: torch.device) -> list[Tensor]:
        return list(evaluate(copy_on(device, network), samples, 4, device, inference=inference, batch_size=2))

    (wait,) = waits_of(counted)
    assert wait.startswith("evaluation.py:") and wait.endswith("cuda to cpu ×2"), "at the end, not for each batch"


@pytest.mark.parametrize(
    "protocol",
    [
        {"flip": True, "scales": (0.5, 1.5)}, {"window": (24, 32)},
        {"window": (24, 32), "stride": (16, 16), "overlap": "hann", "flip": True},
    ],
)  # fmt: skip
def test_prediction(network: Network, protocol: dict[str, Any]) -> None:
    image, settings = batch_of(3).image, TTASettings(**protocol)

    def whole(device: torch.device) -> Any:
        return predict_with_tta(copy_on(device, network), send(image, device), settings, 8)

    def too_large(device: torch.device) -> Any:
        return predict_in_windows(copy_on(device, network), send(image, device), settings, 8, 900)

    assert waits_of(whole, TILED) == waits_of(too_large, TILED) == []


def test_images_of_any_size(network: Network) -> None:
    images = [image[:, : 40 - index].movedim(0, 2).numpy() for index, image in enumerate(batch_of(4).image)]
    (wait,) = waits_of(lambda device: list(predict_images(copy_on(device, network), images, 2, device)), TILED)
    assert "cuda to cpu" in wait, "what is predicted is read"


def test_pseudo_masks(network: Network, scenes: Path, tmp_path: Path) -> None:
    files = data_set_files(str(scenes), load_manifest(str(scenes)))[:1]

    def predicted(device: torch.device) -> Any:
        task = PoolTask(
            destination=str(tmp_path / device.type), model_digest="m", num_classes=4, downscale=1, batch_size=3,
            max_image_pixels=10**6, used_ids=frozenset(), excluded_ids=frozenset(),
        )  # fmt: skip
        (report,) = pool_prediction.predict_files(copy_on(device, network), task, files, device)
        return read_table(pseudo_mask_uri(task.destination, files[0])).to_pylist(), report.model_dump()

    assert {line.split()[1] for line in waits_of(predicted)} == {"event"}, "in the threads that encode"
