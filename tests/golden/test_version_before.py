"""Why: users have data sets, runs, models, predictions and sweeps of the version before; this one reads and continues them.

The folders are those of tests/golden/version_before/, whose make.py renews them.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from PIL import Image
from safetensors.torch import load_file

import tests.narrow_resnet  # noqa: F401 - makes the folders' encoder known
from tests.golden.command_line import run_command, this_machine
from tests.golden.version_before import PLACE, restored
from tests.golden.version_before.without_ray import without_ray

pytestmark = pytest.mark.filterwarnings("ignore::threestage.errors.RenamedSetting")
SAME_PIXELS = 0.99  # share of a mask's pixels, on another kind of machine than that which made the folders
SAME_WEIGHTS = 0.02  # relative, of a whole tensor


@pytest.fixture
def before(tmp_path: Path) -> Path:
    return restored(tmp_path)


def json_of(*path: object) -> Any:
    return json.loads(Path(*map(str, path)).read_text())


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def same_machine(before: Path) -> bool:
    return bool(json_of(before, "machine.json") == this_machine())


def run_again(before: Path, out: Path, *more: object) -> Any:
    return json.loads(run_command("run", before / "config.yaml", "--local", "--out", out, "--json", *more))


def test_no_path_of_the_old_place_is_left(before: Path) -> None:
    """Parquet files hold where an image came from, which nothing reads to find it."""
    found = {name for name, content in contents(before).items() if PLACE.encode() in content}
    assert all(name.startswith("data/") and name.endswith(".parquet") for name in found), found


def test_a_data_set_takes_one_more_image(before: Path) -> None:
    files = contents(before / "data")
    old = json_of(before, "data", "manifest.json")
    assert old["version"] == 2 and {file["kind"] for file in old["files"]} == {"images", "labels"}
    ingest = ["ingest", before / "more", before / "data", "--format", "camvid", "--local", "--json",
              "--class-map", before / "more" / "class_map.yaml"]  # fmt: skip
    report = json.loads(run_command(*ingest))
    assert (report["added_images"], report["added_labels"], report["skipped"], report["bad"]) == (1, 1, 0, 0)
    new = json_of(before, "data", "manifest.json")
    assert new["version"] == 3 and [file for file in new["files"] if file in old["files"]] == old["files"]
    assert new["counts"]["train"]["images"] == old["counts"]["train"]["images"] + 1
    now = contents(before / "data")
    kept = {name for name in files if name.startswith(("images/", "labels/"))}
    assert all(now[name] == files[name] for name in kept)
    again = json.loads(run_command(*ingest))
    assert (again["added_images"], again["added_labels"], again["skipped"]) == (0, 0, 1)


def test_a_finished_run_is_not_trained_again(before: Path) -> None:
    run = before / "run"
    stages = {name: content for name, content in contents(run).items() if "/" in name}
    figures = json_of(run, "results.json")["stages"]
    assert run_again(before, run)["stages"] == figures
    assert {name: content for name, content in contents(run).items() if "/" in name} == stages


def test_a_finished_run_is_reported_and_evaluated(before: Path) -> None:
    run = before / "run"
    page = json.loads(run_command("report", run, "--json"))
    assert Path(page["page"]).stat().st_size == page["bytes"] > 10_000 and not page["missing"]
    scores = json.loads(run_command("evaluate", run / "stage2", before / "data", "--json"))
    expected = json_of(run, "stage2", "result.json")["mean_iou"]
    assert scores["mean_iou"] == pytest.approx(expected, rel=1e-6 if same_machine(before) else 0.05)


def test_a_stage_of_a_finished_run_is_reused(before: Path) -> None:
    run, out = before / "run", before / "other"
    files = contents(run)
    results = run_again(before, out, "--reuse", run, "--set", "stage2.steps=4", "--set", "stages=2")
    assert {"stage1", "pseudo_masks1", "pool.parquet", "split.json"} == set(results["reused"])
    assert not (out / "stage1").exists() and results["stages"]["stage2"]["steps"] == 4
    assert results["stages"]["stage1"] == json_of(run, "results.json")["stages"]["stage1"]
    assert contents(run) == files, "the run that is reused is not changed"


def test_a_stopped_run_continues_from_its_checkpoint(before: Path) -> None:
    """To the weights of the run that was not stopped, bit for bit."""
    stopped, run = before / "stopped", before / "run"
    first = {
        name: content for name, content in contents(stopped).items() if name.startswith(("stage1/", "pseudo_masks1/"))
    }
    step = json_of(stopped, "stage2", "checkpoints", "latest.json")["step"]
    rows = json_of(stopped, "stage2", "checkpoints", "rows.json")
    assert rows[-1]["step"] == step and not (stopped / "stage2" / "done.json").exists()
    run_again(before, stopped)
    assert first.items() <= contents(stopped).items()
    assert json_of(stopped, "stage2", "result.json")["history"][: len(rows)] == rows, (
        "it began with the checkpoint's step"
    )
    for stage in ("stage2", "stage3"):
        model, expected = stopped / stage / "model" / "model.safetensors", run / stage / "model" / "model.safetensors"
        if same_machine(before):
            assert model.read_bytes() == expected.read_bytes()
        found, tensors = load_file(model), load_file(expected)
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            distance = (found[name].float() - tensor.float()).norm() / tensor.float().norm().clamp(min=1e-6)
            assert distance < SAME_WEIGHTS, name


def predict(before: Path, model: Path, out: Path) -> Any:
    words = ("--local", "--no-overlays", "--confidence", "--json")
    return json.loads(run_command("predict", model, before / "data", out, *words))


def test_a_model_predicts_the_same_masks(before: Path) -> None:
    report = predict(before, before / "model", before / "anew")
    old = sorted((before / "predictions" / "masks").rglob("*.png"))
    assert report["kept"] == 0 and report["images"] == len(old) > 10
    for file in old:
        mask, new = (
            np.asarray(Image.open(path)) for path in (file, before / "anew" / file.relative_to(before / "predictions"))
        )
        assert np.mean(mask == new) >= (1 if same_machine(before) else SAME_PIXELS), file
    assert json_of(before, "anew", "prediction.json") == json_of(before, "predictions", "prediction.json")


def test_predictions_continue_with_what_is_new(before: Path) -> None:
    out = before / "predictions"
    files = contents(out)
    done = json_of(before, "data", "manifest.json")["counts"]
    images = sum(counts["images"] for counts in done.values())
    assert predict(before, before / "model", out)["kept"] == images
    assert contents(out) == files
    run_command("ingest", before / "more", before / "data", "--format", "camvid", "--local",
                "--class-map", before / "more" / "class_map.yaml")  # fmt: skip
    report = predict(before, before / "model", out)
    assert (report["images"], report["kept"]) == (images + 1, images)
    assert files.items() - {("rejects.parquet", files.get("rejects.parquet"))} <= contents(out).items()


@pytest.mark.slow
def test_a_sweep_is_read_and_resumed(before: Path) -> None:
    """The driver was killed in trial 3: that one alone is run, and what is shared is not computed again."""
    sweep = before / "sweep"
    trials = [json_of(file) for file in sorted((sweep / "trials").glob("*.json"))]
    assert [trial["state"] for trial in trials] == ["finished", "finished", "failed", "running"]
    shared, records = contents(sweep / "shared"), contents(sweep / "trials")
    with without_ray() as run:
        words = ["sweep", before / "space.yaml", before / "config.yaml", "--out", sweep, "--json"]
        run_command(*words, code=2)  # without --resume
        found = json.loads(run_command(*words, "--resume"))
    assert run.begun == [3] and run.shared == []
    assert (contents(sweep / "shared"), contents(sweep / "trials")) == (shared, records)
    by_number = {trial["number"]: trial for trial in found["trials"]}
    assert {number: trial["state"] for number, trial in by_number.items()} == {
        0: "finished", 1: "finished", 2: "failed", 3: "finished"
    }  # fmt: skip
    for trial in trials[:3]:
        same = {key: by_number[trial["number"]][key] for key in ("params", "curve", "reason", "seed")}
        assert same == {key: trial[key] for key in same}
    best = max(
        (trial for trial in found["trials"] if trial["state"] == "finished"), key=lambda trial: trial["curve"][-1][1]
    )
    assert found["best"]["score"] == best["curve"][-1][1]
    storage = JournalStorage(JournalFileBackend(str(sweep / "optuna_journal.log")))
    study = optuna.load_study(study_name="sweep", storage=storage)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE"]
    assert study.best_value == found["best"]["score"]
    settings = json.loads(run_command("config", sweep / "best.yaml", "--json"))
    found_best = found["best"]["params"]["pseudo_mask.confidence_threshold"]
    assert settings["pseudo_mask"]["confidence_threshold"] == found_best


@pytest.mark.slow
def test_a_finished_sweep_runs_nothing(before: Path) -> None:
    words = ["sweep", before / "space.yaml", before / "config.yaml", "--out", before / "sweep", "--json", "--resume"]
    with without_ray():
        first = json.loads(run_command(*words))
    with without_ray() as run:
        again = json.loads(run_command(*words))
    assert not run.begun and not run.shared and again == first


def test_the_settings_that_a_run_wrote_down_are_read(before: Path) -> None:
    """All of them by the names that they had: they give what the run's own configuration gives."""
    written = before / "written.yaml"
    written.write_text(yaml.safe_dump(json_of(before, "run", "config.json")))
    gpus = ("--set", "cluster.gpus_per_worker=0", "--json")  # the default of then, which runs wrote down
    assert run_command("config", written, *gpus) == run_command("config", before / "config.yaml", *gpus)
