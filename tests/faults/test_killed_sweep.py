"""A sweep whose driver is killed: its trials end with it, --resume repeats nothing, best.yaml gives the best figure again."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.local import Cluster, local_cluster
from tests.conftest import copy_to, tiny_config
from threestage.data import storage
from threestage.errors import InputError
from threestage.sweeps.trials import Trial, load_trials

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("default"),
]

OUT = "s3://bucket/sweep"
FREE_S = 30  # from the loss of a driver until all that its trials held is free again
SPACE = {
    "stages": [2],
    "search": {
        "pseudo_mask.confidence_threshold": {"uniform": [0.0, 0.9]},
        "consistency.confidence_threshold": {"uniform": [0.0, 0.9]},
        "consistency.weight": {"loguniform": [0.05, 2.0]},
        "pseudo_mask.weight": {"loguniform": [0.05, 2.0]},
    },
    "scheduler": {"asha": {"grace_steps": 100, "reduction_factor": 2}},
    "trials": 8,
    "max_concurrent": 2,
}
CPUS = """
import ray
ray.init(log_to_driver=False)
print(ray.cluster_resources()["CPU"] - ray.available_resources().get("CPU", 0))
"""


def test_the_driver_is_killed_in_the_middle(scenes: Path, tmp_path: Path) -> None:
    with local_cluster(tmp_path / "cluster", 1, 8) as cluster:
        os.environ.update(cluster.environment)  # this process looks into the sweep's storage; put back after the test
        command = write_files(scenes, tmp_path)
        log = tmp_path / "log"
        driver = start(command, cluster, log)
        wait_until(lambda: over() >= 3 and running() >= 1, driver, log)
        before = {trial.number: trial for trial in load_trials(OUT) if trial.over}
        shared = storage.read_json(f"{OUT}/shared/seed0/stage1/done.json")
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
        killed = time.monotonic()
        while (taken := python(CPUS, cluster)) != "0.0":
            assert time.monotonic() - killed < FREE_S, f"{taken} CPUs are taken after {FREE_S} s"
        print(f"\nall CPUs free {time.monotonic() - killed:.1f} s after the driver was killed")

        assert start([*command, "--resume"], cluster, log).wait(600) == 0, log.read_text()[-3000:]
        trials = load_trials(OUT)
        assert len(trials) == 8 and all(trial.over for trial in trials)
        assert {trial.number: trial for trial in trials if trial.number in before} == before, "none is repeated"
        assert storage.read_json(f"{OUT}/shared/seed0/stage1/done.json") == shared
        found = storage.read_json(f"{OUT}/results.json")
        assert found["counters"]["stage1"] == {"trained": 1, "reused": 8}
        assert {trial.state for trial in trials} >= {"finished", "stopped"}
        assert python(CPUS, cluster) == "0.0"
        score = score_of_best_yaml(found, cluster, tmp_path)
        print(f"best trial {found['best']['score']:.4f}, the run of best.yaml {score:.4f}")
        assert score == pytest.approx(found["best"]["score"], abs=1e-6)


def write_files(scenes: Path, folder: Path) -> list[str]:
    """The data on S3, and the command."""
    copy_to("s3://bucket/data", scenes)
    config = tiny_config(
        scenes, data={"root": "s3://bucket/data", "labelled": 16}, stage1={"steps": 100, "labelled_batch": 4},
        stage2={"steps": 300, "warm_start": True, "labelled_batch": 4, "unlabelled_batch": 4},
        training={"log_every": 50, "checkpoint_every": 50, "evaluate_every": 50},
    )  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    (folder / "space.yaml").write_text(yaml.safe_dump(SPACE))
    return ["sweep", str(folder / "space.yaml"), str(folder / "config.yaml"), "--out", OUT]


def start(command: list[str], cluster: Cluster, log: Path) -> subprocess.Popen[bytes]:
    program = [sys.executable, "-c", "from threestage.cli.app import main; main()", *command]
    with log.open("ab") as output:
        return subprocess.Popen(program, env=os.environ | cluster.environment, stdout=output, stderr=output)


def records() -> list[Trial]:
    """The trials of a sweep that goes on: a record that is replaced while it is read is read again."""
    while True:
        with contextlib.suppress(InputError):  # moto gives half of an object that is replaced meanwhile; S3 does not
            return load_trials(OUT)


def over() -> int:
    return sum(trial.over for trial in records())


def running() -> int:
    """Trials that train, and have been judged once."""
    return sum(trial.state == "running" and len(trial.curve) > 0 for trial in records())


def wait_until(ready: Any, driver: subprocess.Popen[bytes], log: Path) -> None:
    while not ready():
        assert driver.poll() is None, log.read_text()[-3000:]
        time.sleep(0.2)


def python(code: str, cluster: Cluster) -> str:
    """The last line that a program prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | cluster.environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip().splitlines()[-1]


def score_of_best_yaml(found: dict[str, Any], cluster: Cluster, folder: Path) -> float:
    """Of a whole new run, stage 1 included."""
    best = folder / "best.yaml"
    best.write_bytes(storage.read_bytes(f"{OUT}/best.yaml"))
    log = folder / "best.log"
    command = ["run", str(best), "--out", "s3://bucket/best", "--set", "stages=2"]
    assert start(command, cluster, log).wait(600) == 0, log.read_text()[-3000:]
    return float(json.loads(storage.read_bytes("s3://bucket/best/results.json"))["stages"]["stage2"]["mean_iou"])
