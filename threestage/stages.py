"""What stage 1, 2 and 3 each build, and what they do in one step (method.md). The loop is training/loop.py."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from threestage import IGNORE_INDEX
from threestage.augment.views import View, strong_view, weak_view
from threestage.config import Config
from threestage.data import storage
from threestage.data.batches import Batch, SampleSet, batches, canvas_size, prefetch
from threestage.data.pool import load_pool
from threestage.data.records import Manifest, load_manifest
from threestage.data.rejects import Reject, RejectList
from threestage.data.sets import labelled_set, pool_canvas, pool_set, validation_set
from threestage.data.split import Split
from threestage.evaluation import evaluate, summarise
from threestage.models.export import ModelCard, save_model, start_from
from threestage.models.network import Network, build_network
from threestage.pseudo_masks import read_index
from threestage.seeds import derive_seed, generator
from threestage.settings import Settings
from threestage.training import losses
from threestage.training.checkpoint import TrainState
from threestage.training.ema import make_teacher
from threestage.training.loop import StepLoss, fit, resume
from threestage.training.losses import LossSum
from threestage.training.schedule import ramp_up
from threestage.training.worker import Row, Worker

AUXILIARY: Mapping[str, Literal["none", "branch", "shared"]] = {
    "stage1": "none",
    "stage2": "branch",
    "stage3": "shared",
}


class StageTask(Settings):
    """One stage as a message: all that a worker on any machine needs, as plain JSON."""

    stage: Literal["stage1", "stage2", "stage3"]
    config: dict[str, Any] = Field(description="Config.model_dump(mode='json')")
    manifest_version: int
    split: Split
    folder: str
    pool: str | None = Field(description="the list of the pool's files; none for stage 1")
    pseudo_masks: str | None = Field(description="folder of the previous stage's pseudo-masks")
    previous_model: str | None = Field(description="folder of the previous stage's model, for a warm start")

    def settings(self) -> Config:
        return Config.model_validate(self.config)


@dataclass(frozen=True)
class StageData:
    manifest: Manifest
    labelled: SampleSet
    validation: SampleSet
    canvas: tuple[int, int]


def train_stage(task: StageTask, worker: Worker) -> None:
    """Train (or go on training) one stage, then publish `model/` and `result.json` in its folder."""
    config = task.settings()
    data = load_data(task, config)
    state = build_state(task, config, len(data.manifest.classes), worker.device)
    resume(state, worker)
    step_loss = make_step(task, config, state, data, worker)
    confusion = torch.zeros(0)

    def validate(network: nn.Module) -> Row:
        nonlocal confusion
        confusion = evaluate(
            network, data.validation, len(data.manifest.classes), config.pseudo_mask.batch_size, worker.device,
            worker.rank, worker.world_size, worker.sum,
        )  # fmt: skip
        return {"mean_iou": float(summarise(confusion, data.manifest.classes)["mean_iou"])}  # type: ignore[arg-type]

    fit(
        state, worker, step_loss, validate, steps=config.stage(task.stage).steps, seed_place=(config.seed, task.stage),
        loop=config.training, optimiser=config.optimiser, ema=config.ema,
    )  # fmt: skip
    if not len(confusion):  # the last checkpoint already held the last step
        validate(state.shipped)
    if worker.rank == 0:
        publish(task, config, state, data.manifest, confusion)


def load_data(task: StageTask, config: Config) -> StageData:
    root, downscale = config.data.root, config.data.downscale
    manifest = load_manifest(root, task.manifest_version)
    return StageData(
        manifest,
        labelled_set(root, manifest, task.split, downscale, task.pseudo_masks),
        validation_set(root, manifest, task.split, downscale),
        canvas_size((manifest.sizes.max_height // downscale, manifest.sizes.max_width // downscale), config.augment),
    )


def build_state(task: StageTask, config: Config, num_classes: int, device: torch.device) -> TrainState:
    """A fresh network, its teacher (stages 2 and 3) and Adam with two learning rates."""
    seed = derive_seed(config.seed, task.stage, "network")
    student = build_network(config.network, num_classes, AUXILIARY[task.stage], seed).to(device)
    if config.stage(task.stage).warm_start and task.previous_model is not None:
        start_from(student, task.previous_model)
    teacher = None if task.stage == "stage1" else make_teacher(student)
    return TrainState(student, teacher, make_optimiser(student, config))


def make_optimiser(student: Network, config: Config) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [
        {"params": student.new_parameters(), "lr": config.optimiser.learning_rate},
        {"params": student.pretrained_parameters(), "lr": config.optimiser.encoder_learning_rate},
    ]
    for group in groups:
        group["initial_lr"] = group["lr"]
    return torch.optim.AdamW(groups, weight_decay=config.optimiser.weight_decay)


def publish(task: StageTask, config: Config, state: TrainState, manifest: Manifest, confusion: Tensor) -> None:
    """Write the stage's model folder and, last, result.json."""
    card = ModelCard(
        network=config.network,
        classes=manifest.classes,
        colours=manifest.colours,
        downscale=config.data.downscale,
        stage=task.stage,
    )
    digest = save_model(storage.join(task.folder, "model"), state.shipped, card)  # type: ignore[arg-type]
    result = {
        **summarise(confusion, manifest.classes),
        "confusion_matrix": confusion.tolist(),
        "steps": state.step,
        "seconds": state.seconds,
        "model_digest": digest,
        "history": state.history,
    }
    storage.write_json(storage.join(task.folder, "result.json"), result)


def make_step(task: StageTask, config: Config, state: TrainState, data: StageData, worker: Worker) -> StepLoss:
    """The stage's step: draws its batches, makes the views, returns the loss."""
    size = config.stage(task.stage).labelled_batch
    labelled = prefetch(
        batches(
            data.labelled,
            size,
            data.canvas,
            (config.seed, task.stage, "labelled"),
            state.step,
            worker.rank,
            worker.world_size,
        ),
        worker.device,
    )
    if task.stage == "stage1":
        return _supervised_step(config, labelled, worker)
    unlabelled = prefetch(worker.unlabelled(state.step), worker.device)
    return _three_task_step(task, config, state, labelled, unlabelled, worker)


def _supervised_step(config: Config, labelled: Iterator[Batch], worker: Worker) -> StepLoss:
    """Stage 1: CE(g(x_l), y_l); with `stage1.strong_view` the strong view of each image is learnt beside the weak one."""

    def step_loss(network: nn.Module, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        batch = next(labelled)
        random = generator(config.seed, "stage1", "augment", step, worker.rank)
        view = weak_view(batch.image, batch.size, config.augment, random)
        image, mask = view.image, view.warp(batch.maps["mask"])
        if config.stage1.strong_view:
            strong = strong_view(view, config.augment.strong, random)
            image, mask = torch.cat([image, strong.image]), torch.cat([mask, strong.warp(mask)])
        logits, _ = network(image)
        terms = {"supervised_loss": losses.supervised_loss(logits, mask)}
        return losses.total_loss(terms, {"supervised_loss": 1.0}, worker.sum, worker.world_size)

    return step_loss


def _three_task_step(
    task: StageTask,
    config: Config,
    state: TrainState,
    labelled: Iterator[Batch],
    unlabelled: Iterator[Batch],
    worker: Worker,
) -> StepLoss:
    """Stages 2 and 3: w_sup · L_sup + w_con · L_con + w_pm · L_pm."""
    ramp_up_steps = config.consistency.ramp_up * config.stage(task.stage).steps

    def step_loss(network: nn.Module, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        random = generator(config.seed, task.stage, "augment", step, worker.rank)
        batch_l, batch_u = next(labelled), next(unlabelled)
        weak_l = weak_view(batch_l.image, batch_l.size, config.augment, random)
        weak_u = weak_view(batch_u.image, batch_u.size, config.augment, random)
        strong_u = strong_view(weak_u, config.augment.strong, random)
        assert state.teacher is not None
        main, auxiliary = network(torch.cat([weak_l.image, strong_u.image]), with_auxiliary=True)
        terms = three_losses(
            main,
            auxiliary,
            weak_l.warp(batch_l.maps["mask"]),
            teacher_targets(state.teacher, weak_l, weak_u, strong_u, config.consistency.confidence_threshold),
            pseudo_mask_targets(batch_l, batch_u, weak_l, weak_u, strong_u, config.pseudo_mask.confidence_threshold),
        )
        weights = {
            "supervised_loss": config.supervised.weight,
            "consistency_loss": config.consistency.weight * ramp_up(step, ramp_up_steps),
            "pseudo_mask_loss": config.pseudo_mask.weight,
        }
        return losses.total_loss(terms, weights, worker.sum, worker.world_size)

    return step_loss


def three_losses(
    main: Tensor, auxiliary: Tensor, mask: Tensor, teacher_class: Tensor, pseudo_mask: Tensor
) -> dict[str, LossSum]:
    """The terms of stages 2 and 3. Logits (N,C,H,W) of [x_l; A x_u]; `mask` (n_l,H,W) of x_l; both other targets (N,H,W)."""
    return {
        "supervised_loss": losses.supervised_loss(main[: len(mask)], mask),
        "consistency_loss": losses.consistency_loss(main, teacher_class),
        "pseudo_mask_loss": losses.pseudo_mask_loss(auxiliary, pseudo_mask),
    }


@torch.no_grad()
def teacher_targets(
    teacher: nn.Module, weak_l: View, weak_u: View, strong_u: View, confidence_threshold: float
) -> Tensor:
    """[argmax T(x_l); W argmax T(x_u)] (N,h,w) uint8, 255 on padding, outside, and below the threshold. One forward pass of
    the weak views; hard labels are warped, not probabilities."""
    logits, _ = teacher(torch.cat([weak_l.image, weak_u.image]))
    if confidence_threshold == 0:
        class_ids = logits.argmax(dim=1).to(torch.uint8)
    else:
        confidence, best = logits.float().softmax(dim=1).max(dim=1)
        class_ids = losses.keep_confident(best.to(torch.uint8), confidence, confidence_threshold)
    class_ids = class_ids.masked_fill(~torch.cat([weak_l.valid, weak_u.valid]), IGNORE_INDEX)
    return _labelled_and_strong(class_ids, len(weak_l.image), strong_u)


def pseudo_mask_targets(
    batch_l: Batch, batch_u: Batch, weak_l: View, weak_u: View, strong_u: View, confidence_threshold: float
) -> Tensor:
    """[ŷ_l; W ŷ_u] (N,h,w) uint8 through the same geometry as the images; a pixel below the threshold is 255."""
    weak = [
        view.warp(losses.keep_confident(batch.maps["pseudo_mask"], batch.maps["confidence"], confidence_threshold))
        for batch, view in ((batch_l, weak_l), (batch_u, weak_u))
    ]
    return _labelled_and_strong(torch.cat(weak), len(weak_l.image), strong_u)


def _labelled_and_strong(class_ids: Tensor, labelled: int, strong_u: View) -> Tensor:
    return torch.cat([class_ids[:labelled], strong_u.warp(class_ids[labelled:])])


def local_unlabelled(task: StageTask) -> Callable[[int], Iterator[Batch]]:
    """Unlabelled batches from a pool held in memory; the source of `--local`."""

    config = task.settings()

    def source(first_step: int) -> Iterator[Batch]:
        assert task.pool is not None and task.pseudo_masks is not None
        rejects: list[Reject] = []
        pool = pool_set(load_pool(task.pool), task.pseudo_masks, config.data, rejects.append)
        if rejects:
            RejectList(rejects).write(storage.join(task.folder, "rejects", "pool.parquet"))
        canvas = pool_canvas(read_index(task.pseudo_masks), config.augment)
        return batches(pool, config.stage(task.stage).unlabelled_batch, canvas,
                       (config.seed, task.stage, "unlabelled"), first_step)  # fmt: skip

    return source
