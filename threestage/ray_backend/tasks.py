"""map() as Ray Data tasks on any node, with retries: the parts of a listing, and of `threestage ingest`."""

import itertools
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.data
import ray.exceptions
from ray.data import TaskPoolStrategy

from threestage.data.ingest import IngestReport, IngestSettings, Progress, ingest
from threestage.errors import StageFailure
from threestage.ray_backend.connect import connected_on_demand
from threestage.ray_backend.failures import RetryBudget, retry_budget, to_user_error, translate_ray_errors
from threestage.ray_settings import ClusterSettings

# ---- map() in tasks

MAX_TASKS = 4096
LONGEST_WAIT_S = 30


def in_tasks(
    function: Callable[[Any], Any], items: Sequence[Any], max_failures: int, at_once: int | None = None
) -> Iterator[Any]:
    """map() in tasks of one CPU each, `at_once` of them at most, results in any order.

    What raises OSError is tried again `max_failures` times, and so is what ends its process or is lost with its node. Raises
    InputError as the function does, StageFailure when anything else goes wrong for good.
    """
    rows = [{"number": number, "item": pickle.dumps(item)} for number, item in enumerate(items)]
    source = ray.data.from_items(rows, override_num_blocks=min(len(rows), MAX_TASKS))
    source.context.raise_original_map_exception = True
    with retry_budget(max_failures) as attempts:
        work = _Retried(function, max_failures, attempts)
        done = source.map(work, num_cpus=1, compute=TaskPoolStrategy(size=at_once))
        try:
            for row in done.iter_rows():
                yield pickle.loads(row["result"])
        except ray.exceptions.RayError as error:
            raise to_user_error(error) from error


def map_function(
    cluster: ClusterSettings, connect: Callable[[], None] = lambda: None, at_once: int | None = None
) -> Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Any]]:
    """`in_tasks`, on the cluster that `connect` connects to; a single item is done here."""

    def mapped(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        if len(items) < 2:
            return map(function, items)
        connect()
        return in_tasks(function, items, cluster.max_failures, at_once)

    return mapped


@dataclass(frozen=True)
class _Retried:
    """A function of rows that hold pickled arguments and results, which Arrow cannot read."""

    function: Callable[[Any], Any]
    max_failures: int
    attempts: RetryBudget

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        number, item = row["number"], pickle.loads(row["item"])
        with translate_ray_errors():
            self.attempts.begin(number, [str(item)])
            result = pickle.dumps(self._result(item))
        self.attempts.done(number, 1)
        return {"result": result}

    def _result(self, item: Any) -> Any:
        for failures in itertools.count():
            try:
                return self.function(item)
            except OSError:  # a store that does not answer; its client has been patient already
                if failures == self.max_failures:
                    raise
                time.sleep(min(LONGEST_WAIT_S, 2**failures))
        raise AssertionError


# ---- threestage ingest


def ingest_on_ray(
    source: str, root: str, settings: IngestSettings, cluster: ClusterSettings, progress: Progress | None = None
) -> IngestReport:
    """`threestage.data.ingest.ingest` on a cluster, which is connected to when there is work for it: what is one
    piece (listing a small source, a single shard) is done here.

    Raises InputError and OSError as that does, and StageFailure when the tasks, or a store for them, fail for good.
    """
    with connected_on_demand(cluster) as connect:
        try:
            return ingest(source, root, settings, progress, map_function(cluster, connect))
        except StageFailure as error:
            raise StageFailure(f"ingest: {error.message}", error.code) from error
