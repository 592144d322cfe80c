"""Ray Train's controller makes the unlabelled stream anew whenever workers start; what fails there must reach the user."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from tests.conftest import tiny_config
from tests.store_away import StoreAway
from threestage.data import storage
from threestage.data.parallel import in_daemon_thread
from threestage.errors import StageFailure
from threestage.ray_backend import heartbeat, train
from threestage.run.stages import StageTask
from threestage.training.checkpoint import Pointer


class Monitor:
    """Stands in for the actor: each method has `remote`. `heard` is called with every warning."""

    def __init__(self) -> None:
        self.warnings, self.failures, self.heard = list[str](), list[StageFailure](), lambda: None
        self.warn, self.fail = SimpleNamespace(remote=self._warn), SimpleNamespace(remote=self.failures.append)

    def _warn(self, text: str) -> None:
        self.warnings.append(text)
        self.heard()


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StageTask:
    storage.write_json(f"{tmp_path}/stage2/checkpoints/latest.json", {"step": 5, "unlabelled_images": 20})
    monkeypatch.setattr(ray, "get", lambda done: done)
    monkeypatch.setattr(train, "unlabelled_stream", lambda task, pointer: pointer)
    return StageTask(
        stage="stage2", config=tiny_config(tmp_path).model_dump(mode="json"), manifest_version=1, pool=None,
        split={"labelled": [], "validation": [], "validation_split": "val"},
        folder=f"{tmp_path}/stage2", pseudo_masks=None, previous_model=None,
    )  # fmt: skip


def stream(task: StageTask, monitor: Monitor) -> Any:
    return train._stream_from_last_checkpoint(task, monitor)


def test_an_outage_is_waited_out_and_told(task: StageTask, monkeypatch: pytest.MonkeyPatch) -> None:
    store, monitor = StoreAway(monkeypatch), Monitor()
    store.down.set()
    monitor.heard = store.down.clear
    assert stream(task, monitor) == Pointer(step=5, unlabelled_images=20)
    assert "stage2" in monitor.warnings[0] and "overloaded or down" in monitor.warnings[0] and not monitor.failures


def test_another_error_is_the_stage_s_end(task: StageTask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not tried again in silence until the driver misses its workers."""

    def gone(task: StageTask, pointer: Pointer) -> None:
        raise IsADirectoryError("pool.parquet")

    monkeypatch.setattr(train, "unlabelled_stream", gone)
    monitor = Monitor()
    with pytest.raises(IsADirectoryError):
        stream(task, monitor)
    assert "pool.parquet" in monitor.failures[0].message and monitor.warnings == []


@pytest.mark.parametrize("saved", [True, False])
def test_a_driver_that_is_stopped_waits_for_a_checkpoint(monkeypatch: pytest.MonkeyPatch, saved: bool) -> None:
    """Not for ever, and not for workers that are gone."""
    monkeypatch.setattr(ray, "get", lambda done: done)
    monkeypatch.setattr(train, "SAVE_SECONDS", 0.2)
    monkeypatch.setattr(train, "POLL_SECONDS", 0.01)
    heartbeats = heartbeat._Monitor()
    heartbeats.request_checkpoint()
    heartbeats.checkpoint_saved(1)  # for a node that joined
    ended, asked = threading.Event(), list[int]()

    def request() -> int:
        asked.append(heartbeats.request_checkpoint())
        if saved:
            heartbeats.checkpoint_saved(asked[-1])
        return asked[-1]

    monitor = SimpleNamespace(
        request_checkpoint=SimpleNamespace(remote=request), requests_met=SimpleNamespace(remote=heartbeats.requests_met)
    )
    found = train._stopped("stage2", monitor, in_daemon_thread(ended.wait))
    ended.set()
    assert asked == [2] and found.code == "stage/stopped"
    assert ("a checkpoint is saved" if saved else "no checkpoint could be saved") in found.message


def test_a_batch_that_the_workers_cannot_share_is_named(tmp_path: Path) -> None:
    warned: list[str] = []
    for batch in (6, 7):
        config = tiny_config(
            tmp_path, cluster={"workers": 3}, training__batch_scope="global", stage2__unlabelled_batch=batch
        )
        train.warn_of_uneven_batch(config, "stage2", warned.append)
    (line,) = warned
    assert "stage2.unlabelled_batch=7" in line and "3 workers" in line and "reads 9 images" in line
