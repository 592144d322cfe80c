"""Why: what the report names may be left out of the pool: a copy may, the image that it is a copy of may not."""

import csv
from pathlib import Path
from typing import Any

import numpy as np

from tests.unit.selection.test_choice import pool_of
from threestage.selection.pool_report import write_pool_report


def test_near_copies_and_images_unlike_every_label(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    at = random.normal(0, 1, (60, 8))
    rows: list[dict[str, Any]] = [{"id": f"i{n}", "at": at[n]} for n in range(60)]
    copies: list[dict[str, Any]] = [{"id": f"copy{n}", "at": at[n] + 0.01} for n in (0, 30, 31)]
    again: dict[str, Any] = {"id": "again31", "at": at[31] - 0.01}
    far: dict[str, Any] = {"id": "far", "at": np.full(8, 9.0)}
    covered = [f"i{n}" for n in range(30)]
    found = write_pool_report(str(tmp_path), pool_of(tmp_path, rows, [*copies, again, far], covered=covered))
    assert sorted((tmp_path / "near_copies.txt").read_text().split()) == ["again31", "copy0", "copy30", "copy31"]
    unlike = (tmp_path / "unlike.txt").read_text().split()
    assert unlike[0] == "far" and len(unlike) == found.unlike <= 4 and found.near_copies == 4
    with open(tmp_path / "pool.csv") as file:
        table = {row["image_id"]: row for row in csv.DictReader(file)}
    assert {table[copy]["of"] for copy in ("copy30", "copy31", "again31")} == {"i30", "i31"}
    assert table["copy0"]["of"] == "i0" and float(table["far"]["distance"]) > float(table["far"]["usual"])


def test_copies_of_copies_keep_one(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    rows = [{"id": f"i{n}", "at": random.normal(0, 1, 8)} for n in range(40)]
    frames = [{"id": f"frame{n}", "at": np.full(8, 2.0) + n / 10_000} for n in range(20)]
    write_pool_report(str(tmp_path), pool_of(tmp_path, rows, frames))
    assert len((tmp_path / "near_copies.txt").read_text().split()) == 19
    assert (tmp_path / "unlike.txt").read_text() == "", "without labels nothing is unlike them"
