"""A cluster that has no node with room until it is asked for: Ray's own autoscaler, whose machines are processes here."""

import io
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.autoscaling import autoscaled
from tests.conftest import tiny_config
from tests.faults.looking_on import Run
from threestage.training.checkpoint import Checkpoints, checkpoint_folder

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("default"),
]

DRIVER = """
import sys, time, ray
from threestage.ray_backend.stall_monitor import await_resources
from threestage.ray_backend.capacity import room_for_one
from threestage.ray_settings import ClusterSettings

ray.init(sys.argv[1], log_to_driver=False)
cluster = ClusterSettings(gpus_per_worker=1, start_timeout_s=60, report_after_s=1)
print("before", len(ray.nodes()), room_for_one(cluster))
await_resources("pseudo-masks", cluster, print)
time.sleep(3)
print("after", len(ray.nodes()), room_for_one(cluster))
"""
MOST = 3
LIMIT_S = 180


@pytest.fixture
def short_path() -> Iterator[Path]:
    """Names of sockets are cut at 107 bytes."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def test_predicting_brings_a_node(tmp_path: Path, short_path: Path) -> None:
    with autoscaled(tmp_path, short_path, 1, {"CPU": 1, "GPU": 1}, most=1) as machines:
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, machines.address],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=machines.environment,
            cwd=tmp_path,
            timeout=120,
        )
    lines = done.stdout.splitlines()
    assert "before 1 False" in lines and "after 2 True" in lines, done.stdout[-3000:] + machines.log.read_text()[-2000:]
    assert any(line.startswith("pseudo-masks: waiting for ") for line in lines)


def test_a_worker_group_grows_from_nothing_shrinks_and_grows_again(
    scenes: Path, tmp_path: Path, short_path: Path
) -> None:
    """Within one stage: no machine, then as many as the elastic group may have; one is lost, and the autoscaler brings another.
    Each step is in the record once."""
    machine = {"CPU": 2, "slot": 1}
    config = tiny_config(
        tmp_path, data={"root": str(scenes), "labelled": 16}, stages=1, pseudo_mask={"final_stage": False},
        cluster={
            "workers": [1, MOST], "resources_per_worker": {"slot": 1}, "placement": "SPREAD", "resize_after_s": 5,
            "max_failures": -1,
        },
        registry={"tracking_uri": f"sqlite:///{tmp_path}/mlflow.db"},
        stage1={"steps": 1_000_000, "labelled_batch": 6},
        training={"batch_scope": "global", "log_every": 5, "checkpoint_every": 20, "evaluate_every": 1_000_000},
    )  # fmt: skip
    with autoscaled(tmp_path, short_path, 2, machine, MOST) as machines:
        assert machines.raylets("slot") == [], "there is none before it is asked for"
        environment = machines.environment | {"RAY_ADDRESS": machines.address}
        run = Run(config, str(tmp_path / "run"), environment, tmp_path / "log")
        try:
            seen: list[int] = []

            def workers_come_to(fits: Callable[[int], bool]) -> None:
                deadline = time.monotonic() + LIMIT_S
                while not (rows := run.rows("stage1")[len(seen) :]) or not fits(int(rows[-1]["row"]["workers"])):
                    assert run.process.poll() is None and time.monotonic() < deadline, (
                        f"{run.said[-3:]}\n{(tmp_path / 'log').read_text()[-3000:]}\n{machines.log.read_text()[-2000:]}"
                    )
                    time.sleep(0.5)
                seen.extend(int(said["row"]["workers"]) for said in rows)

            workers_come_to(lambda workers: workers == MOST)
            os.kill(machines.raylets("slot")[0], signal.SIGKILL)
            workers_come_to(lambda workers: workers < MOST)
            workers_come_to(lambda workers: workers == MOST)
        finally:
            run.process.send_signal(signal.SIGTERM)
            run.process.wait(60)
    sizes = [workers for before, workers in zip([0, *seen], seen, strict=False) if workers != before]
    print(f"\nsizes of the worker group: {sizes}")
    store = Checkpoints(checkpoint_folder(str(tmp_path / "run/stage1")))
    latest = store.latest()
    assert latest is not None
    saved = torch.load(io.BytesIO(store.read(latest.step)), weights_only=True)
    steps = [row["step"] for row in saved["history"]]
    assert steps == sorted(set(steps)), "each step is in the record once"
