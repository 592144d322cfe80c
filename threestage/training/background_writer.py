"""Writes to a store beside the training, and reads: an outage is waited out, and a place that takes no writes any more ends the
stage."""

import threading
import time
from collections.abc import Callable
from typing import Literal, NamedTuple

from threestage.data.outages import Outage
from threestage.data.storage_errors import explain, is_outage
from threestage.errors import UnwritablePlace, Warn

SILENT_S = 30.0  # a store that has not answered for so long is away
END_S = 15.0  # an end waits so long for the store

WriteState = Literal["written", "writing", "failing", "overdue"]
"""failing: the store is away; overdue: for longer than the training may continue without it. In the order of what is worse."""


class _Job(NamedTuple):
    what: str
    work: Callable[[], object]
    writes: bool


class BackgroundWriter:
    """Does one thing at a time in a thread, in the order in which it came. While the store is away it tries again; what comes
    later takes the place of what waits and is of its kind.

    limit_s: how much unsaved work is allowed in an outage. refusal: the error of a place that takes no writes any more, None for
    any other.
    """

    def __init__(self, limit_s: float, warn: Warn, refusal: Callable[[OSError], UnwritablePlace | None]) -> None:
        self._limit_s, self._refusal = limit_s, refusal
        self._outage = Outage(warn)
        self._changed = threading.Condition()
        self._jobs: dict[str, _Job] = {}
        self._thread: threading.Thread | None = None
        self._trying: _Job | None = None
        self._tried_at = 0.0
        self._error: BaseException | None = None
        self._closed = self._counted = False
        self._times_overdue = 0
        self.work_is_saved()

    def work_is_saved(self) -> None:
        """From now on work counts as unsaved."""
        self._saved_at = time.monotonic()

    def unsaved_seconds(self) -> float:
        return time.monotonic() - self._saved_at

    def submit(self, kind: str, what: str, work: Callable[[], object], writes: bool = True) -> None:
        """Do it in the background; returns at once. Raises what ended the thread."""
        with self._changed:
            self._raise_error()
            self._jobs.pop(kind, None)
            self._jobs[kind] = _Job(what, work, writes)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run_or_end, name="checkpoint", daemon=True)
                self._thread.start()

    def wait(self, timeout_s: float | None = None) -> WriteState:
        """Until all is done, or for some seconds; raises what ended the thread."""
        with self._changed:
            self._changed.wait_for(lambda: not self._jobs or self._error is not None, timeout_s)
            self._raise_error()
            if not self._jobs:
                self.work_is_saved()
                return "written"
            if not self._is_away():
                return "writing"
            if not self._is_overdue():
                return "failing"
            self._outage.remind("training waits for it", at_once=not self._counted)
            self._count()
            return "overdue"

    def times_overdue(self) -> int:
        """How often an outage has outlasted the limit so far; raises what ended the thread."""
        with self._changed:
            self._raise_error()
            if self._is_away() and self._is_overdue() and not self._counted:
                self._outage.remind("training waits for it", at_once=True)
                self._count()
            return self._times_overdue

    def close(self) -> None:
        """Try nothing again; what waits for its first try is still written, which takes END_S at most."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(END_S)

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _is_away(self) -> bool:
        """Whether the last try has failed, or the present one, to write, has no answer."""
        if self._trying is not None and self._trying.writes and time.monotonic() - self._tried_at > SILENT_S:
            self._begin_outage(self._trying, f"no answer for {SILENT_S:.0f} s")
        return self._outage.lasts

    def _is_overdue(self) -> bool:
        return self.unsaved_seconds() > self._limit_s

    def _count(self) -> None:
        self._times_overdue += not self._counted
        self._counted = True

    def _run_or_end(self) -> None:
        """Whatever ends the thread, a warning that could not be shown too, ends the writing: nobody waits for it for ever."""
        try:
            self._run()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _run(self) -> None:
        while (job := self._next()) is not None:
            try:
                job.work()
            except OSError as error:
                if (refusal := self._refusal(error)) is not None:
                    raise refusal from error
                if not is_outage(error):
                    raise
                self._failed(job, error)
            else:
                self._done(job)

    def _next(self) -> _Job | None:
        with self._changed:
            if not self._jobs or (self._closed and self._outage.lasts):
                self._thread = None
                return None
            self._trying, self._tried_at = next(iter(self._jobs.values())), time.monotonic()
            return self._trying

    def _failed(self, job: _Job, error: OSError) -> None:
        with self._changed:
            self._trying = None
            self._begin_outage(job, explain(None, error).message)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._closed, self._outage.pause_s())

    def _begin_outage(self, job: _Job, reason: str) -> None:
        left = self._limit_s - self.unsaved_seconds()
        limit = f"; training continues for {left:.0f} s at most" if job.writes and left > 0 else ""
        self._outage.begin(job.what, reason, limit)

    def _done(self, job: _Job) -> None:
        with self._changed:
            self._trying = None
            self._jobs = {kind: other for kind, other in self._jobs.items() if other is not job}
            self._counted = False
            self.work_is_saved()
            self._outage.end(job.what)
            self._changed.notify_all()
