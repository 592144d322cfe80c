"""A finished stage as it is recorded: its figures, its tags, and its lineage."""

from collections.abc import Mapping
from typing import Any

from threestage.config import StageName
from threestage.data import storage
from threestage.run.context import RunContext
from threestage.run_folder.folder import RunFolder
from threestage.run_folder.lineage import AT_SIZE, Images, Lineage, PseudoMaskSet, Teacher
from threestage.settings import Settings


class StageOutcome(Settings):
    """Plain JSON: `model` is its folder, `summary` its figures. Its rows of metrics are in result.json."""

    stage: StageName
    model: str
    summary: dict[str, float]
    tags: dict[str, str]
    lineage: Lineage


def figures_of(done: Mapping[str, Any], made: PseudoMaskSet | None, rejected: int) -> dict[str, Any]:
    """A finished stage in results.json. `made`: its pseudo-masks; `rejected`: images that it could not read."""
    scores = {key: done[key] for key in ("mean_iou", "pixel_accuracy", "seconds", "steps")} | previous_scores(done)
    of_set = {} if made is None else {**made.statistics, "rejected": made.rejected}
    return {**scores, **of_set, "rejected_while_training": rejected, "per_class_iou": done["per_class_iou"]}


def previous_scores(done: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a stage's best evaluation and of its student; an older version measured neither."""
    figures = {f"best_{key}": done["best"][key] for key in ("mean_iou", "step")} if "best" in done else {}
    return figures | ({"student_mean_iou": done["student"]["mean_iou"]} if "student" in done else {})


def lineage_of(
    context: RunContext,
    folder: RunFolder,
    stage: StageName,
    done: Mapping[str, Any],
    previous: Mapping[str, Any] | None,
    learnt_from: PseudoMaskSet | None,
    made: PseudoMaskSet | None,
) -> Lineage:
    """What a stage was trained with: data set and code are those of its marker, which may be older than this run.

    done, previous: what is finished of the stage and of the one before it. learnt_from, made: its pseudo-masks.
    """
    config, split, marker = context.config, context.split, done["marker"]
    data = marker["data"] if "data" in marker else context.data_set()
    validation = f"{data.name} {'val' if split.validation_split == 'val' else 'carved from train'}"
    if config.data.downscale > 1:  # another size gives other figures
        validation += f"{AT_SIZE}{config.data.downscale} size"
    teacher = None
    if previous is not None:
        before = f"stage{int(stage[-1]) - 1}"
        model = storage.join(folder.part(before), "model")
        teacher = Teacher(stage=before, model_digest=previous["model_digest"], model=model)
    threshold = config.for_stage(stage).pseudo_mask.confidence_threshold
    return Lineage(
        run=folder.out,
        stage=stage,
        model_digest=done["model_digest"],
        code_version=marker["code_version"],
        data=data,
        labelled=Images(name=f"{data.name} train", images=len(split.labelled), digest=context.digests["labelled"]),
        validation=Images(name=validation, images=len(split.validation), digest=context.digests["validation"]),
        split_seed=config.data.split_seed,
        teacher=teacher,
        learnt_from=learnt_from,
        confidence_threshold=None if learnt_from is None else threshold,
        made=made,
        continued_from=None if context.continued is None else context.continued.champion,
    )


def outcome_of(
    context: RunContext, folder: RunFolder, summary: Mapping[str, float], done: Mapping[str, Any], lineage: Lineage
) -> StageOutcome:
    stage: StageName = lineage.stage  # type: ignore[assignment]
    pseudo_masks = {} if lineage.made is None else {"pseudo_masks_digest": lineage.made.digest}
    per_class = {f"iou/{name}": iou for name, iou in done["per_class_iou"].items() if iou is not None}
    return StageOutcome(
        stage=stage,
        model=storage.join(folder.part(stage), "model"),
        summary={**summary, **per_class},
        tags={
            "data_digest": lineage.data.digest,
            "data_version": str(lineage.data.version),
            "encoder": context.config.network.encoder,
            "classes": ",".join(context.manifest.classes),
            "labelled": str(len(context.split.labelled)),
            "model_digest": done["model_digest"],
            "code_version": lineage.code_version,
            **pseudo_masks,
            **({} if context.continued is None else context.continued.tags()),
        },
        lineage=lineage,
    )
