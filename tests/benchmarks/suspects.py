"""Does `threestage suspects` find faulty masks? Faults are planted into the labels of real sets; cleanlab ranks them too.

    python -m tests.benchmarks.suspects --sets camvid=DATASET neu_seg=DATASET --weights FILE [--cleanlab PYTHON]
        [--plantings 1 2 3 4 5] [--out FOLDER] [--record FILE]

A planting decides which labels there are, which faults they get, and the models' seed. `--cleanlab` names the interpreter of an
environment with cleanlab, which this one does not import. --record keeps one line of JSON for each finished planting; what stands
there is not run again, what was killed continues. docs/research/suspects-plan.md is the plan.
"""

import argparse
import json
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.benchmarks.accuracy import METHODS, SETS, configuration, run_once
from tests.benchmarks.paired import describe
from tests.planted import average_precision, planted
from threestage.config import Config, changed
from threestage.data import storage
from threestage.data.datasets import labelled_set
from threestage.data.ingest import IngestSettings, ingest
from threestage.data.records import decode_mask, labelled_rows, load_manifest
from threestage.data.split import make_split
from threestage.models.export import load_model
from threestage.prediction.tta import window_logits
from threestage.run.run import _settings
from threestage.selection.suspects import SuspectsSettings, suspects

STEPS, SHARE, FOLDS = 800, 0.2, 4
CLEANLAB = """
import sys, numpy as np
from cleanlab.segmentation.rank import get_label_quality_scores
data = np.load(sys.argv[1])
scores, _ = get_label_quality_scores(data["labels"], data["probabilities"].astype(np.float32), verbose=False)
print(" ".join(map(str, scores)))
"""


def main() -> None:
    options = _options()
    lines = _recorded(options.record)
    for planting in options.plantings:
        for name, root in options.sets.items():
            if not any((line["set"], line["planting"]) == (name, planting) for line in lines):
                lines.append(measure_planting(options, name, root, planting))
                with options.record.open("a") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
                print(lines[-1], flush=True)
    for name in options.sets:
        print(f"\n{name}\n\n{precisions_text([line for line in lines if line['set'] == name])}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sets", nargs="+", required=True, metavar="SET=DATASET", help=f"ingested; of {', '.join(SETS)}"
    )
    parser.add_argument("--weights", required=True, help="MobileNetV2's")
    parser.add_argument("--cleanlab", metavar="PYTHON", help="of an environment with cleanlab")
    parser.add_argument("--plantings", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="of every run")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=Path("runs/suspects"))
    parser.add_argument("--record", type=Path, default=Path("docs/research/suspects.jsonl"))
    options = parser.parse_args()
    options.sets = dict(text.partition("=")[::2] for text in options.sets)
    return options


def _recorded(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def measure_planting(options: argparse.Namespace, name: str, root: str, planting: int) -> dict[str, Any]:
    """A line of the record: the average precision of each score."""
    torch.set_num_threads(1)
    folder = options.out / name / str(planting)
    places = {"data.root": root, "network.weights": options.weights, "stages": 1, "pseudo_mask.final_stage": False}
    config = changed(configuration(METHODS["own_images"], name, planting, options.set), places)
    data, faults = planted_data_set(config, folder, planting)
    config = changed(config, {"data.root": data, "data.labelled": "all"})
    run, settings = str(folder / "run"), SuspectsSettings(folds=FOLDS, steps=options.steps, count=100_000)
    run_once(changed(config, {"stage1.steps": 1}), run, None)  # its labels are examined, its model is not asked
    storage.write_json(f"{run}/config.json", _settings(config))
    report = suspects(run, str(folder / "found"), settings)
    ours = {image.image_id: image.score for image in report.images}
    masks, probabilities = _probabilities(config, str(folder / "found"))
    ids = sorted(set(masks) & set(ours))
    scores = {"ours": [ours[one] for one in ids], **_rivals(ids, masks, probabilities, options.cleanlab, folder)}
    faulty = {number for number, one in enumerate(ids) if one in faults}
    found = {score: round(average_precision(values, faulty), 4) for score, values in scores.items()}
    line = {"set": name, "planting": planting, "date": str(date.today()), "labels": len(ids), "faults": len(faulty)}
    return line | {"steps": options.steps, "precision": found}


def planted_data_set(config: Config, folder: Path, planting: int) -> tuple[str, dict[str, str]]:
    """A data set of the labels and the val split of another one, faults planted into the labels; and the fault of each image."""
    root, manifest = config.data.root, load_manifest(config.data.root)
    split = make_split(root, manifest, config.data)
    rows = labelled_rows(root, manifest, "train", split.labelled).to_pylist()
    masks, faults = planted([decode_mask(row["mask"]) for row in rows], SHARE, planting)
    sides = {"train": (rows, masks)}
    validation = labelled_rows(root, manifest, "val", split.validation).to_pylist()
    sides["val"] = (validation, [decode_mask(row["mask"]) for row in validation])
    source = folder / "source"
    for side, (images, drawn) in sides.items():
        for kind in ("images", "masks"):
            (source / side / kind).mkdir(parents=True, exist_ok=True)
        for number, (row, mask) in enumerate(zip(images, drawn, strict=True)):
            (source / side / f"images/{side}_{number:05d}.png").write_bytes(row["image"])
            Image.fromarray(mask).save(source / side / f"masks/{side}_{number:05d}.png")
    pairs = enumerate(zip(manifest.classes, manifest.colours, strict=True))
    entries = [{"name": one, "colour": list(colour), "ids": [n]} for n, (one, colour) in pairs]
    (source / "class_map.yaml").write_text(json.dumps({"classes": entries, "ignore": {"ids": [255]}}))
    settings = IngestSettings(format="camvid", class_map=str(source / "class_map.yaml"))
    ingest(str(source), str(folder / "data"), settings)
    return str(folder / "data"), {f"train/images/train_{number:05d}": kind for number, kind in faults.items()}


@torch.inference_mode()
def _probabilities(config: Config, found: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Mask (H,W) and probabilities (C,H,W) float16 of each label, by the model that has not learnt it."""
    masks, probabilities = dict[str, np.ndarray](), dict[str, np.ndarray]()
    manifest = load_manifest(config.data.root)
    split = make_split(config.data.root, manifest, config.data)
    samples = labelled_set(config.data.root, manifest, split, config.data.downscale, None)
    for number in range(1, FOLDS + 1):
        network, card = load_model(f"{found}/folds/fold{number}/stage1/model")
        network.eval()
        learnt = storage.read_json(f"{found}/folds/fold{number}/split.json")["split"]["labelled"]
        for place, image_id in enumerate(samples.ids):
            if image_id not in learnt:
                decoded = samples.decoded(place)
                pixels = torch.from_numpy(decoded.image).permute(2, 0, 1)[None].float() / 255
                answer = window_logits(network, pixels, card.inference).softmax(1)[0]
                masks[image_id], probabilities[image_id] = decoded.maps["mask"], answer.half().numpy()
    return masks, probabilities


def _rivals(
    ids: Sequence[str],
    masks: Mapping[str, np.ndarray],
    probabilities: Mapping[str, np.ndarray],
    cleanlab: str | None,
    folder: Path,
) -> dict[str, list[float]]:
    """Scores by name, the worst the highest. cleanlab knows no pixel without a label: these get the model's class."""
    labels = {one: np.where(masks[one] == 255, probabilities[one].argmax(0), masks[one]) for one in ids}
    chosen = [np.take_along_axis(probabilities[one], labels[one][None].astype(np.int64), 0)[0] for one in ids]
    found = {"confidence": [1 - float(one.astype(np.float32).mean()) for one in chosen]}
    if cleanlab is not None:
        uri = folder / "probabilities.npz"
        stacked = (np.stack([of[one] for one in ids]) for of in (labels, probabilities))
        np.savez(uri, **dict(zip(("labels", "probabilities"), stacked, strict=True)))  # type: ignore[arg-type]
        asked = subprocess.run([cleanlab, "-c", CLEANLAB, str(uri)], capture_output=True, text=True, check=True)
        found["cleanlab"] = [-float(one) for one in asked.stdout.split()]
    return found


def precisions_text(lines: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: the mean average precision of each score, then the paired differences from ours."""
    names = [name for name in ("ours", "cleanlab", "confidence") if all(name in line["precision"] for line in lines)]
    of = {name: [line["precision"][name] for line in lines] for name in names}
    rows = ["| score | mean average precision |", "|---|---|"]
    rows += [f"| {name} | {statistics.fmean(of[name]):.3f} |" for name in names]
    for name in names[1:]:
        pairs = [ours - theirs for ours, theirs in zip(of["ours"], of[name], strict=True)]
        rows.append(f"\nours minus {name}: {describe(pairs)}")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
