"""A store that is away for a while: what needs it is tried again until it answers, and the user is warned."""

import contextlib
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager

from threestage.data.storage_errors import explain, is_outage
from threestage.errors import StoreAway, Warn
from threestage.format import duration

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
REMIND_S = 300.0


class Outage:
    """The warnings about a store that is away: when it begins, every REMIND_S while it lasts, and when it is over."""

    def __init__(self, warn: Warn) -> None:
        self._warn = warn
        self._since: float | None = None
        self._reminded_at = 0.0
        self._pause_s = FIRST_PAUSE_S

    @property
    def lasts(self) -> bool:
        return self._since is not None

    def begin(self, what: str, reason: str, more: str = "") -> None:
        """Once an outage; `more` ends the line."""
        if self._since is None:
            self._since = self._reminded_at = time.monotonic()
            self._warn(f"{what}: the store is away, it is tried again: {reason}{more}")

    def pause_s(self) -> float:
        """How long to wait before the next try: longer each time."""
        pause, self._pause_s = self._pause_s, min(2 * self._pause_s, LONGEST_PAUSE_S)
        return pause

    def remind(self, consequence: str, at_once: bool = False) -> None:
        now = time.monotonic()
        if self._since is not None and (at_once or now - self._reminded_at > REMIND_S):
            self._reminded_at = now
            self._warn(f"the store is still away after {duration((now - self._since) / 3600)}: {consequence}")

    def end(self, what: str) -> None:
        if self._since is not None:
            self._warn(f"the store answers again: {what} is done")
        self._since, self._pause_s = None, FIRST_PAUSE_S


def tries(what: str, warn: Warn) -> Iterator[AbstractContextManager[None]]:
    """`for attempt in tries(what, warn): with attempt: …` does the block again while a store is away. Other errors pass."""
    outage = Outage(warn)
    yield _attempt(what, outage)
    while outage.lasts:
        yield _attempt(what, outage)


@contextlib.contextmanager
def _attempt(what: str, outage: Outage) -> Iterator[None]:
    try:
        with store_away():
            yield
    except StoreAway as error:
        outage.begin(what, error.message)
        outage.remind(f"{what} waits for it")
        time.sleep(outage.pause_s())
    else:
        outage.end(what)


@contextlib.contextmanager
def store_away() -> Iterator[None]:
    """Raises StoreAway in place of an outage's OSError: in a process of Ray's, whose driver then waits."""
    try:
        yield
    except OSError as error:
        if not is_outage(error):
            raise
        known = explain(None, error)
        raise StoreAway(known.message, known.code) from error
