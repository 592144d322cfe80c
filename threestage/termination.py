"""SIGTERM: a run ends where nothing is lost, and its process with exit code 143."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from threestage.errors import Stopped

STOPPED = "stopped by SIGTERM; the same command continues"


class Terminated(BaseException):
    """Raised in the main thread by a SIGTERM; no `except Exception` may keep it."""


@contextlib.contextmanager
def sigterm_stops() -> Iterator[None]:
    """Inside, the first SIGTERM ends the work wherever it is; raises Stopped. What it leaves open is closed meanwhile."""
    ended = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        if not ended.is_set():
            ended.set()
            raise Terminated

    try:
        with _handled_by(stop):
            yield
    except Terminated:
        raise Stopped(STOPPED, "stage/stopped") from None


@contextlib.contextmanager
def sigterm_noted() -> Iterator[threading.Event]:
    """Inside, a SIGTERM sets the event and nothing more: the work ends itself, at a better moment."""
    came = threading.Event()
    with _handled_by(lambda number, frame: came.set()):
        yield came


@contextlib.contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Where the interpreter allows a handler: in its main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def handler_kept() -> Iterator[None]:
    """Ours is in force again afterwards: ray.init sets one that ends the process at once."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if before not in (signal.SIG_DFL, None) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)
