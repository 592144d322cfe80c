"""Threads within bounded memory: how many pixels they may decode at the same time, and one item made ahead."""

import threading
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

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


Item = TypeVar("Item")


def ahead(source: Iterator[Item]) -> Generator[Item]:
    """The same items; the next one is made in a thread while the caller works on this one."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, source, None)
        while (item := following.result()) is not None:
            following = thread.submit(next, source, None)
            yield item
