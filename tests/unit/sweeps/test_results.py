"""Why: a user runs what the sweep calls best and believes its figures; they must be the trials', no luckier."""

import io
import json
import statistics
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from matplotlib import pyplot
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial
from PIL import Image
from rich.console import Console

from threestage.config import changed, load
from threestage.data.records import DataSettings
from threestage.data.split import Split
from threestage.sweeps import plots, results
from threestage.sweeps.plots import write_plots
from threestage.sweeps.trials import State, Trial

RATE, CONSISTENCY = "optimiser.learning_rate", "consistency.confidence_threshold"
PSEUDO = "stage2.overrides.pseudo_mask.confidence_threshold"
HEAD, DECAY = "network.head", "ema.decay"
SPACE: dict[str, BaseDistribution] = {
    RATE: FloatDistribution(1e-4, 1e-2, log=True),
    CONSISTENCY: FloatDistribution(0, 1),
    PSEUDO: FloatDistribution(0, 1),
    HEAD: CategoricalDistribution(['"deeplabv2"', '"deeplabv3plus"']),
    DECAY: FloatDistribution(0.5, 1),
}
KEYS = list(SPACE)
CARVED = "8 images carved from the labelled train split (data.validation=0.2)"


def trial(number: int, *scores: float, state: State = "finished", **changes: Any) -> Trial:
    curve = tuple((100 * (i + 1), score) for i, score in enumerate(scores))
    return Trial(
        **{"number": number, "params": {CONSISTENCY: number / 20}, "seed": 0, "state": state, "curve": curve} | changes
    )


def repeat(number: int, of: int, score: float, state: State = "finished", seed: int = 0) -> Trial:
    return trial(number, score, state=state, kind="repeat", repeats=of, seed=seed)


def study(trials: list[Trial]) -> optuna.Study:
    """What Optuna would hold of them; choices are JSON texts."""
    states = {"finished": TrialState.COMPLETE, "stopped": TrialState.PRUNED, "failed": TrialState.FAIL}
    found = optuna.create_study(direction="maximize")
    for one in trials:
        params = {key: json.dumps(value) if key == HEAD else value for key, value in one.params.items()}
        found.add_trial(
            create_trial(
                state=states[one.state],
                params=params,
                distributions={key: SPACE[key] for key in params},
                value=one.score,
                intermediate_values=dict(one.curve),
            )
        )
    return found


def twelve(values: tuple[float, ...] = tuple(range(12))) -> list[Trial]:
    """Finished, stopped and failed ones; `ema.decay` is there with one of the heads only."""
    made = []
    for i, value in enumerate(values):
        head = ("deeplabv2", "deeplabv3plus")[i % 2]
        params = {RATE: 1e-4 * 1.4**i, CONSISTENCY: i / 20, PSEUDO: (i * 7 % 12) / 20, HEAD: head}
        params |= {DECAY: 0.9 + i / 200} if i % 2 else {}
        state: State = {3: "stopped", 6: "failed"}.get(i, "finished")  # type: ignore[assignment]
        made.append(
            trial(i, 0.3, 0.4 + value / 100, state=state, params=params, reason="out of memory" if i == 6 else None)
        )
    return made


# ---- The best


def test_the_best_are_the_finished_trials_of_the_search_by_score() -> None:
    trials = [trial(i, 0.2, 0.3 + i / 100) for i in range(7)]
    trials += [trial(7, 0.9, state="stopped"), trial(8, state="failed"), trial(9, 0.8, state="running")]
    rows = results.best_rows(trials)
    assert [row.number for row in rows] == [6, 5, 4, 3, 2]
    assert (rows[0].score, rows[0].params, rows[0].repeats) == (0.36, {CONSISTENCY: 0.3}, 0)
    assert results.best_rows([]) == [] and len(results.best_rows(trials, 1)) == 1


def test_the_spread_is_of_the_last_three_evaluations() -> None:
    (row,) = results.best_rows([trial(0, 0.1, 0.30, 0.34, 0.32)])
    assert row.spread == pytest.approx(0.02)
    assert results.best_rows([trial(0, 0.3)])[0].spread is None


def test_repeated_trials_come_first_by_the_mean_of_their_repeats_without_the_lucky_run() -> None:
    trials = [trial(0, 0.50), trial(1, 0.49), trial(2, 0.48), trial(3, 0.47)]
    trials += [
        repeat(4, 0, 0.40),
        repeat(5, 0, 0.42),
        repeat(6, 1, 0.44),
        repeat(7, 1, 0.48),
        repeat(8, 2, 0.1, "failed"),
    ]
    rows = results.best_rows(trials)
    assert [row.number for row in rows] == [1, 0, 2, 3]
    assert rows[0].repeat_mean == pytest.approx(0.46) and rows[0].repeats == 2
    assert rows[0].repeat_std == pytest.approx(statistics.stdev([0.44, 0.48]))
    assert (rows[2].repeat_mean, rows[2].repeat_std, rows[2].repeats) == (None, None, 0)


def test_repeats_count_once_all_with_their_seed_are_over() -> None:
    """Else the one whose repeat waits, perhaps the best, would come last, and lose its model."""
    trials = [trial(0, 0.50), trial(1, 0.40), repeat(2, 0, 0.0, "waiting", seed=1), repeat(3, 1, 0.30, seed=1)]
    rows = results.best_rows(trials)
    assert [(row.number, row.repeats) for row in rows] == [(0, 0), (1, 0)]
    over = [*trials[:2], repeat(2, 0, 0.28, seed=1), trials[3], repeat(4, 0, 0.9, "running", seed=2)]
    assert [(row.number, row.repeat_mean) for row in results.best_rows(over)] == [(1, 0.30), (0, 0.28)]


# ---- Words


def test_the_summary_says_what_became_of_the_trials_and_what_selected() -> None:
    text = results.text_summary([*twelve(), repeat(12, 11, 0.5), repeat(13, 11, 0.52)], KEYS, CARVED)
    assert "12 trials: 10 finished, 1 stopped, 1 failed" in text
    assert "2 repeats with other seeds: 2 finished" in text
    assert "trial 6 failed: out of memory" in text
    assert "0.510 ± 0.014 (2)" in text
    assert "the best 5: 0.470 to 0.510 mean IoU in the search, a range of 0.040" in text
    assert f"validation: {CARVED}" in text
    assert "the test set was not touched" in text
    assert "left out" not in text


def test_a_summary_of_little_says_so() -> None:
    waiting = [trial(0, state="failed", reason="\n s3://KEY:SECRET@b/c\nmore"), trial(1, state="waiting")]
    text = results.text_summary(waiting, KEYS, CARVED)
    assert text.splitlines() == [
        "2 trials: 0 finished, 0 stopped, 1 failed, 1 waiting", "  trial 0 failed: s3://b/c", "no trial has finished"
    ]  # fmt: skip
    assert "no reason was given" in results.text_summary([trial(0, state="failed")], KEYS, CARVED)
    one = results.text_summary([trial(0, 0.5)], KEYS, CARVED)
    assert "the best one: 0.500" in one and "importances.png is left out" in one


def test_the_table_fits_a_terminal_and_shows_the_keys_that_a_trial_has() -> None:
    rows = results.best_rows(
        [trial(0, 0.5, params={HEAD: "deeplabv2", CONSISTENCY: 0.123456, "stage2.warm_start": True})]
    )
    stream = io.StringIO()
    Console(file=stream, width=80).print(results.rich_best_table(rows, [CONSISTENCY, HEAD, DECAY, "stage2.warm_start"]))
    text = stream.getvalue()
    assert f"{CONSISTENCY}=0.1235" in text and f"{HEAD}=deeplabv2" in text and "warm_start=true" in text
    assert DECAY not in text and "repeats" not in text and max(map(len, text.splitlines())) <= 80


def test_validation_images_in_words() -> None:
    data = DataSettings(root="s3://KEY:SECRET@bucket/set", validation=0.25)
    carved = Split(labelled=("a",), validation=("b", "c"), validation_split="carved")
    assert results.validation_text(carved, data) == (
        "2 images carved from the labelled train split (data.validation=0.25)"
    )
    own = carved.model_copy(update={"validation_split": "val"})
    assert results.validation_text(own, data) == "the val split of s3://bucket/set (2 images)"


def test_results_for_machines_hold_every_trial_and_no_secret() -> None:
    trials = [*twelve(), repeat(12, 11, 0.5), trial(13, state="failed", reason="s3://KEY:SECRET@b/c")]
    found = json.loads(json.dumps(results.results_json(trials, CARVED, ["best.yaml"]), allow_nan=False))
    assert len(found["trials"]) == 14 and found["trials"][1]["curve"][0] == [100, 0.3]
    assert found["best"] == found["best_five"][0] and found["best"]["number"] == 11
    assert (found["best"]["repeat_mean"], found["best"]["repeats"]) == (0.5, 1)
    assert found["range_of_best_five"] == pytest.approx(0.04)
    assert (found["validation"], found["test_set_used"], found["files"]) == (CARVED, False, ["best.yaml"])
    assert "SECRET" not in json.dumps(found)
    assert results.results_json([], CARVED, [])["best"] is None


# ---- The configuration


def test_best_yaml_is_the_configuration_of_the_best_trial(tmp_path: Path) -> None:
    config = load(
        "demo", ["data.root=/data/x", "augment.crop_size=[32, 32]", "stage3.overrides={ema: {decay: [[0, 0.9]]}}"]
    )
    overrides = {RATE: 3e-5, PSEUDO: 0.9, "stage2.steps": 20_000, "consistency.ramp_up": 0.0, HEAD: "deeplabv2"}
    (row,) = results.best_rows([trial(7, 0.41, 0.4321, 0.44)])
    header = results.best_header("/sweeps/one", row, CARVED)
    path = tmp_path / "best.yaml"
    path.write_text(results.best_yaml(config, overrides, header))
    assert load(str(path)) == changed(config, overrides)
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert len(comments) == 2
    assert "/sweeps/one, trial 7" in comments[0]
    assert "0.4400" in comments[1] and CARVED in comments[1] and "the test set was not touched" in comments[1]
    assert "Credentials" not in path.read_text()


@pytest.mark.parametrize("preset", ["demo", "camvid"])
def test_best_yaml_changes_nothing_that_was_not_searched(preset: str, tmp_path: Path) -> None:
    path = tmp_path / "best.yaml"
    path.write_text(results.best_yaml(load(preset), {}, []))
    assert load(str(path)) == load(preset)


def test_best_yaml_holds_no_credentials_and_names_where_they_were(tmp_path: Path) -> None:
    config = load(
        "demo", ["data.root=s3://KEY:SECRET@bucket/a@b.c", "registry.tracking_uri=postgresql://me:SECRET@db/m"]
    )
    text = results.best_yaml(config, {}, ["found\nhere"])
    assert text.startswith("# found\n# here\n# Credentials were left out of data.root, registry.tracking_uri.\n")
    assert "SECRET" not in text
    assert yaml.safe_load(text)["data"]["root"] == "s3://bucket/a@b.c"


# ---- Plots


def test_plots_are_pictures_and_leave_pyplot_as_it_was(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pyplot.switch_backend("svg")
    mine = pyplot.figure()
    found = study(twelve())
    capfd.readouterr()
    verbosity, style = optuna.logging.get_verbosity(), dict(pyplot.rcParams)
    names = write_plots(found, KEYS, str(tmp_path / "plots"))
    assert names == ["parallel_coordinates.png", "thresholds.png", "importances.png"]
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == sorted(names)
    for name in names:
        with Image.open(tmp_path / "plots" / name) as picture:
            assert picture.format == "PNG" and picture.width > 900 and picture.height > 600
            assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 10
    assert (pyplot.get_backend(), pyplot.get_fignums(), pyplot.gcf()) == ("svg", [mine.number], mine)
    assert (optuna.logging.get_verbosity(), dict(pyplot.rcParams)) == (verbosity, style)
    assert capfd.readouterr() == ("", "")
    pyplot.close(mine)


@pytest.mark.parametrize(
    ("trials", "expected"),
    [
        ([], 0),
        ([trial(0, 0.5, state="stopped")], 0),
        ([trial(0, 0.5)], 2),
        (twelve((1.0,) * 12), 2),
        (twelve()[:3], 2),
        (twelve()[:5], 3),
        ([trial(i, i / 10, params={CONSISTENCY: 0.5}) for i in range(5)], 2),
        ([trial(i, i / 10, params={HEAD: "deeplabv2"} if i % 2 else {CONSISTENCY: 0.5}) for i in range(6)], 2),
    ],
)
def test_plots_of_few_or_equal_trials(
    trials: list[Trial], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "DPI", 20)
    names = write_plots(study(trials), KEYS, str(tmp_path))
    assert len(names) == len(list(tmp_path.iterdir())) == expected
    left_out = "importances.png is left out" in results.text_summary(trials, KEYS, CARVED)
    assert left_out == (expected == 2)
