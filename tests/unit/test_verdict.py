"""Why: a user must hear whether the unlabelled images paid, with the right sign, and get the better model."""

import html
import json
import re
import shutil
from collections.abc import Mapping
from itertools import permutations, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from tests.conftest import local_config
from tests.refusals import refused
from tests.runs import copy_run, run_local
from threestage.cli.app import main
from threestage.config import StageName
from threestage.data import storage
from threestage.data.records import labelled_ids, load_manifest
from threestage.evaluation import read_image_counts, write_image_counts
from threestage.mlflow_sync.promotion import decide
from threestage.mlflow_sync.records import RegistrySettings
from threestage.prediction.predict import open_model
from threestage.report.run_reader import read_run
from threestage.run import local_main
from threestage.run import run as run_module
from threestage.run.backend import RunCallbacks
from threestage.seeds import derive_seed
from threestage.training.metrics import class_counts, mean_iou
from threestage.verdict import (
    FEWEST,
    NO_CONTROL,
    RESAMPLES,
    Verdict,
    best_stage,
    interval,
    judge,
    outcome,
    verdict_in,
    verdict_text,
)

STAGES: tuple[StageName, ...] = ("stage1", "stage2", "stage3")


def quiet(stage: str, row: Mapping[str, float]) -> None:
    pass


def matrices(images: int, right: float, seed: int = 0) -> Tensor:
    """Confusion matrices (N,3,3) of 300 pixels each, of which the share `right` is right on average."""
    random = np.random.default_rng(seed)
    share = np.clip(right + 0.1 * random.standard_normal((images, 3)), 0, 1)
    correct = np.rint(100 * share).astype(np.int64)
    found = np.zeros((images, 3, 3), np.int64)
    for row in range(3):
        found[:, row, row], found[:, row, (row + 1) % 3] = correct[:, row], 100 - correct[:, row]
    return torch.from_numpy(found)


def judged(folder: Path, last: Tensor, control: Tensor, seed: int = 0, groups: Mapping[str, str] = {}) -> Verdict:
    ids = [str(number) for number in range(len(last))]
    for name, found in (("last", last), ("control", control)):
        write_image_counts(str(folder / name), ids, class_counts(found))
    stages: dict[StageName, dict[str, Any]] = {
        "stage1": {"mean_iou": mean_iou(control.sum(0)), "steps": 1000},
        "stage2": {"mean_iou": mean_iou(last.sum(0)), "steps": 600},
    }
    verdict = judge(str(folder / "control"), str(folder / "last"), stages, seed, True, groups)
    assert verdict is not None
    return verdict


# ---- The interval


def test_the_interval_is_that_of_a_bootstrap_written_image_by_image() -> None:
    last, control = matrices(9, 0.8, seed=1), matrices(9, 0.7, seed=2)
    random = np.random.default_rng(derive_seed(5, "verdict"))
    differences = []
    for _ in range(RESAMPLES):
        drawn = random.integers(0, 9, 9).tolist()
        scores = [mean_iou(torch.stack([one[i] for i in drawn]).sum(0)) for one in (last, control)]
        differences.append(scores[0] - scores[1])
    units = torch.stack([class_counts(last), class_counts(control)], dim=1)
    assert interval(units, 5) == pytest.approx(tuple(np.percentile(differences, [2.5, 97.5])), abs=1e-12)
    assert interval(units, 6) != interval(units, 5), "the seed of the run decides"


def test_two_images_by_hand() -> None:
    """A resample is both first, both second, or one of each: 1/4, 1/4 and 1/2 of the draws."""
    better, worse = torch.tensor([[8, 0], [0, 8]]), torch.tensor([[4, 4], [4, 4]])
    units = torch.stack([class_counts(torch.stack([better, worse])), class_counts(torch.stack([worse, worse]))], dim=1)
    assert interval(units, 0) == pytest.approx((0.0, 1 - 1 / 3))


def test_the_models_are_resampled_alike() -> None:
    """Images differ much, the models by the same on each: unpaired, the interval would be wide."""
    control = torch.cat([matrices(10, 0.9), matrices(10, 0.2)])
    last = control.clone()
    last[:, 0, 0] += 2
    low, high = interval(torch.stack([class_counts(last), class_counts(control)], dim=1), 0)
    assert 0 < low < high < 0.01


# ---- The verdict


def test_the_sign_is_of_the_last_stage_against_the_first(tmp_path: Path) -> None:
    good, bad = matrices(30, 0.9, seed=1), matrices(30, 0.6, seed=2)
    difference = mean_iou(good.sum(0)) - mean_iou(bad.sum(0))
    pays, loses = judged(tmp_path, good, bad), judged(tmp_path, bad, good)
    assert pays.difference == pytest.approx(difference) and loses.difference == pytest.approx(-difference)
    assert 0 < pays.interval[0] < difference < pays.interval[1]
    assert loses.interval[0] < -difference < loses.interval[1] < 0
    assert (pays.outcome, pays.choice) == ("pays", "stage2")
    assert (loses.outcome, loses.choice) == ("does not pay", "stage1")
    assert (pays.images, pays.steps, pays.stage, pays.against) == (
        30, {"stage1": 1000, "stage2": 1600}, "stage2", "stage1",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("low", "high", "units", "expected"),
    [
        (0.01, 0.06, 100, "pays"),
        (-0.06, -0.01, 100, "does not pay"),
        (-0.01, 0.06, 100, "cannot be told"),
        (0.0, 0.06, 100, "cannot be told"),
        (0.0, 0.0, 100, "does not pay"),
        (0.01, 0.06, FEWEST, "pays"),
        (0.01, 0.06, FEWEST - 1, "cannot be told"),
        (-0.06, -0.01, FEWEST - 1, "cannot be told"),
    ],
)
def test_outcomes(low: float, high: float, units: int, expected: str) -> None:
    assert outcome(low, high, units) == expected


def test_few_images_cannot_tell_and_the_higher_score_is_delivered(tmp_path: Path) -> None:
    last, control = matrices(5, 0.9), matrices(5, 0.6)
    assert (judged(tmp_path, last, control).outcome, judged(tmp_path, last, control).choice) == (
        "cannot be told", "stage2",
    )  # fmt: skip
    assert judged(tmp_path, control, last).choice == "stage1"
    assert judged(tmp_path, last, last).choice == "stage1", "of equals the earlier one"


def test_images_of_a_group_count_together(tmp_path: Path) -> None:
    """Twenty frames of four scenes are four independent images."""
    last, control = matrices(20, 0.9, seed=1), matrices(20, 0.6, seed=2)
    alone = judged(tmp_path, last, control)
    grouped = judged(tmp_path, last, control, groups={str(i): f"scene{i % 4}" for i in range(20)})
    assert (alone.outcome, alone.groups) == ("pays", None)
    assert (grouped.outcome, grouped.groups, grouped.images) == ("cannot be told", 4, 20)
    assert grouped.difference == alone.difference and grouped.interval != alone.interval


def test_the_best_stage_is_the_one_that_the_registry_makes_champion() -> None:
    """Whatever the stages score, ties included: both follow one rule."""
    for scores in product((0.5, 0.6, 0.7), repeat=3):
        champion = None
        for number, score in enumerate(scores, 1):
            tags = {"mean_iou": repr(score), "validation": "val", "threestage.validation_digest": "d"}
            version = SimpleNamespace(version=str(number), name="m", tags=tags)
            champion = version if decide(version, champion)[0] else champion
        stages = {stage: {"mean_iou": score} for stage, score in zip(STAGES, scores, strict=True)}
        assert champion is not None and best_stage(stages) == f"stage{champion.version}"


def test_a_version_whose_validation_images_drift_is_no_champion_by_itself() -> None:
    tags = {"mean_iou": "0.9", "threestage.validation_drift": "1.25"}
    version = SimpleNamespace(version="7", name="m", tags=tags)
    assert decide(version, None)[0] and decide(version, None, max_drift=1.25)[0]
    takes, why = decide(version, None, max_drift=1)
    assert not takes and "1.25" in why and "registry.max_drift=1" in why and "models:/m/7" in why
    old = SimpleNamespace(version="8", name="m", tags={"mean_iou": "0.9"})
    assert decide(old, None, max_drift=1)[0], "nothing is known of it"


def test_a_score_that_is_none_is_never_best() -> None:
    for scores in permutations((0.1, float("nan"), 0.2)):
        stages = {stage: {"mean_iou": score} for stage, score in zip(STAGES, scores, strict=True)}
        assert stages[best_stage(stages)]["mean_iou"] == 0.2


# ---- What a user reads

PAYS = Verdict(
    difference=0.0412, interval=(0.0204, 0.0618), outcome="pays", choice="stage3", images=101, groups=None, stage="stage3",
    against="stage1", steps={"stage1": 1000, "stage3": 2200}, strong_view=True,
)  # fmt: skip


def said(**changes: Any) -> str:
    found = verdict_text(
        {"stages": dict.fromkeys(STAGES), "verdict": PAYS.model_copy(update=changes).model_dump(mode="json")}
    )
    assert found is not None
    return found


def test_the_first_sentence_says_by_how_much() -> None:
    assert said().startswith(
        "The unlabelled images added 4.1 points of mean IoU (95 % interval 2.0 to 6.2, 101 validation images): "
        "training on them pays."
    )
    lost = said(difference=-0.032, interval=(-0.05, -0.0111), outcome="does not pay", choice="stage1")
    assert lost.startswith("The unlabelled images cost 3.2 points of mean IoU (95 % interval −5.0 to −1.1, ")
    assert "does not pay." in lost and "best model is that of stage 1" in lost
    unknown = said(difference=0.012, interval=(-0.0004, 0.041), outcome="cannot be told", images=12)
    assert unknown.startswith(
        "Whether the unlabelled images pay cannot be told with 12 validation images: they added 1.2 points of mean IoU "
        "(95 % interval 0.0 to 4.1)."
    )
    assert "101 validation images in 9 groups" in said(groups=9)


def test_the_text_names_the_control_and_its_steps() -> None:
    assert "compares stage 3 with stage 1" in said() and "steps are not equal: stage 1 had 1,000 of the 2,200" in said()
    assert "weak views only" not in said() and "weak views only" in said(strong_view=False)


def test_a_run_without_a_verdict_says_so_and_one_without_unlabelled_images_says_nothing() -> None:
    for results in ({}, {"verdict": None}, {"verdict": {"outcome": "pays"}}, {"verdict": [1]}):
        assert verdict_in(results) is None
        assert "was not measured" in (verdict_text({"stages": dict.fromkeys(STAGES), **results}) or "")
        assert verdict_text({"stages": {"stage1": {}}, **results}) is None
        assert "no control" in (verdict_text({"stages": {"stage1": {}}, **results, "no_verdict": NO_CONTROL}) or "")
    assert verdict_in([]) is None


# ---- The counts of each image


def test_counts_are_read_as_they_were_written_and_nothing_else_is(tmp_path: Path) -> None:
    counts, ids = class_counts(matrices(4, 0.5)), ["a", "b/ü", "c", "d"]
    assert read_image_counts(str(tmp_path)) is None
    write_image_counts(str(tmp_path), ids, counts)
    found = read_image_counts(str(tmp_path))
    assert found is not None and found[0] == ids and torch.equal(found[1], counts)
    uri = str(tmp_path / "image_counts.parquet")
    table = storage.read_table(uri)
    for other in (table.replace_schema_metadata({"format": "2"}), table.drop(["true"]), pa.table({"x": [1]})):
        storage.write_table(uri, other)
        assert read_image_counts(str(tmp_path)) is None
    Path(uri).write_bytes(b"torn")
    assert read_image_counts(str(tmp_path)) is None


def test_counts_of_other_images_are_not_compared(tmp_path: Path) -> None:
    verdict = judged(tmp_path, matrices(8, 0.9), matrices(8, 0.6))
    stages: dict[StageName, dict[str, Any]] = {
        "stage1": {"mean_iou": 0.1, "steps": 1},
        "stage2": {"mean_iou": 0.2, "steps": 1},
    }
    control, last = str(tmp_path / "control"), str(tmp_path / "last")
    assert verdict is not None and judge(control, last, stages, 0, True) is not None
    for ids, images in (([str(i) for i in range(8)][::-1], 8), ([str(i) for i in range(7)], 7)):
        write_image_counts(control, ids, class_counts(matrices(images, 0.6)))
        assert judge(control, last, stages, 0, True) is None


# ---- A run


@pytest.fixture(scope="module")
def finished(scenes: Path, finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two stages; do not change it."""
    out = copy_run(finished_run, tmp_path_factory.mktemp("verdict") / "run", stages=2)
    run_module.run(local_config(scenes, stages=2), str(out), True, RunCallbacks(on_warning=lambda text: None))
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return copy_run(finished, tmp_path / "run")


def results_of(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "results.json").read_text()))


def test_a_run_judges_itself_without_another_forward_pass(finished: Path) -> None:
    results = results_of(finished)
    verdict, stages = verdict_in(results), results["stages"]
    assert verdict is not None
    assert verdict.difference == pytest.approx(stages["stage2"]["mean_iou"] - stages["stage1"]["mean_iou"])
    assert verdict.interval[0] <= verdict.difference <= verdict.interval[1]
    assert (verdict.images, verdict.steps) == (6, {"stage1": 6, "stage2": 12}) and not verdict.strong_view
    for stage in stages:
        found = read_image_counts(str(finished / stage))
        confusion = torch.tensor(json.loads((finished / stage / "result.json").read_text())["confusion_matrix"])
        assert found is not None and torch.equal(found[1].sum(0), class_counts(confusion))


def test_a_run_that_reuses_the_control_and_a_rerun_have_the_same_verdict(
    scenes: Path, run: Path, tmp_path: Path
) -> None:
    first = results_of(run)["verdict"]
    config = local_config(scenes, stages=2)
    assert run_local(config, str(run), quiet)["verdict"] == first
    shutil.rmtree(run / "stage2")
    again = run_local(config, str(tmp_path / "other"), quiet, reuse=str(run))
    assert not (tmp_path / "other/stage1").exists() and again["verdict"] == first


def test_a_stage_of_an_earlier_version_gives_no_verdict(scenes: Path, run: Path) -> None:
    (run / "stage1/image_counts.parquet").unlink()
    results = run_local(local_config(scenes, stages=2), str(run), quiet)
    assert results["verdict"] is None and "was not measured" in (verdict_text(results) or "")
    assert open_model(str(run), RegistrySettings())[1].stage == "stage2", "as such a run always was read"


def test_groups_are_resampled_and_belong_to_the_run(scenes: Path, tmp_path: Path) -> None:
    """Scenes 0 to 5 validate; by their last digit's half they are three groups."""
    (tmp_path / "scenes.csv").write_text("image_id,group\n" + "".join(f"{i},{group_of(i)}\n" for i in every_id(scenes)))
    config = local_config(scenes, stages=2, stage1__steps=2, stage2__steps=2, data__group=str(tmp_path / "scenes.csv"))
    results = run_local(config, str(tmp_path / "run"), quiet)
    verdict = verdict_in(results)
    assert verdict is not None and (verdict.images, verdict.groups, verdict.outcome) == (6, 3, "cannot be told")
    assert len(json.loads((tmp_path / "run/split.json").read_text())["split"]["groups"]) == 6
    (tmp_path / "scenes.csv").unlink()
    assert run_local(config, str(tmp_path / "run"), quiet)["verdict"] == results["verdict"], "the split is read again"
    with refused("run/other-settings", "split.json", "data.group="):
        run_local(local_config(scenes, stages=2), str(tmp_path / "run"), quiet)


def every_id(scenes: Path) -> list[str]:
    manifest = load_manifest(str(scenes))
    return [*labelled_ids(str(scenes), manifest, "train"), *labelled_ids(str(scenes), manifest, "val")]


def group_of(image_id: str) -> str:
    split, number = image_id.rsplit("/", 1)[0], int(re.sub(r"\D", "", image_id))
    return f"{split}{number // 2}"


def test_near_copies_are_a_warning_of_the_run(scenes: Path, tmp_path: Path) -> None:
    warnings: list[str] = []
    ids = sorted(labelled_ids(str(scenes), load_manifest(str(scenes)), "train"))[:4]
    split = {"labelled": ids, "validation": ids[:2], "validation_split": "carved"}
    settings = {"labelled": 8, "split_seed": 0, "validation": 0.2}
    storage.write_json(str(tmp_path / "run/split.json"), {"settings": settings, "split": split})
    config = local_config(scenes, stages=1, stage1__steps=1, pseudo_mask__final_stage=False)
    run_local(config, str(tmp_path / "run"), quiet, warnings.append)
    assert (
        len([text for text in warnings if text.startswith("2 of 2 validation images nearly equal a labelled one")]) == 1
    )


@pytest.mark.parametrize("unlabelled", [0, 2])
def test_one_stage_alone_has_no_verdict(scenes: Path, tmp_path: Path, unlabelled: int) -> None:
    """It is the control, unless it learns the pool too."""
    config = local_config(
        scenes, stages=1, stage1__steps=1, stage1__unlabelled_batch=unlabelled, pseudo_mask__final_stage=False
    )
    results = run_local(config, str(tmp_path), quiet)
    assert results["verdict"] is None
    assert (verdict_text(results) is None) == (unlabelled == 0) and ("no control" in (verdict_text(results) or "")) == (
        unlabelled > 0
    )


@pytest.mark.parametrize("choice", ["stage1", "stage2"])
def test_a_run_means_the_model_that_its_verdict_chose(scenes: Path, run: Path, tmp_path: Path, choice: str) -> None:
    other = tmp_path / "other"
    run_local(local_config(scenes, stages=2), str(other), quiet, reuse=str(run))  # its stages lie in `run`
    for folder in (run, other):
        results = results_of(folder)
        results["verdict"]["choice"] = choice
        (folder / "results.json").write_text(json.dumps(results))
        assert open_model(str(folder), RegistrySettings())[1].stage == choice


def test_results_that_are_none_do_not_choose(run: Path) -> None:
    for content in ("[]", "{}", '{"verdict": {"choice": "../stage1"}}'):
        (run / "results.json").write_text(content)
        assert open_model(str(run), RegistrySettings())[1].stage == "stage2"


def test_the_page_begins_with_the_verdict(run: Path) -> None:
    page = (run / "report.html").read_text()
    results = results_of(run)
    first = html.unescape(page.partition("</h1>")[2])
    assert first.lstrip().startswith(f"<p>{verdict_text(results)}</p>")
    (run / "stage2/done.json").unlink()
    assert read_run(str(run)).verdict is None, "of an unfinished run the results are former ones"


def test_the_end_of_a_run_prints_the_verdict(
    finished: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = results_of(finished)
    expected = verdict_text(results)
    assert expected is not None
    settings = ["--set", f"data.root={scenes}", "--out", str(tmp_path / "run")]
    for module, name in ((local_main, "run"), (run_module, "run_checked")):
        monkeypatch.setattr(module, name, lambda *arguments: results)
    monkeypatch.setattr("sys.argv", ["threestage", "run", "demo", "--local", *settings])
    with pytest.raises(SystemExit):
        main()
    assert expected in " ".join(capsys.readouterr().out.split())
    assert local_main.main(["demo", *settings]) == 0
    assert expected in capsys.readouterr().out
