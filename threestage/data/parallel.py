"""Threads within bounded memory: map() in some, items made ahead in one, how many pixels all may decode at a time, and work
that nobody waits for when the process ends."""

import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import NoReturn, ParamSpec, TypeVar

MAX_IMAGE_PIXELS = 64_000_000
LARGE_PIXELS = MAX_IMAGE_PIXELS // 4
"""Smaller images are decoded at once by all threads of a prediction: photos wait for nobody."""


class PixelBudget:
    """What threads may hold together. Who comes first is served first, so a large amount is not passed over."""

    def __init__(self, total: int) -> None:
        self._total = self._free = total
        self._changed = threading.Condition()
        self._turn = threading.Lock()

    @contextmanager
    def hold(self, amount: int) -> Iterator[None]:
        """Wait until `amount` is free, at most all of it, and hold it."""
        amount = min(amount, self._total)
        with self._turn, self._changed:
            self._changed.wait_for(lambda: self._free >= amount)
            self._free -= amount
        try:
            yield
        finally:
            with self._changed:
                self._free += amount
                self._changed.notify()

    def hold_large(self, amount: int) -> AbstractContextManager[None]:
        """As `hold`, of an image of LARGE_PIXELS or more; others need not wait."""
        return self.hold(amount) if amount >= LARGE_PIXELS else nullcontext()


PIXELS = PixelBudget(MAX_IMAGE_PIXELS)


ASK_STORES = ("checkpoint", "lease", "events", "run-mirror", "sweep-mirror")
"""Names of daemon threads that an end does not wait for."""

Item = TypeVar("Item")
Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


def ahead(source: Iterator[Item], depth: int = 1) -> Generator[Item]:
    """The same items, none of them None; the next `depth` are made in a thread while the caller works on this one."""
    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(next, source, None) for _ in range(depth))
        try:
            while (item := waiting.popleft().result()) is not None:
                waiting.append(thread.submit(next, source, None))
                yield item
        finally:
            _cancel(waiting)


def map_ahead(function: Callable[[Item], Result], items: Iterable[Item], threads: int = 8) -> Iterator[Result]:
    """map() in threads, in order, with few items worked on or waiting, so that memory stays bounded."""
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            _cancel(waiting)


def _cancel(waiting: Iterable[Future[Result]]) -> None:
    for future in waiting:
        future.cancel()


def in_daemon_thread(
    work: Callable[Arguments, Item], *arguments: Arguments.args, **options: Arguments.kwargs
) -> Future[Item]:
    """What the work returns or raises; a process that ends does not wait for it, as it would for an executor's."""
    future: Future[Item] = Future()

    def run() -> None:
        try:
            future.set_result(work(*arguments, **options))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def end_process(code: int | str | None) -> NoReturn:
    """As sys.exit; at once where a thread still waits for a store: pyarrow waits for its requests, which may take minutes."""
    if not any(thread.name in ASK_STORES for thread in threading.enumerate()):
        sys.exit(code)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))
