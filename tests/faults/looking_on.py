"""A run on a cluster of `cluster/local.py`, looked at while parts of that cluster are lost."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from cluster.local import Cluster, Node, members
from threestage.config import Config
from threestage.data import storage
from threestage.training.checkpoint import Checkpoints, checkpoint_folder

LIMIT_S = 300
QUIET_S = 8.0  # rows of a run that is not disturbed come every second


class Run:
    """The driver's process, and what it has said. The environment names the cluster."""

    def __init__(self, config: Config, out: str, environment: dict[str, str], log: Path) -> None:
        self.config, self.out = config, out
        self.said: list[dict[str, Any]] = []
        self._log = log
        self.started = time.time()
        command = [sys.executable, "-m", "tests.faults.driver", config.model_dump_json(), out]
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                if line.startswith('{"time"'):
                    self.said.append(json.loads(line))

    def rows(self, stage: str) -> list[dict[str, Any]]:
        return [said for said in list(self.said) if said.get("stage") == stage]

    def warnings(self) -> list[str]:
        return [said["warning"] for said in list(self.said) if "warning" in said]

    def wait_for_step(self, stage: str, step: int) -> None:
        """Until the stage has passed a step and has saved a checkpoint."""
        store = Checkpoints(checkpoint_folder(storage.join(self.out, stage)))
        self._wait(lambda: any(said["row"]["step"] >= step for said in self.rows(stage)) and store.latest() is not None)

    def wait_for_end(self) -> dict[str, Any]:
        """The figures of its stages. AssertionError with the end of its log when it failed."""
        self._wait(lambda: self.process.poll() is not None)
        self._reader.join()
        assert self.process.returncode == 0, f"{self.said[-1:]}\n{self._log.read_text()[-3000:]}"
        return dict(self.said[-1]["results"])

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def start_s(self) -> float:
        """Seconds from the command to the first row of training."""
        return float(self.rows("stage1")[0]["time"]) - self.started

    def recovery_s(self, stage: str, fault: float) -> float:
        """Seconds from the fault to the first row after the longest silence that began within QUIET_S of it."""
        times = [said["time"] for said in self.rows(stage)]
        gaps = [
            (after - before, after) for before, after in pairwise(times) if after > fault and before < fault + QUIET_S
        ]
        return max(gaps)[1] - fault if gaps else 0.0

    def _wait(self, ready: Any) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not ready():
            ended = self.process.poll() not in (None, 0)
            if ended or time.monotonic() > deadline:
                raise AssertionError(
                    f"the run {'failed' if ended else 'does not go on'}: {self.said[-3:]}\n{self._log.read_text()[-3000:]}"
                )
            time.sleep(0.1)


def assert_published_once(run: Run) -> None:
    """Every stage's rows are in its result, and in its last checkpoint, each step once and in order, to the end."""
    for stage in run.config.stage_names:
        folder = storage.join(run.out, stage)
        history = storage.read_json(storage.join(folder, "result.json"))["history"]
        steps = [row["step"] for row in history]
        assert steps == sorted(set(steps)) and steps[-1] == run.config.stage(stage).steps, stage
        due = run.config.training.log_every
        assert {step for step in steps if step % due == 0} == set(range(due, int(steps[-1]) + 1, due)), stage
        store = Checkpoints(checkpoint_folder(folder))
        latest = store.latest()
        assert latest is not None
        saved = torch.load(io.BytesIO(store.read(latest.step)), weights_only=True)
        assert [row["step"] for row in saved["history"]] == steps, stage


def processes_of(node: Node, title: str) -> list[int]:
    """The processes of a node whose title begins so, e.g. "ray::RayTrainWorker"."""
    found = []
    for pid in members({node.pid}):
        try:
            if Path(f"/proc/{pid}/cmdline").read_text(errors="replace").startswith(title):
                found.append(pid)
        except OSError:
            continue
    return found


def node_with_worker(cluster: Cluster) -> Node:
    """A node beside the head that holds a training worker."""
    return next(node for node in cluster.nodes if node.alive() and processes_of(node, "ray::RayTrainWorker"))
