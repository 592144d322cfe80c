"""`threestage run` killed with SIGKILL at several moments, and started again each time, ends like a run left alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

KILL_AFTER_S = (20, 35, 50)
SETTINGS = {
    "data.labelled": 8, "stage1.steps": 60, "stage1.labelled_batch": 2,
    "stage2.steps": 60, "stage2.labelled_batch": 2, "stage2.unlabelled_batch": 4,
    "stage3.steps": 60, "stage3.labelled_batch": 2, "stage3.unlabelled_batch": 4,
    "training.checkpoint_every": 5, "training.evaluate_every": 60,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_three_times_and_run_again(scenes: Path, tmp_path: Path) -> None:
    sets = [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-c", "from threestage.cli.app import main; main()", "run", "demo", "--out", "run"]
    command += ["--set", f"data.root={scenes}", *sets]
    for seconds in KILL_AFTER_S:
        process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True)
        time.sleep(seconds)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [figures["steps"] for figures in results["stages"].values()] == [60, 60, 60]
    for stage in results["stages"]:
        history = json.loads((tmp_path / "run" / stage / "result.json").read_text())["history"]
        steps = [row["step"] for row in history]
        assert steps == sorted(set(steps)) and steps[-1] == 60, f"{stage}: no step is done twice in the record"
    versions = subprocess.run(
        [*command[:3], "models", "list", "--json"], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    aliases = sorted(alias for model in json.loads(versions) for alias in model["aliases"])
    assert aliases == ["champion", "stage1", "stage2", "stage3"] and len(json.loads(versions)) == 3
