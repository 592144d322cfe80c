"""Where checkpoints are kept: the newest few, one writer, and a pointer that never names what is not there."""

import io
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.refusals import refused
from threestage.data import storage
from threestage.errors import StageFailure
from threestage.training.checkpoint import Checkpoints, Pointer, StaleWorkerError


def snapshot(step: int) -> dict[str, Any]:
    return {"format": 2, "step": step, "unlabelled_images": step * 4, "history": [{"step": step - 1}, {"step": step}]}


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
    store = Checkpoints(str(tmp_path))
    store.claim()
    down, write = threading.Event(), storage.write_bytes

    def failing(uri: str, data: Any) -> None:
        down.wait(10)
        raise OSError("the store does not answer")

    monkeypatch.setattr(storage, "write_bytes", failing)
    assert store.save(snapshot(5)) is None  # returns although nothing can be written yet
    down.set()
    monkeypatch.setattr(storage, "write_bytes", write)
    assert "does not answer" in str(store.save(snapshot(10)))
    store.wait()
    assert store.latest() == Pointer(step=10, unlabelled_images=40)


def test_the_last_one_must_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(uri: str, data: Any) -> None:
        raise OSError("disk full")

    store = Checkpoints(str(tmp_path))
    store.claim()
    monkeypatch.setattr(storage, "write_bytes", failing)
    store.save(snapshot(5))
    with pytest.raises(OSError, match="disk full"):
        store.wait()
