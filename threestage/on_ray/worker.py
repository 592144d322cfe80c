"""The training loop's surroundings inside a Ray Train worker (training/worker.py says what they are)."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import ray.train
import ray.train.torch
import torch
import torch.distributed
from ray.train import Checkpoint
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from threestage.allocator import keep_freed_memory
from threestage.data.batches import Batch
from threestage.on_ray.data import stream_batches
from threestage.stages import StageTask, train_stage
from threestage.training.worker import Row

CHECKPOINT_FILE = "state.pt"


def train_worker(arguments: dict[str, Any]) -> None:
    """What Ray Train runs on every worker: `arguments` holds a StageTask as JSON and the driver's progress actor."""
    keep_freed_memory()
    torch.set_num_threads(max(1, int(arguments["threads"])))
    task = StageTask.model_validate(arguments["task"])
    train_stage(task, RayWorker(task, arguments["progress"]))


class RayWorker:
    """A Worker of a Ray Train group: checkpoints go through ray.train.report, which Ray keeps in the stage's folder."""

    def __init__(self, task: StageTask, progress: Any) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        self._task = task
        self._progress = progress

    def wrap(self, network: nn.Module) -> nn.Module:
        if self.world_size == 1:
            return network
        if self.device.type == "cpu":
            return DistributedDataParallel(network, broadcast_buffers=False)
        if self._task.settings().network.batch_norm == "live":
            from timm.layers import convert_sync_batchnorm  # torch's own drops the activation inside timm's norm layers

            network = convert_sync_batchnorm(network)
        return DistributedDataParallel(network, device_ids=[self.device], broadcast_buffers=False)

    def share_buffers(self, network: nn.Module) -> None:
        """Running statistics become their mean over the workers: without SyncBN (CPU) each one sees its own batch only."""
        floats = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
        if self.world_size == 1 or self.device.type != "cpu" or not floats:
            return
        mean = self.sum(torch.cat([buffer.flatten() for buffer in floats])) / self.world_size
        for buffer, value in zip(floats, mean.split([buffer.numel() for buffer in floats]), strict=True):
            buffer.copy_(value.view_as(buffer))

    def sum(self, tensor: Tensor) -> Tensor:
        if self.world_size > 1:
            tensor = tensor.clone()
            torch.distributed.all_reduce(tensor)
        return tensor

    def unlabelled(self, first_step: int) -> Iterator[Batch]:
        config = self._task.settings()
        size = config.stage(self._task.stage).unlabelled_batch
        return stream_batches(ray.train.get_dataset_shard("unlabelled"), size, config.seed, self.rank)

    def latest_checkpoint(self) -> bytes | None:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return None
        with checkpoint.as_directory() as folder:
            return Path(folder, CHECKPOINT_FILE).read_bytes()

    def save(self, row: Row, write: Callable[[IO[bytes]], None]) -> None:
        if self.rank > 0:
            ray.train.report(dict(row))
            return
        with tempfile.TemporaryDirectory() as folder:
            with open(Path(folder, CHECKPOINT_FILE), "wb") as file:
                write(file)
            ray.train.report(dict(row), checkpoint=Checkpoint.from_directory(folder))
        self.log(row)

    def log(self, row: Row) -> None:
        if self.rank == 0:
            self._progress.push.remote(dict(row))
