"""A sweep's record must survive the driver at any moment, and losers must not keep storage."""

from pathlib import Path

import pytest

from threestage.sweeps.journal import Trial, TrialStore, load_trials, ranked, run_folder


def journal(out: Path, kept: int = 1) -> TrialStore:
    return TrialStore(str(out), load_trials(str(out)), kept, lambda trial: None)


def ended(found: TrialStore, number: int, score: float) -> None:
    """A trial that ran and finished, with something in its run's folder."""
    found.begin(number)
    found.note(number, ["stage2"], ["stage1"])
    found.score(number, 10, score)
    found.end(number, "finished")


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
    monkeypatch.setattr("threestage.sweeps.journal.time.monotonic", lambda: now[0])
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
    monkeypatch.setattr("threestage.sweeps.journal.time.monotonic", lambda: now[0])
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
    found = journal(tmp_path)
    for _ in range(3):
        found.add({"a": 1}, 5)
    (tmp_path / "trials" / "0001.json").unlink()
    again = journal(tmp_path)
    again.add({"a": 1}, 6, repeats=0)
    assert [trial.number for trial in again.trials] == [0, 2, 3] and again.take("repeat", 5) is None
    assert again.take("repeat", 6) == again.trial(3)


def test_only_finished_trials_rank_and_the_first_of_equals_wins() -> None:
    def trial(number: int, state: str, score: float) -> Trial:
        return Trial.model_validate(
            {"number": number, "params": {}, "seed": 0, "state": state, "curve": [(1, 0.99), (2, score)]}
        )

    trials = [trial(0, "stopped", 0.9), trial(1, "finished", 0.5), trial(2, "finished", 0.5), trial(3, "finished", 0.6)]
    assert [t.number for t in ranked(trials)] == [3, 1, 2]
