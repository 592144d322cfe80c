"""Settings that were renamed are read under their old names, with one warning; records keep the old names."""

from pathlib import Path

import pytest

from tests.refusals import refused
from threestage.config import RENAMED_KEYS, changed, load, stage_keys
from threestage.errors import RenamedSetting
from threestage.sweeps.space import Space, load_space
from threestage.sweeps.trials import Trial

DATA = "data.root=data"


def test_an_old_name_is_read_with_a_warning() -> None:
    with pytest.warns(RenamedSetting, match=r"pseudo_mask\.on_collapse in place of pseudo_mask\.guard"):
        config = load("demo", [DATA, "pseudo_mask.guard=stop"])
    assert config.pseudo_mask.on_collapse == "stop"


def test_a_file_with_old_names_gives_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("old.yaml").write_text(
        "base: best\ntraining: {batch: global}\npseudo_mask: {of_last_stage: false}\n"
        "stage2: {changes: {pseudo_mask: {confidence_threshold: 0.9}}}\n"
    )
    with pytest.warns(RenamedSetting) as warned:
        config = load("old.yaml", [DATA])
    assert len(warned) == 1
    assert config.training.batch_scope == "global" and not config.pseudo_mask.final_stage
    assert config.for_stage("stage2").pseudo_mask.confidence_threshold == 0.9


def test_below_a_renamed_key() -> None:
    with pytest.warns(RenamedSetting, match=r"stage3\.overrides\.pseudo_mask\.weight"):
        config = load("demo", [DATA, "stage3.changes.pseudo_mask.weight=0.5"])
    assert config.for_stage("stage3").pseudo_mask.weight == 0.5


@pytest.mark.parametrize("key", RENAMED_KEYS)
def test_every_old_name_is_that_of_a_setting(key: str) -> None:
    config = load("demo", [DATA])
    section, _, name = RENAMED_KEYS[key].partition(".")
    value = getattr(getattr(config, section), name)
    assert getattr(getattr(changed(config, {key: value}), section), name) == value


def test_both_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("both.yaml").write_text("base: demo\npseudo_mask: {guard: stop, on_collapse: warn}\n")
    with refused("config/conflict", "pseudo_mask.guard='stop'", "pseudo_mask.on_collapse"):
        load("both.yaml", [DATA])


def test_records_keep_the_names_of_before() -> None:
    keys = stage_keys(load("demo", [DATA, "training.batch_scope=global"]), "stage2")
    assert keys["training.batch"] == "global" and not keys.keys() & set(RENAMED_KEYS.values())
    assert not keys.keys() & {"pseudo_mask.guard", "pseudo_mask.of_last_stage"}


def test_a_space_with_old_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    key = "stage2.changes.consistency.weight"
    Path("space.yaml").write_text(f"stages: [2]\nsearch: {{{key}: {{choice: [0.1, 0.2]}}}}\ntrials: 2\nat_once: 2\n")
    with pytest.warns(RenamedSetting) as warned:
        space = load_space("space.yaml")
    assert len(warned) == 1 and space.max_concurrent == 2
    assert list(space.search) == ["stage2.overrides.consistency.weight"]
    assert Trial(number=0, params={key: 0.1}, seed=0).params == {"stage2.overrides.consistency.weight": 0.1}
    assert Space.model_validate(space.model_dump(mode="json")) == space
