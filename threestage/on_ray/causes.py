"""What went wrong in a task, an actor or a group of workers, without Ray's wrapping and trace of it."""

import contextlib
from collections.abc import Iterator

import ray.exceptions

from threestage.errors import InputError, StageFailure, reason_of


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
        raise StageFailure(reason_of(error)) from error


def ours(error: ray.exceptions.RayError, what: str = "") -> Exception:
    """The InputError that led to it, else a StageFailure that names `what`; the first line of either, see `first_line`."""
    if isinstance(cause_of(error), InputError):
        return InputError(first_line(error))
    return StageFailure(f"{what}{first_line(error)}; the same command goes on")


def last_line(error: BaseException) -> str:
    """Of its cause; errors of Ray Train begin with traces."""
    cause = cause_of(error)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[-1] if lines else type(cause).__name__


def first_line(error: BaseException) -> str:
    """Of its cause; Ray's own errors of tasks end with advice about Ray, and Ray Data appends some to anybody's."""
    cause = cause_of(error)
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]
