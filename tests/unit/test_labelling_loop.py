"""Why: docs/labelling-loop.md promises that masks come back as labels and that the next run starts from the last one. One round,
by the commands of the page, without Ray."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.conftest import write_photos
from tests.narrow_resnet import NAME
from threestage.cli.app import main
from threestage.data.records import labelled_ids, load_manifest

CLASSES = {
    "classes": [
        {"name": "ground", "colour": [90, 90, 90], "ids": [0], "categories": ["ground"]},
        {"name": "thing", "colour": [255, 0, 0], "ids": [1], "categories": ["thing"]},
    ]
}
CONFIG = {
    "name": "mine",
    "stages": 2,
    "data": {"root": "data", "validation": 0.3},
    "network": {"encoder": NAME, "batch_norm": "live", "dilations": [1]},
    "augment": {"crop_size": [32, 32], "strong": {"cutout_size": 8}},
    "pseudo_mask": {"on_collapse": "ignore", "final_stage": False},
    "stage1": {"steps": 2, "labelled_batch": 2},
    "stage2": {"steps": 2, "labelled_batch": 2, "unlabelled_batch": 2},
    "training": {"log_every": 1, "checkpoint_every": 2, "evaluate_every": 2},
}
Command = Callable[..., str]


@pytest.fixture
def threestage(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """A command that succeeds, in this process; what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(line: str) -> str:
        monkeypatch.setattr("sys.argv", ["threestage", *line.split()])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        assert not ended.value.code, captured.err
        return captured.out

    return run


@pytest.mark.slow
def test_one_round(threestage: Command, tmp_path: Path) -> None:
    write_photos(tmp_path, 8)
    for number in range(4, 8):
        (tmp_path / f"masks/{number}.png").unlink()
    (tmp_path / "classes.yaml").write_text(yaml.safe_dump(CLASSES))
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(CONFIG))
    threestage("ingest images data --masks masks --class-map classes.yaml --local")

    threestage("run mine.yaml --local --out runs/round1")
    printed = threestage("next runs/round1 --out rounds/2 --count 2 --export coco --local")
    assert "rounds/2/next.html" in printed and f"--continue-from {tmp_path}/runs/round1" in printed
    chosen = (tmp_path / "rounds/2/images.txt").read_text().split()
    assert len(chosen) == 2 and set(chosen) < {"4", "5", "6", "7"}

    correct(tmp_path / "rounds/2/coco/annotations.json")
    threestage("ingest images data --format coco --masks rounds/2/coco/annotations.json --local")
    manifest = load_manifest(str(tmp_path / "data"))
    assert manifest.version == 2
    assert labelled_ids(str(tmp_path / "data"), manifest, "train") == sorted(["0", "1", "2", "3", *chosen])

    printed = threestage("run mine.yaml --continue-from runs/round1 --local --out runs/round2")
    assert "pixels changed" in printed and "round2" in printed
    results = json.loads((tmp_path / "runs/round2/results.json").read_text())
    assert results["data"]["version"] == 2 and [one["labelled"] for one in results["rounds"]] == [2, 4]
    assert results["rounds"][1]["corrected"]["images"] == 2
    assert results["rounds"][1]["corrected"]["pixels_changed"] > 0


def correct(annotations: Path) -> None:
    """The annotator swaps the classes of one of the images."""
    content = json.loads(annotations.read_text())
    swapped = {1: 2, 2: 1}
    for one in content["annotations"]:
        if one["image_id"] == content["images"][0]["id"]:
            one["category_id"] = swapped[one["category_id"]]
    annotations.write_text(json.dumps(content))
