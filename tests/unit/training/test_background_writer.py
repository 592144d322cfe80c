"""Why: whoever waits for a write must hear how it ended, whatever ended it, and no end may wait for a store."""

import threading
import time
from collections.abc import Callable

import pytest

from tests.store_away import busy
from tests.waiting import wait_for
from threestage.data import outages
from threestage.training import background_writer
from threestage.training.background_writer import BackgroundWriter


def away() -> None:
    raise busy()


def test_a_warning_that_cannot_be_shown_ends_the_writing_and_not_the_waiting() -> None:
    def closed_terminal(text: str) -> None:
        raise BrokenPipeError

    writer = BackgroundWriter(60, closed_terminal, lambda error: None)
    writer.submit("checkpoint", "the checkpoint", away)
    with pytest.raises(BrokenPipeError):
        writer.wait(10)


def test_what_is_no_outage_is_not_tried_again() -> None:
    """Such as a file of the data set that is gone, when a stage begins."""

    def gone() -> None:
        raise FileNotFoundError("images.parquet")

    writer = BackgroundWriter(60, print, lambda error: None)
    writer.submit("data", "the data set", gone)
    with pytest.raises(FileNotFoundError, match=r"images\.parquet"):
        writer.wait(10)


def test_what_is_delivered_is_written_before_the_checkpoints_that_come_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a stage that continues from one of these would lack the weights of half-way."""
    monkeypatch.setattr(outages, "FIRST_PAUSE_S", 0.01)
    written, back = list[str](), threading.Event()

    def write(what: str) -> Callable[[], None]:
        def work() -> None:
            if not back.is_set():
                raise busy()
            written.append(what)

        return work

    writer = BackgroundWriter(60, lambda text: None, lambda error: None)
    for kind, what in (("checkpoint", "step 4"), ("half-way", "half-way"), ("checkpoint", "step 6")):
        writer.submit(kind, what, write(what))
    back.set()
    assert writer.wait(10) == "written"
    assert written == ["half-way", "step 6"] or written == ["step 4", "half-way", "step 6"]


def test_an_outage_that_is_too_long_is_told_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outages, "REMIND_S", 0.05)
    warnings = list[str]()
    writer = BackgroundWriter(0, warnings.append, lambda error: None)
    writer.submit("checkpoint", "the checkpoint", away)
    wait_for(lambda: writer.wait(0.01) == "overdue" and sum("training waits" in text for text in warnings) > 2)
    assert writer.times_overdue() == 1
    writer.close()


def test_an_end_does_not_wait_for_a_store_that_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background_writer, "END_S", 0.1)
    answered = threading.Event()
    writer = BackgroundWriter(60, print, lambda error: None)
    writer.submit("checkpoint", "the checkpoint", answered.wait)
    begun = time.monotonic()
    writer.close()
    assert time.monotonic() - begun < 5
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "checkpoint")
    answered.set()
