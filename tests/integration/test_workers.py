"""Workers of a Ray Train group: what they compute together, what they say, and what stops them."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from tests.conftest import tiny_config
from tests.fixed_steps import FixedSteps, network, new_state
from threestage.data.batches import Batch, Share
from threestage.data.split import Split
from threestage.on_ray.pulse import Pulse, start_monitor
from threestage.on_ray.worker import RayWorker
from threestage.stages import StageTask
from threestage.training.checkpoint import Checkpoints, TrainState, checkpoint_folder
from threestage.training.loop import fit, resume
from threestage.training.schedule import EmaSettings, OptimiserSettings
from threestage.training.worker import LocalWorker, Worker

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(240),
    pytest.mark.filterwarnings("default"),  # Ray's own
]


def new_task(folder: Path) -> StageTask:
    config = tiny_config(folder, training={"log_every": 5, "checkpoint_every": 10, "evaluate_every": 20})
    split = Split(labelled=("a",), validation=("b",), validation_split="val")
    return StageTask(
        stage="stage2", config=config.model_dump(mode="json"), manifest_version=1, split=split, folder=str(folder),
        pool=None, pseudo_masks=None, previous_model=None,
    )  # fmt: skip


def train(worker: Worker, task: StageTask) -> TrainState:
    """20 steps of fixed inputs in float64 with frozen batch norm."""
    state = new_state(network().double())
    resume(state, worker)
    fit(
        state, worker, FixedSteps(worker.rank, worker.world_size, torch.float64), lambda shipped: {"mean_iou": 0.5},
        steps=20, images_per_step=4, seed_place=(0,), loop=task.settings().training,
        optimiser=OptimiserSettings(learning_rate=1e-3, clip_norm=1.0), ema=EmaSettings(),
    )  # fmt: skip
    if worker.rank == 0:
        worker.checkpoints.wait()
    return state


def train_fixed(arguments: dict[str, Any]) -> None:
    import ray.train

    torch.set_num_threads(1)
    task, monitor = StageTask.model_validate(arguments["task"]), arguments["monitor"]
    context = ray.train.get_context()
    with Pulse(monitor, "stage2", context.get_world_rank(), context.get_world_size(), 60) as pulse:
        train(RayWorker(task, monitor, pulse), task)


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

    def none(share: Share, first_image: int) -> Iterator[Batch]:
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
