"""The order of a sweep, and what it does when its budget is spent, its trials fail or more are asked for: without a cluster."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.refusals import refused
from threestage.config import Config, load
from threestage.data import storage
from threestage.errors import StageFailure
from threestage.ray_backend import sweep as on_ray_sweep
from threestage.ray_backend import train as on_ray_train
from threestage.run import pipeline
from threestage.run.backend import RunCallbacks
from threestage.sweeps import sweep, trials
from threestage.sweeps.space import Space
from threestage.sweeps.sweep import Sweep
from threestage.sweeps.trials import Trial, TrialStore, load_trials, run_folder, shared_folder

KEY = "pseudo_mask.confidence_threshold"
SPACE = {"stages": [2], "search": {KEY: {"choice": [0.0, 0.5, 0.7, 0.9]}}, "trials": 3}
Outcome = tuple[str, float] | str  # (state, score), or how it failed


class Quiet:
    def __init__(self) -> None:
        self.said: list[str] = []

    def warn(self, text: str) -> None:
        self.said.append(text)

    phase = warn

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *given: None


class Cluster:
    """Stands in for Ray: shared runs are folders, a trial ends as `ends` says of its number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ends: Callable[[Trial], Outcome], hours: float = 0.0) -> None:
        self.shared: list[str] = []
        self.begun: list[int] = []
        self._ends, self._hours, self._now = ends, hours, 0.0
        monkeypatch.setattr(on_ray_train, "on_cluster", lambda config, out, on: contextlib.nullcontext())
        monkeypatch.setattr(pipeline, "run", self._run)
        monkeypatch.setattr(on_ray_sweep, "run_trials", self._trials)
        for module in (sweep, trials):
            monkeypatch.setattr(module, "time", self)

    def monotonic(self) -> float:
        return self._now

    def _run(self, config: Config, out: str, *_: Any, **__: Any) -> None:
        self.shared.append(Path(out).name)
        done = Path(out, "pseudo_masks1", "done.json")
        done.parent.mkdir(parents=True)
        done.write_text("{}")

    def _trials(
        self, space: Space, config: Config, out: str, journal: TrialStore, next_trial: Callable[[], Trial | None], count: int,
        over: Callable[[], bool], warn: Callable[[str], None],
    ) -> None:  # fmt: skip
        while not over() and (trial := next_trial()) is not None:
            self.begun.append(trial.number)
            journal.begin(trial.number)
            self._now += 3600 * self._hours
            if over():
                break
            end = self._ends(trial)
            if isinstance(end, str):
                journal.end(trial.number, "failed", end)
                continue
            Path(run_folder(out, trial.number), "stage2").mkdir(parents=True)
            Path(run_folder(out, trial.number), "stage2", "done.json").write_text("{}")
            journal.score(trial.number, 800, end[1])
            journal.end(trial.number, end[0])  # type: ignore[arg-type]
        journal.interrupt()


def a_sweep(out: Path, repeat: int = 0, **settings: Any) -> Sweep:
    space = Space.model_validate({**SPACE, **settings})
    return Sweep(space, load("demo", ["data.root=/nowhere"]), str(out), repeat=repeat)


def run(requested: Sweep) -> Quiet:
    show = Quiet()
    store = TrialStore(requested.out, requested.space, sweep.REPEATED, lambda trial: None)
    running = sweep._Running(requested, store, show, 0.0)
    running.search()
    running.repeat()
    return show


def finished(trial: Trial) -> Outcome:
    return "finished", float(trial.params[KEY])


def by_number(out: Path) -> dict[int, tuple[str, str, int]]:
    return {trial.number: (trial.kind, trial.state, trial.seed) for trial in load_trials(str(out))}


def test_first_what_there_is_then_the_search_then_other_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, finished)
    run(a_sweep(tmp_path, repeat=2, trials=4))
    found = load_trials(str(tmp_path))
    assert found[0].own and found[0].params == {KEY: 0.7} and not any(trial.own for trial in found[1:])
    assert {trial.params[KEY] for trial in found[:4]} == {0.0, 0.5, 0.7, 0.9}, "nothing twice"
    assert cluster.shared == ["seed0", "seed1", "seed2"]
    repeated = [(trial.seed, trial.params[KEY]) for trial in found[4:]]
    assert repeated == [(seed, score) for seed in (1, 2) for score in (0.9, 0.7, 0.5)]
    assert not Path(shared_folder(str(tmp_path), 1)).exists() and Path(shared_folder(str(tmp_path), 0)).exists()


def test_what_the_configuration_scores_is_repeated_though_others_are_better(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Cluster(monkeypatch, lambda trial: ("finished", 0.1 if trial.params[KEY] == 0.7 else 0.5))
    run(a_sweep(tmp_path, repeat=1, trials=4))
    repeats = [trial.repeats for trial in load_trials(str(tmp_path)) if trial.kind == "repeat"]
    assert repeats == [1, 2, 3, 0] and Path(run_folder(str(tmp_path), 0)).exists()


def test_a_spent_budget_interrupts_and_a_larger_one_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, finished, hours=1.0)
    show = run(a_sweep(tmp_path, repeat=1, budget={"device_hours": 1.5}))
    assert by_number(tmp_path) == {0: ("search", "finished", 0), 1: ("search", "waiting", 0)}, (
        "nobody knows the best yet"
    )
    assert cluster.shared == ["seed0"] and any("the budget is spent; 1 trials wait" in text for text in show.said)
    more = Cluster(monkeypatch, finished, hours=0.1)
    run(a_sweep(tmp_path, repeat=1, budget={"device_hours": 9}))
    assert more.begun[0] == 1 and more.shared == ["seed1"]
    assert all(trial.over for trial in load_trials(str(tmp_path)))


def test_the_shared_stages_of_a_seed_stay_while_its_trials_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Cluster(monkeypatch, finished)
    run(a_sweep(tmp_path))
    Cluster(monkeypatch, finished, hours=1.0)
    run(a_sweep(tmp_path, repeat=1, budget={"hours": 1.5}))
    assert Path(shared_folder(str(tmp_path), 1)).exists()
    last = Cluster(monkeypatch, finished)
    run(a_sweep(tmp_path, repeat=1))
    assert last.shared == [] and not Path(shared_folder(str(tmp_path), 1)).exists()


def test_trials_that_all_fail_before_they_are_judged_end_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster(monkeypatch, lambda trial: "the disk is full")
    with refused("sweep/trials-failed", "5 trials", "the disk is full", error=StageFailure):
        run(a_sweep(tmp_path, search={KEY: {"uniform": [0.0, 0.9]}}, trials=100))
    assert len(cluster.begun) == 5


def test_failed_trials_among_others_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Cluster(monkeypatch, lambda trial: "NaN" if trial.number % 5 else ("finished", 0.5))
    run(a_sweep(tmp_path, search={KEY: {"uniform": [0.0, 0.9]}}, trials=20))
    assert sum(trial.state == "failed" for trial in load_trials(str(tmp_path))) == 16


def test_more_trials_go_on_where_the_search_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Cluster(monkeypatch, finished)
    run(a_sweep(tmp_path, trials=2))
    again = Cluster(monkeypatch, finished)
    run(a_sweep(tmp_path, trials=4, max_concurrent=2))
    assert again.begun == [2, 3] and again.shared == []


def test_models_that_were_deleted_are_not_trained_again_to_be_promoted(tmp_path: Path) -> None:
    best = Trial(number=3, params={KEY: 0.5}, seed=0, state="finished", curve=((800, 0.5),))
    with refused("sweep/models-deleted", "--promote", "trial 3", "best.yaml"):
        sweep.promote(a_sweep(tmp_path), best, RunCallbacks())


def resumed(tmp_path: Path, settings: dict[str, Any], overrides: Sequence[str] = ()) -> str | None:
    """A --resume with other settings."""
    config = load("demo", ["data.root=/nowhere", *overrides])
    return sweep.known(Sweep(Space.model_validate({**SPACE, **settings}), config, str(tmp_path), resume=True))


def test_a_resumed_sweep_searches_the_same(tmp_path: Path) -> None:
    requested = a_sweep(tmp_path)
    assert sweep.known(requested) is None
    key = sweep.record_sweep(requested)
    with refused("sweep/exists", f"--out {tmp_path}", "--resume"):
        sweep.known(requested)
    assert sweep.known(Sweep(requested.space, requested.config, requested.out, resume=True)) == key
    assert resumed(tmp_path, {"trials": 9, "max_concurrent": 3, "budget": {"hours": 1}}) == key
    assert resumed(tmp_path, {}, ["cluster.workers=4", "registry.experiment=x"]) == key
    with refused("run/other-settings", f"search.{KEY}.choice"):
        resumed(tmp_path, {"search": {KEY: {"choice": [0.0, 0.5]}}})
    with refused("run/other-settings", "stage2.steps=800", "900"):
        resumed(tmp_path, {}, ["stage2.steps=900"])


def test_a_sweep_continues_with_keys_that_were_added_later(tmp_path: Path) -> None:
    key = sweep.record_sweep(a_sweep(tmp_path))
    record = storage.read_json(f"{tmp_path}/sweep.json")
    del record["config"]["training.accumulate"]
    storage.write_json(f"{tmp_path}/sweep.json", record)
    assert resumed(tmp_path, {}) == key
    with refused("run/other-settings", "training.accumulate=1", "2"):
        resumed(tmp_path, {}, ["training.accumulate=2"])
