"""The stages and the pool's predictions in this process."""

from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial

from threestage.allocator import disable_malloc_trim
from threestage.config import Config
from threestage.data.parallel import map_ahead
from threestage.data.pool import PoolFile
from threestage.prediction.pool_prediction import predict_pool_here
from threestage.prediction.pseudo_masks import FileReport, PoolTask
from threestage.run.backend import Item, Result, RunCallbacks
from threestage.run.stages import StageTask, local_unlabelled, train_stage
from threestage.training.worker import LocalWorker


class LocalBackend:
    """One process, one device."""

    def __init__(self, config: Config, on: RunCallbacks) -> None:
        self._training, self._on = config.training, on
        disable_malloc_trim()

    def train_stage(self, task: StageTask) -> None:
        on_metrics = partial(self._on.on_metrics, task.stage)
        unlabelled = local_unlabelled(task)
        keep, limit_s = self._training.checkpoints_kept, self._training.unsaved_limit_s
        worker = LocalWorker(task.folder, keep, unlabelled, on_metrics, self._on.on_warning, limit_s)
        with worker.listening(), worker.checkpoints.writing():
            train_stage(task, worker)

    def predict_pool(self, model: str, task: PoolTask, files: Sequence[PoolFile]) -> Generator[FileReport]:
        yield from predict_pool_here(model, task, files)

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        return map_ahead(function, items)
