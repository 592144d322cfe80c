"""What a run has computed serves another one; nothing of it is computed again, and nothing of it is changed."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.conftest import local_config, write_photos
from tests.refusals import refused
from tests.runs import copy_run, run_local
from threestage.config import Config, changed, load, stage_keys


def modified(folder: Path) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


def stages_shown(config: Config, out: Path, reuse: Path | None = None) -> set[str]:
    shown = set()

    def show(stage: str, row: Mapping[str, float]) -> None:
        shown.add(stage)

    run_local(config, str(out), show, lambda text: None, reuse=None if reuse is None else str(reuse))
    return shown


@pytest.fixture(scope="module")
def shared(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of stage 1."""
    return copy_run(finished_run, tmp_path_factory.mktemp("shared") / "run", stages=1)


def test_a_run_trains_only_what_another_has_not(scenes: Path, shared: Path, tmp_path: Path) -> None:
    before = modified(shared)
    config = local_config(scenes, stages=2, consistency__weight=0.5, pseudo_mask__final_stage=False)
    assert stages_shown(config, tmp_path / "a", shared) == {"stage2"}
    assert modified(shared) == before
    assert not (tmp_path / "a" / "stage1").exists() and not (tmp_path / "a" / "pseudo_masks2").exists()
    assert stages_shown(config, tmp_path / "a") == set(), "a rerun knows what it reuses"

    alone = config.model_copy(update={"pseudo_mask": config.pseudo_mask.model_copy(update={"final_stage": True})})
    run_local(alone, str(tmp_path / "b"), lambda stage, row: None)
    model = Path("stage2", "model", "model.safetensors")
    assert (tmp_path / "a" / model).read_bytes() == (tmp_path / "b" / model).read_bytes()


def test_pseudo_masks_that_are_missing_there_are_predicted_here(scenes: Path, shared: Path, tmp_path: Path) -> None:
    """A run of stage 1 alone may have none, nor a pool. The same run tells of a threshold that keeps no pixel."""
    other = tmp_path / "other"
    shutil.copytree(shared, other)
    shutil.rmtree(other / "pseudo_masks1")
    (other / "pool.parquet").unlink()
    before = modified(other)
    config = local_config(scenes, stages=2, pseudo_mask__final_stage=False, pseudo_mask__confidence_threshold=1.0)
    warnings: list[str] = []
    run_local(config, str(tmp_path / "a"), lambda stage, row: None, warnings.append, reuse=str(other))
    assert modified(other) == before
    assert not (tmp_path / "a" / "stage1").exists()
    assert digest_of(tmp_path / "a" / "pseudo_masks1") == digest_of(shared / "pseudo_masks1")
    assert stages_shown(config, tmp_path / "a") == set(), "a rerun knows what it reuses and what it made"
    thresholds = [text for text in warnings if "confidence_threshold" in text]
    assert len(thresholds) == 1 and "stage2: pseudo_mask.confidence_threshold=1 kept no pixel" in thresholds[0]


def digest_of(pseudo_masks: Path) -> str:
    return str(json.loads((pseudo_masks / "done.json").read_text())["digest"])


def test_a_run_whose_first_stage_differs_can_reuse_nothing(scenes: Path, shared: Path, tmp_path: Path) -> None:
    with refused("run/nothing-to-reuse", f"--reuse {shared}", "seed=0", "1"):
        stages_shown(local_config(scenes, seed=1), tmp_path / "a", shared)
    with refused("run/other-settings", "split.json", "data.labelled=8", "9"):
        stages_shown(local_config(scenes, data__labelled=9), tmp_path / "b", shared)
    with refused("run/reused-gone", tmp_path / "nowhere/split.json", "--reuse"):
        stages_shown(local_config(scenes), tmp_path / "c", tmp_path / "nowhere")


def test_a_run_that_has_begun_reuses_nothing(scenes: Path, shared: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(shared, own)
    with refused("run/reuse-too-late", f"--reuse {shared}", own, "--out"):
        stages_shown(local_config(scenes, stages=1), own, shared)


def test_a_run_does_not_train_into_one_that_is_gone(scenes: Path, shared: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(shared, other)
    config = local_config(scenes, stages=2)
    stages_shown(config, tmp_path / "a", other)
    shutil.rmtree(other / "stage1")
    with refused("run/reused-gone", "reused.json", other / "stage1", "--out"):
        stages_shown(config, tmp_path / "a")


def test_what_lies_elsewhere_is_not_written_over(scenes: Path, shared: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(shared, other)
    before = modified(other)
    with refused("run/reused-gone", other / "pseudo_masks1", "reused.json", "data.max_image_pixels"):
        stages_shown(local_config(scenes, stages=2, data__max_image_pixels=10**6), tmp_path / "a", other)
    unlabelled = tmp_path / "photos"
    unlabelled.mkdir()
    write_photos(unlabelled, 3)
    with refused("run/other-settings", other / "pool.parquet", "data.unlabelled=None"):
        stages_shown(local_config(scenes, stages=2, data__unlabelled=str(unlabelled / "images")), tmp_path / "b", other)
    assert modified(other) == before


def test_changes_belong_to_their_stage_alone() -> None:
    config = load("demo", ["stage3.overrides.pseudo_mask.weight=0.7"])
    assert stage_keys(config, "stage3")["pseudo_mask.weight"] == 0.7
    assert stage_keys(config, "stage2") == stage_keys(load("demo"), "stage2")
    assert config.for_stage("stage3").for_stage("stage3").pseudo_mask.weight == 0.7
    assert stage_keys(changed(config, {"stage2.overrides.ema.decay": [[0, 0.5]]}), "stage2")["ema.decay"] == [[0, 0.5]]


@pytest.mark.parametrize(
    ("override", "code", "named"),
    [
        (
            "stage3.overrides.pseudo_mask.weight=-1",
            "config/invalid-value",
            ["stage3.overrides: pseudo_mask.weight=-1:"],
        ),
        (
            "stage2.overrides.pseudo_mask.wait=1",
            "config/unknown-key",
            ["stage2.overrides: pseudo_mask.wait=1:", "weight?"],
        ),
        (
            "stage2.overrides.network.encoder=x",
            "config/invalid-value",
            ["stage2.overrides.network='network':", "'augment'"],
        ),
    ],
)
def test_changes_that_do_not_fit_are_refused(override: str, code: str, named: list[str]) -> None:
    with refused(code, *named):
        load("demo", [override])
