"""What `threestage check` finds: one line each."""

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from threestage.checks.store import Probe, try_one


class CheckResult(NamedTuple):
    """`problem`: what is wrong and how to fix it; `code`: its code; `warning`: what may be wrong, or was not
    tried and why; without both, all is well with `value`. `busy`: the problem may pass by itself."""

    name: str
    value: str
    seconds: float = 0.0
    problem: str | None = None
    code: str | None = None
    busy: bool = False
    warning: str | None = None

    def as_json(self) -> dict[str, Any]:
        """For programs and for `from_json`; `warning` is called doubt there."""
        found = self._asdict()
        return found | {"doubt": found.pop("warning")}

    @classmethod
    def from_json(cls, text: str) -> "CheckResult":
        found = json.loads(text)
        return cls(**{"warning" if key == "doubt" else key: value for key, value in found.items()})


class CheckOutcome(NamedTuple):
    """Something that holds, in words, and what is doubtful about it."""

    value: str
    warning: str | None = None


def run_check(name: str, what: str, find: Callable[[], CheckOutcome]) -> CheckResult:
    """The line of something that is found out here. `find` raises InputError or OSError when it is wrong."""
    found: list[CheckOutcome] = []
    line = CheckResult(*try_one(Probe(name, what, lambda: found.append(find()))))
    return line._replace(value=found[0].value, warning=found[0].warning) if found else line


def not_tried(names: Sequence[str], needs: Sequence[str]) -> CheckResult:
    """One line for all that depends on what has failed."""
    return CheckResult(", ".join(names), "", warning=f"not tried: needs {' and '.join(needs)}")


def gibibytes(size: float) -> str:
    return f"{size / 2**30:.2g} GiB" if size < 10 * 2**30 else f"{size / 2**30:.0f} GiB"
