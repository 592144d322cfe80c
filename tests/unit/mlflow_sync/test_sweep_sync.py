"""Why: people watch a sweep in MLflow; a store that is away, or a driver that was killed, may neither end nor double it."""

import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from tests.mlflow_server import die_after
from tests.s3 import free_port
from tests.waiting import wait_for
from threestage.errors import InputError
from threestage.mlflow_sync import sweep_sync as mirror_module
from threestage.mlflow_sync.client import Registry, open_registry
from threestage.mlflow_sync.records import RegistrySettings, TrialRecord
from threestage.mlflow_sync.sweep_sync import SweepSync
from threestage.sweeps.trials import Trial

KEY, TAGS = "/sweeps/it's one", {"version": "1"}
PARAMS = {"trials": 12, "search": {"consistency.weight": {"low": 0.1}}, "root": "s3://KEY:SECRET@bucket/x"}


@pytest.fixture
def registry(tmp_path: Path, empty_store: Path) -> Registry:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return open_registry(RegistrySettings(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db"))


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror_module, "BETWEEN_S", 0.02)
    monkeypatch.setattr(mirror_module, "RETRY_S", 0.05)


def trial(number: int = 3, steps: int = 2, **changes: Any) -> Trial:
    curve = tuple((10 * (i + 1), 0.3 + i / 100) for i in range(steps))
    return Trial(**{"number": number, "params": {"consistency.weight": 0.5}, "seed": 7, "curve": curve} | changes)


def runs_of(registry: Registry) -> dict[str, Any]:
    experiment = registry._client.get_experiment_by_name("threestage")
    runs = list(registry._client.search_runs([experiment.experiment_id]))
    found = {run.data.tags.get("threestage.trial", "parent"): run for run in runs}
    assert len(found) == len(runs), "a trial has two runs"
    return found


def points_of(registry: Registry, run: Any) -> list[tuple[int, float]]:
    history = registry._client.get_metric_history(run.info.run_id, "mean_iou")
    return sorted((point.step, point.value) for point in history)


def test_a_sweep_is_a_run_with_one_nested_in_it_per_trial(registry: Registry, tmp_path: Path) -> None:
    warnings: list[str] = []
    (tmp_path / "best.yaml").write_text("seed: 0\n")
    mirror = SweepSync(lambda: registry, KEY, "shapes", PARAMS, warnings.append)
    mirror.update(trial(0, state="finished"), TAGS)
    mirror.update(trial(1, state="stopped"), TAGS)
    mirror.update(trial(2, 0, state="failed", reason="no s3://KEY:SECRET@bucket/x"), TAGS)
    mirror.update(trial(3, state="running"), TAGS)
    mirror.update(trial(4, 0, kind="repeat", repeats=0, params={"network.head": "x", "a": [1, 2]}), TAGS)
    assert mirror.close("FINISHED", {"mean_iou": 0.31}, {"best.yaml": str(tmp_path / "best.yaml")})
    runs = runs_of(registry)
    parent = runs.pop("parent")
    assert (parent.info.status, parent.info.run_name) == ("FINISHED", "shapes")
    assert parent.data.params["root"] == "s3://bucket/x"
    assert parent.data.params["search.consistency.weight.low"] == "0.1"
    assert parent.data.metrics == {"mean_iou": 0.31}
    assert (tmp_path / "mlartifacts" / parent.info.run_id / "artifacts/best.yaml").is_file()
    statuses = {number: run.info.status for number, run in runs.items()}
    assert statuses == {"0": "FINISHED", "1": "KILLED", "2": "FAILED", "3": "RUNNING", "4": "SCHEDULED"}
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}
    assert runs["0"].data.params == {"consistency.weight": "0.5"}
    assert runs["4"].data.params == {"network.head": "x", "a": "[1, 2]"}
    assert points_of(registry, runs["0"]) == [(10, 0.3), (20, 0.31)]
    assert points_of(registry, runs["2"]) == []
    told = {"state": "failed", "reason": "no s3://bucket/x", "seed": "7", "number": "2", "sweep": KEY, **TAGS}
    assert told.items() <= runs["2"].data.tags.items()
    assert {"kind": "repeat", "repeats": "0"}.items() <= runs["4"].data.tags.items()
    assert not any(b"SECRET" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert warnings == []


def test_a_killed_driver_leaves_nothing_that_the_next_one_doubles(registry: Registry) -> None:
    killed = SweepSync(lambda: registry, KEY, "shapes", PARAMS, pytest.fail)
    killed.update(trial(0, 2, state="running"), TAGS)
    wait_for(lambda: "0" in runs_of(registry) and runs_of(registry)["0"].info.status == "RUNNING")
    for _ in range(2):
        resumed = SweepSync(lambda: registry, KEY, "shapes", PARAMS, pytest.fail)
        resumed.update(trial(0, 3, state="finished"), TAGS)
        assert resumed.close("FINISHED", {"mean_iou": 0.32}, {})
    runs = runs_of(registry)
    assert points_of(registry, runs["0"]) == [(10, 0.3), (20, 0.31), (30, 0.32)]
    assert points_of(registry, runs["parent"]) == [(0, 0.32)]
    assert (runs["0"].info.status, runs["0"].data.tags["state"]) == ("FINISHED", "finished")
    killed.close("KILLED", {}, {})


@pytest.mark.parametrize(
    ("call", "number"), [("create_run", 1), *(("log_batch", n) for n in (1, 2, 3)), ("set_terminated", 1)]
)
def test_a_recording_that_was_cut_is_completed(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    record = TrialRecord(KEY, "shapes", 0, {"a.b": 1}, [(10, 0.3), (20, 0.3)], {"state": "finished"}, "FINISHED")
    parent = registry.open_sweep(KEY, "shapes", PARAMS)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        die_after(patch, call, number)
        registry.record_trial(parent, record)
    registry.record_trial(parent, record)
    run = runs_of(registry)["0"]
    assert points_of(registry, run) == [(10, 0.3), (20, 0.3)]
    assert (run.info.status, run.data.params, run.data.tags["state"]) == ("FINISHED", {"a.b": "1"}, "finished")


def test_a_resumed_sweep_opens_its_runs_again(registry: Registry) -> None:
    for state, status, reason in (("stopped", "KILLED", "x"), ("running", "RUNNING", None)):
        mirror = SweepSync(lambda: registry, KEY, "shapes", PARAMS, pytest.fail)
        mirror.update(trial(0, state=state, reason=reason), TAGS)
        mirror.close("KILLED", {}, {})
        run = runs_of(registry)["0"]
        assert (run.info.status, run.data.tags["reason"]) == (status, reason or "")


def test_an_update_that_changes_nothing_is_not_sent(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    original = Registry.record_trial

    def record_trial(self: Registry, parent_id: str, record: TrialRecord) -> None:
        sent.append(record.number)
        original(self, parent_id, record)

    monkeypatch.setattr(Registry, "record_trial", record_trial)
    mirror = SweepSync(lambda: registry, KEY, "shapes", PARAMS, pytest.fail)
    for _ in range(3):
        mirror.update(trial(0), TAGS)
        wait_for(lambda: 0 in mirror._sent)
    assert mirror.close("FINISHED", {}, {})
    assert sent == [0]


def test_a_store_that_is_away_costs_one_warning_and_gets_everything_later(registry: Registry) -> None:
    warnings: list[str] = []
    there, registry.uri = registry.uri, f"http://127.0.0.1:{free_port()}"
    mirror = SweepSync(lambda: registry, KEY, "shapes", PARAMS, warnings.append)
    start = time.monotonic()
    mirror.update(trial(0, state="finished"), TAGS)
    mirror.update(trial(1, 1), TAGS)
    assert time.monotonic() - start < 0.1
    wait_for(lambda: warnings)
    time.sleep(0.3)
    mirror.update(trial(1, 2, state="finished"), TAGS)
    registry.uri = there
    wait_for(lambda: {0, 1} <= set(mirror._sent))
    assert mirror.close("FINISHED", {}, {})
    (warning,) = warnings
    assert "continues without MLflow" in warning and "registry.tracking_uri" in warning
    assert len(points_of(registry, runs_of(registry)["1"])) == 2


def test_closing_without_a_store_says_how_to_mend_it_and_a_second_sweep_does(registry: Registry) -> None:
    warnings: list[str] = []
    there, registry.uri = registry.uri, f"http://127.0.0.1:{free_port()}"
    mirror = SweepSync(lambda: registry, KEY, "shapes", PARAMS, warnings.append)
    mirror.update(trial(0, state="finished"), TAGS)
    start = time.monotonic()
    assert not mirror.close("FINISHED", {}, {})
    assert time.monotonic() - start < 3
    assert "--resume" in warnings[-1]
    registry.uri = there
    assert runs_of(registry) == {}
    again = SweepSync(lambda: registry, KEY, "shapes", PARAMS, pytest.fail)
    again.update(trial(0, state="finished"), TAGS)
    assert again.close("FINISHED", {}, {})
    assert set(runs_of(registry)) == {"parent", "0"}


def test_a_store_that_is_away_at_the_start_is_found_later(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    away = [True]

    def connect() -> Registry:
        if away[0]:
            raise InputError("no MLflow there")
        return registry

    monkeypatch.setattr("threestage.mlflow_sync.sweep_sync.RETRY_S", 0.1)
    mirror = SweepSync(connect, KEY, "shapes", PARAMS, warnings.append)
    mirror.update(trial(0, state="finished"), TAGS)
    wait_for(lambda: warnings)
    assert "continues without MLflow and retries: no MLflow there" in warnings[0]
    away[0] = False
    wait_for(lambda: "0" in runs_of(registry))
    assert mirror.close("FINISHED", {}, {})


def test_a_fault_of_the_stores_client_ends_nothing(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []

    def record_trial(self: Registry, parent_id: str, record: TrialRecord) -> None:
        raise KeyError("unforeseen")

    with monkeypatch.context() as patch:
        patch.setattr(Registry, "record_trial", record_trial)
        mirror = SweepSync(lambda: registry, KEY, "shapes", PARAMS, warnings.append)
        mirror.update(trial(0), TAGS)
        wait_for(lambda: warnings)
    assert "KeyError" in warnings[0]
    assert mirror.close("FAILED", {}, {})
    assert runs_of(registry)["parent"].info.status == "FAILED"
