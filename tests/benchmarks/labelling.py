"""Do the images that `threestage next` chooses pay? Rounds of labelling, every strategy from the same first labels and seeds.

    python -m tests.benchmarks.labelling --sets camvid=DATASET neu_seg=DATASET --weights FILE [--starts 1 2 3 4]
        [--strategies combined random …] [--jobs 2] [--out FOLDER] [--record FILE]

A start is the first labels and the seed: `data.split_seed` = `seed` = start. Round 1 is the same run for all strategies of a
start. Each later round adds as many images as the first had, of those that the strategy chooses by the run before, and
continues from that run, with steps in proportion to the labels. Random choice has one round more: by it the labels are found
that random choice needs for the score of another strategy. --record keeps one line of JSON for each finished round; what
stands there is not run again, what was killed continues. docs/research/labelling-plan.md is the plan.
"""

import argparse
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch

from tests.benchmarks.accuracy import METHODS, configuration, digest_of_settings, end_with, run_once
from tests.benchmarks.paired import describe
from threestage.config import Config, changed, stage_keys
from threestage.data import storage
from threestage.data.split import saved_split
from threestage.evaluation import evaluate_model
from threestage.models.export import load_model
from threestage.report.scores import deviation, plus_minus
from threestage.run.run import _settings
from threestage.selection.choice import StrategyName
from threestage.selection.next_images import NextSettings, next_images

FIRST_LABELS = {"camvid": 12, "neu_seg": 10}
FULL_LABELS = {"camvid": 46, "neu_seg": 40}
"""For which the preset's steps are meant."""
ROUNDS = 3
BASELINE: StrategyName = "random"


class Job(NamedTuple):
    """All rounds of one strategy from one start; plain values, for another process. `record`: what is finished."""

    set: str
    strategy: StrategyName
    start: int
    config: dict[str, Any]
    out: str
    test: bool


Line = Mapping[str, Any]
Key = tuple[str, str, int, int]


def main() -> None:
    options = _options()
    jobs = [
        _job(options, name, strategy, start)
        for start in options.starts
        for name in options.sets
        for strategy in options.strategies
    ]
    record = read_rounds(options.record)
    waiting = [job for job in jobs if any((key, digest) not in record for key, digest in _rounds_of(job))]
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), end_with, (os.getpid(),)) as pool:
        for lines in pool.map(measure_rounds, waiting):
            new = {(_key(line), line["digest"]): line for line in lines}
            with options.record.open("a") as file:
                file.writelines(json.dumps(line) + "\n" for key, line in new.items() if key not in record)
            record |= new
    found = [record[key] for job in jobs for key in _rounds_of(job)]
    for name in options.sets:
        print(f"\n{name}\n\n{rounds_text([line for line in found if line['set'] == name])}")


def read_rounds(path: Path) -> dict[tuple[Key, str], dict[str, Any]]:
    """The finished rounds by (set, strategy, start, round) and the digest of their settings."""
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else []
    return {(_key(line), line["digest"]): line for line in lines}


def _key(line: Line) -> Key:
    return line["set"], line["strategy"], line["start"], line["round"]


def _rounds_of(job: Job) -> list[tuple[Key, str]]:
    config = Config.model_validate(job.config)
    keys = [stage_keys(config, stage) for stage in config.stage_names]
    digest = digest_of_settings([{k: v for k, v in of.items() if k != "network.weights"} for of in keys])
    count = ROUNDS + (job.strategy == BASELINE)
    return [((job.set, job.strategy, job.start, number), digest) for number in range(1, count + 1)]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sets", nargs="+", required=True, metavar="SET=DATASET", help=f"ingested; of {', '.join(FIRST_LABELS)}"
    )
    parser.add_argument("--weights", required=True, help="MobileNetV2's")
    parser.add_argument("--starts", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument(
        "--strategies", nargs="*", choices=get_args(StrategyName), default=list(get_args(StrategyName)), metavar="NAME"
    )
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="of every run")
    parser.add_argument("--test", action="store_true", help="score the test split too")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each of one thread where there is no GPU")
    parser.add_argument("--out", type=Path, default=Path("runs/labelling"))
    parser.add_argument("--record", type=Path, default=Path("docs/research/labelling.jsonl"))
    options = parser.parse_args()
    options.sets = dict(text.partition("=")[::2] for text in options.sets)
    return options


def _job(options: argparse.Namespace, name: str, strategy: StrategyName, start: int) -> Job:
    places = {"data.root": options.sets[name], "network.weights": options.weights}
    config = changed(configuration(METHODS["own_images"], name, start, options.set), places)
    return Job(name, strategy, start, config.model_dump(mode="json"), str(options.out / name), options.test)


def measure_rounds(job: Job) -> list[dict[str, Any]]:
    """Run the rounds that are not finished yet; a line of the record for each."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    first = FIRST_LABELS[job.set]
    lines, folder, labels = list[dict[str, Any]](), "", list[str]()
    for (key, digest), number in zip(_rounds_of(job), range(1, 99), strict=False):
        before, own = folder, Path(job.out, job.strategy if number > 1 else "first", str(job.start))
        config = _scaled(Config.model_validate(job.config), job.set, first * number)
        folder = str(own / f"round{number}")
        if number > 1:
            settings = NextSettings(count=first, strategy=job.strategy, seed=job.start)
            labels = labels + [image.image_id for image in next_images(before, f"{own}/next{number}", settings).images]
            config = changed(config, {"data.labelled": _listed(own / f"labels{number}.txt", labels)})
        results = run_once(config, folder, None, before or None)
        storage.write_json(f"{folder}/config.json", _settings(config))  # as a command leaves it
        labels = list(saved_split(f"{folder}/split.json")[0].labelled)
        lines.append(_line(job, key, digest, config, folder, results))
        print(f"{key}: {lines[-1]['mean_iou']:.4f}", flush=True)
    return lines


def _scaled(config: Config, name: str, labels: int) -> Config:
    """With steps in proportion to the labels."""
    steps = {
        f"{stage}.steps": max(1, config.stage(stage).steps * labels // FULL_LABELS[name])
        for stage in config.stage_names
    }
    return changed(config, {"data.labelled": labels, **steps})


def _listed(path: Path, ids: Sequence[str]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{image_id}\n" for image_id in ids))
    return str(path)


def _line(job: Job, key: Key, digest: str, config: Config, folder: str, results: Mapping[str, Any]) -> dict[str, Any]:
    """mean_iou: of the last stage's last step, on the val split."""
    last = config.stage_names[-1]
    line = {"set": key[0], "strategy": key[1], "start": key[2], "round": key[3], "labels": results["data"]["labelled"]}
    line |= {"digest": digest, "date": str(date.today()), "mean_iou": results["stages"][last]["mean_iou"]}
    line["steps"] = sum(config.stage(stage).steps for stage in config.stage_names)
    if job.test:
        network, card = load_model(str(Path(folder, last, "model")))
        line["test"] = evaluate_model(network, card, config.data.root, "test")["mean_iou"]
    return line


def rounds_text(lines: Sequence[Line]) -> str:
    """Markdown: a row a strategy, then the paired differences from random choice at the last round that all have, and the labels
    that random choice needs for the same score."""
    scores: dict[str, dict[int, dict[int, float]]] = {}
    labels = {line["round"]: line["labels"] for line in lines}
    for line in lines:
        scores.setdefault(line["strategy"], {}).setdefault(line["round"], {})[line["start"]] = line["mean_iou"]
    rows = [
        f"| strategy | {' | '.join(f'{labels[n]} labels' for n in sorted(labels))} |",
        "|---" * (len(labels) + 1) + "|",
    ]
    for strategy, rounds in scores.items():
        cells = [_cell([*rounds[n].values()]) if n in rounds else "–" for n in sorted(labels)]
        rows.append(f"| {strategy} | {' | '.join(cells)} |")
    baseline = scores.get(BASELINE, {})
    means = {labels[n]: statistics.fmean(of.values()) for n, of in sorted(baseline.items())}
    for strategy, rounds in scores.items():
        last = max(rounds)
        if strategy != BASELINE and last in baseline:
            pairs = [rounds[last][start] - score for start, score in baseline[last].items() if start in rounds[last]]
            needed = labels_needed(means, statistics.fmean(rounds[last].values()))
            ratio = f"more than {max(means) / labels[last]:.2f}" if needed is None else f"{needed / labels[last]:.2f}"
            rows.append(
                f"\n{strategy} minus {BASELINE} at {labels[last]} labels: {describe(pairs)}; {BASELINE} needs {ratio} times the "
                "labels"
            )
    return "\n".join(rows)


def labels_needed(means: Mapping[int, float], score: float) -> float | None:
    """The labels at which the line through the means (labels → mean IoU) first reaches a score; None where it does not."""
    points = list(means.items())
    if points[0][1] >= score:
        return points[0][0]
    for (few, low), (many, high) in pairwise(points):
        if low < score <= high:
            return few + (many - few) * (score - low) / (high - low)
    return None


def _cell(values: Sequence[float]) -> str:
    return plus_minus(statistics.fmean(values), deviation(values))


if __name__ == "__main__":
    main()
