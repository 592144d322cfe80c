"""Splits that make every score wrong: one scene on both sides of training and validation."""

from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from tests.bad_inputs import BadInput, Ended, refused, threestage

SIZE, IMAGES = 40, 10


def _ingest(folder: Path, split: str = "train", first_scene: int = 0) -> None:
    """Scenes of two frames each, named s0_0, s0_1, s1_0 …, as the data set `data`; the frames of a scene are alike."""
    source = folder / split
    for name in ("images", "masks"):
        (source / name).mkdir(parents=True)
    for number in range(IMAGES):
        scene = first_scene + number // 2
        random = np.random.default_rng(scene)
        cells = Image.fromarray(random.integers(0, 256, (5, 5, 3)).astype(np.uint8))
        cells.resize((SIZE, SIZE)).save(source / f"images/s{scene}_{number % 2}.png")
        mask = Image.fromarray((np.arange(SIZE * SIZE).reshape(SIZE, SIZE) % 2).astype(np.uint8))
        mask.save(source / f"masks/s{scene}_{number % 2}.png")
    classes = [{"name": name, "colour": [90, 90, 90 * i], "ids": [i]} for i, name in enumerate(("a", "b"))]
    (folder / "classes.yaml").write_text(yaml.safe_dump({"classes": classes}))
    ended = threestage(
        "ingest", source / "images", folder / "data", "--masks", source / "masks", "--class-map", folder / "classes.yaml",
        "--split", split, "--local",
    )  # fmt: skip
    assert ended.code == 0, ended.text


def _settings(folder: Path, **changes: object) -> list[str]:
    settings = {
        "data.root": folder / "data", "data.labelled": "all", "network.encoder": "test_resnet", "network.weights": "null",
        "network.batch_norm": "live", "network.dilations": "[1,2]", "augment.crop_size": "[32,32]", "stage1.labelled_batch": 2,
        "stages": 1, **changes,
    }  # fmt: skip
    return [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]


def _run(folder: Path, **changes: object) -> Ended:
    return threestage("run", "demo", "--local", "--out", folder / "run", *_settings(folder, **changes))


def no_group(folder: Path) -> str:
    _ingest(folder)
    return refused(_run(folder, **{"data.group": "'^(drive[0-9]+)_'"}))


def other_columns(folder: Path) -> str:
    _ingest(folder)
    (folder / "scenes.csv").write_text("image,scene\ns0_0,s0\n")
    return refused(_run(folder, **{"data.group": folder / "scenes.csv"}))


def on_both_sides(folder: Path) -> str:
    _ingest(folder)
    _ingest(folder, "val", first_scene=100)
    return refused(_run(folder, **{"data.group": "'^s'"}))


def near_copies(folder: Path) -> str:
    _ingest(folder)
    short = {"stage1.steps": 2, "training.evaluate_every": 2, "pseudo_mask.final_stage": False}
    ended = _run(folder, **short)
    warned = "validation images nearly equal a labelled one" in ended.text
    return f"exit code {ended.code}{', a warning' if warned else ': ' + ended.text}"


BAD_INPUTS = [
    BadInput("`data.group` that some labelled image does not match", "refused [data/no-group]", no_group),
    BadInput("`data.group`: a .csv file with other columns", "refused [data/group-columns]", other_columns),
    BadInput(
        "`data.group` that puts all images of train and val into one group",
        "refused [data/group-on-both-sides]",
        on_both_sides,
    ),
    BadInput("frames of one scene in training and validation", "exit code 0, a warning", near_copies),
]
