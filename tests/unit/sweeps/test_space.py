"""What a sweep searches: bad spaces are refused in one line."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.refusals import refused
from threestage.config import Config, load, stage_keys
from threestage.sweeps.space import (
    Parameter,
    Space,
    base_config,
    best_overrides,
    check_space,
    load_space,
    overrides,
    total_steps,
    trial_config,
)
from threestage.sweeps.trials import propose

SHIPPED = sorted((Path(__file__).parents[3] / "tune").glob("*.yaml"))
UNKNOWN, INVALID = "config/unknown-key", "config/invalid-value"
ASHA = {"scheduler": {"asha": {"grace_steps": 200}}}


def a_space(search: Mapping[str, Any], **settings: Any) -> Space:
    return Space.model_validate({"stages": [2], "search": search, "trials": 20, **settings})


def check(tmp_path: Path, text: str, changes: Sequence[str] = ()) -> None:
    """The space of a file, for the demo."""
    file = tmp_path / "space.yaml"
    file.write_text(text)
    check_space(load_space(str(file)), load("demo", changes))


@pytest.mark.parametrize(
    ("search", "code", "named"),
    [
        ("consistency.wieght: {uniform: [0, 1]}", UNKNOWN, "wieght: unknown key; did you mean consistency.weight?"),
        ("consistency: {uniform: [0, 1]}", UNKNOWN, "search.consistency: is a section; name one of its keys"),
        ("zzz: {uniform: [0, 1]}", UNKNOWN, "search.zzz: "),
        ("consistency.weight: {unifrom: [0, 1]}", UNKNOWN, "unifrom=[0, 1]: unknown key; did you mean uniform?"),
        ("consistency.weight: [0, 1]", "sweep/parameter", "search.consistency.weight=[0, 1]: "),
        ("consistency.weight: {}", "sweep/parameter", "search.consistency.weight: "),
        ("consistency.weight: {uniform: [0, 1], choice: [1]}", "sweep/parameter", "uniform, loguniform and choice"),
        ("consistency.weight: {uniform: [a, 1]}", INVALID, "search.consistency.weight: uniform.0='a': "),
        ("consistency.weight: {uniform: [0, .inf]}", INVALID, "uniform.1=inf: "),
        ("consistency.weight: {uniform: [0.5, 0.5]}", "sweep/parameter", "search.consistency.weight: uniform=[0.5, 0.5]: "),
        ("consistency.weight: {loguniform: [2, 1]}", "sweep/parameter", "loguniform=[2.0, 1.0]: "),
        ("consistency.weight: {loguniform: [0, 1]}", "sweep/parameter", "loguniform=[0.0, 1.0]: "),
        ("consistency.weight: {uniform: [0, 1], step: 0}", "sweep/parameter", "step=0: must be above 0"),
        ("consistency.weight: {uniform: [0, 1], step: 1.5}", "sweep/parameter", "step=1.5: "),
        ("consistency.weight: {loguniform: [1, 2], step: 1}", "sweep/parameter", "step=1: belongs to uniform, not to loguniform"),
        ("consistency.weight: {choice: []}", "sweep/parameter", "search.consistency.weight: choice=[]: "),
        ("ema.decay: {choice: [[[0, 0.9]], [[0, 0.9]]]}", "sweep/parameter", "search.ema.decay: choice: has [[0, 0.9]] twice"),
        ("consistency.weight: {uniform: [-1, 1]}", INVALID, "search.consistency.weight=-1: "),
        ("consistency.confidence_threshold: {uniform: [0, 2]}", INVALID, "confidence_threshold=2: "),
        ("ema.decay: {choice: [[[0, 0.9]], [[0, 1.5]]]}", INVALID, "search.ema.decay=[[0, 1.5]]: "),
        ("stage2.steps: {loguniform: [10, 1000]}", INVALID, "search.stage2.steps="),
        ("stage2.steps: {uniform: [10, 20], step: 0.5}", INVALID, "search.stage2.steps="),
        ("stage1.steps: {uniform: [10, 20]}", "sweep/no-effect", "stage 2, which is searched; it does for stage 1: search that"),
        ("training.log_every: {uniform: [1, 9]}", "sweep/no-effect", "training.log_every: "),
        ("network.head: {choice: [linear, deeplabv3plus]}", "sweep/shared-stage", "network.head: counts for stage 1 too"),
        ("training.precision: {choice: [float32, bfloat16]}", "sweep/shared-stage", "training.precision: counts for stage 1 too"),
        ("consistency.weight: {uniform: [0, 1]}", "sweep/parameter", "search.consistency.weight: uniform=[0, 1]"),
        ("consistency.weight: {uniform: [0, 1]}", "sweep/parameter", "write [0.0, 1.0]"),
        ("stage3.overrides.consistency.weight: {uniform: [1, 9]}", "sweep/no-effect", "stage 2"),
        ("1: {uniform: [0, 1]}", INVALID, "search.1"),
        ("consistency.weight: {uniform: [0]}", "config/missing-key", "search.consistency.weight: uniform.1: "),
        ("consistency.weight: {choice: [2026-01-01]}", "sweep/parameter", "2026-01-01 is a date: "),
        ("consistency.weight:", "sweep/parameter", "search.consistency.weight=None: "),
        ("seed: {choice: [1, 2]}", "sweep/not-searchable", "search.seed: "),
        ("cluster.workers: {choice: [1, 2]}", "sweep/not-searchable", "search.cluster.workers: "),
        ("cluster.resources_per_worker: {choice: [{}]}", "sweep/not-searchable", "search.cluster.resources_per_worker: "),
        ("data.labelled: {choice: [1, 2]}", "sweep/not-searchable", "search.data.labelled: "),
        ("consistency.weight: {uniform: [0, 1], when: {ema.decay: [1]}}",
         "sweep/when", "ema.decay is no choice that is searched above consistency.weight"),
        ("consistency.ramp_up: {choice: [0.0, 0.5]}\n  consistency.weight: {uniform: [0, 1], when: {consistency.ramp_up: [0.4]}}",
         "sweep/when", "consistency.ramp_up is never 0.4; its choices are 0.0, 0.5"),
        ("consistency.ramp_up: {choice: [0.0, 0.5]}\n  consistency.weight: {uniform: [0, 1], when: {consistency.ramp_up: []}}",
         "sweep/when", "consistency.ramp_up is never []"),
        ("consistency.ramp_up: {choice: [0.0, 0.5]}\n  consistency.weight: {uniform: [0, 1], when: {ema.decay: [1]}}",
         "sweep/when", "those are consistency.ramp_up"),
    ],
)  # fmt: skip
def test_a_bad_search_is_refused(tmp_path: Path, search: str, code: str, named: str) -> None:
    with refused(code, named) as raised:
        check(tmp_path, f"stages: [2]\ntrials: 5\nsearch:\n  {search}\n")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "code", "named"),
    [
        ("stages: [1, 3]\ntrials: 5", INVALID, "stages=[1, 3]: "),
        ("stages: [4]\ntrials: 5", INVALID, "stages=[4]: "),
        ("stages: []\ntrials: 5", INVALID, "stages=[]: "),
        ("stages: 2\ntrials: 5", INVALID, "stages=2: "),
        ("stages: [2]", "config/missing-key", "trials: "),
        ("stages: [2]\ntrials: 0", INVALID, "trials=0: "),
        ("stages: [2]\ntrials: 5\nmax_concurrent: 0", INVALID, "max_concurrent=0: "),
        ("stages: [2]\ntrials: 5\ntrails: 5", UNKNOWN, "trails=5: unknown key; did you mean trials?"),
        ("stages: [2]\ntrials: 5\nsearcher: tpes", INVALID, "searcher='tpes': should be 'tpe', 'random' or 'grid'"),
        ("stages: [2]\ntrials: 5\nbudget: {hour: 1}", UNKNOWN, "budget.hour=1: unknown key; did you mean hours?"),
        ("stages: [2]\ntrials: 5\nbudget: {hours: 0}", INVALID, "budget.hours=0: "),
        ("stages: [2]\ntrials: 5\nscheduler: ashe", INVALID, "scheduler='ashe': give {asha: {grace_steps: 200}} or none"),
        ("stages: [2]\ntrials: 5\nscheduler: {asha: {grace: 1, grace_steps: 9}}", UNKNOWN, "scheduler.grace=1: "),
        ("stages: [2]\nsearcher: grid", "sweep/parameter", "search.consistency.weight: searcher: grid"),
        ("stages: [2]\ntrials: 5\nfixed: {consistency.weight: 1}", "sweep/key-twice", "consistency.weight: "),
        ("stages: [2]\ntrials: 5\nfixed: {stage2.stesp: 1}", UNKNOWN, "fixed.stage2.stesp: unknown key; did you mean stage2"),
        ("stages: [2]\ntrials: 5\nfixed: {cluster: {workers: 1}}", UNKNOWN, "fixed.cluster: is a section"),
        ("stages: [2]\ntrials: 5\nfixed: {stages: 1}", "sweep/not-searchable", "fixed.stages: "),
        ("stages: [2]\ntrials: 5\nfixed: {stage2.steps: 0}", INVALID, "stage2.steps=0: "),
        ("stages: [2]\ntrials: 5\nscheduler: {asha: {grace_steps: 800}}",
         "sweep/asha", "scheduler.asha.grace_steps=800: the last evaluation before the end at step 800 is at step 750"),
        ("stages: [2]\ntrials: 5\nscheduler: {asha: {grace_steps: 10}}\nfixed: {training.evaluate_every: 400}",
         "sweep/asha", "make evaluate_every 399"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(tmp_path: Path, settings: str, code: str, named: str) -> None:
    with refused(code, named) as raised:
        check(tmp_path, f"search: {{consistency.weight: {{uniform: [0.0, 1]}}}}\n{settings}\n")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "code", "named"),
    [
        ("- a list\n", "config/not-a-mapping", "space.yaml"),
        ("a: [\n", "config/not-yaml", "space.yaml"),
        ("{stages: [2], trials: 5, search: {}}", "sweep/parameter", "search={}"),
        ("{stages: [2], trials: 5}", "config/missing-key", "search: "),
    ],
)
def test_what_is_no_space_is_refused(tmp_path: Path, text: str, code: str, named: str) -> None:
    with refused(code, named):
        check(tmp_path, text)


def test_a_space_that_does_not_ship_is_refused(tmp_path: Path) -> None:
    with refused("sweep/not-found", "threshold: ", "did you mean thresholds?"):
        load_space("threshold")
    with refused("config/missing-key", "stages: is not set") as raised:
        check(tmp_path, "{trials: 5, search: {ema.decay: {choice: [1]}}}")
    assert "--set" not in raised.value.message, "--set is of the configuration, not of the space"


def test_a_setting_of_a_loss_that_has_no_weight_is_refused(tmp_path: Path) -> None:
    threshold = "{stages: [2], trials: 5, search: {SECTION.confidence_threshold: {uniform: [0.0, 1]}MORE}}"
    for section in ("consistency", "pseudo_mask"):
        text = threshold.replace("SECTION", section)
        with refused("sweep/no-effect", f"{section}.confidence_threshold: ", f"{section}.weight"):
            check(tmp_path, text.replace("MORE", ""), [f"{section}.weight=0"])
        both = Space.model_validate(yaml.safe_load(text.replace("MORE", f", {section}.weight: {{choice: [0, 1]}}")))
        check_space(both, load("demo", [f"{section}.weight=0"]))


def test_a_key_that_the_stage_has_changed_is_searched_there(tmp_path: Path) -> None:
    changes = ["stage2.overrides={consistency: {weight: 0.3}}"]
    with refused("sweep/no-effect", "search stage2.overrides.consistency.weight"):
        check(tmp_path, "{stages: [2], trials: 5, search: {consistency.weight: {uniform: [0, 1]}}}", changes)
    check_space(a_space({"stage2.overrides.consistency.weight": {"uniform": [0.0, 1]}}), load("demo", changes))
    rate, own = (
        {"optimiser.learning_rate": {"loguniform": [1e-4, 1e-2]}},
        ["stage3.overrides={optimiser: {learning_rate: 1}}"],
    )
    found = best_overrides(a_space(rate), load("demo", own), {"optimiser.learning_rate": 1e-3})
    assert found == {"stage2.overrides.optimiser.learning_rate": 1e-3}, "stage 3 keeps its own"


def test_shipped_spaces_fit_the_presets() -> None:
    assert [file.stem for file in SHIPPED] == [
        "learning_rate_and_ema", "loss_weights", "thresholds", "thresholds_and_weights"
    ]  # fmt: skip
    for file in SHIPPED:
        header = file.read_text().split("stages:")[0]
        assert all(f"# {what}:" in header for what in ("command", "cost", "result")), file.name
        space = load_space(file.stem)
        assert space == load_space(str(file)) == Space.model_validate(space.model_dump(mode="json"))
        for preset in ("demo", "camvid"):
            config = load(preset)
            check_space(space, config)
            assert total_steps(space, config) == config.stage2.steps
            for seed in range(4):
                stages = trial_config(space, config, propose(space, [], seed) or {}, 1)
                assert stage_keys(stages, "stage1") == stage_keys(base_config(space, config, 1), "stage1")
                assert (stages.stages, stages.seed, stages.pseudo_mask.final_stage) == (2, 1, False)


def test_the_faithful_thresholds_are_among_the_shipped_ones() -> None:
    assert all(next(parameter.values()) == 0.0 for parameter in load_space("thresholds").search.values())


def test_numbers_with_exponents_are_numbers(tmp_path: Path) -> None:
    file = tmp_path / "space.yaml"
    file.write_text(
        "{stages: [2], trials: 5, scheduler: none, search: {"
        "optimiser.learning_rate: {loguniform: [1e-5, 1e-2]}, optimiser.encoder_learning_rate: {choice: [1e-3, 2e-3]}}}"
    )
    space = load_space(str(file))
    assert space.search["optimiser.learning_rate"].loguniform == (1e-5, 1e-2)
    assert space.search["optimiser.encoder_learning_rate"].choice == (1e-3, 2e-3)
    assert space.scheduler is None


def test_a_key_that_counts_for_a_shared_stage_is_changed_for_the_later_ones() -> None:
    demo, rate = load("demo"), {"optimiser.learning_rate": {"loguniform": [1e-4, 1e-2]}}
    params = {"optimiser.learning_rate": 5e-3}
    end = {"pseudo_mask.final_stage": False}
    later = {f"stage{n}.overrides.optimiser.learning_rate": 5e-3 for n in (2, 3)}
    assert overrides(a_space(rate), demo, params) == later | end | {"stages": 2}
    assert best_overrides(a_space(rate), demo, params) == later
    whole = a_space(rate, stages=[1, 2], fixed={"cluster.workers": 2})
    assert overrides(whole, demo, params) == params | end | {"stages": 2, "cluster.workers": 2}
    last = a_space({"consistency.weight": {"uniform": [0, 1]}, "ema.decay": {"choice": [[[0, 0.9]]]}}, stages=[3])
    assert overrides(last, demo, {"consistency.weight": 0.7}) == end | {
        "stage3.overrides.consistency.weight": 0.7, "stages": 3,
    }  # fmt: skip
    strong = a_space({"augment.strong.cutouts": {"uniform": [0, 5]}})
    assert "augment.strong.cutouts" in best_overrides(strong, demo, {"augment.strong.cutouts": 1})
    with_stage_1 = best_overrides(strong, load("demo", ["stage1.strong_view=true"]), {"augment.strong.cutouts": 1})
    assert with_stage_1 == {f"stage{n}.overrides.augment.strong.cutouts": 1 for n in (2, 3)}


def test_shared_stages_are_those_of_the_base_configuration() -> None:
    space = a_space({"consistency.weight": {"uniform": [0, 1]}}, stages=[3], fixed={"stage1.steps": 7})
    base = base_config(space, load("demo", ["pseudo_mask.final_stage=false"]), 5)
    assert (space.shared_stages, base.stages, base.seed, base.stage1.steps) == (2, 2, 5, 7)
    assert base.pseudo_mask.final_stage, "stage 3 learns from the pseudo-masks of stage 2"
    trial = trial_config(space, load("demo"), {"consistency.weight": 0.9}, 5)
    assert all(stage_keys(trial, stage) == stage_keys(base, stage) for stage in base.stage_names)
    assert a_space({"stage1.steps": {"uniform": [1, 9]}}, stages=[1]).shared_stages == 0


def test_total_steps_are_the_most_that_a_trial_has() -> None:
    demo = load("demo")
    assert total_steps(a_space({"consistency.weight": {"uniform": [0, 1]}}, stages=[2, 3]), demo) == 1600
    searched = {"stage2.steps": {"uniform": [100, 345], "step": 100}}
    assert total_steps(a_space(searched, stages=[2, 3], fixed={"stage3.steps": 50}), demo) == 350


def test_asha_needs_evaluations() -> None:
    weight = {"consistency.weight": {"uniform": [0.0, 1]}}
    check_space(a_space(weight, **ASHA), load("demo"))
    check_space(a_space(weight, stages=[2, 3], **ASHA), load("demo", ["training.evaluate_every=799"]))


def test_values_of_a_range_with_a_step() -> None:
    parameter = Parameter.model_validate({"uniform": [0, 1], "step": 0.3})
    assert list(parameter.values()) == [0.0, 0.3, 0.6, 0.9]
    assert parameter.last == 0.9 and parameter.samples() == [0.0, 0.3, 0.9]
    assert list(Parameter.model_validate({"uniform": [1, 7], "step": 2}).values()) == [1, 3, 5, 7]


def test_configurations_that_are_used_are_untouched() -> None:
    config = load("demo")
    before = Config.model_validate(config.model_dump())
    trial_config(load_space("learning_rate_and_ema"), config, {"optimiser.learning_rate": 1e-3}, 3)
    assert config == before
