"""Why: eight workers of a node that each hold 50,000 labelled images are killed for memory before the first step."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest

from threestage.data import node_tables
from threestage.data.node_tables import node_table

TABLE = pa.table({"image_id": [f"{i:03d}" for i in range(200)], "image": [bytes(20_000)] * 200})
RANKS = 3


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the tables; the user's private folder is made in it."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path / f"threestage-{os.getuid()}" / "tables"


def on_all_ranks(make: Callable[[], pa.Table], warnings: list[str]) -> list[pa.Table]:
    """What the processes of a node get; the locks tell threads apart as they do processes."""
    with ThreadPoolExecutor(RANKS) as ranks:
        tables = [ranks.submit(node_table, "key", RANKS, make, warnings.append) for _ in range(RANKS)]
        return [table.result() for table in tables]


def test_one_reads_and_all_hold_it_together(folder: Path) -> None:
    made: list[int] = []

    def make() -> pa.Table:
        made.append(threading.get_ident())
        return TABLE

    before = pa.total_allocated_bytes()
    warnings: list[str] = []
    tables = on_all_ranks(make, warnings)
    assert len(made) == 1 and warnings == [] and all(table.equals(TABLE) for table in tables)
    assert pa.total_allocated_bytes() - before < TABLE.nbytes / 10, "they are mapped, not held"
    assert os.listdir(folder) == [], "nothing is left to be removed"
    assert on_all_ranks(make, warnings)[0].equals(TABLE) and len(made) == 2, "the next group reads again"


def test_a_failure_is_the_caller_s_and_the_next_one_reads(folder: Path) -> None:
    def fail() -> pa.Table:
        raise ConnectionError("the store is away")

    with pytest.raises(ConnectionError):
        node_table("key", 1, fail, print)
    assert node_table("key", 1, lambda: TABLE, print).equals(TABLE)


def test_a_full_disk_is_a_warning(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(table: pa.Table, path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(node_tables, "_write", full)
    warnings: list[str] = []
    tables = on_all_ranks(lambda: TABLE, warnings)
    assert all(table.equals(TABLE) for table in tables)
    assert len(warnings) == RANKS and "No space left" in warnings[0] and str(folder) in warnings[0]


def test_what_a_killed_group_left_is_removed(folder: Path) -> None:
    node_table("killed", 2, lambda: TABLE, print)
    (left,) = folder.glob("*.arrow")
    node_table("another", 1, lambda: TABLE, print)
    assert left.exists(), "its group may still start"
    os.utime(left, (0, 0))
    node_table("another", 1, lambda: TABLE, print)
    assert not left.exists()
