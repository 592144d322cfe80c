"""Where checkpoints are kept: the newest few, one writer, and a pointer that never names what is not there."""

import errno
import io
import os
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.failing_s3 import ERRORS, failing_s3
from tests.refusals import refused
from tests.s3 import variables
from tests.store_away import busy
from tests.waiting import wait_for
from threestage.data import storage
from threestage.errors import StageFailure, UnwritablePlace
from threestage.training.checkpoint import Checkpoints, Pointer, StaleWorkerError


def snapshot(step: int) -> dict[str, Any]:
    return {
        "format": 2,
        "step": step,
        "unlabelled_images": step * 4,
        "stream": None,
        "history": [{"step": step - 1}, {"step": step}],
    }


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_are_kept(tmp_path: Path) -> None:
    store = Checkpoints(str(tmp_path), keep=2)
    assert store.latest() is None
    store.claim()
    for step in (5, 10, 15):
        store.save(snapshot(step))
        store.wait()
    assert store.latest() == Pointer(step=15, unlabelled_images=60)
    assert names(tmp_path) == ["latest.json", "owner.json", "rows.json", "step-000000010.pt", "step-000000015.pt"]
    assert torch.load(io.BytesIO(store.read(10)), weights_only=True)["step"] == 10


def test_one_that_was_written_and_not_pointed_to_does_not_count(tmp_path: Path) -> None:
    """A kill between the two writes: the stage goes on from the one before, and writes it again."""
    store = Checkpoints(str(tmp_path))
    store.claim()
    store.save(snapshot(5))
    store.wait()
    (tmp_path / "step-000000010.pt").write_bytes(b"half")
    storage.write_json(str(tmp_path / "rows.json"), [{"step": 4}, {"step": 5}, {"step": 6}])
    assert store.rows() == [{"step": 4}, {"step": 5}], "rows after the checkpoint may be trained again"
    assert store.latest() == Pointer(step=5, unlabelled_images=20)
    store.save(snapshot(10))
    store.wait()
    assert torch.load(io.BytesIO(store.read(10)), weights_only=True)["step"] == 10


@pytest.mark.parametrize("drivers", ["aa", "ab"])
def test_who_was_there_before_may_not_write_any_more(tmp_path: Path, drivers: str) -> None:
    """A lost process that lives yet ends in silence; another run is told."""
    before = Checkpoints(str(tmp_path), driver=drivers[0])
    after = Checkpoints(str(tmp_path), driver=drivers[1])
    before.claim()
    after.claim()
    after.save(snapshot(5))
    after.wait()
    before.save(snapshot(100))
    another_run = refused("run/taken-over", tmp_path, error=StageFailure)
    with pytest.raises(StaleWorkerError) if drivers == "aa" else another_run:
        before.wait()
    latest = after.latest()
    assert latest is not None and latest.step == 5


def test_writing_goes_on_beside_the_training_and_an_outage_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    store = Checkpoints(str(tmp_path), warn=warnings.append)
    store.claim()
    down, write = threading.Event(), storage.write_bytes

    def failing(uri: str, data: Any) -> None:
        down.wait(10)
        raise busy()

    monkeypatch.setattr(storage, "write_bytes", failing)
    store.save(snapshot(5))  # returns although nothing can be written yet
    assert store.wait(0.01) == "writing"
    down.set()
    wait_for(lambda: store.wait(0.01) == "failing")
    store.save(snapshot(10))  # takes its place
    monkeypatch.setattr(storage, "write_bytes", write)
    assert store.wait() == "written"
    assert store.latest() == Pointer(step=10, unlabelled_images=40)
    assert "step 5" in warnings[0] and "overloaded or down" in warnings[0] and "step 10" in warnings[1]


def test_a_folder_that_takes_no_writes_is_named_with_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(uri: str, data: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store = Checkpoints(str(tmp_path / "stage1/checkpoints"))
    store.claim()
    store.save(snapshot(5))
    store.wait()
    monkeypatch.setattr(storage, "write_bytes", full)
    store.save(snapshot(10))
    with refused("stage/unwritable", tmp_path / "stage1", "MB free", "of step 5;", "make room", error=UnwritablePlace):
        store.wait()
    with refused("stage/unwritable", error=UnwritablePlace):
        store.times_overdue()


@pytest.mark.parametrize("name", ["denied", "token", "bucket"])
def test_a_store_that_refuses_ends_the_stage(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with failing_s3({"PUT": ERRORS[name]}) as (endpoint, _):
        for key, value in variables(endpoint).items():
            monkeypatch.setenv(key, value)
        store = Checkpoints("s3://bucket/run/stage1/checkpoints")
        store.save(snapshot(5))
        fix = "renew AWS_SESSION_TOKEN" if name == "token" else "the same command continues"
        with refused("stage/unwritable", "s3://bucket", "no checkpoint is saved", fix, error=UnwritablePlace):
            store.wait()


def test_a_store_that_is_busy_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "s3_filesystem", partial(storage.s3_filesystem, attempts=1))
    with failing_s3({"PUT": ERRORS["busy"]}) as (endpoint, _):
        for key, value in variables(endpoint).items():
            monkeypatch.setenv(key, value)
        store = Checkpoints("s3://bucket/run/stage1/checkpoints", unsaved_limit_s=0, warn=lambda text: None)
        with store.writing():
            store.save(snapshot(5))
            wait_for(lambda: store.wait(0.01) == "overdue")
            assert store.times_overdue() == 1
