"""The exceptions that a user meets, and the nearest name for one that is unknown."""

import difflib
import re
from collections.abc import Callable, Iterable, Sequence

_SECTIONS = (
    "data|network|augment|optimiser|ema|supervised|consistency|pseudo_mask|stage[123]|training|cluster|storage|registry"
)
_SUBJECT = re.compile(
    rf"(?P<key>--?[a-z][\w-]*|name|seed|stages|(?:{_SECTIONS})(?:\.\w+)*)(?:[= ](?P<value>.+))?", re.DOTALL
)

Warn = Callable[[str], None]
"""Shows the user a warning of one line."""


class CodedError(Exception):
    """An error of one line, `WHAT: WHY; FIX [area/code]`, whose code stays when its words change.

    `message` is the line without its code. WHAT is a setting or an option with its value, or a file or another thing by its name.
    """

    def __init__(self, message: object = "", code: str | None = None) -> None:
        super().__init__(message if code is None else f"{message} [{code}]")
        self.message = str(message)
        self.code = code

    def as_json(self) -> dict[str, str | None]:
        """The parts of the line, for programs: code, message, key (of a setting or option), value, fix; None where absent."""
        what, colon, reason = self.message.partition(": ")
        subject = _SUBJECT.fullmatch(what)
        key, value = (subject["key"], subject["value"]) if subject else (None, what if colon else None)
        fix = reason.rpartition("; ")[2] if "; " in reason else None
        return {"code": self.code, "message": self.message, "key": key, "value": value, "fix": fix}


class InputError(CodedError, ValueError):
    """Wrong input from the user: one line that names the file or key, the value and the fix. The CLI exits with 2."""


class StageFailure(CodedError, RuntimeError):
    """The work could not be done: a stage diverged, pseudo-masks collapsed, a process or cluster was lost. The CLI exits with 1.

    The line says what to change, or that the same command continues.
    """


class UnwritablePlace(StageFailure):
    """The place of the results takes no writes any more: full, read-only, denied. The CLI exits with 3; nothing is retried."""


class StoreAway(StageFailure):
    """A store does not answer for now: what needs it is done again when it does (data/outages.py)."""


class Stopped(StageFailure):
    """The process was asked to end by SIGTERM; the same command continues. The CLI exits with 143."""


class NoRoom(StageFailure):
    """The cluster had no room for it for as long as the settings allow."""


def joined(errors: Sequence[CodedError], several: str) -> InputError:
    """One error in place of some: their messages, and their code where all have the same, else `several`."""
    codes = {error.code for error in errors}
    return InputError("; ".join(error.message for error in errors), codes.pop() if len(codes) == 1 else several)


class RenamedSetting(FutureWarning):
    """A setting was given under an older name, which still works."""


def reason_of(error: BaseException) -> str:
    """Why something failed, for a sentence: our own errors speak for themselves, without their code."""
    return error.message if isinstance(error, CodedError) else f"{type(error).__name__}: {error}"


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The end of a complaint about an unknown name that is nearly a known one: `; did you mean steps?`, else nothing."""
    near = difflib.get_close_matches(str(name), list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""
