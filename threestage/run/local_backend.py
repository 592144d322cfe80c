"""The stages and the pool's predictions in this process."""

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from threestage.allocator import disable_malloc_trim
from threestage.config import Config
from threestage.data.pool import PoolFile
from threestage.models.export import load_model
from threestage.prediction.pool_prediction import predict_files
from threestage.prediction.pseudo_masks import FileReport, PoolTask
from threestage.run import pipeline
from threestage.run.stages import StageTask, local_unlabelled, train_stage
from threestage.training.worker import LocalWorker, default_device

Show = Callable[[str, Mapping[str, float]], None]  # (stage, row of metrics)


def run_local(
    config: Config,
    out: str,
    show: Show,
    warn: pipeline.Warn = print,
    record: pipeline.Record = lambda outcome: None,
    watch: pipeline.Watch = lambda what, done, total: None,
    reuse: str | None = None,
) -> dict[str, Any]:
    """Run the three stages here; returns what results.json holds. `reuse`: see pipeline.run."""
    disable_malloc_trim()

    def run_stage(task: StageTask) -> None:
        keep = config.training.checkpoints_kept
        worker = LocalWorker(task.folder, keep, local_unlabelled(task), lambda row: show(task.stage, row), warn)
        with worker.listening():
            train_stage(task, worker)

    return pipeline.run(config, out, run_stage, predict_pool, record, warn, watch=watch, reuse=reuse)


def predict_pool(model: str, task: PoolTask, files: Sequence[PoolFile]) -> Generator[FileReport]:
    """Predict every file of the pool, one after the other; their reports as they are done."""
    device = default_device()
    yield from predict_files(load_model(model)[0].to(device), task, files, device)
