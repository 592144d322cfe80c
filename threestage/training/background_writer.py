"""Writes to a store beside the training: an outage is waited out, and a place that takes no writes any more ends the stage."""

import threading
import time
from collections.abc import Callable
from typing import Literal

from threestage.data.storage_errors import explain
from threestage.errors import UnwritablePlace, Warn

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0

WriteState = Literal["written", "writing", "failing", "overdue"]
"""failing: the store is away; overdue: for longer than the training may continue without it."""


class BackgroundWriter:
    """Writes one thing at a time in a thread. While the store is away it tries again; what comes later takes the place of what
    waits.

    limit_s: how much unsaved work is allowed in an outage. refusal: the error of a place that takes no writes any more, None for
    an outage.
    """

    def __init__(self, limit_s: float, warn: Warn, refusal: Callable[[OSError], UnwritablePlace | None]) -> None:
        self._limit_s, self._warn, self._refusal = limit_s, warn, refusal
        self._changed = threading.Condition()
        self._waiting: tuple[str, Callable[[], None]] | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._away = self._overdue = self._closed = False
        self._times_overdue = 0
        self.work_is_saved()

    def work_is_saved(self) -> None:
        """From now on work counts as unsaved."""
        self._saved_at = time.monotonic()

    def submit(self, what: str, write: Callable[[], None]) -> None:
        """Write it in the background, after what is being written now; raises what ended the writing."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is None or self._away or self._error is not None)
            self._raise_error()
            self._waiting = (what, write)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run_or_end, name="checkpoint")
                self._thread.start()

    def wait(self, timeout_s: float | None = None) -> WriteState:
        """Until all is written, or for some seconds; raises what ended the writing."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is None or self._error is not None, timeout_s)
            self._raise_error()
            if self._waiting is None:
                self.work_is_saved()
                return "written"
            if not self._away:
                return "writing"
            return "overdue" if self._is_overdue() else "failing"

    def times_overdue(self) -> int:
        """How often an outage has outlasted the limit so far; raises what ended the writing."""
        with self._changed:
            self._raise_error()
            self._is_overdue()
            return self._times_overdue

    def close(self) -> None:
        """Try nothing again; what waits for its first try is still written."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _is_overdue(self) -> bool:
        if self._away and not self._overdue and time.monotonic() - self._saved_at > self._limit_s:
            self._overdue = True
            self._times_overdue += 1
            self._warn("the store is still away: training waits for it with the weights in memory")
        return self._overdue

    def _run_or_end(self) -> None:
        """Whatever ends the thread, a warning that could not be shown too, ends the writing: nobody waits for it for ever."""
        try:
            self._run()
        except BaseException as error:
            self._end(error)

    def _run(self) -> None:
        pause_s = FIRST_PAUSE_S
        while (job := self._next()) is not None:
            try:
                job[1]()
            except OSError as error:
                if (refusal := self._refusal(error)) is not None:
                    self._end(refusal)
                    return
                self._note_outage(job[0], error)
                with self._changed:
                    self._changed.wait_for(lambda: self._closed, pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            else:
                self._done(job)
                pause_s = FIRST_PAUSE_S

    def _next(self) -> tuple[str, Callable[[], None]] | None:
        with self._changed:
            if self._waiting is None or (self._closed and self._away):
                self._thread = None
                return None
            return self._waiting

    def _end(self, error: BaseException) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def _note_outage(self, what: str, error: OSError) -> None:
        with self._changed:
            first, self._away = not self._away, True
            left = max(0.0, self._limit_s - (time.monotonic() - self._saved_at))
            self._changed.notify_all()
        if first:
            limit = f"; training continues for {left:.0f} s at most" if left > 0 else ""
            self._warn(f"{what} could not be written, it is tried again: {explain(None, error).message}{limit}")

    def _done(self, job: tuple[str, Callable[[], None]]) -> None:
        with self._changed:
            if self._waiting is job:
                self._waiting = None
            was_away, self._away, self._overdue = self._away, False, False
            self.work_is_saved()
            self._changed.notify_all()
        if was_away:
            self._warn(f"the store answers again: {job[0]} is written")
