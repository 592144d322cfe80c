"""Do the unlabelled images pay? Every method on the same labels and seeds, on data of several kinds: `make results`.

    python -m tests.benchmarks.accuracy --sets camvid=DATASET neu_seg=DATASET --weights FILE [--draws 1 2 3 4 5 6]
        [--methods NAME …] [--try "NAME=PRESET a.b=c …" …] [--test] [--jobs 2] [--out FOLDER] [--record FILE]

A draw is both the labelled subset and the seed: `data.split_seed` = `seed` = draw. A method is a preset with settings
changed (METHODS); a set says what the data need (SETS). --record keeps one line of JSON for each finished run, with its
curve: what stands there is not run again, so a table may take several days and several machines. What was killed continues.
--try adds methods for a search: they are recorded as others. --test scores the test split too: once, when all is frozen.
"""

import argparse
import fcntl
import hashlib
import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.benchmarks.paired import describe
from tests.runs import run_local
from threestage.config import Config, changed, load, stage_keys
from threestage.evaluation import evaluate_model
from threestage.models.export import load_model
from threestage.report.scores import deviation, plus_minus

MOBILENET = (
    "network.encoder=mobilenetv2_100", "network.output_stride=16", "network.head=deeplabv3plus", "network.pretrained=false",
    "network.mean=[0.5,0.5,0.5]", "network.std=[0.5,0.5,0.5]", "training.channels_last=true", "training.checkpoint_every=200",
    "training.evaluate_every=200", "pseudo_mask.on_collapse=ignore",
)  # fmt: skip
SETS: Mapping[str, tuple[str, ...]] = {
    "camvid": ("data.labelled=46", "data.downscale=4", "augment.crop_size=[96,128]", "augment.strong.cutout_size=16"),
    "camvid_large": (
        "data.labelled=46",
        "data.downscale=1",
        "augment.crop_size=[256,256]",
        "augment.strong.cutout_size=32",
    ),
    "neu_seg": ("data.labelled=40", "data.downscale=1", "augment.crop_size=[96,96]", "augment.strong.cutout_size=16"),
    "scenes": ("data.labelled=32", "data.downscale=1", "augment.crop_size=[64,64]", "augment.strong.cutout_size=16"),
}
"""What each kind of data needs, whatever the method: CamVid at 120×90 and at 480×360, NEU-Seg at 200×200, and the demo's
scenes at 64×64 (`threestage demo` leaves them in data/), which stand in no table of docs/results.md."""


@dataclass(frozen=True)
class Method:
    """A preset and what is changed of it."""

    preset: str
    changes: tuple[str, ...] = ()


def control(steps: int) -> Method:
    """Supervised with all that needs no unlabelled image: what stage 1 of `own_images` is, for so many steps."""
    return Method("own_images", ("stages=1", f"stage1.steps={steps}"))


EQUAL_STEPS = 1600
METHODS: Mapping[str, Method] = {
    "control, equal steps": control(EQUAL_STEPS),
    "own_images": Method("own_images"),
    "own_images of 2026-11-29": Method("best"),
}


class Job(NamedTuple):
    """One method on one draw of one set; plain values, for another process."""

    key: tuple[str, str, int]
    config: dict[str, Any]
    digest: str
    folder: str
    test: bool


def main() -> None:
    options = _options()
    methods = {name: METHODS[name] for name in options.methods} | dict(map(_tried, options.try_))
    jobs = [
        _job(options, methods, name, key, draw) for draw in options.draws for key in options.sets for name in methods
    ]
    record = read_record(options.record)
    waiting = [job for job in jobs if (job.key, job.digest) not in record]
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), end_with, (os.getpid(),)) as pool:
        for job, line in zip(waiting, pool.map(measure, waiting), strict=True):
            record[job.key, job.digest] = line
            with options.record.open("a") as file:
                file.write(json.dumps(line) + "\n")
    found = [record[job.key, job.digest] for job in jobs]
    for name in options.sets:
        print(f"\n{name}\n\n{table([line for line in found if line['set'] == name])}")


def read_record(path: Path) -> dict[tuple[tuple[str, str, int], str], dict[str, Any]]:
    """The finished runs by (set, method, draw) and the digest of their settings."""
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else []
    return {((line["set"], line["method"], line["draw"]), line["digest"]): line for line in lines}


def _tried(text: str) -> tuple[str, Method]:
    name, _, what = text.partition("=")
    preset, *changes = what.split()
    return name, Method(preset, tuple(changes))


def end_with(parent: int) -> None:
    """End this process when the one that started it was killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sets", nargs="+", required=True, metavar="SET=DATASET", help=f"ingested; of {', '.join(SETS)}"
    )
    parser.add_argument("--weights", required=True, help="MobileNetV2's")
    parser.add_argument("--draws", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6])
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--try", dest="try_", action="append", default=[], metavar="'NAME=PRESET a.b=c …'")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="of every method")
    parser.add_argument("--test", action="store_true", help="score the test split too")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each of one thread where there is no GPU")
    parser.add_argument("--out", type=Path, default=Path("runs/results"))
    parser.add_argument("--record", type=Path, default=Path("docs/research/accuracy.jsonl"))
    options = parser.parse_args()
    options.sets = dict(text.partition("=")[::2] for text in options.sets)
    return options


def _job(options: argparse.Namespace, methods: Mapping[str, Method], method: str, name: str, draw: int) -> Job:
    places = {"data.root": options.sets[name], "network.weights": options.weights}
    config = changed(configuration(methods[method], name, draw, options.set), places)
    keys = {stage: stage_keys(config, stage) for stage in config.stage_names}
    without = [{key: value for key, value in of.items() if key != "network.weights"} for of in keys.values()]
    digest = digest_of_settings([without, draw])
    folder = options.out / name / file_name(method) / str(draw)
    return Job((name, method, draw), config.model_dump(mode="json"), digest, str(folder), options.test)


def digest_of_settings(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def file_name(method: str) -> str:
    return "_".join("".join(letter if letter.isalnum() else " " for letter in method).split())


def configuration(method: Method, name: str, draw: int, common: Sequence[str] = ()) -> Config:
    """A method's preset with what the set needs, then what the method changes."""
    own = (f"seed={draw}", f"data.split_seed={draw}", "name=results")
    return load(method.preset, [*MOBILENET, *SETS[name], *own, *method.changes, *common])


def measure(job: Job) -> dict[str, Any]:
    """Train what is not trained yet; the line of the record."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    config, shared = Config.model_validate(job.config), None
    if config.stages > 1:
        shared = str(
            Path(job.folder).parents[1] / f"stage1-{digest_of_settings([stage_keys(config, 'stage1'), job.key[2]])}"
        )
        run_once(changed(config, {"stages": 1, "pseudo_mask.final_stage": True}), shared, None)
    results = run_once(config, job.folder, shared)
    name, method, draw = job.key
    line = {"set": name, "method": method, "draw": draw, "digest": job.digest, "date": str(date.today())}
    line |= _figures(job, config, results)
    print(f"{name}, {method}, draw {draw}: {line['curve']}", flush=True)
    return line


def run_once(config: Config, folder: str, reuse: str | None, continue_from: str | None = None) -> dict[str, Any]:
    """A run that is finished is not trained again; two methods that share a first stage wait for each other."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder, "rows.jsonl"), "a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)

        def show(stage: str, row: Mapping[str, float]) -> None:
            print(json.dumps({"stage": stage, **row}), file=log, flush=True)

        return run_local(config, folder, show, warn=lambda text: None, reuse=reuse, continue_from=continue_from)


def _figures(job: Job, config: Config, results: Mapping[str, Any]) -> dict[str, Any]:
    """mean_iou: of the last stage's last step; curve: of every evaluation, against the steps of the whole run."""
    curve, before = [], 0
    for stage in config.stage_names:
        folder = results["reused"].get(stage, Path(job.folder, stage))
        history = json.loads(Path(folder, "result.json").read_text())["history"]
        curve += [[before + row["step"], round(row["mean_iou"], 4)] for row in history if "mean_iou" in row]
        before += config.stage(stage).steps
    last = results["stages"][config.stage_names[-1]]
    figures = {"steps": before, "mean_iou": last["mean_iou"], "curve": curve}
    figures |= {"stages": {stage: values["mean_iou"] for stage, values in results["stages"].items()}}
    if job.test:
        network, card = load_model(str(Path(job.folder, config.stage_names[-1], "model")))
        figures["test"] = evaluate_model(network, card, config.data.root, "test")["mean_iou"]
    return figures


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a row a method, then the paired differences of each from the first, draw by draw."""
    methods: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        methods.setdefault(line["method"], []).append(line)
    rows = ["| method | steps | draws | val | test | val by draw |", "|---" * 6 + "|"]
    for method, runs in methods.items():
        cells = [_cell([run.get(key) for run in runs]) for key in ("mean_iou", "test")]
        by_draw = ", ".join(f"{run['mean_iou']:.3f}" for run in runs)
        rows.append(f"| {method} | {runs[0]['steps']} | {len(runs)} | {' | '.join(cells)} | {by_draw} |")
    first, *others = methods.values()
    for runs in others:
        by_draw_of_first = {run["draw"]: run["mean_iou"] for run in first}
        pairs = [run["mean_iou"] - by_draw_of_first[run["draw"]] for run in runs if run["draw"] in by_draw_of_first]
        rows.append(f"\n{runs[0]['method']} minus {first[0]['method']}: {describe(pairs)}")
    return "\n".join(rows)


def _cell(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return plus_minus(sum(known) / len(known), deviation(known)) if known else "–"


if __name__ == "__main__":
    main()
