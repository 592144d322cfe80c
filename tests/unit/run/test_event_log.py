"""What happens to a run is noted in its folder, whatever ends the run, and only once the folder is the run's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import tiny_config
from tests.waiting import wait_for
from threestage.config import Config
from threestage.data import storage
from threestage.errors import InputError, StageFailure
from threestage.run import event_log
from threestage.run.backend import RunCallbacks
from threestage.run.event_log import noted
from threestage.run_folder import lease
from threestage.run_folder.events import read_events
from threestage.termination import STOPPED, Terminated

ROW = {"step": 3.0, "steps_per_second": 2.0}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return tiny_config(tmp_path)


def drive(config: Config, out: str, work: Callable[[RunCallbacks], None], before: lease.Holder | None = None) -> None:
    on = RunCallbacks(on_warning=lambda text: None)
    with lease.held(out, print, 0.1) as held, noted(config, out, held, before, 2, on) as noting:
        work(noting)


def kinds(out: str) -> list[str]:
    return [event["kind"] for event in read_events(out)]


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (StageFailure("NaN in step 2"), "failed", "NaN in step 2"),
        (KeyboardInterrupt(), "stopped", "Ctrl-C"),
        (Terminated(), "stopped", STOPPED),
    ],
)
def test_how_it_ended(config: Config, tmp_path: Path, error: BaseException, kind: str, text: str) -> None:
    def work(on: RunCallbacks) -> None:
        on.on_metrics("stage1", ROW)
        on.on_warning("a node of s3://me:hunter2@bucket was lost")
        raise error

    with pytest.raises(type(error)):
        drive(config, str(tmp_path), work)
    assert kinds(str(tmp_path)) == ["started", "stage", "warning", kind]
    last, warning = read_events(str(tmp_path))[-1], read_events(str(tmp_path))[-2]
    assert last["text"] == text and last["devices"] == 2 and last["seconds"] >= 0
    assert "hunter2" not in warning["text"]


def test_a_refused_run_notes_nothing(config: Config, tmp_path: Path) -> None:
    def refused_work(on: RunCallbacks) -> None:
        raise InputError("other settings", "run/other-settings")

    with pytest.raises(InputError):
        drive(config, str(tmp_path), refused_work)
    assert not (tmp_path / "events.jsonl").exists()


def test_events_follow_those_of_drivers_before(config: Config, tmp_path: Path) -> None:
    out, before = str(tmp_path), lease._this_process(0.1).model_copy(update={"progress": {"seconds": 60, "devices": 4}})
    (tmp_path / "events.jsonl").write_text('{"time": "t", "kind": "started", "text": "x"}\n{"torn')
    drive(config, out, lambda on: on.on_metrics("stage1", ROW), before)
    assert kinds(out) == ["started", "lost", "started", "stage", "finished"]
    assert read_events(out)[1]["seconds"] == 60


def test_an_outage_costs_no_event(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, failed = storage.write_bytes, list[str]()

    def failing(uri: str, data: Any) -> None:
        if uri.endswith("events.jsonl") and len(failed) < 2:
            failed.append(uri)
            raise OSError("the store does not answer")
        write(uri, data)

    monkeypatch.setattr(storage, "write_bytes", failing)
    for name in ("BETWEEN_S", "RETRY_S"):
        monkeypatch.setattr(event_log, name, 0.01)

    def work(on: RunCallbacks) -> None:
        on.on_metrics("stage1", ROW)
        wait_for(lambda: kinds(str(tmp_path)) == ["started", "stage"])

    drive(config, str(tmp_path), work)
    assert len(failed) == 2 and kinds(str(tmp_path))[-1] == "finished"


def test_the_lease_tells_the_progress(config: Config, tmp_path: Path) -> None:
    def progress() -> dict[str, Any]:
        return dict(json.loads((tmp_path / "lease.json").read_text())["progress"])

    def work(on: RunCallbacks) -> None:
        on.on_metrics("stage1", ROW)
        storage.write_json(str(tmp_path / "stage1/checkpoints/latest.json"), {"step": 2, "unlabelled_images": 0})
        wait_for(lambda: progress().get("checkpoint_step") == 2)
        assert {"stage": "stage1", "step": 3, "steps": 6, "per_second": 2.0}.items() <= progress().items()
        assert 0 <= progress()["checkpoint_age_s"] < 20 and progress()["devices"] == 2
        on.on_progress("pseudo-masks 1", 4, 10)
        wait_for(lambda: progress()["stage"] == "pseudo-masks 1")
        assert "checkpoint_step" not in progress()

    drive(config, str(tmp_path), work)
