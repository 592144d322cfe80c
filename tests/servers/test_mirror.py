"""Why: a run must not notice what happens to MLflow, and MLflow must in the end hold all of the run."""

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import local_config, tiny_config
from tests.mlflow_server import mlflow_server
from tests.refusals import refused
from tests.runs import run_local
from tests.s3 import free_port
from tests.waiting import wait_for
from threestage.config import Config
from threestage.data import storage
from threestage.errors import InputError
from threestage.mlflow_sync import packing
from threestage.mlflow_sync import run_sync as mirror_module
from threestage.mlflow_sync.client import Registry, open_registry
from threestage.mlflow_sync.connection import Background
from threestage.mlflow_sync.records import RegisteredVersion, RegistrySettings
from threestage.mlflow_sync.run_sync import RunSync, keep_outcome, keep_settings, sync
from threestage.run.backend import RunCallbacks
from threestage.run.local_backend import LocalBackend
from threestage.run.outcome import StageOutcome
from threestage.run.run import run

Events = Mapping[tuple[str, int], Callable[[], None]]  # what happens at a stage's step
WAIT_S = 1.0  # more than training may ever wait for MLflow


class Server:
    """An MLflow server that can be killed and started again, on its port and its store."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._port = folder, free_port()
        self._running = contextlib.ExitStack()
        self._group = 0
        self.start()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        _, self._group = self._running.enter_context(
            mlflow_server(self._folder, str(self._folder / "artifacts"), self._port)
        )

    def kill(self) -> None:
        os.killpg(self._group, signal.SIGKILL)
        self._running.close()

    close = kill


@pytest.fixture
def server(tmp_path: Path, empty_store: Path) -> Iterator[Server]:
    shutil.copy(empty_store, tmp_path / "server.db")
    started = Server(tmp_path)
    yield started
    with contextlib.suppress(ProcessLookupError):
        started.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror_module, "BETWEEN_S", 0.02)
    monkeypatch.setattr(mirror_module, "RETRY_S", 0.1)


def config_of(scenes: Path, server: Server) -> Config:
    return tiny_config(scenes, registry={"tracking_uri": server.uri})


def run_mirrored(
    config: Config, out: str, warnings: list[str], events: Events
) -> tuple[list[RegisteredVersion], float]:
    """The run in this process, sent as in run.run. Returns the versions, and the longest that training waited."""
    settings = config.model_dump(mode="json")
    mirror = RunSync(out, settings, config.registry, open_registry(config.registry), warnings.append)
    waits: list[float] = []

    def show(stage: str, row: Mapping[str, float]) -> None:
        begun = time.monotonic()
        mirror.notify()
        waits.append(time.monotonic() - begun)
        events.get((stage, int(row["step"])), lambda: None)()

    def record(outcome: StageOutcome) -> None:
        begun = time.monotonic()
        keep_settings(out, settings)
        keep_outcome(out, outcome)
        mirror.notify()
        waits.append(time.monotonic() - begun)

    run_local(config, out, show, record=record)
    return mirror.close("FINISHED"), max(waits)


def runs_of(config: Config) -> dict[str, Any]:
    """MLflow's runs by stage; fails where a stage has two."""
    registry = open_registry(config.registry)
    found = list(registry._client.search_runs([registry._experiment_id]))
    by_stage = {run.data.tags["threestage.stage"]: run for run in found}
    assert len(by_stage) == len(found)
    return by_stage


def assert_all_there(config: Config, out: str) -> None:
    """Every value of every row is in MLflow, once, and every stage is registered once."""
    registry = open_registry(config.registry)
    recorded = runs_of(config)
    assert {run.info.status for run in recorded.values()} == {"FINISHED"}
    for stage in ("stage1", "stage2", "stage3"):
        rows = storage.read_json(f"{out}/{stage}/result.json")["history"]
        names = {name for row in rows for name in row} - {"step", "mean_iou"}  # mean_iou is a final value too
        assert {"supervised_loss", "steps_per_second"} <= names
        for name in names:
            expected = [(row["step"], row[name]) for row in rows if name in row]
            history = registry._client.get_metric_history(recorded[stage].info.run_id, name)
            assert sorted((point.step, point.value) for point in history) == expected
    assert sorted(row["stage"] for row in registry.models.versions()) == ["stage1", "stage2", "stage3"]


@pytest.mark.slow
def test_a_server_that_dies_and_comes_back_has_all_of_the_run(scenes: Path, server: Server, tmp_path: Path) -> None:
    config, out, warnings = config_of(scenes, server), str(tmp_path / "run"), list[str]()
    seen: list[Any] = []

    def look() -> None:
        wait_for(lambda: "stage2" in runs_of(config) and "supervised_loss" in runs_of(config)["stage2"].data.metrics)
        seen.append(runs_of(config)["stage2"].info.status)
        server.kill()

    versions, waited = run_mirrored(config, out, warnings, {("stage2", 6): look, ("stage3", 4): server.start})
    assert seen == ["RUNNING"], "a stage is seen while it trains"
    assert waited < WAIT_S
    assert [version.alias for version in versions] == ["stage1", "stage2", "stage3"]
    assert len(warnings) == 1 and "the run continues without MLflow" in warnings[0]
    assert_all_there(config, out)


@pytest.mark.slow
def test_without_a_server_at_the_end_sync_sends_the_rest(scenes: Path, server: Server, tmp_path: Path) -> None:
    config, out, warnings = config_of(scenes, server), str(tmp_path / "run"), list[str]()
    _, waited = run_mirrored(config, out, warnings, {("stage2", 4): server.kill})
    assert waited < WAIT_S
    assert f"`threestage sync {out}` sends the rest" in warnings[-1]
    with refused("mlflow/unavailable", server.uri):
        sync(out)
    server.start()
    versions = sync(out)
    assert [version.alias for version in versions] == ["stage1", "stage2", "stage3"]
    assert_all_there(config, out)
    assert sync(out) == versions
    assert_all_there(config, out)


@pytest.mark.slow
def test_a_local_run_can_be_sent_later_and_a_half_done_one_too(scenes: Path, tmp_path: Path) -> None:
    config, out = tiny_config(scenes), str(tmp_path / "run")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    settings = config.model_dump(mode="json")

    def record(outcome: StageOutcome) -> None:
        keep_settings(out, settings)
        keep_outcome(out, outcome)

    def die(stage: str, row: Mapping[str, float]) -> None:
        if (stage, row["step"]) == ("stage2", 6):
            raise KeyboardInterrupt

    with refused("run/no-run", out, "config.json"):
        sync(out, uri)
    with pytest.raises(KeyboardInterrupt):
        run_local(config, out, die, record=record)
    half = open_registry(RegistrySettings(tracking_uri=uri))
    assert [version.alias for version in sync(out, uri)] == ["stage1"]
    assert steps_of(half, "stage2") == [2, 4]
    run_local(config, out, lambda stage, row: None, record=record)
    assert [version.version for version in sync(out, uri)] == [1, 2, 3]
    assert steps_of(half, "stage2") == [2, 4, 6]


@pytest.mark.slow
def test_a_run_that_died_in_its_first_stage_can_be_sent(scenes: Path, tmp_path: Path) -> None:
    out, uri = str(tmp_path / "run"), f"sqlite:///{tmp_path}/mlflow.db"

    def die(stage: str, row: Mapping[str, float]) -> None:
        if row["step"] == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny_config(scenes), out, True, RunCallbacks(die))
    assert sync(out, uri) == []
    registry = open_registry(RegistrySettings(tracking_uri=uri))
    assert steps_of(registry, "stage1") == [2, 4]
    assert {run.info.status for run in registry._client.search_runs([registry._experiment_id])} == {"KILLED"}


@pytest.mark.slow
def test_a_copied_run_is_sent_with_its_own_weights(scenes: Path, tmp_path: Path) -> None:
    out, copy, uri = str(tmp_path / "run"), str(tmp_path / "copy"), f"sqlite:///{tmp_path}/mlflow.db"
    run(tiny_config(scenes), out, True, RunCallbacks())
    shutil.copytree(out, copy)
    shutil.rmtree(out)
    assert [version.alias for version in sync(copy, uri)] == ["stage1", "stage2", "stage3"]


def test_a_refused_command_changes_nothing_in_mlflow(
    scenes: Path, empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_failed", {})
    monkeypatch.setattr(packing, "write_program", lambda folder: "not tried")
    monkeypatch.setattr(
        "threestage.ray_backend.train.on_cluster",
        lambda config, out, on: contextlib.nullcontext(LocalBackend(config, on)),
    )
    where = RegistrySettings(tracking_uri=f"sqlite:///{shutil.copy(empty_store, tmp_path)}")
    short: dict[str, Any] = {"stages": 1, "stage1__steps": 1, "pseudo_mask__final_stage": False}
    out = str(tmp_path / "run")

    def again(out: str, **changes: Any) -> None:
        settings = short | {"registry": where.model_dump()} | changes
        run(local_config(scenes, **settings), out, False, RunCallbacks())

    again(out)
    registry = open_registry(where)
    before = everything(registry)
    assert len(before) == 3, "the run, its stage and a version"
    with refused("run/other-settings", "seed=0"):
        again(out, seed=1, name="other")
    with refused("data/too-few-labels", "1000"):
        again(str(tmp_path / "fresh"), data={"root": str(scenes), "labelled": 1000})
    assert everything(registry) == before
    assert not storage.exists(str(tmp_path / "fresh" / "run.json"))


def everything(registry: Registry) -> list[str]:
    """Names, states and tags of all that MLflow holds."""
    found = registry._client.search_runs([registry._experiment_id])
    versions = registry._client.search_model_versions()
    return [f"{run.info} {run.data.tags}" for run in found] + [f"{version} {version.tags}" for version in versions]


def test_what_does_not_end_is_not_waited_for() -> None:
    def closed(last: Callable[[], None], within_s: float) -> None:
        Background("test", lambda: None, lambda error: None, 0, 0).close(last, within_s)

    begun = time.monotonic()
    with pytest.raises(TimeoutError, match="no end within"):
        closed(lambda: time.sleep(30), 0.2)
    assert time.monotonic() - begun < 5
    with pytest.raises(InputError, match="told"):
        closed(lambda: _refuse("told"), 5)


def _refuse(text: str) -> None:
    raise InputError(text)


def steps_of(registry: Registry, stage: str) -> list[int]:
    found = registry._client.search_runs([registry._experiment_id], f"tags.`threestage.stage` = '{stage}'")
    assert len(found) == 1
    history = registry._client.get_metric_history(found[0].info.run_id, "supervised_loss")
    return [point.step for point in history]
