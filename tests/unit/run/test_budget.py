"""A budget becomes steps once: measured costs divided in the configuration's proportion, read again by every rerun."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import local_config
from tests.refusals import refused
from tests.runs import run_local
from threestage.checks.step_time import MeasuredStep, StepSpecification
from threestage.config import Config
from threestage.data import storage
from threestage.data.records import load_manifest
from threestage.run import budget as budgets
from threestage.run.budget import Costs, Resolved, TimeBudget, bought, divide, parse, resolve


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A step takes 0.1 s, an image 0.01 s; counts how often that is measured."""
    times: list[int] = []

    def measure(specification: StepSpecification) -> Iterator[MeasuredStep]:
        times.append(1)
        for stage in specification.config.stage_names:
            yield MeasuredStep(stage=stage, seconds=0.1, image_seconds=0.01)

    monkeypatch.setattr(budgets, "measure_here", measure)
    return times


def test_a_budget_is_a_time_of_the_run_or_of_its_devices(scenes: Path) -> None:
    assert (
        parse("90m") == TimeBudget("90m", 5400, False)
        and parse("1.5h").seconds == 5400
        and parse("2d").seconds == 172800
    )
    devices = parse("8 device-hours")
    assert devices.of_devices
    assert devices.wall_seconds(local_config(scenes, cluster__workers=4)) == 2 * 3600
    for wrong in ("60", "m", "0m", "60s", "-5m", "1h30m"):
        with refused("budget/not-a-time", "--budget"):
            parse(wrong)


def test_steps_fill_the_budget_in_the_proportion_of_the_configuration(scenes: Path) -> None:
    """By hand: 0.9·1000 s − 2 passes of 50 s − 3 evaluations of 10 s = 770 s for 100 : 300 : 100 steps of 1, 2, 2 s, with an
    evaluation of 10 s every 100 steps: 100 + 600 + 200 + 50 = 950 s a share."""
    config = local_config(
        scenes, stage1__steps=100, stage2__steps=300, stage3__steps=100, training__evaluate_every=100,
        pseudo_mask__final_stage=False,
    )  # fmt: skip
    costs = Costs(steps={"stage1": 1, "stage2": 2, "stage3": 2}, evaluation=10, pool_pass=50)
    found = divide(config, TimeBudget("1000 s", 1000, False), costs)
    assert found.steps == {"stage1": 81, "stage2": 243, "stage3": 81}
    assert found.applied(config).stage2.steps == 243
    spent = sum(n * costs.steps[s] for s, n in found.steps.items()) + 2 * 50 + (3 + 405 / 100) * 10
    assert 880 < spent <= 900
    with refused("budget/too-small", "--budget 200 s") as error:
        divide(config, TimeBudget("200 s", 200, False), costs)
    least = float(error.value.message.rsplit("give ")[1].split("m")[0])
    assert min(divide(config, TimeBudget("", 60 * (least + 1), False), costs).steps.values()) >= budgets.LEAST_STEPS


def test_what_is_resolved_is_read_again(scenes: Path, tmp_path: Path, measured: list[int]) -> None:
    config = local_config(scenes, stages=2)
    out = str(tmp_path / "run")
    first = resolve(config, out, "5m", True)
    assert first is not None and resolve(config, out, "5m", True) == first == resolve(config, out, None, True)
    assert measured == [1], "once"
    assert Resolved.model_validate(storage.read_json(f"{out}/budget.json")) == first
    with refused("budget/another-budget", "--budget"):
        resolve(config, out, "10m", True)
    assert resolve(config, str(tmp_path / "other"), None, True) is None


def test_steps_and_budget_exclude_each_other(scenes: Path, tmp_path: Path, measured: list[int]) -> None:
    config = local_config(scenes, stages=1, stage1__steps=2, pseudo_mask__final_stage=False)
    with refused("budget/steps-are-set", "--budget"):
        resolve(config, str(tmp_path / "a"), "5m", True, ["stage1.steps=9"])
    run_local(config, str(tmp_path / "b"), lambda stage, row: None)
    with refused("budget/run-has-steps", "--budget"):
        resolve(config, str(tmp_path / "b"), "5m", True)
    assert not measured


def test_what_was_not_measured_or_counted_is_refused(scenes: Path, tmp_path: Path) -> None:
    config, manifest = local_config(scenes, stages=1), load_manifest(str(scenes))
    with refused("budget/not-measured", "--budget"):
        bought("5m", config, manifest, [MeasuredStep(stage="stage1", problem="no memory")])
    (tmp_path / "photos").mkdir()
    away: Config = local_config(scenes, stages=1, data__unlabelled=str(tmp_path / "photos"))
    fine = [MeasuredStep(stage="stage1", seconds=1, image_seconds=1)]
    with refused("budget/pool-not-counted", "--budget"):
        bought("5m", away, manifest, fine)
    costs = bought("1h", config, manifest, fine).costs
    assert costs.pool_pass == 40 and costs.evaluation == 6, "of 40 and 6 images"
