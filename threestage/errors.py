"""The exceptions that a user meets, and the nearest name for one that is unknown."""

import difflib
from collections.abc import Iterable


class CodedError(Exception):
    """An error whose one line ends with its code: `InputError("...", "data/foreign-folder")` → `... [data/foreign-folder]`."""

    def __init__(self, message: object = "", code: str | None = None) -> None:
        super().__init__(message if code is None else f"{message} [{code}]")
        self.code = code


class InputError(CodedError, ValueError):
    """Wrong input from the user: one line that names the file or key, the value and the fix. The CLI exits with 2."""


class StageFailure(CodedError, RuntimeError):
    """The work could not be done: a stage diverged, a guard said stop, a process or a cluster was lost. The CLI exits with 1.

    The line says what to change, or that the same command continues.
    """


class NoRoom(StageFailure):
    """The cluster had no room for it for as long as the settings allow."""


def reason_of(error: Exception) -> str:
    """Why something failed, for a sentence: our own errors speak for themselves."""
    return str(error) if isinstance(error, InputError | StageFailure) else f"{type(error).__name__}: {error}"


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The end of a complaint about an unknown name that is nearly a known one: `; did you mean steps?`, else nothing."""
    near = difflib.get_close_matches(str(name), list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""
