"""What the workers of a group exchange in a step, by gloo in a group of one: a second process costs a test seconds."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from tests.conftest import local_config
from tests.fixed_steps import FixedSteps, new_state
from threestage.ray_backend.worker import RayWorker
from threestage.training.loop import LoopSettings, StageLength, fit
from threestage.training.schedule import EmaSettings, OptimiserSettings
from threestage.training.worker import LocalWorker

STEPS, PIECES = 3, 4


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


class GroupWorker(LocalWorker):
    """Wraps and sums as a worker of a group of two."""

    world_size = 2
    no_sync, sum, sync_buffers = RayWorker.no_sync, RayWorker.sum, RayWorker.sync_buffers
    _settle_buckets = RayWorker._settle_buckets

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), 2, lambda share, first_image: iter(()))
        config = local_config(folder, network__batch_norm="frozen", network__weights="none.pth")
        self._task = SimpleNamespace(settings=lambda: config)
        self.buckets: list[Tensor] = []

    def wrap(self, network: nn.Module) -> nn.Module:
        wrapped: Any = RayWorker.wrap(self, network)  # type: ignore[arg-type]
        assert isinstance(wrapped, DistributedDataParallel) and not wrapped.broadcast_buffers
        wrapped.register_comm_hook(None, self._exchanged)
        return wrapped

    def _exchanged(
        self,
        _: None,
        bucket: torch.distributed.GradBucket,  # type: ignore[name-defined]
    ) -> torch.futures.Future[Tensor]:
        self.buckets.append(bucket.buffer())
        done = torch.futures.Future[Tensor]()
        done.set_result(bucket.buffer())
        return done


@pytest.mark.filterwarnings("ignore:.broadcast_buffers. is deprecated:FutureWarning")  # its new name is torch 2.15's
def test_gradients_are_exchanged_once_a_step_whatever_the_pieces(group: None, tmp_path: Path) -> None:
    state, worker = new_state(), GroupWorker(tmp_path)
    fit(
        state, worker, FixedSteps(), lambda shipped: {}, StageLength(STEPS, (2, 4), (0,)),
        LoopSettings(accumulate=PIECES, log_every=99, checkpoint_every=99), OptimiserSettings(), EmaSettings(),
    )  # fmt: skip
    assert len(worker.buckets) == STEPS
    assert worker.buckets[-1].numel() == sum(one.numel() for one in state.student.parameters() if one.requires_grad)


class ThreeAlike(GroupWorker):
    """One of three workers that hold the same values."""

    world_size, _averages_buffers = 3, True

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor + tensor + tensor


def test_the_mean_over_the_workers_leaves_constants_as_they_are(tmp_path: Path) -> None:
    """A third of a sum of three is another number than the one: a mean colour that moves a little in every step is in no
    checkpoint, so a run that was continued had other weights."""
    network = new_state().student
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    for name, buffer in network.named_buffers():
        if name.endswith("running_var"):
            buffer.copy_(torch.linspace(0.1, 0.9, len(buffer)))
    worker: Any = ThreeAlike(tmp_path)
    worker.sync_buffers(network)
    moved = {name for name, buffer in network.named_buffers() if not torch.equal(buffer, before[name])}
    assert {"mean", "std"} <= before.keys()
    assert moved == {name for name in before if name.endswith("running_var")}
