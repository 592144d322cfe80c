"""An end to work that ends the process which does it: Ray begins tasks and actors of Ray Data again for ever."""

from collections import Counter
from collections.abc import Sequence

import ray

from threestage.errors import StageFailure
from threestage.on_ray.beside_driver import beside_driver


class Attempts:
    """How often each piece of work was begun since it last got on; travels to the processes that do the work.

    `max_failures`: how often a piece may be begun again without getting on; -1: always.
    """

    def __init__(self, max_failures: int) -> None:
        self._max_failures = max_failures
        self._counts = beside_driver(_Counts)

    def begin(self, piece: int, parts: Sequence[str]) -> None:
        """Say that a piece is begun. `parts`: names of what it consists of, in the order of the work. Raises StageFailure,
        which names the first that is not done, when that is too often."""
        begun, done = ray.get(self._counts.begin.remote(piece))
        if 0 <= self._max_failures < begun - 1:
            raise StageFailure(
                f"{parts[min(done, len(parts) - 1)]}: the process that works on it or on what follows was lost {begun - 1} "
                "times, out of memory or by an image that ends it (the logs of Ray's workers say which): give it nodes with "
                "more memory, or leave that image out"
            )

    def done(self, piece: int, parts: int) -> None:
        """Say that so many parts of it are done, now or before; returns at once."""
        self._counts.done.remote(piece, parts)


class _Counts:
    def __init__(self) -> None:
        self._begun, self._done = Counter[int](), Counter[int]()

    def begin(self, piece: int) -> tuple[int, int]:
        """Times it was begun since it last got on; parts that are done."""
        self._begun[piece] += 1
        return self._begun[piece], self._done[piece]

    def done(self, piece: int, parts: int) -> None:
        if parts > self._done[piece]:
            self._begun[piece], self._done[piece] = 1, parts
