"""Why: what `threestage next` lists ends in the hands of an annotator: it must be unlabelled, stay as it was, and be seen."""

import csv
import json
import re
from collections.abc import Generator, Sequence
from pathlib import Path

import pytest

from tests.refusals import refused
from tests.runs import copy_run
from threestage.data import storage
from threestage.data.pool import PoolFile
from threestage.data.split import saved_split
from threestage.prediction.pool_prediction import predict_pool_here
from threestage.prediction.pseudo_masks import FileReport, PoolTask
from threestage.selection.next_images import NextReport, NextSettings, next_images


@pytest.fixture(scope="module")
def report(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> NextReport:
    out = tmp_path_factory.mktemp("next") / "out"
    before = {uri: Path(uri).stat().st_mtime_ns for uri in storage.list_files(str(finished_run))}
    report = next_images(str(finished_run), str(out), NextSettings(count=5, export="coco"))
    assert {uri: Path(uri).stat().st_mtime_ns for uri in storage.list_files(str(finished_run))} == before
    return report


def test_the_lists_hold_unlabelled_images(report: NextReport, finished_run: Path) -> None:
    split = saved_split(f"{finished_run}/split.json")[0]
    ids = [image.image_id for image in report.images]
    assert len(set(ids)) == 5 and not set(ids) & {*split.labelled, *split.validation}
    assert report.pool == 40 - len(split.labelled)
    with open(f"{report.out}/next.csv") as file:
        assert [row["image_id"] for row in csv.DictReader(file)] == ids
    assert [image["image_id"] for image in json.loads(Path(report.out, "next.json").read_text())["images"]] == ids
    assert Path(report.out, "images.txt").read_text().split() == ids
    assert all(0 < image.entropy <= 1 and 0 <= image.margin < 1 and image.distance > 0 for image in report.images)


def test_the_page_and_the_export_show_them(report: NextReport) -> None:
    page = Path(report.out, "next.html").read_text()
    assert page.count("<img ") == 3 * 5 and all(image.image_id in page for image in report.images)
    hidden = {kind for rule in re.findall(r":not\(:has\(#[^{]*", page) for kind in re.findall(r"\) \.(\w+)", rule)}
    assert hidden and not hidden & set(re.findall(r'class="picture (\w+)"', page)), (
        "the style sheet hides nothing of it"
    )
    assert report.export is not None
    content = json.loads(Path(report.export, "annotations.json").read_text())
    assert len(content["images"]) == 5 and content["annotations"]


def test_a_finished_choice_stays(report: NextReport, finished_run: Path, tmp_path: Path) -> None:
    """Somebody may be labelling it."""

    def no_more(model: str, task: PoolTask, files: Sequence[PoolFile]) -> Generator[FileReport]:
        yield from pytest.fail(f"{len(files)} files are predicted again")

    again = next_images(str(finished_run), report.out, NextSettings(count=5, export="coco"), no_more)
    assert again == report
    with refused("next/other-choice", report.out, "count=5", "6"):
        next_images(str(finished_run), report.out, NextSettings(count=6), no_more)
    with refused("labels/format", "svg", "coco"):
        next_images(str(finished_run), f"{tmp_path}/a", NextSettings(export="svg"), no_more)
    (tmp_path / "mine.txt").touch()
    with refused("data/foreign-folder", tmp_path, "mine.txt"):
        next_images(str(finished_run), str(tmp_path), NextSettings(), no_more)


def test_a_killed_pass_over_the_pool_continues(report: NextReport, finished_run: Path, tmp_path: Path) -> None:
    seen: list[str] = []

    def killed(model: str, task: PoolTask, files: Sequence[PoolFile]) -> Generator[FileReport]:
        yield from predict_pool_here(model, task, files[:1])
        raise KeyboardInterrupt

    def rest(model: str, task: PoolTask, files: Sequence[PoolFile]) -> Generator[FileReport]:
        seen.extend(file.name for file in files)
        yield from predict_pool_here(model, task, files)

    with pytest.raises(KeyboardInterrupt):
        next_images(str(finished_run), f"{tmp_path}/out", NextSettings(count=5), killed)
    assert next_images(str(finished_run), f"{tmp_path}/out", NextSettings(count=5), rest).images == report.images
    assert len(seen) == len(set(seen)) == len(list((tmp_path / "out/features").glob("train-*"))) - 1


def test_labels_that_came_since_are_left_out(scenes: Path, finished_run: Path, tmp_path: Path) -> None:
    """A run that takes all labels covers those of the data set's newest version; here all images have masks."""
    run = copy_run(finished_run, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["data"]["labelled"] = "all"
    (run / "config.json").write_text(json.dumps(config))
    with refused("next/all-labelled", run):
        next_images(str(run), f"{tmp_path}/out", NextSettings())
