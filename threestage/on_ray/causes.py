"""What went wrong in a task, an actor or a group of workers, without Ray's wrapping and trace of it."""

import contextlib
import re
from collections.abc import Iterator

import ray.exceptions

from threestage.errors import CodedError, InputError, StageFailure, reason_of

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
def told() -> Iterator[None]:
    """Makes any error one of ours, with its reason: Ray Data appends text to errors, and takes the place of some."""
    try:
        yield
    except (InputError, StageFailure):
        raise
    except Exception as error:
        raise StageFailure(reason_of(error), FAILED) from error


def ours(error: ray.exceptions.RayError, what: str = "") -> InputError | StageFailure:
    """The InputError that led to it, else a StageFailure that names `what`; the first line of either, see `first_line`."""
    if isinstance(cause_of(error), InputError):
        return InputError(first_line(error), code_of(error))
    return StageFailure(f"{what}{first_line(error)}; the same command continues", code_of(error) or FAILED)


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
