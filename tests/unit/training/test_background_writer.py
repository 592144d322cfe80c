"""Why: whoever waits for a write must hear how it ended, whatever ended it."""

import pytest

from threestage.training.background_writer import BackgroundWriter


def test_a_warning_that_cannot_be_shown_ends_the_writing_and_not_the_waiting() -> None:
    def closed_terminal(text: str) -> None:
        raise BrokenPipeError

    def away() -> None:
        raise OSError("no answer")

    writer = BackgroundWriter(60, closed_terminal, lambda error: None)
    writer.submit("the checkpoint", away)
    with pytest.raises(BrokenPipeError):
        writer.wait(10)
