"""Work that nobody waits for: done soon, tried again when it fails."""

import threading
from collections.abc import Callable


class Background:
    """Calls `work` in a thread after each `notify`, at most every `between_s` seconds; after a failure again in `retry_s`
    seconds. `failed` gets the error, once until it works again; whatever `work` raises, nobody else hears of it."""

    def __init__(
        self,
        name: str,
        work: Callable[[], None],
        failed: Callable[[Exception], None],
        between_s: float,
        retry_s: float,
    ) -> None:
        self._work, self._failed, self._between_s, self._retry_s = work, failed, between_s, retry_s
        self._told = False
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def notify(self) -> None:
        """There is something to do; returns at once."""
        with self._changed:
            self._told = True
            self._changed.notify_all()

    def close(self) -> None:
        """End the thread, once the call that it is in has returned."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        lost = False
        while self._wait_for_work():
            pause = self._between_s
            try:
                self._work()
                lost = False
            except Exception as error:
                pause = self._retry_s
                if not lost:
                    self._failed(error)
                lost = True
                self.notify()
            with self._changed:
                self._changed.wait_for(lambda: self._closing, timeout=pause)

    def _wait_for_work(self) -> bool:
        """False when it is being closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._told or self._closing)
            self._told = False
            return not self._closing


def in_time(work: Callable[[], None], seconds: float) -> None:
    """Do it, or stop waiting for it: TimeoutError. What it raises is raised."""
    raised: list[Exception] = []

    def run() -> None:
        try:
            work()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no end within {seconds:.0f} s")
    if raised:
        raise raised[0]
