"""What MLflow hears of a run's end, whatever ends it."""

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import tiny_config
from threestage.errors import InputError, StageFailure, Stopped
from threestage.run import run
from threestage.run.backend import RunCallbacks
from threestage.run_folder import lease
from threestage.termination import Terminated


class Mirror:
    """Stands in for what sends the run to MLflow."""

    notified = True
    told: str | None = None

    def __init__(self, *arguments: Any) -> None:
        pass

    def notify(self) -> None:
        pass

    def close(self, status: str) -> list[Any]:
        Mirror.told = status
        return []


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Terminated(), "KILLED"),
        (Stopped("stage2: stopped by SIGTERM"), "KILLED"),
        (KeyboardInterrupt(), "KILLED"),
        (StageFailure("NaN"), "FAILED"),
        (InputError("no such file"), "FAILED"),
    ],
)
def test_how_a_run_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: str) -> None:
    monkeypatch.setattr(run, "RunSync", Mirror)
    monkeypatch.setattr(run, "has_begun", lambda out: True)
    on, out = RunCallbacks(), str(tmp_path)
    with pytest.raises(type(error)), run._sent_to_mlflow(tiny_config(tmp_path), out, lease.Lease(out), on, []):
        raise error
    assert Mirror.told == status
