"""Why: an annotator's hours go where this says, so the choice must be the one that its strategy defines, whatever the size of the
pool and however its files are cut."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pytest

from threestage.data import storage
from threestage.prediction.pool_features import FEATURE_SIZE, feature_schema
from threestage.selection import choice
from threestage.selection.candidates import CandidateFiles
from threestage.selection.choice import STRATEGIES, StrategyName, choose_images, nearest, survey

CLASSES = 3


def write_features(folder: Path, name: str, rows: Sequence[dict[str, Any]]) -> str:
    """A file of the pool. Rows: `id`, `entropy`, `margin`, `shares`, and `at`: the first numbers of the feature."""
    table = []
    for row in rows:
        feature = np.zeros(FEATURE_SIZE, np.float16)
        feature[: len(row.get("at", ()))] = row.get("at", ())
        shares = np.array(row.get("shares", (1, 0, 0)), np.float32)
        table.append(
            {"image_id": row["id"], "source": f"{row['id']}.jpg", "class_shares": shares.tobytes(),
             "entropy": row.get("entropy", 0.5), "margin": row.get("margin", 0.5), "feature": feature.tobytes()}
        )  # fmt: skip
    table.append({"image_id": "bad"})  # an image that could not be used
    uri = f"{folder}/{name}.parquet"
    storage.write_table(uri, pa.Table.from_pylist(table, feature_schema(CLASSES)))
    return uri


def pool_of(
    folder: Path, *files: Sequence[dict[str, Any]], covered: Sequence[str] = (), seed: int = 0
) -> CandidateFiles:
    uris = [write_features(folder, f"file{number}", rows) for number, rows in enumerate(files)]
    return CandidateFiles(uris, pa.array(covered, pa.string()), seed)


def chosen(files: CandidateFiles, strategy: StrategyName, count: int) -> list[str]:
    tables = [storage.read_table(uri).column("image_id").to_pylist() for uri in files.uris]
    return [tables[one.file][one.row] for one in choose_images(files, survey(files), STRATEGIES[strategy], count)]


FRAMES: list[dict[str, Any]] = [
    {"id": f"frame{n}", "entropy": 0.9 - n / 100, "margin": n / 100, "at": (1, n / 1000)} for n in range(10)
]
OTHERS: list[dict[str, Any]] = [
    {"id": "far", "entropy": 0.3, "margin": 0.9, "at": (0, 1)},
    {"id": "near", "entropy": 0.2, "margin": 0.5, "at": (0.9, 0.1)},
    {"id": "label", "at": (1, 1), "entropy": 1.0, "margin": 0.0},
]


def test_strategies_choose_as_they_say(tmp_path: Path) -> None:
    files = pool_of(tmp_path, FRAMES, OTHERS, covered=["label"])
    assert chosen(files, "entropy", 3) == ["frame0", "frame1", "frame2"]
    assert chosen(files, "margin", 3) == ["frame0", "frame1", "frame2"]
    assert chosen(files, "coreset", 1)[0] in ("frame0", "far"), "the farthest from the label"
    assert set(chosen(files, "combined", 2)) == {"frame0", "far"}, "of ten neighbouring frames one is chosen"
    assert set(get_args(StrategyName)) == set(STRATEGIES)


def test_rare_classes_are_worth_more(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"id": "common", "shares": (1, 0, 0), "at": (0, 1)},
        {"id": "rare", "shares": (0.5, 0.5, 0), "at": (1, 0)},
    ]
    labelled: list[dict[str, Any]] = [{"id": f"label{n}", "shares": (0.99, 0.01, 0), "at": (1, 1)} for n in range(3)]
    files = pool_of(tmp_path, rows, labelled, covered=[row["id"] for row in labelled])
    assert chosen(files, "combined", 2) == ["rare", "common"]


def test_a_seed_repeats_a_random_choice(tmp_path: Path) -> None:
    def draw(seed: int) -> list[str]:
        return chosen(pool_of(tmp_path, FRAMES, OTHERS, seed=seed), "random", 5)

    assert draw(1) == draw(1) != draw(2)
    assert len(set(draw(1))) == 5


def test_no_more_than_there_are(tmp_path: Path) -> None:
    files = pool_of(tmp_path, FRAMES[:2], covered=["frame1"])
    assert chosen(files, "combined", 5) == ["frame0"]


@pytest.mark.parametrize("strategy", get_args(StrategyName))
def test_many_passes_choose_what_one_does(
    strategy: StrategyName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pool of more images than are kept in memory, against the definition: the best of all, then the distances again."""
    random = np.random.default_rng(3)
    rows: list[dict[str, Any]] = [
        {"id": f"i{n}", "entropy": float(random.random()), "margin": float(random.random()),
         "shares": random.dirichlet(np.ones(CLASSES)), "at": random.random(5)}
        for n in range(120)
    ]  # fmt: skip
    files = pool_of(tmp_path, *(rows[start : start + 10] for start in range(0, 120, 10)), covered=["i0", "i1"])
    whole = chosen(files, strategy, 15)
    monkeypatch.setattr(choice, "KEPT", 4)
    assert chosen(files, strategy, 15) == whole
    if strategy == "coreset":
        at = {str(row["id"]): np.array(row["at"], np.float16).astype(np.float32) for row in rows}
        for number, image_id in enumerate(whole):
            centres = np.array([at[i] for i in ["i0", "i1", *whole[:number]]])
            distances = {i: float(nearest(at[i][None], centres)[0]) for i in at}
            assert distances[image_id] == pytest.approx(max(distances.values()))
