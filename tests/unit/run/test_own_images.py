"""One command from folders to a run: the data set and the class map below the run's folder, the same after a rerun."""

import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import write_photos
from tests.refusals import refused
from tests.unit.labels.exports import CLASSES, write
from threestage.cli.app import app
from threestage.data.classes import load_class_map
from threestage.data.ingest import ingest
from threestage.run.own_images import OwnImages, described

WHITE, RED = (255, 255, 255), (200, 0, 0)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OwnImages:
    """Ten photos with masks of two colours and white, and five photos more."""
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path, 10)
    for mask in Path("masks").iterdir():
        colours = np.full((40, 48, 3), WHITE, np.uint8)
        colours[:, :20], colours[:, 20:40] = RED, (0, 0, 9)
        Image.fromarray(colours).save(mask.with_suffix(".png"))
    Path("more").mkdir()
    for number, image in enumerate(np.random.default_rng(1).integers(0, 255, (5, 40, 48, 3), np.uint8)):
        Image.fromarray(image).save(f"more/other{number}.jpg")
    return OwnImages("images", "masks", "runs/mine", "more", ignored=(WHITE,))


def test_from_folders_to_a_configuration_and_again(own: OwnImages) -> None:
    labelled, unlabelled = own.make_data_set(ingest)
    assert (labelled.added_labels, unlabelled.added_images) == (10, 5) and not own.has_begun
    assert [entry.name for entry in load_class_map("runs/mine/classes.yaml").classes] == [
        "class_000009",
        "class_c80000",
    ]
    config = own.config("mine", ["stage1.steps=7"])
    assert (config.name, config.data.root, config.stage1.steps) == ("mine", "runs/mine/data", 7)
    shown = dict(described(config, "a CPU"))
    assert shown["found"] == "8 labelled, 2 to validate, 13 in the pool" and shown["steps"].startswith("7, ")
    assert [report.added_images for report in own.make_data_set(ingest)] == [0, 0]


def test_the_commands_that_it_stands_for_are_commands(own: OwnImages) -> None:
    own.make_data_set(ingest)
    lines = [shlex.split(line) for line in own.commands("mine", ["a.b=[1, 2]"], local=True)]
    assert [line[:2] for line in lines] == [["threestage", name] for name in ("ingest", "ingest", "check", "run")]
    assert all("--local" in line for line in lines) and "a.b=[1, 2]" in lines[-1]
    known = {name for command in app.registered_commands if command.callback for name in [command.callback.__name__]}
    assert {line[1] for line in lines} <= known


def test_a_class_map_that_exists_is_kept(own: OwnImages) -> None:
    own.make_data_set(ingest)
    with refused("class-map/ignore-too-late", "classes.yaml"):
        OwnImages("images", "masks", "runs/mine", ignored=(RED,)).make_data_set(ingest)


def test_an_export_of_a_labelling_tool_needs_no_class_map(own: OwnImages, tmp_path: Path) -> None:
    names = sorted(path.name for path in Path("images").iterdir())
    mask = np.repeat(np.array([0, 1, 2, 255], np.uint8), 480).reshape(40, 48)
    write("coco", tmp_path / "export", dict.fromkeys(names, mask))
    (report,) = OwnImages("images", "export", "runs/coco").make_data_set(ingest)
    assert list(report.manifest.classes) == [name for name, _ in CLASSES]


def test_what_is_not_ours_is_left_alone(own: OwnImages) -> None:
    with refused("config/usage", "data.root=elsewhere"):
        own.config("mine", ["data.root=elsewhere"])
    Path("runs/mine").mkdir(parents=True)
    Path("runs/mine/notes.txt").write_text("mine")
    with refused("data/foreign-folder", "notes.txt"):
        own.make_data_set(ingest)
