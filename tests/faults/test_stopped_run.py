"""A run on a cluster that is asked to end, by SIGTERM to its driver and by `ray job stop`: within 30 s it has saved a checkpoint,
let go of its lease and told MLflow."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from cluster.local import Cluster, local_cluster
from tests.faults.test_lost_parts import config_for, put_scenes
from threestage.data import storage
from threestage.run_folder.events import read_events
from threestage.training.checkpoint import Checkpoints, checkpoint_folder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.integration,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("default"),
]
LIMIT_S = 30.0
THREESTAGE = [sys.executable, "-m", "threestage"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with local_cluster(tmp_path_factory.mktemp("cluster"), 1, 8) as cluster:
        yield cluster


@pytest.fixture
def place(cluster: Cluster, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a configuration: so many steps that it does not end, and no checkpoint unless one is asked for."""
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    config = config_for(put_scenes(scenes, cluster), workers=2).model_dump(mode="json")
    config["stage1"]["steps"], config["training"]["checkpoint_every"] = 100_000, 200
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def wait_for_checkpoint(out: str, process: subprocess.Popen[str] | None = None) -> int:
    deadline = time.monotonic() + 240
    while (latest := Checkpoints(checkpoint_folder(f"{out}/stage1")).latest()) is None:
        assert time.monotonic() < deadline and (process is None or process.poll() is None)
        time.sleep(0.5)
    return latest.step


def judge(out: str, before: int) -> None:
    """What is left of a run that was stopped."""
    from mlflow import MlflowClient

    latest = Checkpoints(checkpoint_folder(f"{out}/stage1")).latest()
    assert latest is not None and latest.step > before and latest.step % 200, "a checkpoint of its own"
    assert not storage.exists(f"{out}/lease.json")
    assert read_events(out)[-1]["kind"] == "stopped"
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    names = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = [run for run in client.search_runs(names) if run.info.status != "FINISHED"]
    assert runs and {run.info.status for run in runs} == {"KILLED"}


def test_sigterm_to_the_driver(place: Path) -> None:
    out = "s3://bucket/terminated"
    command = [*THREESTAGE, "run", "mine.yaml", "--out", out]
    process = subprocess.Popen(command, cwd=place, stderr=subprocess.PIPE, text=True)
    before = wait_for_checkpoint(out, process)
    process.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    _, errors = process.communicate(timeout=120)
    seconds = time.monotonic() - begun
    print(f"\nSIGTERM: exit code {process.returncode} after {seconds:.1f} s: {errors.splitlines()[-1:]}")
    assert process.returncode == 143 and seconds < LIMIT_S, errors[-3000:]
    assert "a checkpoint is saved" in errors and "[stage/stopped]" in errors and "SIGABRT" not in errors
    judge(out, before)


def test_ray_job_stop(place: Path, cluster: Cluster) -> None:
    out = "s3://bucket/stopped"
    submitted = [*THREESTAGE, "submit", "run", "mine.yaml", "--out", out, "--no-wait"]
    job = subprocess.run(submitted, cwd=place, check=True, capture_output=True, text=True, timeout=120).stdout.strip()
    before = wait_for_checkpoint(out)
    begun = time.monotonic()
    subprocess.run(["ray", "job", "stop", job], check=True, capture_output=True, timeout=120)
    seconds = time.monotonic() - begun
    print(f"\nray job stop: {seconds:.1f} s")
    assert seconds < LIMIT_S + 5, "of which a few are the command's own"
    judge(out, before)
