"""Folders of others: a command writes into, and deletes below, only what threestage has made."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from tests.bad_inputs import BadInput, refused, threestage
from threestage.models.export import ModelCard, save_model
from threestage.models.network import build_network
from threestage.models.settings import NetworkSettings

REFUSED = "refused [data/foreign-folder], nothing changed"


def _photos(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for number in range(2):
        Image.fromarray(np.full((40, 48, 3), 40 * number, np.uint8)).save(folder / f"{number}.jpg")
    return folder


def _model(folder: Path) -> Path:
    settings = NetworkSettings(encoder="test_resnet", batch_norm="live", dilations=(1, 2))
    card = ModelCard(network=settings, classes=("a", "b"), colours=((0, 0, 0), (9, 9, 9)), downscale=1, stage="stage1")
    save_model(str(folder), build_network(settings, 2, seed=0), card)
    return folder


def _files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _refused_over(folder: Path, theirs: tuple[str, ...], *command: object) -> str:
    """What became of a command whose output folder holds files of somebody else."""
    for name in theirs:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"mine": 1}')
    before = _files(folder)
    outcome = refused(threestage(*command))
    return f"{outcome}, {'nothing' if _files(folder) == before else 'something'} changed"


def _predict_beside_masks(folder: Path) -> str:
    photos, model = _photos(folder / "own/photos"), _model(folder / "model")
    return _refused_over(
        folder / "own", ("masks/0.png", "masks/1.png"), "predict", model, photos, folder / "own", "--local"
    )


def _ingest_over(*theirs: str) -> Callable[[Path], str]:
    def try_it(folder: Path) -> str:
        command = ("ingest", _photos(folder / "photos"), folder / "out", "--format", "images", "--local")
        return _refused_over(folder / "out", theirs, *command)

    return try_it


def _run_over(folder: Path) -> str:
    data = folder / "data"
    threestage("ingest", _photos(folder / "photos"), data, "--format", "images", "--local")
    command = ("run", "demo", "--set", f"data.root={data}", "--out", folder / "out", "--local")
    return _refused_over(folder / "out", ("results.json", "stage1/checkpoints/step-000000001.pt"), *command)


def _demo_over(folder: Path) -> str:
    return _refused_over(folder / "out", ("scenes/class_map.yaml",), "demo", "--local", "--out", folder / "out")


def _evaluate_over(folder: Path) -> str:
    command = ("evaluate", _model(folder / "model"), folder / "data", "--out", folder / "out")
    return _refused_over(folder / "out", ("metrics.json",), *command)


def _run_folder(folder: Path) -> Path:
    """One that is enough for `clean`."""
    run = folder / "run"
    run.mkdir()
    split = {"labelled": [], "validation": [], "validation_split": "val"}
    (run / "split.json").write_text(json.dumps({"settings": {}, "split": split}))
    return run


def _clean_behind_link(folder: Path) -> str:
    run, elsewhere = _run_folder(folder), folder / "elsewhere"
    for name in ("checkpoints/thesis.txt", "ray_train/x", "done.json"):
        (elsewhere / name).parent.mkdir(parents=True, exist_ok=True)
        (elsewhere / name).write_text("{}")
    (run / "stage1").symlink_to(elsewhere)
    before = _files(elsewhere)
    codes = {threestage("clean", run, "--yes", *more).code for more in ((), ("--all",))}
    return f"exit code {codes}, {'nothing' if _files(elsewhere) == before else 'something'} behind the link changed"


def _clean_of_others(folder: Path) -> str:
    (folder / "run").mkdir()
    (folder / "run/split.json").write_text("{}")
    return _refused_over(folder / "run", ("stage1/checkpoints/a", "stage1/done.json"), "clean", folder / "run", "--yes")


BAD_INPUTS = [
    BadInput("`predict` into a folder with hand-made masks", REFUSED, _predict_beside_masks),
    BadInput("`ingest` into a folder with an index of its own", REFUSED, _ingest_over("index/thesis.txt")),
    BadInput("`ingest` into a folder with a list of its own", REFUSED, _ingest_over("rejected/v0001.parquet")),
    BadInput("`ingest` into a folder with one unknown file", REFUSED, _ingest_over("notes.txt")),
    BadInput("`run --out` of a folder with other results", REFUSED, _run_over),
    BadInput("`demo --out` of a folder with other scenes", REFUSED, _demo_over),
    BadInput("`evaluate --out` of a folder with other metrics", REFUSED, _evaluate_over),
    BadInput("`clean` of a folder with another split.json", REFUSED, _clean_of_others),
    BadInput(
        "`clean` of a run whose stage is a link to another folder",
        "exit code {0}, nothing behind the link changed",
        _clean_behind_link,
    ),
]
