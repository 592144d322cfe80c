"""Every method on the same labels and seeds: `make results`. Needs torch, timm, pyarrow and pydantic only.

    python -m tests.benchmarks.accuracy --data DATASET --weights FILE [--size cpu|gpu] [--seeds 0 1 2] [--jobs 2]
                                        [--methods NAME …] [--test DATASET …] [--out FOLDER] [--json FILE]

A method is a preset with a few settings changed (METHODS). What is finished is not run again, what was killed goes on, and
methods share their first stages. --test scores the test splits of these data sets too (the whole one; a part of it, ingested
by itself, gives a column of its own): once, after everything is frozen.
"""

import argparse
import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from threestage.config import STAGES, Config, changed, load
from threestage.evaluation import evaluate_model
from threestage.inference import Protocol
from threestage.local import run_local
from threestage.models.export import load_model
from threestage.over_seeds import deviation, plus_minus

PRESETS = {"cpu": "camvid", "gpu": "camvid_gpu"}
BASE = "stage 1"  # what all but the control begin with
ONE_STAGE, TWO_STAGES = "stages=1", "stages=2"
CONTROL = (ONE_STAGE, "stage1.strong_view=true")
THRESHOLDS = ("consistency.confidence_threshold=0.95", "pseudo_mask.confidence_threshold=0.95")


@dataclass(frozen=True)
class Method:
    """What is changed of the preset."""

    changes: tuple[str, ...] = ()
    control_of: int = 0
    """A control's: it has as many steps as so many of the preset's stages together."""
    half: bool = False
    """Stages 2 and 3 have half of the preset's steps."""


def _rates(share: float) -> tuple[str, str]:
    return (f"optimiser.learning_rate={1e-3 * share}", f"optimiser.encoder_learning_rate={3e-4 * share}")


# The preset `best`: what paid on seed 100 (docs/results.md), together.
BEST = (
    "stage2.warm_start=true",
    "stage3.warm_start=true",
    "stage2.changes={augment: {class_balance: 0.5}}",
    "stage3.changes={augment: {class_balance: 0.5}}",
    *THRESHOLDS,
    "consistency.threshold_rule=dynamic",
    "pseudo_mask.threshold_rule=dynamic",
    "consistency.weight_by_confidence=true",
    "pseudo_mask.weight_by_confidence=true",
    "consistency.cutmix=0.5",
)
TWO_VIEWS = ("consistency.strong_views=2", "consistency.feature_dropout=0.5")

METHODS: Mapping[str, Method] = {
    BASE: Method((ONE_STAGE,)),
    "three stages (faithful)": Method(),
    "control": Method((*CONTROL, *_rates(1 / 2)), control_of=2),
    "control of three stages": Method((*CONTROL, *_rates(1 / 2)), control_of=3),
    "control, whole rates": Method(CONTROL, control_of=2),
    "control, a quarter of the rates": Method((*CONTROL, *_rates(1 / 4)), control_of=2),
    "three stages, half the steps": Method(half=True),
    "plain self-training": Method(
        (TWO_STAGES, "consistency.weight=0", "pseudo_mask.weight=0.5", "pseudo_mask.head=main")
    ),
    "mean teacher, no auxiliary head": Method((TWO_STAGES, "consistency.weight=0.5", "pseudo_mask.weight=0")),
    "no strong augmentation": Method((TWO_STAGES, "augment.strong.operations=0", "augment.strong.cutouts=0")),
    "CutMix": Method((TWO_STAGES, "consistency.cutmix=0.5")),
    "two strong views, feature dropout": Method(
        (TWO_STAGES, "consistency.strong_views=2", "consistency.feature_dropout=0.5")
    ),
    "thresholds 0.8": Method(
        (TWO_STAGES, "consistency.confidence_threshold=0.8", "pseudo_mask.confidence_threshold=0.8")
    ),
    "thresholds 0.95 · mean confidence": Method(
        (TWO_STAGES, *THRESHOLDS, "consistency.threshold_rule=dynamic", "pseudo_mask.threshold_rule=dynamic")
    ),
    "thresholds 0.95 · of the class": Method(
        (TWO_STAGES, *THRESHOLDS, "consistency.threshold_rule=per_class", "pseudo_mask.threshold_rule=per_class")
    ),
    "weights by confidence": Method(
        (TWO_STAGES, "consistency.weight_by_confidence=true", "pseudo_mask.weight_by_confidence=true")
    ),
    "class-balanced crops": Method((TWO_STAGES, "stage2.changes={augment: {class_balance: 0.5}}")),
    "reliable half first": Method((TWO_STAGES, "stage2.reliable_share=0.5")),
    "ramp-up": Method((TWO_STAGES, "consistency.ramp_up=0.3")),
    "warm start": Method((TWO_STAGES, "stage2.warm_start=true")),
    "best": Method(BEST, half=True),
    "best, two strong views": Method((*BEST, *TWO_VIEWS), half=True),
}


class Job(NamedTuple):
    """One method with one seed; plain values, for another process."""

    method: str
    seed: int
    config: dict[str, Any]
    folder: str
    reuse: str | None
    test: list[str]


def main() -> None:
    options = _options()
    chosen = [name for name in METHODS if name in options.methods or name == BASE]
    found: dict[str, list[dict[str, Any]]] = {}
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), _end_with, (os.getpid(),)) as pool:
        for methods in ([BASE], [name for name in chosen if name != BASE]):
            jobs = [_job(options, name, seed) for name in methods for seed in options.seeds]
            for job, figures in zip(jobs, pool.map(measure, jobs), strict=True):
                found.setdefault(job.method, []).append(figures)
    print(table(found, (*ACCURACY, *map(test_column, options.test))))
    print(f"\nOf each stage's model on the pool (entropy in nats):\n\n{table(found, tuple(ON_POOL))}")
    if options.json:
        facts = {"preset": PRESETS[options.size], "seeds": options.seeds, "set": options.set}
        options.json.write_text(json.dumps({**facts, "methods": found}, indent=1) + "\n")


def _end_with(parent: int) -> None:
    """End this process when the one that started it was killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CamVid after `threestage ingest`")
    parser.add_argument("--weights", required=True, help="of the preset's encoder")
    parser.add_argument("--size", choices=PRESETS, default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="of every method")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each of one thread where there is no GPU")
    parser.add_argument(
        "--test", nargs="+", default=[], metavar="DATASET", help="whose test splits the models are scored on"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/results"))
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def _job(options: argparse.Namespace, method: str, seed: int) -> Job:
    folder = Path(options.out) / options.size
    config = configuration(PRESETS[options.size], options.set, method, seed)
    places = {"data.root": options.data, "network.weights": options.weights}
    reuse = None if method == BASE or METHODS[method].control_of else str(folder / _file_name(BASE) / str(seed))
    own = str(folder / _file_name(method) / str(seed))
    return Job(method, seed, changed(config, places).model_dump(mode="json"), own, reuse, options.test)


def _file_name(method: str) -> str:
    return "_".join("".join(letter if letter.isalnum() else " " for letter in method).split())


def configuration(preset: str, common: Sequence[str], method: str, seed: int) -> Config:
    """The preset with the changes of a method."""
    chosen, own = METHODS[method], [f"seed={seed}", "name=results"]
    steps = {stage: load(preset, [*common, *own]).stage(stage).steps for stage in STAGES}
    if chosen.control_of:
        own.append(f"stage1.steps={sum(list(steps.values())[: chosen.control_of])}")
    if chosen.half:
        own += [f"{stage}.steps={steps[stage] // 2}" for stage in STAGES[1:]]
    return load(preset, [*common, *own, *chosen.changes])


def measure(job: Job) -> dict[str, Any]:
    """Train what is not trained yet; the figures of the method's last stage, or of all where it has three."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    config, began = Config.model_validate(job.config), time.perf_counter()
    Path(job.folder).mkdir(parents=True, exist_ok=True)
    with open(Path(job.folder, "rows.jsonl"), "a") as log:

        def show(stage: str, row: Mapping[str, float]) -> None:
            print(json.dumps({"stage": stage, **row}), file=log, flush=True)

        results = run_local(config, job.folder, show, warn=lambda text: None, reuse=job.reuse)
    figures = {stage: _stage_figures(job, config, results, stage) for stage in config.stage_names}
    print(
        f"{job.method}, seed {job.seed}: {figures[config.stage_names[-1]]} in {time.perf_counter() - began:.0f} s",
        flush=True,
    )
    return {"seed": job.seed, "stages": figures}


def _stage_figures(job: Job, config: Config, results: Mapping[str, Any], stage: str) -> dict[str, float]:
    """Mean IoU by what it is of: last, best, student and windows on the validation images; the test images' if asked for.
    Then what the stage's model says of the pool."""
    values = results["stages"][stage]
    figures = {name: values[key] for name, key in (SCORES | ON_POOL).items() if key in values}
    network, card = load_model(str(Path(results["reused"].get(stage, Path(job.folder, stage)), "model")))
    windows = Protocol(window=config.augment.crop_size)
    figures["windows"] = evaluate_model(network, card, config.data.root, "val", windows)["mean_iou"]
    for dataset in job.test:
        figures[test_column(dataset)] = evaluate_model(network, card, dataset, "test")["mean_iou"]
    return figures


SCORES = {"last": "mean_iou", "best": "best_mean_iou", "student": "student_mean_iou"}
ON_POOL = {
    "confidence": "mean_confidence", "entropy": "mean_entropy", "share above 0.9": "share_above_0.9",
    "mean IoU of its pseudo-masks": "pseudo_mask_mean_iou",
}  # fmt: skip
ACCURACY = (*SCORES, "windows")


def test_column(dataset: str) -> str:
    """Of the test split of a data set."""
    return f"test of {Path(dataset).name}"


def table(found: Mapping[str, Sequence[Mapping[str, Any]]], columns: Sequence[str]) -> str:
    """Markdown: a row for each stage that a method itself trains, mean ± sample standard deviation over its seeds."""
    lines = ["| method | changes | stage | seeds | " + " | ".join(columns) + " |", "|---" * (len(columns) + 4) + "|"]
    for method, runs in found.items():
        stages = list(runs[0]["stages"])
        for stage in stages if method == BASE or METHODS[method].control_of else stages[1:]:
            cells = [_cell([run["stages"][stage].get(column) for run in runs]) for column in columns]
            changes = " ".join(f"`{change}`" for change in METHODS[method].changes)
            lines.append(f"| {method} | {changes} | {stage[-1]} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return plus_minus(sum(known) / len(known), deviation(known)) if known else "–"


if __name__ == "__main__":
    main()
