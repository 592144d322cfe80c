"""An ingest as Ray Data jobs: shards of its source are fetched, checked and written by tasks on any node."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray

from threestage.data.ingest import IngestReport, IngestSettings, Progress, ingest
from threestage.errors import StageFailure
from threestage.on_ray.settings import ClusterSettings
from threestage.on_ray.tasks import in_tasks
from threestage.on_ray.train import connected


def ingest_on_ray(
    source: str, root: str, settings: IngestSettings, cluster: ClusterSettings, progress: Progress | None = None
) -> IngestReport:
    """`threestage.data.ingest.ingest` on a cluster, which is connected to when there is work for it: what is one
    piece (listing a small source, a single shard) is done here.

    Raises InputError and OSError as that does, and StageFailure when the tasks, or a store for them, fail for good.
    """
    with contextlib.ExitStack() as stack:

        def each(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
            if len(items) < 2:
                yield from map(function, items)
                return
            if not ray.is_initialized():
                stack.enter_context(connected(cluster))
            yield from in_tasks(function, items, cluster.max_failures)

        try:
            return ingest(source, root, settings, progress, each)
        except StageFailure as error:
            raise StageFailure(f"ingest: {error.message}", error.code) from error
