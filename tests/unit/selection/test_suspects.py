"""Why: a label is suspect by what a model says that has not learnt it; nothing is trained twice, and a list stays as it was."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import tiny_config
from tests.planted import average_precision, planted
from tests.refusals import refused
from tests.runs import run_local
from threestage.data import storage
from threestage.data.ingest import IngestSettings, ingest
from threestage.data.palette import palette_png
from threestage.data.split import saved_split
from threestage.data.synthetic import COLOURS, scene, write_scenes
from threestage.run.run import _settings
from threestage.selection import suspects as module
from threestage.selection.held_out import read_held_out
from threestage.selection.suspects import SuspectsReport, SuspectsSettings, suspects

SETTINGS = SuspectsSettings(folds=2, steps=2, count=5, export="coco")


@pytest.fixture(scope="module")
def report(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> SuspectsReport:
    out = tmp_path_factory.mktemp("suspects") / "out"
    before = {uri: Path(uri).stat().st_mtime_ns for uri in storage.list_files(str(finished_run))}
    report = suspects(str(finished_run), str(out), SETTINGS, warn=lambda text: None)
    assert {uri: Path(uri).stat().st_mtime_ns for uri in storage.list_files(str(finished_run))} == before
    return report


def test_no_model_has_learnt_what_it_is_asked_about(report: SuspectsReport, finished_run: Path) -> None:
    split = saved_split(f"{finished_run}/split.json")[0]
    asked = list[str]()
    for number in (1, 2):
        held_out = {image.image_id for image in read_held_out([f"{report.out}/predictions/fold{number}.parquet"])}
        learnt = set(saved_split(f"{report.out}/folds/fold{number}/split.json")[0].labelled)
        assert held_out.isdisjoint(learnt) and learnt <= set(split.labelled)
        asked += held_out
    assert sorted(asked) == sorted([*split.labelled, *split.validation]), "those to validate on too, each once"
    assert report.examined == len(asked)


def test_lists_page_and_export_hold_them(report: SuspectsReport) -> None:
    ids = [image.image_id for image in report.images]
    assert len(set(ids)) == 5
    assert [image.score for image in report.images] == sorted((i.score for i in report.images), reverse=True)
    with open(f"{report.out}/suspects.csv") as file:
        assert [row["image_id"] for row in csv.DictReader(file)] == ids
    assert Path(report.out, "images.txt").read_text().split() == ids
    page = Path(report.out, "suspects.html").read_text()
    assert page.count("<img ") == 4 * 5 and all(image_id in page for image_id in ids)
    assert report.export is not None
    assert len(json.loads(Path(report.export, "annotations.json").read_text())["images"]) == 5


def test_a_finished_list_stays(
    report: SuspectsReport, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "side_run", lambda *_: pytest.fail("a model is trained again"))
    assert suspects(str(finished_run), report.out, SETTINGS) == report
    with refused("next/other-choice", report.out, "folds=2", "3"):
        suspects(str(finished_run), report.out, SETTINGS.model_copy(update={"folds": 3}))
    with refused("next/too-few-for-folds", "--folds 9"):
        suspects(str(finished_run), f"{tmp_path}/out", SETTINGS.model_copy(update={"folds": 9}))
    with refused("run/no-champion", tmp_path):
        suspects(str(tmp_path), f"{tmp_path}/out", SETTINGS)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_planted_faults_are_found(tmp_path: Path) -> None:
    """In a fifth of the masks of 40 scenes, by models of a few hundred steps."""
    source, count = tmp_path / "source", 40
    write_scenes(str(source), {"train": count, "val": 4, "test": 1}, seed=3)
    masks, faults = planted([scene(3, number)[1] for number in range(count)], 0.2, seed=1)
    for number, mask in enumerate(masks):
        (source / f"train/masks/train_{number:05d}.png").write_bytes(palette_png(mask, COLOURS))
    settings = IngestSettings(format="camvid", class_map=str(source / "class_map.yaml"))
    ingest(str(source), str(tmp_path / "data"), settings)
    config = tiny_config(
        tmp_path / "data", stages=1, data__labelled=count, pseudo_mask__final_stage=False,
        augment={"crop_size": [64, 64]}, stage1={"steps": 1, "labelled_batch": 8},
    )  # fmt: skip
    run_local(config, tmp_path / "run")
    storage.write_json(f"{tmp_path}/run/config.json", _settings(config))
    options = SuspectsSettings(steps=200, count=60)
    report = suspects(f"{tmp_path}/run", f"{tmp_path}/out", options, warn=lambda text: None)
    ids = [image.image_id for image in report.images if image.image_id.startswith("train/")]
    faulty = {ids.index(f"train/images/train_{number:05d}") for number in faults}
    assert len(ids) == count
    assert average_precision(list(-np.arange(len(ids))), faulty) > 0.5, "0.2 by chance"
