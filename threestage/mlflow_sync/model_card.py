"""The model card: what a person must know who finds a model in the registry and nobody to ask."""

import json
from collections.abc import Mapping
from typing import Any

from threestage.mlflow_sync.connection import redact
from threestage.mlflow_sync.records import StageRecord
from threestage.models.export import ModelCard
from threestage.plain_text import markdown, one_line
from threestage.run_folder.lineage import Lineage, PseudoMaskSet, short_digest
from threestage.training.metrics import MEAN_IOU_RULE

METHOD = "https://arxiv.org/abs/2012.00827"
WHAT = {
    "stage1": "trained on the labelled images alone",
    "stage2": "trained on the labelled images, on the pseudo-masks of stage 1, and on what a teacher (the moving average "
    "of its own weights) says of weakly augmented images; the teacher ships",
    "stage3": "trained like stage 2, on the pseudo-masks of stage 2; the teacher ships",
}


def write_card(
    name: str, card: ModelCard, record: StageRecord, least_side: int | None = None, no_program: str | None = None
) -> str:
    """Markdown: use, data, method, figures per class, limits.

    `least_side`: the shortest side that the exported program takes; `no_program`: why there is none.
    """
    lineage = Lineage.model_validate(record.lineage)
    parts = [
        f"# {markdown(name)}, {record.stage}",
        f"Semantic segmentation of RGB images into {len(card.classes)} classes: a {markdown(card.network.encoder)} with a "
        f"{card.network.head} head, {WHAT[record.stage]} (stage {record.stage[-1]} of the three-stage method, {METHOD}).",
        _use(name, no_program),
        _data(lineage),
        _method(lineage, record.config),
        _figures(card, lineage, record.summary),
        _limits(card, least_side),
    ]
    return redact("\n\n".join(parts)) + "\n"


def _digest(digest: str) -> str:
    return markdown(short_digest(digest))


def _use(name: str, no_program: str | None) -> str:
    if no_program is not None:
        return f"""## Use

    threestage predict {one_line(f"models:/{name}@champion")} IMAGES OUT

This version has no exported program, so `mlflow.pyfunc` cannot run it: {markdown(no_program)}
`threestage models pull` fetches the weights (safetensors)."""
    uri = json.dumps(one_line(f"models:/{name}@champion"), ensure_ascii=False)
    return f"""## Use

    model = mlflow.pyfunc.load_model({uri})
    class_ids = model.predict(images)                              # uint8 (N,H,W,3) RGB → uint8 (N,H,W)
    both = model.predict(images, params={{"confidence": True}})      # {{"class_ids": …, "confidence": float32 (N,H,W)}}

It needs mlflow, torch, numpy and pillow. `threestage models pull` fetches the weights (safetensors), and with `--program` the
exported program."""


def _data(lineage: Lineage) -> str:
    data, labelled, validation = lineage.data, lineage.labelled, lineage.validation
    lines = [
        "## Data",
        "",
        f"- data set: {markdown(data.name)}, version {data.version}, digest {_digest(data.digest)} ({markdown(data.root)})",
        f"- labelled: {labelled.images} images, digest {_digest(labelled.digest)}, split seed {lineage.split_seed}",
        f"- validation: {validation.images} images of {markdown(validation.name)}, digest {_digest(validation.digest)}",
    ]
    if lineage.learnt_from is not None and lineage.teacher is not None:
        made_by = f"made by {markdown(lineage.teacher.stage)}, model {_digest(lineage.teacher.model_digest)}"
        threshold = f"kept from confidence {lineage.confidence_threshold:g}"
        lines.append(f"- pseudo-masks: {_set_in_words(lineage.learnt_from)}, {made_by}, {threshold}")
    return "\n".join(lines)


def _set_in_words(found: PseudoMaskSet) -> str:
    confidence = found.statistics.get("mean_confidence", float("nan"))
    left_out = f" ({found.rejected} left out)" if found.rejected else ""
    return f"{found.images} images{left_out}, mean confidence {confidence:.3f}, digest {_digest(found.digest)}"


def _method(lineage: Lineage, config: Mapping[str, Any]) -> str:
    stage, optimiser = config[lineage.stage], config["optimiser"]
    lines = [
        "## Training",
        "",
        f"- {stage['steps']} steps, batches of {stage['labelled_batch']} labelled"
        + (f" and {stage['unlabelled_batch']} unlabelled images" if lineage.learnt_from is not None else " images")
        + (", of all workers together" if config["training"]["batch_scope"] == "global" else ", each worker's"),
        f"- learning rates {optimiser['learning_rate']:g} (new layers) and {optimiser['encoder_learning_rate']:g} (encoder)",
    ]
    if lineage.learnt_from is not None:
        names = ("supervised", "consistency", "pseudo_mask")
        weights = ", ".join(f"{name} {config[name]['weight']:g}" for name in names)
        lines.append(f"- weights of the losses: {weights}")
    lines.append(
        f"- seed {config['seed']}, threestage {markdown(lineage.code_version)}; config.yaml of the run has all settings"
    )
    return "\n".join(lines)


def _figures(card: ModelCard, lineage: Lineage, summary: Mapping[str, float]) -> str:
    lines = [
        "## Figures",
        "",
        f"On {markdown(lineage.validation.name)} ({lineage.validation.images} images), whole images, one scale. The mean IoU is "
        f"{MEAN_IOU_RULE}.",
        "",
        "| class | IoU |",
        "|---|---|",
    ]
    for name in card.classes:
        score = summary.get(f"iou/{name}")
        lines.append(f"| {markdown(name)} | {'not in these images' if score is None else f'{score:.3f}'} |")
    for key, name in (("mean_iou", "mean IoU"), ("pixel_accuracy", "pixel accuracy")):
        if key in summary:
            lines.append(f"| **{name}** | {summary[key]:.3f} |")
    return "\n".join(lines)


def _limits(card: ModelCard, least_side: int | None) -> str:
    lines = [
        "## Limits",
        "",
        "- The figures are of validation images; where settings were chosen by them, they flatter.",
        "- Every pixel gets one of the classes above: the model cannot say that something is none of them.",
        "- Confidences are the network's probabilities and not calibrated; `threestage evaluate` measures how far they can "
        "be trusted.",
        "- Images unlike those it was trained on (another camera, place or season) were not tried.",
    ]
    if least_side is not None:
        lines.append(
            f"- The exported program adds a plain border to images with a side below {least_side} pixels (after any reduction)."
        )
    if card.downscale > 1:
        lines.append(
            f"- It was trained, and looks, at 1/{card.downscale} of an image's size; masks are enlarged again."
        )
    return "\n".join(lines)
