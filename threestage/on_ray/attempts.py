"""An end to work that ends the process which does it: Ray begins tasks and actors of Ray Data again for ever."""

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import ray

from threestage.errors import StageFailure
from threestage.on_ray.beside_driver import beside_driver
from threestage.on_ray.nodes import alive_ids


class Attempts:
    """How often each piece of work lost its process since it last got on; travels to the processes that do the work.

    `max_failures`: how often a piece may lose its process without getting on; -1: always.
    """

    def __init__(self, max_failures: int, counts: Any) -> None:
        self._max_failures, self._counts = max_failures, counts

    def begin(self, piece: int, parts: Sequence[str]) -> None:
        """Say that a piece is begun. `parts`: names of what it consists of, in the order of the work. Raises StageFailure,
        which names the first that is not done, when it has lost its process too often."""
        lost, done = ray.get(self._counts.begin.remote(piece, ray.get_runtime_context().get_node_id()))
        if 0 <= self._max_failures < lost and done < len(parts):
            raise StageFailure(
                f"{parts[done]}: the process that works on it or on what follows was lost {lost} times, out of memory or by "
                "an image that ends it (the logs of Ray's workers say which); give it nodes with more memory, or leave that "
                "image out",
                "ray/process-lost",
            )

    def done(self, piece: int, parts: int) -> None:
        """Say that so many parts of it are done, now or before; returns at once."""
        self._counts.done.remote(piece, parts)


@contextlib.contextmanager
def counted(max_failures: int) -> Iterator[Attempts]:
    """Attempts of one job."""
    counts = beside_driver(_Counts)
    try:
        yield Attempts(max_failures, counts)
    finally:
        if ray.is_initialized():
            ray.kill(counts)


class _Counts:
    def __init__(self) -> None:
        self._nodes: dict[int, str] = {}
        self._lost, self._done = Counter[int](), Counter[int]()

    def begin(self, piece: int, node: str) -> tuple[int, int]:
        """Processes that it has lost since it last got on, but for those that went with their node; parts that are done."""
        if piece in self._nodes and self._nodes[piece] in alive_ids():
            self._lost[piece] += 1
        self._nodes[piece] = node
        return self._lost[piece], self._done[piece]

    def done(self, piece: int, parts: int) -> None:
        if parts > self._done[piece]:
            self._lost[piece], self._done[piece] = 0, parts
