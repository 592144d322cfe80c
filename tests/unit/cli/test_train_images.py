"""`threestage train`: a wrong photo or setting ends it before anything is trained; a repeated command continues."""

from pathlib import Path

import pytest

from tests.unit.cli.test_app import Run, photos, refused, threestage
from threestage.checks.result import CheckResult

__all__ = ["photos", "threestage"]
TRAIN = ["train", "images", "--masks", "masks", "--out", "runs/mine", "--local", "--set", "network.pretrained=false"]
TRAIN += ["--set", "network.batch_norm=live", "--set", "stage1.steps=7"]


def test_it_ends_where_check_finds_a_problem(threestage: Run, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [CheckResult("input", "crops fit"), CheckResult("stage1", "", problem="does not fit", code="check/memory")]
    monkeypatch.setattr("threestage.checks.run_check.check", lambda *_: iter(found))
    code, out, error = threestage(*TRAIN)
    assert code == 2, error
    assert "8 labelled, 2 to validate, 8 in the pool" in out and "does not fit [check/memory]" in out
    assert "threestage ingest images runs/mine/data --format folders" in out and "7, 600 in 2 stages" in out
    assert not Path("runs/mine/stage1").exists()
    Path("runs/mine/stage1").mkdir()
    Path("runs/mine/stage1/inputs.json").write_text("{}")  # it has begun: a repeated command is not checked again
    monkeypatch.setattr("threestage.cli.train_images.run_shown", lambda *_: print("trained"))
    code, out, _ = threestage(*TRAIN)
    assert code == 0 and out.endswith("trained\n")


def test_wrong_options(threestage: Run, photos: Path) -> None:
    for colour in ("white", "1,2", "1,2,256"):
        refused(threestage(*TRAIN, "--ignore", colour), f"--ignore {colour}", "255,255,255")
    refused(threestage(*TRAIN, "--classes", "nothing.yaml"), "nothing.yaml")
    refused(threestage("train", "nowhere", *TRAIN[2:]), "nowhere")
    refused(threestage(*TRAIN, "--set", "stage1.stps=3"), "stage1.stps", "did you mean steps")
