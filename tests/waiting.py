"""For what a thread or another process does soon."""

import time
from collections.abc import Callable


def wait_for(true: Callable[[], object], limit_s: float = 20) -> None:
    deadline = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < deadline, f"not within {limit_s:g} s"
        time.sleep(0.01)
