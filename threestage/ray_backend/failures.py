"""Failures on a cluster: the cause behind Ray's wrapping as one of our errors, the nodes that are left, and how often work may
lose its process. Imports no torch: a small actor counts the losses."""

import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import ray
import ray.exceptions

from threestage.data.outages import store_away
from threestage.errors import CodedError, InputError, StageFailure, StoreAway, UnwritablePlace, reason_of
from threestage.ray_backend.heartbeat import driver_actor

# ---- From an error of Ray to one of ours

FAILED = "ray/task-failed"
_CODE = re.compile(r" \[[a-z-]+/[a-z0-9-]+\]$")


def cause_of(error: BaseException) -> BaseException:
    """The outermost of our own errors in the chain, which says what to do; where there is none, the innermost error."""
    while True:
        if isinstance(error, ray.exceptions.RayTaskError):  # of a class of its own, which is one of its cause's too
            inner = error.cause
        elif isinstance(error, InputError | StageFailure):
            return error
        else:
            inner = error.__cause__
        if inner is None:
            return error
        error = inner


@contextlib.contextmanager
def translate_ray_errors() -> Iterator[None]:
    """Makes any error one of ours, with its reason: Ray Data appends text to errors, and takes the place of some."""
    try:
        with store_away():
            yield
    except (InputError, StageFailure):
        raise
    except Exception as error:
        raise StageFailure(reason_of(error), FAILED) from error


def to_user_error(error: ray.exceptions.RayError, what: str = "") -> InputError | StageFailure:
    """The InputError that led to it, else a StageFailure that names `what`; the first line of either, see `first_line`."""
    if isinstance(cause_of(error), InputError):
        return InputError(first_line(error), code_of(error))
    return to_stage_failure(error, f"{what}{first_line(error)}", FAILED)


def to_stage_failure(error: BaseException, text: str, code: str) -> StageFailure:
    """A StageFailure that `text` begins, with the code of its cause, else `code`; of the kind of its cause, where that decides
    what follows."""
    cause = cause_of(error)
    kind = type(cause) if isinstance(cause, UnwritablePlace | StoreAway) else StageFailure
    return kind(f"{text}; the same command continues", code_of(error) or code)


def code_of(error: BaseException) -> str | None:
    """The code of our own error that led to it."""
    cause = cause_of(error)
    return cause.code if isinstance(cause, CodedError) else None


def last_line(error: BaseException) -> str:
    """Of its cause, without a code; errors of Ray Train begin with traces."""
    cause = cause_of(error)
    lines = [line.strip() for line in _text(cause).splitlines() if line.strip()]
    return _CODE.sub("", lines[-1]) if lines else type(cause).__name__


def first_line(error: BaseException) -> str:
    """Of its cause, without a code; Ray's own errors of tasks end with advice about Ray, and Ray Data appends some to
    anybody's."""
    cause = cause_of(error)
    return (_text(cause).strip() or type(cause).__name__).splitlines()[0]


def _text(cause: BaseException) -> str:
    return cause.message if isinstance(cause, CodedError) else str(cause)


# ---- The nodes that are left


def alive_nodes() -> list[dict[str, Any]]:
    """What Ray knows of each node, without those that are gone."""
    return [node for node in ray.nodes() if node["Alive"]]


def alive_ids() -> frozenset[str]:
    return frozenset(node["NodeID"] for node in alive_nodes())


# ---- How often a piece of work lost its process


class RetryBudget:
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
def retry_budget(max_failures: int) -> Iterator[RetryBudget]:
    """Attempts of one job."""
    counts = driver_actor(_Counts)
    try:
        yield RetryBudget(max_failures, counts)
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
