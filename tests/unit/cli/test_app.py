"""What a user types wrong gets one clear line and exit code 2, before any training."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
import yaml
from PIL import Image

from tests.conftest import write_photos
from tests.narrow_resnet import NAME as NARROW
from threestage import __version__ as package_version
from threestage.cli.app import main
from threestage.errors import CodedError, InputError, StageFailure, UnwritablePlace
from threestage.models.export import ModelCard, save_model
from threestage.models.network import build_network
from threestage.models.settings import NetworkSettings

CLASS_MAP = {
    "classes": [
        {"name": "ground", "colour": [90, 90, 90], "ids": [0]},
        {"name": "thing", "colour": [255, 0, 0], "ids": [1]},
    ],
    "ignore": {"ids": [255]},
}
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def threestage(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run the command line in this process: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["threestage", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten good images with masks, in images/ and masks/, and a class map."""
    write_photos(tmp_path, 10)
    (tmp_path / "classes.yaml").write_text(yaml.safe_dump(CLASS_MAP))
    return tmp_path


def ingest_arguments(photos: Path, *more: object) -> list[object]:
    options = ["--masks", photos / "masks", "--class-map", photos / "classes.yaml"]
    return ["ingest", photos / "images", photos / "data", "--local", *options, *more]


def refused(result: tuple[int, str, str], *expected: str) -> None:
    code, _, error = result
    assert code == 2
    assert error.count("\n") == 1, f"not one line: {error}"
    for text in expected:
        assert text in error


def test_missing_folder(threestage: Run) -> None:
    refused(threestage("ingest", "nowhere", "data", "--format", "images"), "nowhere")


def test_empty_folder(threestage: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(threestage("ingest", "empty", "data", "--format", "images"), "empty")


def test_mask_of_another_size(threestage: Run, photos: Path) -> None:
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(photos / "masks/3.png")
    refused(threestage(*ingest_arguments(photos)), "3.png", "40", "48")


def test_id_outside_the_class_map(threestage: Run, photos: Path) -> None:
    Image.fromarray(np.full((40, 48), 7, np.uint8)).save(photos / "masks/3.png")
    refused(threestage(*ingest_arguments(photos)), "3.png", "id 7", "class map")


def test_truncated_jpeg_is_skipped_counted_and_listed(threestage: Run, photos: Path) -> None:
    file = photos / "images/3.jpg"
    file.write_bytes(file.read_bytes()[:-200])
    code, out, _ = threestage(*ingest_arguments(photos, "--max-bad-fraction", 0.2, "--json"))
    report = json.loads(out)
    assert code == 0 and report["added_images"] == 9
    assert [Path(rejected["source"]).name for rejected in report["rejected"]] == ["3.jpg"] and report["bad"] == 1
    refused(threestage(*ingest_arguments(photos, "--max-bad-fraction", 0.05)), "3.jpg")


def test_wrong_settings(threestage: Run, scenes: Path) -> None:
    refused(threestage("run", "demo", "--set", "stage1.stps=3"), "stage1.stps", "did you mean steps")
    refused(threestage("ingest", "a", "b", "--format", "cocos"), "format='cocos'", "'cityscapes'")
    demo = ["run", "demo", "--local", "--set", f"data.root={scenes}", "--set"]
    refused(threestage(*demo, "network.encoder=resnet18x"), "resnet18x", "did you mean resnet18")
    torch.save({"conv1.weight": torch.zeros(1)}, "other.pth")
    refused(threestage(*demo, "network.weights=other.pth"), "other.pth", "conv1.weight")


def test_no_model_there(threestage: Run, tmp_path: Path) -> None:
    refused(threestage("predict", tmp_path, tmp_path, "out"), str(tmp_path), "models:/NAME@stage3")
    refused(threestage("evaluate", "nothing", tmp_path), "nothing")


def failing(error: Exception) -> Callable[..., None]:
    def load(*arguments: object) -> None:
        raise error

    return load


@pytest.mark.parametrize(
    ("error", "exit_code", "expected"),
    [
        (
            InputError("stage1.stps=3: unknown key; did you mean steps?", "config/unknown-key"),
            2,
            {"code": "config/unknown-key", "key": "stage1.stps", "value": "3", "fix": "did you mean steps?"},
        ),
        (StageFailure("stage1: NaN in step 2", "stage/diverged"), 1, {"code": "stage/diverged", "fix": None}),
        (UnwritablePlace("/runs/a: is full; make room", "stage/unwritable"), 3, {"value": "/runs/a", "fix": "make room"}),
        (OSError(28, "No space left on device", "/runs/a"), 2, {"code": "storage/full", "value": "/runs/a"}),
        (typer.Abort(), 1, {"code": "clean/no-answer"}),
        (InputError("s3://me:hunter2@bucket/run: not there; correct it"), 2, {"code": None, "value": "s3://bucket/run"}),
    ],
)  # fmt: skip
def test_with_json_an_error_is_json_too(
    threestage: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, exit_code: int, expected: dict[str, object]
) -> None:
    monkeypatch.setattr("threestage.config.load", failing(error))
    code, out, line = threestage("config", "demo", "--json")
    printed = json.loads(out)["error"]
    assert code == exit_code and out.count("\n") == 1
    assert printed.keys() == {"code", "message", "key", "value", "fix"} and expected.items() <= printed.items()
    assert line == f"error: {CodedError(printed['message'], printed['code'])}\n" and "hunter2" not in out + line
    assert threestage("config", "demo") == (exit_code, "", line)


def test_a_command_line_that_cannot_be_read(threestage: Run) -> None:
    code, out, line = threestage("config", "--json", "--nonsense")
    assert code == 2 and json.loads(out)["error"]["code"] == "config/usage"
    assert "--nonsense" in line and line.endswith(" [config/usage]\n")
    refused(threestage("ingest", "photos"), "'out'", "ingest --help", "[config/usage]")


def test_config_prints_the_whole_tree(threestage: Run) -> None:
    code, out, _ = threestage("config", "demo", "--set", "stage1.steps=7")
    assert code == 0 and yaml.safe_load(out)["stage1"]["steps"] == 7
    code, out, _ = threestage("config", "--json")
    assert code == 0 and {"camvid", "demo"} <= set(json.loads(out))


def test_own_images_from_ingest_to_prediction(threestage: Run, photos: Path) -> None:
    """The README's commands on one's own images, at their smallest."""
    assert threestage(*ingest_arguments(photos))[0] == 0
    settings = {
        "data.root": "data", "network.encoder": NARROW,
        "network.head": "deeplabv2", "augment.crop_size": "[40,48]", "pseudo_mask.on_collapse": "ignore",
        "stage1.steps": 2, "stage2.steps": 2, "stage3.steps": 2, "stage1.labelled_batch": 2, "data.labelled": 6,
        "stage2.labelled_batch": 2, "stage3.labelled_batch": 2, "stage2.unlabelled_batch": 2, "stage3.unlabelled_batch": 2,
    }  # fmt: skip
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    code, out, error = threestage("run", "demo", "--local", "--out", "run", *sets)
    assert code == 0, error
    assert "stage3" in out and Path("run/pictures.png").is_file()
    code, out, _ = threestage("runs", "show", ".", "--json")
    shown = json.loads(out)[0]
    assert code == 0 and shown["state"] == "finished" and set(shown["mean_iou"]) == {"stage1", "stage2", "stage3"}
    assert [event["kind"] for event in shown["events"] if event["kind"] != "warning"][:2] == ["started", "stage"]
    assert shown["events"][-1]["kind"] == "finished" and shown["device_hours"] > 0
    code, out, _ = threestage("runs", "cost", "run", "--price-per-hour", 3600, "--json")
    assert code == 0 and json.loads(out)["cost"] == pytest.approx(shown["device_hours"] * 3600)
    code, out, _ = threestage("predict", "run", "images", "predicted", "--local", "--json")
    assert code == 0 and {"images": 10, "kept": 0, "bad": 0}.items() <= json.loads(out).items()
    assert len(list(Path("predicted/overlays").iterdir())) == 10
    code, out, _ = threestage("evaluate", "run", "data", "--split", "train", "--json")
    assert code == 0 and json.loads(out)["images"] == 10


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder; it has learnt nothing."""
    settings = NetworkSettings(encoder="test_resnet", batch_norm="live", dilations=(1, 2))
    colours = ((90, 90, 90), (255, 0, 0))
    card = ModelCard(network=settings, classes=("ground", "thing"), colours=colours, downscale=1, stage="stage1")
    save_model(str(tmp_path / "model"), build_network(settings, 2), card)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path / "model"


def test_evaluate_prints_and_writes(threestage: Run, photos: Path, model: Path) -> None:
    assert threestage(*ingest_arguments(photos))[0] == 0
    evaluate = ["evaluate", model, "data", "--split", "train"]
    code, out, _ = threestage(*evaluate)
    assert code == 0 and "model on data (train, 10 images): whole image, single scale" in out
    assert "boundary F" in out and "calibration error" in out and "true \\ predicted" in out and "1 thing" in out
    options = ["--window", "16,24", "--stride", "8,24", "--flip", "--scales", "0.75,1", "--out", "scores", "--json"]
    code, out, _ = threestage(*evaluate, *options)
    scores = json.loads(out)
    assert code == 0 and scores == json.loads(Path("scores/metrics.json").read_text())
    assert scores["protocol"].startswith("windows of 16x24 every 8x24 pixels")
    assert np.sum(scores["confusion_matrix"]) == 10 * 40 * 48 and scores["split"] == "train"
    with Image.open("scores/reliability.png") as diagram:
        assert diagram.width > 400


def test_wrong_protocols(threestage: Run, photos: Path, model: Path) -> None:
    for command in (["evaluate", model, "data"], ["predict", model, "images", "out", "--local"]):
        refused(threestage(*command, "--window", "16"), "window")
        refused(threestage(*command, "--window", "16,x"), "window", "x")
        refused(threestage(*command, "--window", "15,16"), "window=15x16", "multiples of 8", "try 16,16")
        refused(threestage(*command, "--stride", "8,8"), "stride=8x8", "give a window too")
        refused(threestage(*command, "--scales", "0,1"), "scales", "0")
    assert not Path("out").exists()


def test_predict_names_what_is_wrong(threestage: Run, photos: Path, model: Path) -> None:
    predict = ["predict", model, "images", "out", "--local"]
    refused(threestage(*predict, "--format", "tiff"), "format='tiff'", "'png'")
    refused(threestage("predict", model, "nowhere", "out", "--local"), "nowhere")
    code, out, _ = threestage(*predict, "--no-overlays", "--confidence")
    assert code == 0 and "10 images predicted, 0 left out; all in out" in out
    assert sorted(path.name for path in Path("out").iterdir() if path.is_dir()) == [
        "confidence", "listing", "masks", "parts"
    ]  # fmt: skip
    code, out, _ = threestage(*predict, "--no-overlays", "--confidence")
    assert code == 0 and "10 images predicted (10 of them before)" in out
    refused(threestage(*predict), "out: it holds predictions with overlays=False, not True; give another folder")


def test_predict_fails_when_too_many_images_are_bad(threestage: Run, photos: Path, model: Path) -> None:
    (photos / "images/3.jpg").write_bytes(b"no image")
    predict = ["predict", model, "images", "out", "--local"]
    code, _, error = threestage(*predict)
    assert code == 1 and error.count("\n") == 1
    assert "1 of 10 images are bad" in error and "3.jpg" in error and "out/rejects.parquet" in error
    code, out, _ = threestage(*predict, "--max-bad-fraction", 0.1)
    assert code == 0 and "left out" in out and "3.jpg: cannot be decoded" in out


def test_the_version_and_the_short_help(threestage: Run) -> None:
    code, out, _ = threestage("--version")
    assert code == 0 and out == f"threestage {package_version}\n"
    for arguments in (["-h"], ["run", "-h"], ["models", "pull", "-h"]):
        code, out, _ = threestage(*arguments)
        assert code == 0 and "Usage" in out
