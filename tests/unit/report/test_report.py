"""A page that people send to each other: every figure must be the run's, and no text of the data may become markup."""

import json
import math
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.refusals import refused
from tests.runs import copy_run
from threestage.cli.app import main
from threestage.data import storage
from threestage.data.rejects import Reject, RejectList
from threestage.report.report import write_report
from threestage.report.run_reader import log_page, read_run, throughput
from threestage.report.validation_images import Validation, choose, evenly, median_of_quarters
from threestage.run import run as run_module
from threestage.training.metrics import expected_calibration_error, reliability_counts

EVIL = "<script>alert('1')</script>&\"x\" onload=alert(1) \udcff.jpg"


@pytest.fixture
def finished(finished_run: Path) -> Path:
    """Do not change it."""
    return finished_run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return copy_run(finished, tmp_path / "run")


class Page(HTMLParser):
    """A strict reading of a page: its elements, its text, and what refers to something."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert self.open == [], f"not closed: {self.open}"
        self.text = " ".join(self.text.split())

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attributes)))
        if name not in ("meta", "link", "img", "input"):
            self.open.append(name)

    def handle_startendtag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        assert name in ("path", "line", "polyline", "rect", "use"), name
        self.elements.append((name, dict(attributes)))

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.elements if found == name]


def page_of(run: Path, **options: object) -> Page:
    return Page(storage.read_bytes(write_report(str(run), **options).uri).decode())  # type: ignore[arg-type]


# ---- Figures


def test_reliability_counts_and_calibration_error_by_hand() -> None:
    confidence = torch.tensor([[0.1, 0.4, 0.5], [0.9, 1.0, 0.6]])
    correct = torch.tensor([[False, True, False], [True, True, False]])
    counts = reliability_counts(confidence, correct, bins=2)
    assert counts.dtype == torch.float64
    torch.testing.assert_close(counts, torch.tensor([[2, 0.5, 1], [4, 3.0, 2]], dtype=torch.float64))
    assert expected_calibration_error(counts) == pytest.approx((0.5 + 1.0) / 6)


def test_reliability_counts_add_up_and_know_the_ends() -> None:
    random = torch.Generator().manual_seed(0)
    confidence, correct = torch.rand(1000, generator=random), torch.rand(1000, generator=random) < 0.5
    parts = reliability_counts(confidence[:300], correct[:300]) + reliability_counts(confidence[300:], correct[300:])
    torch.testing.assert_close(parts, reliability_counts(confidence, correct))
    ends = reliability_counts(torch.tensor([0.0, 1.0]), torch.tensor([False, True]))
    assert ends.shape == (15, 3) and ends[0, 0] == 1 and ends[14].tolist() == [1, 1, 1]
    assert expected_calibration_error(ends) == 0
    assert math.isnan(expected_calibration_error(torch.zeros(15, 3, dtype=torch.float64)))


def test_the_stages_are_measured_as_the_run_measured_them(finished: Path, scenes: Path) -> None:
    found = read_run(str(finished))
    validation = Validation(found, str(scenes))
    measured = validation.measure(100, lambda done, total: None)
    assert not validation.changed
    for stage, one in zip(found.stages, measured, strict=True):
        others = one.confusion - torch.tensor(stage.result["confusion_matrix"])
        assert others.abs().max() <= 3, "another batch size rounds otherwise: a few of 24,576 pixels"
        assert one.accuracy == pytest.approx(stage.result["pixel_accuracy"], abs=1e-3)
        assert one.pixels == one.confusion.sum()
        assert 0 < one.mean_confidence < 1 and 0 < one.mean_entropy < math.log(6)
        assert one.counts[:, 2].sum() == one.confusion.diagonal().sum()
    assert len(measured[0].image_iou) == 6
    assert len(validation.measure(2, lambda done, total: None)[0].image_iou) == 2


def test_images_are_chosen_from_worst_middle_and_best() -> None:
    scores = {i: i / 20 for i in range(20)} | {20: math.nan}
    chosen = choose(scores, 7)
    assert [c.place for c in chosen] == [0, 1, 2, 9, 10, 18, 19]
    assert [c.group for c in chosen] == ["worst"] * 3 + ["middle"] * 2 + ["best"] * 2
    assert [c.place for c in choose(scores, 100)] == list(range(20)), "each image once"
    assert [c.group for c in choose(scores, 1)] == ["worst"]
    assert choose({0: math.nan}, 3) == []
    assert evenly(10, 3) == [0, 3, 6] and evenly(2, 5) == [0, 1]


def test_throughput_weighs_rows_by_their_steps() -> None:
    rows = [
        {"step": 10, "step_seconds": 1.0, "images_per_second": 4.0, "data_wait_seconds": 0.5, "workers": 2.0},
        {"step": 40, "step_seconds": 2.0, "images_per_second": 2.0, "data_wait_seconds": 0.0, "workers": 2.0},
    ]
    found = throughput(rows)
    assert found.steps_per_second == pytest.approx(40 / 70)
    assert found.images_per_second == pytest.approx(160 / 70)
    assert found.data_wait_share == pytest.approx(5 / 70)
    assert (found.workers, found.memory_bytes) == (2, None)
    assert throughput([{"step": 5, "mean_iou": 0.1}]).steps_per_second is None


# ---- The page


def test_a_finished_run_has_every_part_and_its_own_figures(finished: Path, tmp_path: Path) -> None:
    page = page_of(finished, out=str(tmp_path / "page.html"), images=6)
    results = json.loads((finished / "results.json").read_text())["stages"]
    for values in results.values():
        assert f"{values['mean_iou']:.3f}" in page.text
        assert f"{values['mean_confidence']:.3f}" in page.text
        assert f"{values['share_above_0.9']:.1%}" in page.text
        assert f"{values['pseudo_mask_mean_iou']:.3f}" in page.text
        assert all(f"{iou:.3f}" in page.text for iou in values["per_class_iou"].values() if iou is not None)
    for said in (
        "validation images",
        "not of a test set",
        "▼ worst",
        "ECE",
        "stage1.steps",
        "cluster.workers",
        "narrow_resnet",
        "nan",
    ):
        assert (said in page.text) == (said != "nan")
    assert len(page.all("img")) == 6 * (2 + 3 * 3)
    assert len(Page((finished / "report.html").read_text()).all("img")) == len(page.all("img")), "the run writes it too"


def test_the_page_loads_nothing_and_runs_nothing(finished: Path, tmp_path: Path) -> None:
    page = page_of(finished, out=str(tmp_path / "page.html"))
    assert not {"script", "link", "iframe", "object", "embed", "form", "base"} & {name for name, _ in page.elements}
    references = [
        value for _, attributes in page.elements for key, value in attributes.items() if key in ("src", "href")
    ]
    assert all(value and value.startswith(("data:image/", "#")) for value in references)
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
    assert set(re.findall(r"url\(([^)]*)\)", page.source)) <= {"#pattern2", "#pattern3", "#pattern4"}
    assert "@import" not in page.source and "http" not in re.sub(r'http-equiv="', "", page.source)


def test_the_page_can_be_used_without_a_mouse_and_without_eyes(finished: Path, tmp_path: Path) -> None:
    page = page_of(finished, out=str(tmp_path / "page.html"))
    assert page.all("html") == [{"lang": "en"}]
    assert all(image["alt"] for image in page.all("img"))
    assert all(svg.get("aria-label") or svg.get("aria-hidden") for svg in page.all("svg"))
    levels = [int(name[1]) for name, _ in page.elements if re.fullmatch("h[1-6]", name)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert len(page.all("main")) == len(page.all("nav")) == len(page.all("header")) == len(page.all("footer")) == 1
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [link["href"] or "" for link in page.all("a")]
    targets += [
        f"#{attributes['aria-labelledby']}" for _, attributes in page.elements if "aria-labelledby" in attributes
    ]
    targets += [attributes["href"] or "" for attributes in page.all("use")]
    assert {target.removeprefix("#") for target in targets} <= set(ids)


def test_no_picture_moves_what_follows_it_or_waits_to_be_seen(finished: Path, tmp_path: Path) -> None:
    """Links of the menu land where they say, and a print or a screenshot of the whole page has no gap."""
    page = page_of(finished, out=str(tmp_path / "page.html"))
    assert all(
        (image["width"], image["height"]) == ("64", "64") and "loading" not in image for image in page.all("img")
    )
    assert "content-visibility: auto" not in page.source


def test_text_of_the_data_never_becomes_markup(run: Path) -> None:
    for stage in (1, 2, 3):
        uri = run / f"stage{stage}/result.json"
        result = json.loads(uri.read_text())
        others = list(result["per_class_iou"])[1:]
        result["per_class_iou"] = {EVIL: 0.5, **{name: result["per_class_iou"][name] for name in others}}
        uri.write_text(json.dumps(result))
    reject = Reject(image_id="a", source="s3://key:secret@bucket/<img src=x>.jpg", reason="cannot </td><b>be decoded")
    RejectList([reject]).write(str(run / "pseudo_masks1/rejects.parquet"))
    (run / "config.json").write_text(json.dumps({"name": EVIL, "cluster": {"address": "ray://me:secret@host:1"}}))
    page = page_of(run)
    assert "<script" not in page.source and "<b>be" not in page.source and "<img src=x" not in page.source
    assert "<script>alert('1')</script>" in page.text and "cannot </td><b>be decoded" in page.text
    assert "secret" not in page.source and "ray://host:1" in page.text
    assert "1 image was rejected." in page.text


def test_a_page_that_fails_does_not_fail_the_run(run: Path) -> None:
    (run / "stage1/result.json").unlink()
    warnings: list[str] = []
    run_module._write_page(str(run), warnings.append)
    assert len(warnings) == 1 and "threestage report" in warnings[0]


def test_an_unfinished_run_shows_what_there_is_and_says_what_is_missing(run: Path, scenes: Path) -> None:
    settings = json.loads((run / "config.json").read_text())
    for path in ("config.json", "results.json", "stage3/done.json", "stage3/result.json"):
        (run / path).unlink()
    shutil.rmtree(run / "pseudo_masks2")
    written = write_report(str(run))
    page = Page(Path(written.uri).read_text())
    assert not written.finished
    for said in (
        "Stage 3 is not finished: its last checkpoint is of step 6",
        "Stage 2 has no pseudo-masks yet",
        "--data",
    ):
        assert said in page.text and any(said in missing for missing in written.missing)
    assert page.all("img") == [], "the folder does not say where the images are"
    page = page_of(run, data=str(scenes), images=3)
    assert len(page.all("img")) == 3 * (2 + 2 * 3)
    assert "stage 2" in page.text and "stage 3: prediction" not in page.text
    (run / "config.json").write_text(json.dumps(settings))
    assert len(page_of(run, images=3).all("img")) == 3 * (2 + 2 * 3)


def test_last_and_best_are_told_apart_and_a_run_of_an_older_version_has_a_page(run: Path) -> None:
    uri = run / "stage2/result.json"
    result = json.loads(uri.read_text())
    uri.write_text(json.dumps(result | {"best": {"step": 4, "mean_iou": 0.98765, "model": "best_model"}}))
    text = page_of(run).text
    assert "best evaluation" in text and "0.988" in text and "student" in text
    for stage in (1, 2, 3):
        uri = run / f"stage{stage}/result.json"
        result = json.loads(uri.read_text())
        uri.write_text(json.dumps({key: result[key] for key in result.keys() - {"last", "best", "student"}}))
    text = page_of(run).text
    assert "best evaluation" not in text and "At a glance" in text


def test_a_run_that_has_just_begun_has_a_page_too(run: Path) -> None:
    for path in run.iterdir():
        if path.name != "split.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = page_of(run)
    assert "Stage 1 has not saved anything yet." in page.text


def test_a_data_set_that_is_gone_costs_the_pictures_only(run: Path, tmp_path: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    results["data"]["root"] = str(tmp_path / "gone")  # the results are believed before the settings
    (run / "results.json").write_text(json.dumps(results))
    page = page_of(run)
    assert "No pictures and no calibration" in page.text and "manifest.json" in page.text
    with refused("data/no-data-set"):
        write_report(str(run), data=str(tmp_path / "elsewhere"))


def test_validation_images_that_changed_are_told(run: Path) -> None:
    for stage in (1, 2, 3):
        uri = run / f"stage{stage}/done.json"
        uri.write_text(json.dumps(json.loads(uri.read_text()) | {"validation": "other"}))
    assert "have changed since the run" in page_of(run).text


# ---- The command


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def threestage(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["threestage", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return call


def test_the_command_writes_the_page_into_the_run(threestage: Run, run: Path) -> None:
    code, out, error = threestage("report", run, "--images", 2)
    assert (code, error) == (0, "") and "report.html" in out
    assert len(Page((run / "report.html").read_text()).all("img")) == 2 * 11
    code, out, _ = threestage("report", run, "--out", "there.html", "--measure", 3, "--json")
    assert json.loads(out)["bytes"] == Path("there.html").stat().st_size
    assert "3 of the 6 validation images" in Path("there.html").read_text()


def test_a_folder_that_is_no_run_is_one_clear_line(threestage: Run, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        code, _, error = threestage("report", folder)
        assert code == 2 and error.count("\n") == 1
        assert str(folder) in error and "split.json" in error and "--out" in error
    assert list(tmp_path.iterdir()) == []


def test_mlflow_that_is_down_costs_a_warning(threestage: Run, run: Path) -> None:
    (run / "run.json").write_text(json.dumps({"run_key": "k"}))
    (run / "config.json").write_text(json.dumps({"registry": {"tracking_uri": "http://127.0.0.1:9"}}))
    code, _, error = threestage("report", run)
    assert code == 0 and (run / "report.html").is_file()
    assert error.count("\n") == 1 and "not logged to MLflow" in error and "127.0.0.1:9" in error


def test_no_store_is_made_for_a_run_that_is_in_another_one(run: Path, tmp_path: Path) -> None:
    (run / "run.json").write_text(json.dumps({"run_key": "k"}))
    said = log_page(str(run), str(run / "report.html"), True, f"sqlite:///{tmp_path}/mlflow.db")
    assert said is not None and "--tracking-uri" in said
    assert not (tmp_path / "mlflow.db").exists()
    assert "not finished" in str(log_page(str(run), str(run / "report.html"), False))


KNOWN = """
html head meta title style body header nav main footer section div span p a h1 h2 h3 ul ol li dl dt dd table caption thead
tbody tr th td figure figcaption img details summary input label fieldset legend article h4 br b strong em code small time
svg g path line polyline polygon rect circle text tspan defs pattern use
"""


def test_every_element_is_one_of_html_or_svg(finished: Path, tmp_path: Path) -> None:
    page = page_of(finished, out=str(tmp_path / "page.html"))
    assert {name for name, _ in page.elements} <= set(KNOWN.split())


def test_pictures_are_four_scenes_of_truth_labels_only_and_the_last_stage(finished: Path) -> None:
    assert median_of_quarters(torch.tensor([3.0, 1.0, 2.0, 0.0, 9.0, 5.0, 7.0, 8.0, 6.0, 0.0, 0.0, 0.0])) == [
        2,
        5,
        6,
        10,
    ]
    assert median_of_quarters(torch.zeros(2)) == [0, 1] and median_of_quarters(torch.zeros(0)) == []
    with Image.open(finished / "pictures.png") as picture:
        colours = np.asarray(picture.convert("RGB"))
    filled = (colours != 255).any(2)
    columns = np.diff(np.r_[0, filled[100:150].mean(0) > 0.9, 0].astype(int))
    assert (columns == 1).sum() == 4, "image, truth, stage 1, stage 3"
