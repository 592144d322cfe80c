"""Why: Ray begins a piece of work again for ever when it ends its process, and as often where nodes come and go; only one that
never gets on may fail the job. With Ray: tests/integration/test_attempts.py."""

from types import SimpleNamespace
from typing import Any

import pytest

from tests.refusals import refused
from threestage.errors import StageFailure
from threestage.ray_backend import failures
from threestage.ray_backend.failures import retry_budget

PARTS = ["a.parquet", "b.parquet"]
HERE = "node"


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The nodes that are alive; the counting actor is in this process."""

    def here(kind: type) -> Any:
        counts = kind()
        return SimpleNamespace(**{name: SimpleNamespace(remote=getattr(counts, name)) for name in ("begin", "done")})

    nodes = {HERE}
    monkeypatch.setattr(failures, "driver_actor", here)
    monkeypatch.setattr(failures, "alive_ids", lambda: nodes)
    monkeypatch.setattr("ray.get", lambda answer: answer)
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: HERE))
    return nodes


def test_a_piece_that_never_gets_on_is_refused_at_last_and_others_are_not(alive: set[str]) -> None:
    with retry_budget(max_failures=2) as tried:
        for _ in range(3):
            tried.begin(5, PARTS)
        tried.begin(6, PARTS)
        with refused("ray/process-lost", "a.parquet: ", "3 times", error=StageFailure):
            tried.begin(5, PARTS)


def test_one_that_gets_on_is_begun_as_often_again(alive: set[str]) -> None:
    with retry_budget(max_failures=1) as tried:
        tried.begin(0, PARTS)
        tried.begin(0, PARTS)
        tried.done(0, 1)
        tried.begin(0, PARTS)
        tried.done(0, 1)  # found done: it has not got on
        with refused("ray/process-lost", "b.parquet: ", "2 times", error=StageFailure):
            tried.begin(0, PARTS)


def test_what_is_lost_with_its_node_does_not_count(alive: set[str]) -> None:
    with retry_budget(max_failures=0) as tried:
        tried.begin(0, PARTS)
        alive.clear()
        for _ in range(9):
            tried.begin(0, PARTS)
        alive.add(HERE)
        with refused("ray/process-lost", "1 times", error=StageFailure):
            tried.begin(0, PARTS)


@pytest.mark.parametrize(("max_failures", "done"), [(-1, 0), (0, 2)])
def test_one_may_be_begun_for_ever_and_so_may_what_is_done(alive: set[str], max_failures: int, done: int) -> None:
    with retry_budget(max_failures) as tried:
        for _ in range(100):
            tried.begin(0, PARTS)
            tried.done(0, done)
