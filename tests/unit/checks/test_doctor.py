"""`threestage doctor` says on one screen, within seconds, what a machine has and what it reaches."""

import json
import urllib.error
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.cli.test_app import Run, threestage
from threestage.checks import doctor as module
from threestage.checks.doctor import examine
from threestage.checks.result import CheckResult

__all__ = ["threestage"]
NAMES = ["versions", "devices", "memory", "ray", "mlflow", "store", "hub"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No cluster, an MLflow of a file, a hub that is switched off."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def found(out: str | None = None) -> dict[str, CheckResult]:
    return {line.name: line for line in examine(out, None, None)}


def test_one_screen(threestage: Run, tmp_path: Path) -> None:
    code, out, _ = threestage("doctor", "--json")
    lines = json.loads(out)
    assert code == 0 and [line["name"] for line in lines] == NAMES and list(tmp_path.iterdir()) == []
    assert f"torch {torch.__version__.partition('+')[0]}" in lines[0]["value"]
    assert threestage("doctor")[1].count("\n") == len(NAMES)


def test_a_folder_that_takes_no_writes_ends_with_exit_code_2(threestage: Run) -> None:
    Path("file").write_text("")
    code, out, _ = threestage("doctor", "--out", "file/runs")
    assert code == 2 and "✗ store" in out and "[storage/not-a-folder]" in out


def test_a_gpu_that_torch_does_not_find(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert found()["devices"].warning is None
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module")
    monkeypatch.setattr(module, "NVIDIA_DRIVER", tmp_path / "version")
    assert "finds no GPU of it" in str(found()["devices"].warning)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (urllib.error.URLError("Name or service not known"), "Name or service not known"),
        (TimeoutError("timed out"), "timed out"),
        (urllib.error.HTTPError("", 403, "Forbidden", None, None), None),  # type: ignore[arg-type]
    ],
)
def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, answer: Exception, expected: str | None) -> None:
    def open_url(*_: Any, **__: Any) -> None:
        raise answer

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("urllib.request.urlopen", open_url)
    line = found()["hub"]
    if expected is None:
        assert line.warning is None and "can be fetched" in line.value
    else:
        assert expected in str(line.warning) and "--set network.weights=FILE" in str(line.warning)
