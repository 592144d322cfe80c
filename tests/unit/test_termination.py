"""Why: a SIGTERM must end a run where nothing is lost, whatever its libraries do with signals."""

import os
import signal
import time
from collections.abc import Iterator

import pytest

from tests.refusals import refused
from threestage.cli.app import reported
from threestage.errors import Stopped
from threestage.termination import Terminated, handler_kept, sigterm_noted, sigterm_stops


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(autouse=True)
def unharmed() -> Iterator[None]:
    """Whatever a test does wrong ends the test, not the session."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    yield
    signal.signal(signal.SIGTERM, before)


def test_the_first_one_ends_the_work_and_no_other_ends_the_clearing_up() -> None:
    cleared = list[str]()
    with refused("stage/stopped", "SIGTERM", error=Stopped), sigterm_stops():
        try:
            terminate()
            time.sleep(60)
        except Exception:
            cleared.append("kept by what takes any error for its own")
        finally:
            terminate()
            cleared.append("lease")
    assert cleared == ["lease"]


def test_where_it_is_only_noted_the_work_ends_itself() -> None:
    with refused("stage/stopped", error=Stopped), sigterm_stops():
        with sigterm_noted() as came:
            terminate()
            assert came.is_set()
        terminate()
    assert came.is_set()


def test_a_library_that_sets_a_handler_does_not_keep_it() -> None:
    """As ray.init does: its own ends the process with a C++ stack and leaves the lease."""
    with refused("stage/stopped", error=Stopped), sigterm_stops():
        with handler_kept():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        terminate()
        time.sleep(60)


def test_the_exit_code_is_that_of_a_terminated_process() -> None:
    with pytest.raises(SystemExit) as ended, reported():
        raise Stopped("stopped by SIGTERM", "stage/stopped")
    assert ended.value.code == 143


def test_it_is_no_error_of_the_work() -> None:
    assert not issubclass(Terminated, Exception)
