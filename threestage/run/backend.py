"""The interfaces of a run: `Backend`, which trains stages and predicts the pool (this process, or Ray), and `RunCallbacks`."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from threestage.data.pool import PoolFile
from threestage.errors import Warn
from threestage.prediction.pseudo_masks import FileReport, PoolTask
from threestage.run.outcome import StageOutcome
from threestage.run.stages import StageTask

Item = TypeVar("Item")
Result = TypeVar("Result")
OnMetrics = Callable[[str, Mapping[str, float]], None]
OnProgress = Callable[[str, int, int], None]


def ignore(*_: Any) -> None:
    """A callback of nobody."""


@dataclass(frozen=True)
class RunCallbacks:
    """on_metrics: (stage, row of metrics). on_progress: (what is done, so many, of so many). Any thread may call them."""

    on_metrics: OnMetrics = ignore
    on_warning: Warn = print
    on_progress: OnProgress = ignore
    on_stage_done: Callable[[StageOutcome], None] = ignore


class Backend(Protocol):
    """Where stages train and the pool is predicted."""

    def train_stage(self, task: StageTask) -> None:
        """Train, or continue, one stage until its models and result.json are written. Raises StageFailure."""

    def predict_pool(self, model: str, task: PoolTask, files: Sequence[PoolFile]) -> Generator[FileReport]:
        """Predict files of the pool with the model in a folder; a report of each as it is done."""

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """The function's results, some items at a time; on Ray in any order."""
