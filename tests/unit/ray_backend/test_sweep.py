"""What a trial's process tells Ray Tune; neither Ray nor a training is started."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from threestage.config import load
from threestage.errors import InputError, NoRoom
from threestage.ray_backend import sweep
from threestage.run.backend import RunCallbacks
from threestage.sweeps.space import load_space
from threestage.sweeps.trials import Trial

Told = list[dict[str, Any]]
LAST = 800  # steps of stage 2 of the demo


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    reports: Told = []
    monkeypatch.setattr("ray.tune.report", reports.append)
    monkeypatch.setattr(sweep, "quiet_ray_data", lambda: None)
    monkeypatch.setattr(sweep, "curve_of", lambda folder, stages, config: [(250, 0.3), (LAST, 0.5)])
    return reports


def run(monkeypatch: pytest.MonkeyPatch, out: Path, does: Callable[..., None], **trial: Any) -> None:
    monkeypatch.setattr(sweep, "on_cluster", lambda config, out, on: contextlib.nullcontext())
    monkeypatch.setattr("threestage.run.pipeline.run", does)
    setting = Trial(**{"number": 3, "params": {"pseudo_mask.confidence_threshold": 0.5}, "seed": 0} | trial)
    space, base = load_space("thresholds"), load("demo", ["data.root=data"])
    sweep._run_trial(
        {"trial": setting.model_dump(mode="json")},
        space.model_dump(mode="json"),
        base.model_dump(mode="json"),
        str(out),
    )


def trains(config: Any, folder: str, backend: None, on: RunCallbacks, reuse: str | None) -> None:
    assert config.pseudo_mask.confidence_threshold == 0.5 and folder.endswith("runs/0003")
    assert reuse is not None and reuse.endswith("shared/seed0")
    on.on_metrics("stage1", {"step": 400, "mean_iou": 0.2})  # not searched
    on.on_metrics("stage2", {"step": 25, "supervised": 1.0})  # no evaluation
    on.on_metrics("stage2", {"step": 250, "mean_iou": 0.3})
    on.on_warning("a node was lost")
    on.on_metrics("stage2", {"step": LAST, "mean_iou": 0.5})  # its model is not there yet


def test_each_score_is_told_once_and_the_last_by_the_finished_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, told: Told
) -> None:
    run(monkeypatch, tmp_path, trains)
    common = {"trained": ["stage1", "stage2"], "reused": []}
    assert told == [
        common | {"step": 250, "mean_iou": 0.3, "judged_mean_iou": 0.3, "finished": False},
        {"warning": "a node was lost"},
        common | {"step": LAST, "mean_iou": 0.5, "finished": True},
    ]


def test_what_an_earlier_try_reported_is_said_again_and_one_that_changes_nothing_is_not_judged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, told: Told
) -> None:
    run(monkeypatch, tmp_path, trains, curve=((100, 0.1), (250, 0.3)), trained=("stage1",), own=True)
    scores = [(row["step"], row["finished"], "judged_mean_iou" in row) for row in told if "step" in row]
    assert scores == [(100, False, False), (250, False, False), (LAST, True, False)]
    assert told[0]["trained"] == ["stage1"]


@pytest.mark.parametrize(
    ("error", "state"),
    [(NoRoom("no\n room"), "waiting"), (OSError("away"), "waiting"), (InputError("wrong"), "failed")],
)
def test_what_fails_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, told: Told, error: Exception, state: str
) -> None:
    def fails(*arguments: Any, **options: Any) -> None:
        raise error

    run(monkeypatch, tmp_path, fails)
    (row,) = told
    assert (row["trained"], row["reused"], row["state"]) == ([], [], state)
    assert " ".join(str(error).split()) in row["failure"]


def test_a_store_that_is_away_leaves_the_trial_waiting(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, told: Told
) -> None:
    """Also where the reports themselves, and the last score, need the store: a failed trial would lose its checkpoints."""

    def away(*arguments: object) -> None:
        raise OSError("no answer")

    monkeypatch.setattr(sweep, "parts_elsewhere", away)
    monkeypatch.setattr(sweep, "curve_of", away)
    run(monkeypatch, tmp_path, trains)
    assert [report.get("mean_iou") for report in told[:1]] == [0.3]
    assert told[-1] == {
        "trained": ["stage1", "stage2"],
        "reused": [],
        "failure": "OSError: no answer",
        "state": "waiting",
    }
