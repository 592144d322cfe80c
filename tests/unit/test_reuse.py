"""What a run has computed serves another one; nothing of it is computed again, and nothing of it is changed."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.conftest import tiny_config, write_photos
from threestage.config import Config, changed, load, stage_keys
from threestage.errors import InputError
from threestage.local import run_local


def modified(folder: Path) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


def stages_shown(config: Config, out: Path, reuse: Path | None = None) -> set[str]:
    shown = set()

    def show(stage: str, row: Mapping[str, float]) -> None:
        shown.add(stage)

    run_local(config, str(out), show, lambda text: None, reuse=None if reuse is None else str(reuse))
    return shown


@pytest.fixture(scope="module")
def shared(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shared")
    run_local(tiny_config(scenes, stages=1), str(out), lambda stage, row: None)
    return out


def test_a_run_trains_only_what_another_has_not(scenes: Path, shared: Path, tmp_path: Path) -> None:
    before = modified(shared)
    config = tiny_config(scenes, stages=2, consistency__weight=0.5, pseudo_mask__of_last_stage=False)
    assert stages_shown(config, tmp_path / "a", shared) == {"stage2"}
    assert modified(shared) == before
    assert not (tmp_path / "a" / "stage1").exists() and not (tmp_path / "a" / "pseudo_masks2").exists()
    assert stages_shown(config, tmp_path / "a") == set(), "a rerun knows what it reuses"

    alone = config.model_copy(update={"pseudo_mask": config.pseudo_mask.model_copy(update={"of_last_stage": True})})
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
    config = tiny_config(scenes, stages=2, pseudo_mask__of_last_stage=False, pseudo_mask__confidence_threshold=1.0)
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
    with pytest.raises(InputError, match=r"nothing of it can be used, it was made with seed=0, this run has 1"):
        stages_shown(tiny_config(scenes, seed=1), tmp_path / "a", shared)
    with pytest.raises(InputError, match=r"split.json was made with data.labelled=8, this run has 9"):
        stages_shown(tiny_config(scenes, data__labelled=9), tmp_path / "b", shared)
    with pytest.raises(InputError, match=r"the run that this one reuses parts of is gone, or is none"):
        stages_shown(tiny_config(scenes), tmp_path / "c", tmp_path / "nowhere")


def test_a_run_does_not_train_into_one_that_is_gone(scenes: Path, shared: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(shared, other)
    config = tiny_config(scenes, stages=2)
    stages_shown(config, tmp_path / "a", other)
    shutil.rmtree(other / "stage1")
    with pytest.raises(InputError, match="which is gone: give another --out"):
        stages_shown(config, tmp_path / "a")


def test_what_lies_elsewhere_is_not_written_over(scenes: Path, shared: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(shared, other)
    before = modified(other)
    with pytest.raises(InputError, match=r"pseudo_masks1, which .*reused.json names, is gone or of other settings"):
        stages_shown(tiny_config(scenes, stages=2, data__max_image_pixels=10**6), tmp_path / "a", other)
    unlabelled = tmp_path / "photos"
    unlabelled.mkdir()
    write_photos(unlabelled, 3)
    with pytest.raises(InputError, match=r"pool.parquet, which this run reuses, was made with data.unlabelled=None"):
        stages_shown(tiny_config(scenes, stages=2, data__unlabelled=str(unlabelled / "images")), tmp_path / "b", other)
    assert modified(other) == before


def test_changes_belong_to_their_stage_alone() -> None:
    config = load("demo", ["stage3.changes.pseudo_mask.weight=0.7"])
    assert stage_keys(config, "stage3")["pseudo_mask.weight"] == 0.7
    assert stage_keys(config, "stage2") == stage_keys(load("demo"), "stage2")
    assert config.for_stage("stage3").for_stage("stage3").pseudo_mask.weight == 0.7
    assert stage_keys(changed(config, {"stage2.changes.ema.decay": [[0, 0.5]]}), "stage2")["ema.decay"] == [[0, 0.5]]


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("stage3.changes.pseudo_mask.weight=-1", r"stage3.changes: pseudo_mask.weight=-1: should be greater"),
        ("stage2.changes.pseudo_mask.wait=1", r"stage2.changes: pseudo_mask.wait=1: unknown key; did you mean weight"),
        ("stage2.changes.network.encoder=x", r"stage2.changes.network='network': should be 'augment'"),
    ],
)
def test_changes_that_do_not_fit_are_refused(override: str, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        load("demo", [override])
