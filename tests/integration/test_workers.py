"""Workers of a Ray Train group: what they compute together, what they say, and what stops them."""

import io
import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from tests.conftest import tiny_config
from tests.fixed_steps import FixedSteps, network, new_state
from tests.refusals import refused
from tests.runs import run_on_ray
from threestage.data.batches import Batch, BatchSlice
from threestage.data.split import Split
from threestage.errors import StageFailure
from threestage.ray_backend import train as ray_train
from threestage.ray_backend.heartbeat import Heartbeat, start_monitor
from threestage.ray_backend.worker import RayWorker
from threestage.run.stages import StageTask
from threestage.training.checkpoint import Checkpoints, TrainState, checkpoint_folder
from threestage.training.loop import StageLength, fit, resume
from threestage.training.schedule import EmaSettings, OptimiserSettings
from threestage.training.step import StepInputs
from threestage.training.worker import LocalWorker, Worker

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(240),
    pytest.mark.filterwarnings("default"),  # Ray's own
]


def new_task(folder: Path, **changes: Any) -> StageTask:
    config = tiny_config(folder, training={"log_every": 5, "checkpoint_every": 10, "evaluate_every": 20}, **changes)
    split = Split(labelled=("a",), validation=("b",), validation_split="val")
    return StageTask(
        stage="stage2", config=config.model_dump(mode="json"), manifest_version=1, split=split, folder=str(folder),
        pool=None, pseudo_masks=None, previous_model=None,
    )  # fmt: skip


def train(worker: Worker, task: StageTask, steps: type[FixedSteps] = FixedSteps) -> TrainState:
    """20 steps of fixed inputs in float64 with frozen batch norm."""
    state = new_state(network().double())
    resume(state, worker)
    fit(
        state, worker, steps(worker.rank, worker.world_size, torch.float64), lambda shipped: {"mean_iou": 0.5},
        StageLength(20, (2, 4), (0,)), task.settings().training,
        OptimiserSettings(learning_rate=1e-3, clip_norm=1.0), EmaSettings(),
    )  # fmt: skip
    if worker.rank == 0:
        worker.checkpoints.wait()
    return state


def train_fixed(arguments: dict[str, Any], steps: type[FixedSteps] = FixedSteps) -> None:
    import ray.train

    torch.set_num_threads(1)
    task, monitor = StageTask.model_validate(arguments["task"]), arguments["monitor"]
    context = ray.train.get_context()
    with Heartbeat(monitor, task, context.get_world_rank(), context.get_world_size()) as pulse:
        train(RayWorker(task, monitor, pulse, "test"), task, steps)


def run_group(function: Callable[[dict[str, Any]], None], task: StageTask, workers: int) -> Any:
    """Train with a group; returns its monitor."""
    monitor = start_monitor()
    TorchTrainer(
        function,
        train_loop_config={"task": task.model_dump(mode="json"), "monitor": monitor},
        scaling_config=ScalingConfig(num_workers=workers),
        run_config=RunConfig(name="ray_train", storage_path=task.folder, failure_config=FailureConfig(max_failures=0)),
    ).fit()
    return monitor


def test_two_workers_equal_one(ray_cluster: None, tmp_path: Path) -> None:
    """2 workers × b/2 is 1 worker × b after 20 steps: losses are means over the pixels of all workers."""
    import ray

    def none(share: BatchSlice, first_image: int) -> Iterator[Batch]:
        return iter(())

    one = train(LocalWorker(str(tmp_path / "one"), 2, none), new_task(tmp_path / "one"))
    task = new_task(tmp_path / "two")
    news = ray.get(run_group(train_fixed, task, 2).news.remote())

    store = Checkpoints(checkpoint_folder(task.folder))
    latest = store.latest()
    assert latest is not None and latest.step == 20
    two = torch.load(io.BytesIO(store.read(20)), weights_only=True)
    for name, value in one.student.state_dict().items():
        torch.testing.assert_close(two["student"][name], value, rtol=1e-5, atol=1e-12)
    losses = ("supervised_loss", "consistency_loss", "pseudo_mask_loss")
    for mine, theirs in zip(one.history, two["history"], strict=True):
        assert [theirs[name] for name in losses] == pytest.approx([mine[name] for name in losses], rel=1e-5)
        assert theirs["kept_share/consistency"] == mine["kept_share/consistency"] and theirs["workers"] == 2
    assert [row["step"] for row in news.rows] == [5, 10, 15, 20] and news.failure is None
    assert {(sign.rank, sign.world_size) for sign, _ in news.signs.values()} == {(0, 2), (1, 2)}


class Stalling(FixedSteps):
    """Its images do not come for 12 s in step 7."""

    def draw(self, step: int) -> StepInputs:
        if step == 7 and self.rank == 1:
            time.sleep(12)
        return super().draw(step)


def train_stalling(arguments: dict[str, Any]) -> None:
    train_fixed(arguments, Stalling)


@pytest.mark.slow
def test_a_rank_that_stands_still_is_named_and_the_clusters_metrics_hold_each_rank(
    ray_cluster: None, tmp_path: Path
) -> None:
    warnings: list[str] = []
    metrics: list[str] = []

    def warn(text: str) -> None:
        if ", start;" not in text:  # a busy machine may take longer than that to start
            warnings.append(text)
            metrics.append(scraped())

    cluster = {"workers": 2, "hang_after_s": 5, "report_after_s": 100}
    task = new_task(tmp_path, cluster=cluster).model_copy(update={"stage": "stage1"})  # no stream to wait for
    ray_train.train_on_ray(task, lambda stage, row: None, warn, train_stalling)

    assert len(warnings) == 1, warnings
    assert re.search(r"stage1 has stood still for \d+ s: rank 1 of 2 on \S+ is at step 7, data;", warnings[0])
    for rank in ("0", "1"):
        assert re.search(rf'threestage_images_per_second{{[^}}]*rank="{rank}"[^}}]*}} [0-9.]*[1-9]', metrics[0])
    assert re.search(r'threestage_seconds_in_phase{[^}]*rank="1"[^}]*} ([5-9]|1[0-9])', metrics[0])
    assert re.search(r'threestage_unsaved_seconds{[^}]*rank="0"[^}]*} [0-9.]+', metrics[0])
    assert not re.search(r'threestage_unsaved_seconds{[^}]*rank="1"', metrics[0])
    stacks = [log.read_text(errors="replace") for log in Path("/tmp/ray/session_latest/logs").glob("worker-*.err")]
    assert any("stage1 rank 1 of 2 on" in text and "in draw" in text for text in stacks)


def scraped() -> str:
    """What the nodes of the cluster export."""
    import ray

    ports = [(node["NodeManagerAddress"], node["MetricsExportPort"]) for node in ray.nodes()]
    pages = [urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=10).read() for host, port in ports]
    return b"".join(pages).decode()


@pytest.mark.slow  # what the loop says of it: tests/unit/training/test_loop.py
def test_a_stage_that_diverges_is_not_tried_again(ray_cluster: None, scenes: Path, tmp_path: Path) -> None:
    optimiser = {"learning_rate": 1e30, "encoder_learning_rate": 1e30}
    config = tiny_config(scenes, cluster={"workers": 2}, optimiser=optimiser)
    rows: list[object] = []
    with refused("stage/diverged", "stage1: ", "supervised_loss", "step 2", "images train", error=StageFailure):
        run_on_ray(config, str(tmp_path), lambda stage, row: rows.append(row), print)
    assert rows == [], "a second try would begin at step 0 again"


def test_what_is_asked_and_not_there_ends_the_run(ray_cluster: None, scenes: Path, tmp_path: Path) -> None:
    """How often it is said before the end: tests/unit/ray_backend/test_stall_monitor.py."""
    cluster = {"workers": [2, 4], "resources_per_worker": {"fpga": 1}, "start_timeout_s": 3}
    before = controllers()
    asked, there = "2 × (CPU 1, fpga 1)", "fpga 0 (0 free) on 1 node"
    with refused("ray/no-room", "stage1: ", asked, there, error=StageFailure):
        run_on_ray(tiny_config(scenes, cluster=cluster), str(tmp_path), lambda stage, row: None, print)
    assert_no_controller_is_left(before)


def assert_no_controller_is_left(but: set[str]) -> None:
    """A stage that was given up has ended Ray Train's controller too, which would wait for ever."""
    deadline = time.monotonic() + 30
    while left := controllers() - but:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def controllers() -> set[str]:
    """The processes of Ray Train's controllers, those that Ray itself keeps for its handler of SIGINT among them."""
    return {file.parent.name for file in Path("/proc").glob("[0-9]*/cmdline") if "TrainController" in title(file)}


def title(cmdline: Path) -> str:
    try:
        return cmdline.read_text(errors="replace").split("\0")[0]
    except OSError:
        return ""
