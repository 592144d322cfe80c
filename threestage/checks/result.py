"""What `threestage check` finds out: one line each, one after the other or many at a time."""

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from threestage.data.parallel import in_daemon_thread
from threestage.data.storage_errors import Complaint, complaint
from threestage.errors import InputError

DEADLINE_S = 9.0


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


class Probe(NamedTuple):
    """Something to try. `name`: of the setting; `try_it` raises InputError or OSError when it does not work, and returns None
    where `value` says all."""

    name: str
    value: str
    try_it: Callable[[], CheckOutcome | None]


def run_check(name: str, value: str, find: Callable[[], CheckOutcome | None]) -> CheckResult:
    """The line of a probe that is tried here, however long it takes."""
    start = time.monotonic()
    found, problem = None, Complaint("", None)
    try:
        found = find()
    except InputError as error:
        problem = Complaint(" ".join(error.message.split()), error.code)
    except OSError as error:
        problem = complaint(value, error)
    value, warning = found or CheckOutcome(value)
    seconds = time.monotonic() - start
    return CheckResult(name, value, seconds, problem.text or None, problem.code, problem.busy, warning)


def try_all(probes: Sequence[Probe], deadline_s: float = DEADLINE_S) -> list[CheckResult]:
    """Try them at the same time. One that is not done when the time is over has failed, and is left behind."""
    start = time.monotonic()
    futures = [in_daemon_thread(run_check, *probe) for probe in probes]
    return [_wait(probe, future, start, deadline_s) for probe, future in zip(probes, futures, strict=True)]


def _wait(probe: Probe, future: Future[CheckResult], start: float, deadline_s: float) -> CheckResult:
    try:
        return future.result(max(0.0, start + deadline_s - time.monotonic()))
    except TimeoutError:
        problem = f"{probe.value}: no answer within {deadline_s:g} s; start it, or correct {probe.name}"
        return CheckResult(probe.name, probe.value, time.monotonic() - start, problem, "storage/unreachable")


def merged(results: Sequence[CheckResult]) -> list[CheckResult]:
    """One line for all that fails for the same reason."""
    lines: dict[str, CheckResult] = {}
    for result in results:
        key = result.problem or result.name
        before = lines.get(key)
        if before is not None:
            result = before._replace(name=f"{before.name}, {result.name}", seconds=max(before.seconds, result.seconds))
        lines[key] = result
    return list(lines.values())


def not_tried(names: Sequence[str], needs: Sequence[str]) -> CheckResult:
    """One line for all that depends on what has failed."""
    return CheckResult(", ".join(names), "", warning=f"not tried: needs {' and '.join(needs)}")
