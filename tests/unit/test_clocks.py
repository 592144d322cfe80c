"""Durations come from a monotonic clock: the wall clock steps (NTP, a paused machine, a closed laptop)."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.package_source import tree_of

ROOT = Path(__file__).parents[2]
FILES = [file for folder in ("threestage", "cluster", "jobs") for file in sorted((ROOT / folder).rglob("*.py"))]
MOMENTS = {
    "threestage/run_folder/folder.py": 1,  # when a stage was finished, in its marker
    "threestage/run_folder/lease.py": 1,  # since when a driver works, for people
    "threestage/mlflow_sync/client.py": 1,  # MLflow's timestamp of a metric
    "threestage/run/event_log.py": 1,  # when an event happened
    "threestage/run/clean.py": 1,  # days since a file was written: two moments, of which neither is ours
    "threestage/report/report.py": 1,  # when a page was written
}
"""How often each file reads the wall clock: for a moment that is written down, never for a duration."""
WALL_CLOCK = {("time", "time"), ("time", "time_ns"), ("datetime", "now"), ("datetime", "utcnow"), ("datetime", "today")}


def wall_clock_reads(tree: ast.AST) -> Iterator[int]:
    """Lines that read the wall clock, or import what does."""
    for node in ast.walk(tree):
        named = set[tuple[str | None, str]]()
        if isinstance(node, ast.Attribute):
            named = {(ast.unparse(node.value).split(".")[-1], node.attr)}
        elif isinstance(node, ast.ImportFrom):
            named = {(node.module, name.name) for name in node.names}
        if isinstance(node, ast.Attribute | ast.ImportFrom) and named & WALL_CLOCK:
            yield node.lineno


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_the_wall_clock_is_read_for_moments_only(file: Path) -> None:
    lines = list(wall_clock_reads(tree_of(file)))
    allowed = MOMENTS.get(str(file.relative_to(ROOT)), 0)
    assert len(lines) == allowed, f"lines {lines}: use time.monotonic(), or list the moment in MOMENTS"


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import time\nd = time.time() - start", [2]),
        ("import datetime\nx = datetime.datetime.now()", [2]),
        ("from time import time", [1]),
        ("import time\nd = time.monotonic()\nrun.time()", []),
    ],
)
def test_reads_are_found(code: str, found: list[int]) -> None:
    assert list(wall_clock_reads(ast.parse(code))) == found
