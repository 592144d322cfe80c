"""`make results`: every method is a configuration that loads, the control is as long as what it is compared with, and
nothing is trained twice."""

import argparse
from pathlib import Path

import pytest

from tests.benchmarks import accuracy
from tests.benchmarks.accuracy import BASE, METHODS, configuration, measure, table
from threestage.config import STAGES, load, stage_keys
from threestage.models.export import load_card

TINY = (
    "data.labelled=8", "data.downscale=1", "network.encoder=test_resnet", "network.batch_norm=live", "network.dilations=[1, 2]",
    "augment.crop_size=[32, 32]", "stage1.steps=2", "stage1.labelled_batch=2", "stage2.steps=2", "stage2.labelled_batch=2",
    "stage2.unlabelled_batch=2", "stage3.steps=2", "stage3.labelled_batch=2", "stage3.unlabelled_batch=2", 
    "pseudo_mask.guard=ignore",
)  # fmt: skip


@pytest.mark.parametrize("preset", accuracy.PRESETS.values())
@pytest.mark.parametrize("method", METHODS)
def test_a_method_loads_and_shares_its_first_stage(preset: str, method: str) -> None:
    base, config = configuration(preset, (), BASE, 7), configuration(preset, (), method, 7)
    faithful = configuration(preset, (), "three stages (faithful)", 7)
    if METHODS[method].control_of:
        steps = [faithful.stage1.steps, faithful.stage2.steps, faithful.stage3.steps]
        assert config.stage1.steps == sum(steps[: METHODS[method].control_of])
        assert config.stages == 1 and config.stage1.strong_view
    else:
        assert stage_keys(config, "stage1") == stage_keys(base, "stage1")
        if method not in (BASE, "three stages (faithful)"):
            assert stage_keys(config, "stage2") != stage_keys(faithful, "stage2")


def test_best_is_the_preset_of_that_name() -> None:
    ours, theirs = configuration("camvid", (), "best", 7), load("best", ["seed=7"])
    for stage in STAGES:
        assert stage_keys(ours, stage) == stage_keys(theirs, stage)


def test_the_figures_of_a_method(scenes: Path, tmp_path: Path) -> None:
    options = argparse.Namespace(
        data=str(scenes), weights=None, size="cpu", set=list(TINY), test=[str(scenes)], out=tmp_path
    )
    found: dict[str, list[dict[str, object]]] = {}
    for method in (BASE, "CutMix", "control"):
        job = accuracy._job(options, method, 3)
        first = measure(job)
        rows = Path(job.folder, "rows.jsonl").read_text()
        assert measure(job) == first and Path(job.folder, "rows.jsonl").read_text() == rows, "nothing is trained twice"
        found[method] = [first]
    assert not Path(tmp_path, "cpu", "CutMix", "3", "stage1").exists(), "it is that of the others"
    assert load_card(str(tmp_path / "cpu" / "CutMix" / "3" / "stage2" / "model")).stage == "stage2"
    lines = table(found, (*accuracy.ACCURACY, accuracy.test_column(str(scenes)))).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| stage 1", "| CutMix", "| control"]
    assert "`consistency.cutmix=0.5`" in lines[3] and "–" not in lines[3], "last, best, student, windows, test"
    assert "–" not in table(found, tuple(accuracy.ON_POOL)).splitlines()[3]


def test_the_table_has_a_row_per_stage_that_a_method_trains() -> None:
    def run(*values: float) -> dict[str, object]:
        return {"seed": 0, "stages": {f"stage{n}": {"last": value} for n, value in enumerate(values, 1)}}

    text = table(
        {"three stages (faithful)": [run(0.3, 0.4, 0.5), run(0.3, 0.5, 0.7)], "control": [run(0.25)]},
        accuracy.ACCURACY,
    ).splitlines()
    assert text[2] == "| three stages (faithful) |  | 2 | 2 | 0.450 ± 0.071 | – | – | – |"
    assert text[3].startswith("| three stages (faithful) |  | 3 | 2 | 0.600 ± 0.141 |")
    assert text[4].startswith("| control | `stages=1` `stage1.strong_view=true` ") and " | 1 | 1 | 0.250 |" in text[4]
