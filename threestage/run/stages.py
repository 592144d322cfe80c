"""What stage 1, 2 and 3 each build, train and publish (method.md).

Their steps are in training/step_inputs.py, the loop in training/loop.py.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from threestage.calibration import Calibrator, training_sample
from threestage.config import STAGES, Config, StageName
from threestage.data import storage
from threestage.data.bands import Bands
from threestage.data.batches import (
    Batch,
    BatchSlice,
    SampleSet,
    TimedIterator,
    batches,
    canvas_size,
    label_weights,
    max_shard_size,
    prefetch,
    share_of,
)
from threestage.data.datasets import labelled_set, pool_canvas, pool_set, validation_set
from threestage.data.pool import least_agreement, load_pool, read_index
from threestage.data.records import Manifest, load_manifest
from threestage.data.rejects import Reject, RejectList
from threestage.data.samples import Decoding
from threestage.data.split import Split
from threestage.errors import StageFailure
from threestage.evaluation import Evaluation, WorkerShare, evaluate, summarise, write_image_counts
from threestage.models.export import BEST_MODEL, HALFWAY_MODEL, MODEL, ModelCard, save_model, save_weights, start_from
from threestage.models.network import Auxiliary, build_network
from threestage.prediction.estimates import Calibration, write_calibration
from threestage.seeds import derive_seed
from threestage.settings import Settings
from threestage.training.checkpoint import Row, TrainState, copied
from threestage.training.ema import make_teacher
from threestage.training.loop import (
    StageLength,
    autocast_dtype,
    await_written,
    compiled,
    fit,
    make_scaler,
    read_together,
    resume,
)
from threestage.training.metrics import mean_iou
from threestage.training.optimiser import make_optimiser
from threestage.training.step import StepSource
from threestage.training.step_inputs import BatchStream, SupervisedSteps, ThreeTaskSteps
from threestage.training.worker import Worker


def auxiliary(stage: StageName, config: Config) -> Auxiliary:
    """Which auxiliary head the stage's network has: none where no pseudo-mask is learnt, or the main head learns it."""
    if stage == "stage1" or config.pseudo_mask.weight == 0 or config.pseudo_mask.head == "main":
        return "none"
    return "branch" if stage == "stage2" else "shared"


class StageTask(Settings):
    """One stage as a message: all that a worker on any machine needs, as plain JSON."""

    stage: Literal["stage1", "stage2", "stage3"]
    config: dict[str, Any] = Field(description="Config.model_dump(mode='json')")
    manifest_version: int
    split: Split
    folder: str
    pool: str | None = Field(description="the list of the pool's files; none for a stage that is supervised only")
    pseudo_masks: str | None = Field(description="folder of the previous stage's pseudo-masks")
    previous_model: str | None = Field(
        description="folder of the previous stage's model, for a warm start; of stage 1: another run's"
    )
    bands: Bands | None = Field(None, description="bands that the network sees; none: 8-bit RGB")

    def settings(self) -> Config:
        return Config.model_validate(self.config)


@dataclass(frozen=True)
class StageData:
    manifest: Manifest
    labelled: SampleSet
    validation: SampleSet
    canvas: tuple[int, int]


@contextlib.contextmanager
def within_device_memory() -> Iterator[None]:
    """A device that has too little memory is a StageFailure: trying again would end the same way."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        first = ". ".join(str(error).split(". ")[:2])
        raise StageFailure(
            f"training does not fit into the memory of the device ({first}): a model is never split over several devices; set "
            "training.accumulate or network.gradient_checkpointing, or take smaller batches, a smaller augment.crop_size or "
            "network.encoder",
            "stage/out-of-memory",
        ) from error


@within_device_memory()
def train_stage(task: StageTask, worker: Worker) -> None:
    """Train (or go on training) one stage, then publish its models and `result.json` in its folder."""
    config = task.settings()
    data = read_together("the data set", lambda: load_data(task, config, worker), worker)
    classes = len(data.manifest.classes)
    state = read_together("the network", lambda: build_state(task, config, classes, worker.device), worker)
    resume(state, worker)
    source = make_source(task, config, state, data, worker)
    last, card = list[Evaluation](), _card(task, config, data.manifest)

    def score(network: nn.Module) -> Evaluation:
        worker.set_phase(state.step, "evaluation")
        share = WorkerShare(worker.rank, worker.world_size, worker.sum)
        batch, dtype = config.pseudo_mask.batch_size, autocast_dtype(config.training.precision, worker.device)
        return evaluate(network, data.validation, classes, worker.device, share, batch, dtype, config.inference)

    def at_half() -> None:
        if task.stage != STAGES[-1]:  # whatever comes after it in this run: a later one may go on from it
            _keep_halfway(task, state, card, worker)

    def validate(network: nn.Module) -> Row:
        last[:] = [score(network)]
        return {"mean_iou": mean_iou(last[0].confusion)}

    images, place = images_per_step(config, task.stage, worker.world_size), (config.seed, task.stage)
    length = StageLength(config.stage(task.stage).steps, images, place, at_half)
    fit(state, worker, source, validate, length, config.training, config.optimiser, config.ema)
    if not last:  # the last checkpoint already held the last step
        validate(state.shipped)
    student = None if state.teacher is None else score(state.student).confusion
    calibration = _calibration(task, state, data, last[0].images, worker)
    await_written(state.step, worker)

    def publish() -> None:
        write_image_counts(task.folder, data.validation.ids, last[0].images)
        publish_stage(task, state, card, last[0].confusion, student, calibration)

    if worker.rank == 0:
        worker.checkpoints.publish("the stage's model", publish)
    await_written(state.step, worker)


def _calibration(
    task: StageTask, state: TrainState, data: StageData, counts: Tensor, worker: Worker
) -> Calibration | None:
    """Of the shipped network. `counts`: of each validation image (N,3,C), see `Evaluation`."""
    config = task.settings()
    worker.set_phase(state.step, "calibration")
    decoding = Decoding(config.data.downscale, config.data.max_image_pixels, task.bands)
    excluded = frozenset(task.split.validation)

    def read() -> SampleSet:
        return training_sample(data.labelled, load_pool(task.pool) if task.pool else [], decoding, excluded)

    training = read_together("a sample of the training images", read, worker)
    calibrator = Calibrator(
        network=state.shipped.eval(),  # type: ignore[arg-type]
        device=worker.device,
        share=WorkerShare(worker.rank, worker.world_size, worker.sum),
        batch_size=config.pseudo_mask.batch_size,
        dtype=autocast_dtype(config.training.precision, worker.device),
        inference=config.inference,
    )
    return calibrator.calibrate(data.validation, counts, training)


def _card(task: StageTask, config: Config, manifest: Manifest) -> ModelCard:
    return ModelCard(
        network=config.network,
        classes=manifest.classes,
        colours=manifest.colours,
        downscale=config.data.downscale,
        stage=task.stage,
        inference=config.inference,
        bands=task.bands,
    )


def _keep_halfway(task: StageTask, state: TrainState, card: ModelCard, worker: Worker) -> None:
    """By what these weights and the last ones agree on, the next stage may choose its images (`reliable_share`). They are
    written before any later checkpoint: a stage that continues from one has them."""
    weights = copied(state.shipped.main_state_dict())  # type: ignore[operator]
    folder = storage.join(task.folder, HALFWAY_MODEL)
    worker.checkpoints.publish("the model of half-way", lambda: save_weights(folder, weights, card))


def images_per_step(config: Config, stage: StageName, world_size: int) -> tuple[int, int]:
    """Labelled images of all workers, and those that the stream gives them, of which some may pass over one."""
    labelled, unlabelled = (
        share_of(size, config.training.batch_scope, 0, world_size).total
        for size in (config.stage(stage).labelled_batch, config.stage(stage).unlabelled_batch)
    )
    return labelled, max_shard_size(unlabelled, world_size) * world_size


def load_data(task: StageTask, config: Config, worker: Worker) -> StageData:
    root, downscale = config.data.root, config.data.downscale
    manifest = load_manifest(root, task.manifest_version)
    return StageData(
        manifest,
        labelled_set(root, manifest, task.split, downscale, task.pseudo_masks, task.bands, worker.once_per_node),
        validation_set(root, manifest, task.split, downscale, task.bands, worker.once_per_node),
        canvas_size((manifest.sizes.max_height // downscale, manifest.sizes.max_width // downscale), config.augment),
    )


def build_state(task: StageTask, config: Config, num_classes: int, device: torch.device) -> TrainState:
    """A fresh network, its EMA teacher where the stage has one, and an optimiser with two learning rates."""
    seed = derive_seed(config.seed, task.stage, "network")
    student = build_network(config.network, num_classes, auxiliary(task.stage, config), seed).to(device)
    warm = task.stage == "stage1" or config.stage(task.stage).warm_start
    if warm and task.previous_model is not None:
        start_from(student, task.previous_model)
    if config.training.channels_last:
        student = student.to(memory_format=torch.channels_last)
    teacher = make_teacher(student) if config.stage(task.stage).has_teacher else None
    return TrainState(
        student, teacher, make_optimiser(student, config.optimiser), make_scaler(config.training.precision, device)
    )


def publish_stage(
    task: StageTask,
    state: TrainState,
    card: ModelCard,
    confusion: Tensor,
    student: Tensor | None,
    calibration: Calibration | None,
) -> None:
    """Write `model/`, `best_model/` where an earlier step scored higher, and, last, result.json.

    confusion, student: matrices (C,C) of the shipped network and of the student at the last step.
    """
    digest = save_model(storage.join(task.folder, MODEL), state.shipped, card)  # type: ignore[arg-type]
    write_calibration(storage.join(task.folder, MODEL), calibration)
    last = {"step": state.step, "mean_iou": mean_iou(confusion)}
    best = {**last, "model": MODEL}
    if state.best is not None and state.best.step < state.step:
        save_weights(storage.join(task.folder, BEST_MODEL), state.best.weights, card)
        best = {"step": state.best.step, "mean_iou": state.best.mean_iou, "model": BEST_MODEL}
    result = {
        **summarise(confusion, card.classes),
        "last": last,
        "best": best,
        **({} if student is None else {"student": {"mean_iou": mean_iou(student)}}),
        "confusion_matrix": confusion.tolist(),
        "steps": state.step,
        "seconds": state.seconds,
        "model_digest": digest,
        "history": state.history,
    }
    storage.write_json(storage.join(task.folder, "result.json"), result)


def make_source(task: StageTask, config: Config, state: TrainState, data: StageData, worker: Worker) -> StepSource:
    """What the stage's steps compute, from the state's step on."""
    stage, place = config.stage(task.stage), (config.seed, task.stage, "labelled")
    share = share_of(stage.labelled_batch, config.training.batch_scope, worker.rank, worker.world_size)
    source = batches(data.labelled, share, data.canvas, place, state.labelled_images, config.augment.class_balance)
    class_weights = label_weights(data.labelled, config.supervised.class_weight, worker.device)
    labelled = BatchStream(TimedIterator(prefetch(source, worker.device)), share, class_weights)
    if stage.unlabelled_batch == 0:
        return SupervisedSteps(config, labelled)
    share_u = share_of(stage.unlabelled_batch, config.training.batch_scope, worker.rank, worker.world_size)
    unlabelled = TimedIterator(prefetch(worker.unlabelled(share_u, state), worker.device))
    assert state.teacher is not None
    teacher = compiled(state.teacher, config.training)
    return ThreeTaskSteps(task.stage, config, teacher, labelled, BatchStream(unlabelled, share_u))


def local_unlabelled(task: StageTask) -> Callable[[BatchSlice, int], Iterator[Batch]]:
    """Unlabelled batches from a pool held in memory; the source of `--local`."""

    config = task.settings()

    def source(share: BatchSlice, first_image: int) -> Iterator[Batch]:
        assert task.pool is not None
        rejects: list[Reject] = []
        index = None if task.pseudo_masks is None else read_index(task.pseudo_masks)
        least = 0 if index is None else least_agreement(index, config.stage(task.stage).reliable_share)
        excluded = frozenset(task.split.validation)
        files = load_pool(task.pool)
        pool = pool_set(files, task.pseudo_masks, config.data, rejects.append, least, excluded, task.bands)
        if rejects:
            RejectList(rejects).write(storage.join(task.folder, "rejects", "pool.parquet"))
        canvas = pool_canvas(index, config.augment)
        return batches(pool, share, canvas, (config.seed, task.stage, "unlabelled"), first_image)

    return source
