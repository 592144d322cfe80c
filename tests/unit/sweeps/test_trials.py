"""A sweep's record must survive the driver at any moment and can be opened by Optuna; proposals repeat nothing and can be
replayed; losers must not keep storage."""

import errno
import json
import logging
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from tests.refusals import refused
from tests.store_away import StoreAway
from threestage.config import load
from threestage.data import storage
from threestage.errors import InputError, UnwritablePlace
from threestage.sweeps.space import Space, check_space, load_space
from threestage.sweeps.trials import (
    JOURNAL,
    STUDY,
    State,
    Trial,
    TrialStore,
    grid,
    load_trials,
    number_of_trials,
    own_params,
    propose,
    ranked,
    run_folder,
    study_of,
)


def a_space(search: Mapping[str, Any], **settings: Any) -> Space:
    return Space.model_validate({"stages": [2], "search": search, "trials": 20, **settings})


SPACE = a_space({"a": {"uniform": [0.0, 9.0]}})


def journal(out: Path, kept: int = 1) -> TrialStore:
    return TrialStore(str(out), SPACE, kept, lambda trial: None)


def in_optuna(out: Path) -> list[optuna.trial.FrozenTrial]:
    """As optuna-dashboard reads the record."""
    return optuna.load_study(study_name=STUDY, storage=JournalStorage(JournalFileBackend(str(out / JOURNAL)))).trials


# ---- The record


def ended(found: TrialStore, number: int, score: float) -> None:
    """A trial that ran and finished, with something in its run's folder."""
    found.begin(number)
    found.note(number, ["stage2"], ["stage1"])
    found.score(number, 10, score)
    found.end(number, "finished")


def test_an_outage_of_the_record_is_waited_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, warnings = StoreAway(monkeypatch, JOURNAL), list[str]()

    def warn(text: str) -> None:
        warnings.append(text)
        store.down.clear()

    found = TrialStore(str(tmp_path), SPACE, 1, lambda trial: None, warn)
    store.down.set()
    found.add({"a": 1.0}, 0)
    assert len(in_optuna(tmp_path)) == 1 and store.failed == 1
    assert "the store is away" in warnings[0] and "answers again" in warnings[1]


def test_a_record_that_cannot_be_written_any_more_ends_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = journal(tmp_path)

    def full(uri: str, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(storage, "write_bytes", full)
    with refused("stage/unwritable", tmp_path, error=UnwritablePlace):
        found.add({"a": 1.0}, 0)


def with_run(out: Path, number: int) -> Path:
    folder = Path(run_folder(str(out), number))
    folder.mkdir(parents=True)
    (folder / "weights").write_text("x")
    return folder


def test_what_is_written_is_what_the_next_start_knows(tmp_path: Path) -> None:
    first = journal(tmp_path)
    first.add({"a": 1}, 5)
    first.add({"a": 2}, 5)
    ended(first, 0, 0.5)
    first.begin(1)
    first.score(1, 10, 0.25)
    first.score(1, 10, 0.75)  # said again by a trial that was started again
    again = journal(tmp_path)
    assert [trial.state for trial in again.trials] == ["finished", "waiting"], "what ran when it was killed waits"
    assert again.trials[1].curve == ((10, 0.25),) and again.trials[1].seed == 5
    assert again.trials[0].trained == ("stage2",) and again.trials[0].reused == ("stage1",)
    taken = again.take("search", 5)
    assert taken is not None and taken.number == 1 and again.take("search", 5) is None


def test_time_adds_up_over_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("threestage.sweeps.trials.time.monotonic", lambda: now[0])
    first = journal(tmp_path)
    first.add({"a": 1}, 5)
    first.begin(0)
    now[0] += 7
    first.score(0, 10, 0.5)
    now[0] += 2
    assert first.seconds() == 9
    second = journal(tmp_path)
    assert second.seconds() == 7, "what was not written down is not known"
    second.begin(0)
    now[0] += 1
    second.end(0, "finished")
    now[0] += 50
    assert second.seconds() == 8 and load_trials(str(tmp_path))[0].seconds == 8


def test_losers_lose_their_runs_once_they_are_quiet(tmp_path: Path) -> None:
    found = journal(tmp_path)
    folders = [with_run(tmp_path, number) for number in range(4)]
    for score in (0.25, 0.5, 0.75):
        found.add({"a": score}, 5)
    found.add({"a": 0}, 5)
    ended(found, 0, 0.25)
    ended(found, 1, 0.5)
    found.begin(2)
    found.begin(3)
    found.end(3, "failed", "NaN")
    found.delete_losing_runs()
    assert all(folder.exists() for folder in folders), "their processes may still write"
    found.delete_losing_runs(0.0)
    assert [folder.exists() for folder in folders] == [False, True, True, False]
    ended(found, 2, 0.75)
    found.delete_losing_runs(0.0)
    assert [folder.exists() for folder in folders] == [False, False, True, False]


def test_as_many_as_asked_are_kept_and_then_only_one(tmp_path: Path) -> None:
    found = journal(tmp_path, kept=2)
    folders = [with_run(tmp_path, number) for number in range(3)]
    for number in range(3):
        found.add({"a": number}, 5)
        ended(found, number, number / 4)
    found.delete_losing_runs(0.0)
    assert [folder.exists() for folder in folders] == [False, True, True]
    found.delete_losing_runs(0.0, keep=found.trials[1])
    assert [folder.exists() for folder in folders] == [False, True, False]


def test_what_is_over_does_not_begin_again(tmp_path: Path) -> None:
    found = journal(tmp_path)
    found.add({"a": 1}, 5)
    ended(found, 0, 0.5)
    found.begin(0)  # Ray Tune starts a process again that was lost after its last word
    assert found.trial(0).state == "finished"


def test_what_runs_is_interrupted_and_keeps_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("threestage.sweeps.trials.time.monotonic", lambda: now[0])
    found = journal(tmp_path)
    found.add({"a": 1}, 5)
    found.begin(0)
    now[0] += 4
    found.begin(0)  # its process was lost
    now[0] += 4
    found.interrupt()
    now[0] += 100
    assert found.trial(0).state == "waiting" and found.seconds() == 8 == load_trials(str(tmp_path))[0].seconds


def test_failures_in_a_row_are_counted_until_one_is_evaluated(tmp_path: Path) -> None:
    found = journal(tmp_path)
    for number in range(4):
        found.add({"a": number}, 5)
        found.begin(number)
    found.end(0, "failed", "NaN")
    found.end(1, "waiting", "no room")
    assert found.in_vain == 2
    ended(found, 2, 0.5)
    assert found.in_vain == 0
    found.score(3, 10, 0.5)
    found.end(3, "failed", "NaN")
    assert found.in_vain == 0, "it was evaluated"


def test_numbers_are_not_used_again(tmp_path: Path) -> None:
    """Of a sweep of the version before, whose record of trial 1 was lost."""
    for number in (0, 2):
        storage.write_json(f"{tmp_path}/trials/{number:04d}.json", {"number": number, "params": {"a": 1}, "seed": 5})
    again = journal(tmp_path)
    again.add({"a": 1}, 6, repeats=0)
    assert [trial.number for trial in again.trials] == [0, 2, 3] and again.take("repeat", 5) is None
    assert again.take("repeat", 6) == again.trial(3)
    assert [trial.number for trial in load_trials(str(tmp_path))] == [0, 2, 3]


def test_optuna_opens_the_record_at_any_moment(tmp_path: Path) -> None:
    found = journal(tmp_path)
    for number in range(5):
        found.add({"a": number}, 5, own=number == 0)
    found.begin(1)
    found.score(1, 10, 0.25)
    assert [trial.state.name for trial in in_optuna(tmp_path)] == [
        "WAITING",
        "RUNNING",
        "WAITING",
        "WAITING",
        "WAITING",
    ]
    ended(found, 2, 0.5)
    found.begin(3)
    found.end(3, "stopped")
    found.begin(4)
    found.end(4, "failed", "NaN")
    seen = in_optuna(tmp_path)
    assert [trial.state.name for trial in seen] == ["WAITING", "RUNNING", "COMPLETE", "PRUNED", "FAIL"]
    assert [trial.params for trial in seen] == [{"a": float(number)} for number in range(5)]
    assert (seen[1].intermediate_values, seen[2].value, seen[4].user_attrs["reason"]) == ({10: 0.25}, 0.5, "NaN")
    assert seen[0].user_attrs["own"] and seen[2].user_attrs["trained"] == ["stage2"]
    assert [file.name for file in tmp_path.iterdir()] == [JOURNAL], "no lock, no copy"


def test_a_last_score_that_is_no_number_is_a_failure(tmp_path: Path) -> None:
    found = journal(tmp_path)
    found.add({"a": 1}, 5)
    ended(found, 0, float("nan"))
    (trial,) = load_trials(str(tmp_path))
    assert (trial.state, trial.score) == ("failed", None) and "not a number" in str(trial.reason)
    assert in_optuna(tmp_path)[0].state == TrialState.FAIL


def test_values_come_back_to_the_last_bit(tmp_path: Path) -> None:
    search = {"a": {"loguniform": [1e-5, 1.0]}, "b": {"choice": [[[0, 0.9]], None, "x"]}, "c": {"uniform": [1, 9]}}
    space = a_space(search)
    found = TrialStore(str(tmp_path), space, 1, lambda trial: None)
    for seed in range(4):
        params = propose(space, found.trials, seed)
        assert params is not None
        found.add(params, seed)
        found.begin(seed)
        found.score(seed, 10, 1 / 3)
        assert found.trial(seed).params == params and load_trials(str(tmp_path))[seed].params == params
    assert load_trials(str(tmp_path)) == found.trials


def test_trials_of_the_version_before_are_taken_over_once(tmp_path: Path) -> None:
    before = [
        {"number": 0, "params": {"a": 1.5}, "seed": 5, "state": "finished", "curve": [[10, 0.5]], "own": True},
        {"number": 1, "params": {"a": 2.5}, "seed": 5, "state": "failed", "reason": "NaN", "seconds": 3.5},
        {"number": 2, "params": {"a": 3.5}, "seed": 5, "state": "running", "curve": [[5, 0.25]], "trained": ["stage2"]},
        {"number": 3, "params": {"a": 1.5}, "seed": 6, "kind": "repeat", "repeats": 0},
    ]
    for record in before:
        storage.write_json(f"{tmp_path}/trials/{record['number']:04d}.json", record)
    old = load_trials(str(tmp_path))
    assert old == [Trial.model_validate(record) for record in before] and not (tmp_path / JOURNAL).exists()
    found = journal(tmp_path)
    assert found.trials == [*old[:2], old[2].model_copy(update={"state": "waiting"}), old[3]]
    assert [trial.state.name for trial in in_optuna(tmp_path)] == ["COMPLETE", "FAIL", "WAITING", "WAITING"]
    assert load_trials(str(tmp_path)) == found.trials
    found.begin(2)
    found.end(2, "stopped")
    assert journal(tmp_path).trial(2).state == "stopped" and len(list((tmp_path / "trials").iterdir())) == 4


def test_no_pickle_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any, **named: Any) -> Any:
        raise AssertionError("a pickle is loaded")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    found = journal(tmp_path)
    for number in range(101):  # Optuna's storages that take snapshots take one of a hundred trials
        found.add({"a": number / 100}, 5)
    ended(found, 0, 0.5)
    assert journal(tmp_path).trials == load_trials(str(tmp_path)) == found.trials
    (tmp_path / JOURNAL).write_bytes(pickle.dumps(found.trials))
    with refused("storage/damaged-json", JOURNAL):
        load_trials(str(tmp_path))


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    found = journal(tmp_path)
    found.add({"a": 1}, 5)
    ended(found, 0, 0.5)
    lines = (tmp_path / JOURNAL).read_text().splitlines()
    for number, line in enumerate(lines):
        record = json.loads(line)
        values: tuple[Any, ...] = ("x", None, [], 99)
        wrong: list[Any] = ["{", [], 5, None, {}, "[" * 100_000, line[: len(line) // 2]]
        wrong += [{**record, key: value} for key in record if key != "worker_id" for value in values]
        for other in wrong:
            changed = other if isinstance(other, str) else json.dumps(other)
            (tmp_path / JOURNAL).write_text("\n".join([*lines[:number], changed, *lines[number + 1 :]]) + "\n")
            try:
                load_trials(str(tmp_path))
            except InputError as error:
                assert error.code == "storage/damaged-json" and "\n" not in str(error)
    (tmp_path / JOURNAL).write_text("\n".join(lines))
    with refused("storage/damaged-json", JOURNAL):
        load_trials(str(tmp_path))


def test_only_finished_trials_rank_and_the_first_of_equals_wins() -> None:
    def trial(number: int, state: str, score: float) -> Trial:
        return Trial.model_validate(
            {"number": number, "params": {}, "seed": 0, "state": state, "curve": [(1, 0.99), (2, score)]}
        )

    trials = [trial(0, "stopped", 0.9), trial(1, "finished", 0.5), trial(2, "finished", 0.5), trial(3, "finished", 0.6)]
    assert [t.number for t in ranked(trials)] == [3, 1, 2]


# ---- Proposals

CONDITIONAL: dict[str, Any] = {
    "consistency.ramp_up": {"choice": [0.0, 0.3]},
    "consistency.weight": {"uniform": [0.1, 0.5], "step": 0.1, "when": {"consistency.ramp_up": [0.3]}},
}


def run_through(space: Space, count: int, seed: int = 0, states: Sequence[State] = ("finished",)) -> list[Trial]:
    """A sweep whose trials end in these states in turn."""
    trials: list[Trial] = []
    for number in range(count):
        if (params := propose(space, trials, seed)) is None:
            break
        score = (number * 7 % 10) / 10
        state = states[number % len(states)]
        trials.append(Trial(number=number, params=params, seed=0, state=state, curve=((5, score / 2), (10, score))))
    return trials


@given(st.integers(0, 10**6), st.sampled_from(["tpe", "random"]))
def test_values_lie_where_they_may(seed: int, searcher: str) -> None:
    search: dict[str, Any] = {
        "a": {"uniform": [0, 0.95], "step": 0.05},
        "b": {"uniform": [0.25, 0.5]},
        "c": {"uniform": [3, 9]},
        "d": {"uniform": [10, 25], "step": 10},
        "e": {"loguniform": [1e-5, 1e-2]},
        "f": {"choice": [[[0, 0.9]], [[0, 0.99], [400, 0.999]], None, "x"]},
    }
    space = a_space(search, searcher=searcher)
    for trial in run_through(space, 3, seed):
        params = trial.params
        assert list(params) == list(search)
        assert params["a"] in [round(k * 0.05, 2) for k in range(20)]
        assert 0.25 <= params["b"] <= 0.5
        assert type(params["c"]) is int and 3 <= params["c"] <= 9
        assert params["d"] in (10, 20) and type(params["d"]) is int
        assert 1e-5 <= params["e"] <= 1e-2
        assert params["f"] in search["f"]["choice"]


@pytest.mark.parametrize("searcher", ["tpe", "random", "grid"])
def test_conditional_keys_are_there_when_they_should(searcher: str) -> None:
    trials = run_through(a_space(CONDITIONAL, searcher=searcher), 20)
    assert len(trials) == 6, "five weights with the ramp, and one trial without"
    for trial in trials:
        assert ("consistency.weight" in trial.params) == (trial.params["consistency.ramp_up"] == 0.3)
    check_space(a_space(CONDITIONAL), load("demo", ["consistency.weight=0"]))


def test_conditional_trials_teach_tpe() -> None:
    search: dict[str, Any] = CONDITIONAL | {
        "ema.decay": {"choice": [[[0, 0.9]], [[0, 0.99]]], "when": {"consistency.ramp_up": [0.0]}}
    }
    search |= {"pseudo_mask.weight": {"loguniform": [0.1, 1]}}
    assert len(run_through(a_space(search), 25, states=("finished", "stopped", "failed", "running"))) == 25


@pytest.mark.parametrize("searcher", ["tpe", "random"])
def test_nothing_is_proposed_twice(searcher: str) -> None:
    search = {
        "consistency.weight": {"uniform": [0, 1], "step": 0.25},
        "ema.decay": {"choice": [[[0, 0.9]], [[0, 0.99]]]},
    }
    states: tuple[State, ...] = ("finished", "failed", "waiting", "running", "stopped")
    trials = run_through(a_space(search, searcher=searcher), 30, states=states)
    assert len(trials) == 10
    assert len({str(trial.params) for trial in trials}) == 10


@pytest.mark.parametrize("searcher", ["tpe", "random"])
def test_proposals_depend_on_space_trials_and_seed_alone(searcher: str) -> None:
    space = a_space({"pseudo_mask.weight": {"loguniform": [0.01, 1]}, **CONDITIONAL, "stage2.steps": {"uniform": [1, 99]}},
                    searcher=searcher)  # fmt: skip
    trials = run_through(space, 15)
    assert trials == run_through(space, 15)
    assert trials != run_through(space, 15, seed=1)
    resumed = [Trial.model_validate_json(trial.model_dump_json()) for trial in trials[:12]]
    assert propose(space, resumed, 0) == trials[12].params
    repeat = trials[0].model_copy(update={"number": 12, "kind": "repeat", "repeats": 0})
    assert propose(space, [*resumed, repeat], 0) == trials[12].params, "repeats do not count"
    fewer = [*resumed[:5], *resumed[6:]]
    assert propose(space, fewer, 0) not in [trial.params for trial in fewer]


def test_the_first_trial_changes_nothing_where_it_can() -> None:
    both = load_space("thresholds_and_weights")
    assert own_params(both, load("camvid")) == {
        "pseudo_mask.confidence_threshold": 0.0,
        "consistency.confidence_threshold": 0.0,
        "consistency.weight": 0.25,
        "pseudo_mask.weight": 0.25,
    }
    for key, parameter, there in [
        ("pseudo_mask.weight", {"uniform": [0.5, 1.0]}, False),
        ("pseudo_mask.weight", {"uniform": [0.2, 0.5], "step": 0.1}, False),
        ("pseudo_mask.weight", {"choice": [0.25, 0.5]}, True),
        ("ema.decay", {"choice": [[[0, 0.99]], [[0, 0.9]]]}, True),
        ("ema.decay", {"choice": [[[0, 0.9]]]}, False),
    ]:
        assert (own_params(a_space({key: parameter}), load("camvid")) is not None) == there, (key, parameter)
    rate = a_space({"optimiser.learning_rate": {"loguniform": [1e-4, 1e-2]}})
    own = load("camvid", ["stage2.overrides.optimiser.learning_rate=0.002"])
    assert own_params(rate, own) == {"optimiser.learning_rate": 0.002}
    assert own_params(a_space(CONDITIONAL), load("camvid")) == {"consistency.ramp_up": 0.0}


def test_the_grid_is_gone_through_in_order() -> None:
    search = {"pseudo_mask.weight": {"choice": [0.5, 0.25]}, **CONDITIONAL}
    space = a_space(search, searcher="grid", trials=None)
    points = list(grid(space))
    assert len(points) == number_of_trials(space) == 12
    assert points[:2] == [
        {"pseudo_mask.weight": 0.5, "consistency.ramp_up": 0.0},
        {"pseudo_mask.weight": 0.5, "consistency.ramp_up": 0.3, "consistency.weight": 0.1},
    ]
    trials = run_through(space, 99)
    assert [trial.params for trial in trials] == points
    assert propose(space, [*trials[:4], *trials[5:]], 0) == points[4]
    assert number_of_trials(a_space(search, searcher="grid", trials=5)) == 5
    assert number_of_trials(a_space(search, trials=50)) == 50


def test_tpe_looks_where_the_scores_are_high() -> None:
    space = a_space({"consistency.weight": {"uniform": [0.0, 1.0]}})
    trials: list[Trial] = []
    for number in range(40):
        params = propose(space, trials, 0)
        assert params is not None
        score = 1 - abs(params["consistency.weight"] - 0.8)
        trials.append(Trial(number=number, params=params, seed=0, state="finished", curve=((10, score),)))
    near = [abs(trial.params["consistency.weight"] - 0.8) < 0.2 for trial in trials[20:]]
    assert sum(near) >= 14


def test_the_study_holds_what_the_trials_did() -> None:
    search = {
        "ema.decay": {"choice": [[[0, 0.9]], [[0, 0.99]]]},
        "consistency.weight": {"uniform": [0, 1], "step": 0.1},
    }
    space = a_space(search)
    states: list[State] = ["finished", "stopped", "failed", "running", "waiting", "finished"]
    trials = run_through(space, 6, states=states)
    trials[5] = trials[5].model_copy(update={"curve": ()})
    repeat = trials[0].model_copy(update={"number": 6, "kind": "repeat", "repeats": 0})
    study = study_of(space, [*trials, repeat])
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED", "FAIL", "RUNNING", "RUNNING", "FAIL"]
    assert [trial.value for trial in study.trials] == [trials[0].score, None, None, None, None, None]
    assert study.best_trial.number == 0
    assert study.direction.name == "MAXIMIZE"
    for trial, record in zip(trials, study.trials, strict=True):
        assert record.intermediate_values == dict(trial.curve)
        assert record.params["ema.decay"] == str(trial.params["ema.decay"]), "JSON text"
        assert record.params["consistency.weight"] == trial.params["consistency.weight"]


def test_optuna_is_left_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    before = optuna.logging.get_verbosity()
    run_through(a_space(CONDITIONAL), 3)
    assert optuna.logging.get_verbosity() == before == logging.INFO
    assert capfd.readouterr() == ("", "")
