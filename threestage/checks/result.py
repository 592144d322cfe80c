"""What `threestage check` finds: one line each."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from threestage.checks.store import Probe, try_one


class CheckResult(NamedTuple):
    """`problem`: what is wrong and how to fix it; `code`: its code; `doubt`: what may be wrong, or was not
    tried and why; without both, all is well with `value`. `busy`: the problem may pass by itself."""

    name: str
    value: str
    seconds: float = 0.0
    problem: str | None = None
    code: str | None = None
    busy: bool = False
    doubt: str | None = None


class CheckOutcome(NamedTuple):
    """Something that holds, in words, and what is doubtful about it."""

    value: str
    doubt: str | None = None


def run_check(name: str, what: str, find: Callable[[], CheckOutcome]) -> CheckResult:
    """The line of something that is found out here. `find` raises InputError or OSError when it is wrong."""
    found: list[CheckOutcome] = []
    line = CheckResult(*try_one(Probe(name, what, lambda: found.append(find()))))
    return line._replace(value=found[0].value, doubt=found[0].doubt) if found else line


def not_tried(names: Sequence[str], needs: Sequence[str]) -> CheckResult:
    """One line for all that depends on what has failed."""
    return CheckResult(", ".join(names), "", doubt=f"not tried: needs {' and '.join(needs)}")


def gibibytes(size: float) -> str:
    return f"{size / 2**30:.2g} GiB" if size < 10 * 2**30 else f"{size / 2**30:.0f} GiB"
