"""Why: Ray begins a piece of work again for ever when it ends its process, and as often where nodes come and go; only one that
never gets on may fail the job. With Ray: tests/integration/test_attempts.py."""

from types import SimpleNamespace
from typing import Any

import pytest

from threestage.errors import StageFailure
from threestage.on_ray import attempts
from threestage.on_ray.attempts import Attempts

PARTS = ["a.parquet", "b.parquet"]


@pytest.fixture(autouse=True)
def counts_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def here(kind: type) -> Any:
        counts = kind()
        return SimpleNamespace(**{name: SimpleNamespace(remote=getattr(counts, name)) for name in ("begin", "done")})

    monkeypatch.setattr(attempts, "beside_driver", here)
    monkeypatch.setattr("ray.get", lambda answer: answer)


def test_a_piece_that_never_gets_on_is_refused_at_last_and_others_are_not() -> None:
    counted = Attempts(max_failures=2)
    for _ in range(3):
        counted.begin(5, PARTS)
    counted.begin(6, PARTS)
    with pytest.raises(
        StageFailure, match=r"^a\.parquet: .* was lost 3 times, .* more memory, or leave that image out$"
    ):
        counted.begin(5, PARTS)


def test_one_that_gets_on_is_begun_as_often_again() -> None:
    counted = Attempts(max_failures=1)
    counted.begin(0, PARTS)
    counted.begin(0, PARTS)
    counted.done(0, 1)
    counted.begin(0, PARTS)
    counted.done(0, 1)  # found done: it has not got on
    with pytest.raises(StageFailure, match=r"^b\.parquet: .* lost 2 times"):
        counted.begin(0, PARTS)


def test_one_may_be_begun_for_ever() -> None:
    counted = Attempts(max_failures=-1)
    for _ in range(100):
        counted.begin(0, PARTS)
