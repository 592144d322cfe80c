"""The training loop's surroundings inside a Ray Train worker (training/worker.py says what they are)."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import pyarrow as pa
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from threestage.allocator import disable_malloc_trim
from threestage.data.batches import Batch, BatchSlice, max_shard_size
from threestage.data.node_tables import node_table
from threestage.errors import StageFailure
from threestage.private_folder import reserve_compile_cache
from threestage.ray_backend.heartbeat import Heartbeat
from threestage.ray_backend.pool_stream import begin_of, stream_batches
from threestage.run.stages import StageTask, train_stage
from threestage.training.checkpoint import Checkpoints, Row, StreamPosition, StreamState, TrainState, checkpoint_folder


def train_worker(arguments: dict[str, Any]) -> None:
    """What Ray Train runs on every worker: `arguments` holds a StageTask as JSON and the driver's monitor.

    A StageFailure is told to the driver, which ends the stage: trying again would end the same way.
    """
    disable_malloc_trim()
    reserve_compile_cache()
    torch.set_num_threads(max(1, int(arguments["threads"])))
    task, monitor = StageTask.model_validate(arguments["task"]), arguments["monitor"]
    context = ray.train.get_context()
    if not ray.get(monitor.join.remote(task.stage, context.get_world_rank(), context.get_world_size())):
        return
    with Heartbeat(monitor, task, context.get_world_rank(), context.get_world_size()) as pulse:
        worker = RayWorker(task, monitor, pulse, arguments["driver"])
        try:
            with worker.checkpoints.writing():
                train_stage(task, worker)
        except StageFailure as error:
            ray.get(monitor.fail.remote(error))
            raise


class RayWorker:
    """A Worker of a Ray Train group. Ray starts the group again when one of it is lost; what it learnt is in the stage's
    checkpoints, which rank 0 writes."""

    def __init__(self, task: StageTask, monitor: Any, pulse: Heartbeat, driver: str) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self._on_node = context.get_local_world_size()
        self.device = ray.train.torch.get_device()
        training, folder = task.settings().training, checkpoint_folder(task.folder)
        warn = self.warn if self.rank == 0 else lambda text: None  # all have the same to say of a store
        self.checkpoints = Checkpoints(folder, training.checkpoints_kept, driver, training.unsaved_limit_s, warn)
        if self.rank == 0:
            pulse.unsaved_seconds = self.checkpoints.unsaved_seconds
        self._answered = 0
        self._task, self._driver = task, driver
        self._monitor = monitor
        self._pulse = pulse
        self._averages_buffers = False
        self._positions: dict[int, StreamPosition] = {}  # by step, some steps ahead of the training
        self._used: list[int] = []

    def wrap(self, network: nn.Module) -> nn.Module:
        if self.world_size == 1:
            return network
        config = self._task.settings()
        live = config.network.has_live_batch_norm
        synchronised = config.cluster.synchronises(live)
        if synchronised:
            from timm.layers import convert_sync_batchnorm  # torch's own drops the activation inside timm's norm layers

            network = convert_sync_batchnorm(network)
        self._averages_buffers = live and not synchronised
        devices = None if self.device.type == "cpu" else [self.device]
        wrapped = DistributedDataParallel(
            network, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
        )
        self._settle_buckets(wrapped)
        return wrapped

    def _settle_buckets(self, wrapped: DistributedDataParallel) -> None:
        """Gradients of zero, so that the first real ones lie in the buckets in which all others lie: torch sorts them anew after
        the first backward pass, and of three workers the sums depend on where a gradient lies. Nothing else changes."""
        training = wrapped.training
        wrapped.eval()  # running statistics stay
        config = self._task.settings()
        image = torch.zeros(1, config.network.channels, *config.augment.crop_size, device=self.device)
        main, auxiliary = wrapped(image, with_auxiliary=True)
        (main.sum() * 0 + (0 if auxiliary is None else auxiliary.sum() * 0)).backward()
        wrapped.zero_grad(set_to_none=True)
        wrapped.train(training)

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[object]:
        return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else contextlib.nullcontext()

    def sync_buffers(self, network: nn.Module) -> None:
        """Running statistics become their mean over the workers: without SyncBN each one sees its own batch only. Constants are
        left out: rounding would move them, and no checkpoint holds them."""
        names = ("running_mean", "running_var")
        statistics = [buffer for name, buffer in network.named_buffers() if name.endswith(names)]
        if not self._averages_buffers or not statistics:
            return
        mean = self.sum(torch.cat(statistics)) / self.world_size
        for buffer, value in zip(statistics, mean.split([len(buffer) for buffer in statistics]), strict=True):
            buffer.copy_(value)

    def sum(self, tensor: Tensor) -> Tensor:
        if self.world_size > 1:
            tensor = tensor.clone()
            torch.distributed.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    def once_per_node(self, name: str, make: Callable[[], pa.Table]) -> pa.Table:
        if self._on_node == 1:
            return make()
        key = f"{self._driver}/{self._task.model_dump_json()}/{name}"
        return node_table(key, self._on_node, make, self.warn)

    def unlabelled(self, share: BatchSlice, begin: TrainState) -> Iterator[Batch]:
        """From Ray's stream, which was made to begin where the state stands. It gives all workers the same number of images,
        so one whose share is smaller passes over the rest."""
        size = max_shard_size(share.total, self.world_size)
        start, self._used = begin_of(begin.stream, self.rank, self.world_size)
        shard, place = ray.train.get_dataset_shard("unlabelled"), (self._task.settings().seed, "buffer", self.rank)
        found = stream_batches(shard, size, place, self.rank, start, self._used)
        for step, (batch, position) in enumerate(found, begin.step + 1):
            self._positions[step] = position
            yield batch if share.count == size else batch.first(share.count)

    def stream_state(self, step: int) -> StreamState | None:
        for passed in [made for made in list(self._positions) if made < step]:
            del self._positions[passed]
        mine = self._positions.get(step)
        if mine is None:
            return None
        positions = self.gather(mine)
        least = min(position.number for position in positions)
        return StreamState(positions, [number for number in self._used if number >= least])

    def checkpoint_requests(self) -> int:
        """What the driver has noticed: nodes that drain, for an elastic group those that have come, and its own SIGTERM."""
        return self._pulse.checkpoint_requests

    def noticed(self, step: int, saved: bool) -> None:
        """Training goes on until the node is gone; Ray then starts the workers elsewhere, from this checkpoint."""
        requests = self.checkpoint_requests()
        if self.rank == 0 and saved and requests > self._answered:
            self._answered = requests
            self._monitor.checkpoint_saved.remote(requests)
            self.warn(
                f"{self._task.stage}: a node leaves or joins, or the run is stopped; the checkpoint of step {step} is saved"
            )

    def warn(self, text: str) -> None:
        self._monitor.warn.remote(text)

    def set_phase(self, step: int, what: str) -> None:
        self._pulse.set_phase(step, what)

    def measured(self, values: Mapping[str, float]) -> None:
        self._pulse.measured(values)

    def log(self, row: Row) -> None:
        if self.rank == 0:
            self._monitor.row.remote(dict(row))
