"""Why: what an annotator starts from must be what the champion says of the pool, whether the run has stored it or not."""

import shutil
from collections.abc import Generator, Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.refusals import refused
from tests.runs import copy_run
from threestage.data import storage
from threestage.data.pool import PoolFile, listed_pool, write_pool
from threestage.labels.label_export import ExportSettings, export_labels
from threestage.prediction.champion import Champion, PoolPredictions, champion_of, champion_predictions
from threestage.prediction.pool_prediction import predict_pool_here
from threestage.prediction.pseudo_masks import FileReport, PoolTask


def rows_in(predictions: PoolPredictions) -> dict[str, dict[str, object]]:
    files = [f"{predictions.folder}/{file.name}" for file in predictions.files]
    return {row["image_id"]: row for file in files for row in pq.read_table(file).to_pylist()}


@pytest.fixture
def unpredicted(finished_run: Path, tmp_path: Path) -> tuple[str, PoolPredictions]:
    """A run whose champion's pseudo-masks are not stored, and what they were."""
    run = copy_run(finished_run, tmp_path / "run")
    champion = champion_of(str(run))
    stored = champion_predictions(champion_of(str(finished_run)), f"{tmp_path}/none")
    assert champion.stored_masks is not None
    shutil.rmtree(champion.stored_masks)
    return str(run), stored


def no_more(model: str, task: PoolTask, files: Sequence[PoolFile]) -> Generator[FileReport]:
    yield from pytest.fail(f"{len(files)} files are predicted again")


def test_missing_predictions_are_made_as_the_run_makes_them(
    unpredicted: tuple[str, PoolPredictions], tmp_path: Path
) -> None:
    run, stored = unpredicted
    made = champion_predictions(champion_of(run), f"{tmp_path}/out")
    assert rows_in(made) == rows_in(stored)
    assert not Path(stored.folder).is_relative_to(tmp_path), "what is stored is not copied"


def test_a_killed_call_continues_and_only_wanted_images_are_predicted(
    unpredicted: tuple[str, PoolPredictions], tmp_path: Path
) -> None:
    run, stored = unpredicted
    ids = sorted(rows_in(stored))
    wanted = frozenset(ids[::12])

    def killed(model: str, task: PoolTask, files: Sequence[PoolFile]) -> Generator[FileReport]:
        yield from predict_pool_here(model, task, files[:1])
        raise KeyboardInterrupt

    def rest(model: str, task: PoolTask, files: Sequence[PoolFile]) -> Generator[FileReport]:
        again.append(len(files))
        yield from predict_pool_here(model, task, files)

    again: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        champion_predictions(champion_of(run), f"{tmp_path}/out", wanted, killed)
    made = champion_predictions(champion_of(run), f"{tmp_path}/out", wanted, rest)
    assert again == [len(made.files) - 1]
    assert {i for i, row in rows_in(made).items() if row["pseudo_mask"] is not None} == wanted
    assert all(row == rows_in(stored)[i] for i, row in rows_in(made).items() if i in wanted)
    assert champion_predictions(champion_of(run), f"{tmp_path}/out", wanted, no_more) == made


def test_an_export_makes_what_is_missing_under_its_own_folder(
    unpredicted: tuple[str, PoolPredictions], tmp_path: Path
) -> None:
    run, stored = unpredicted
    first, second = list(rows_in(stored))[:2]
    (tmp_path / "list.txt").write_text(f"{first}.jpg\n{second}\nnone\n")  # by name, and by id
    before = set(storage.list_files(run))
    settings = ExportSettings(to="masks", images=f"{tmp_path}/list.txt")
    report = export_labels(run, f"{tmp_path}/out", settings)
    assert (report.images, report.not_found) == (2, ("none",))
    assert len(list((tmp_path / "out/masks").rglob("*.png"))) == 2
    assert set(storage.list_files(run)) == before
    assert list((tmp_path / "out/predictions").glob("*.parquet"))


def test_images_by_reference_are_read_only_where_they_are_wanted(
    unpredicted: tuple[str, PoolPredictions], tmp_path: Path, scenes: Path
) -> None:
    from threestage.data.listing import list_images
    from threestage.data.parallel import map_ahead

    photos = tmp_path / "photos"
    photos.mkdir()
    table = pq.read_table(next((scenes / "images").glob("train-*.parquet"))).to_pylist()
    for number, row in enumerate(table[:3]):
        (photos / f"{number}.png").write_bytes(row["image"])
    (photos / "0.png").write_bytes(b"none")
    run, listing = unpredicted[0], f"{tmp_path}/listing"
    list_images(str(photos), listing, 512, map_ahead)
    write_pool(f"{run}/pool.parquet", listed_pool(listing), str(photos))
    (photos / "0.png").unlink()  # is not asked for
    made = champion_predictions(champion_of(run), f"{tmp_path}/out", frozenset(["1", "2.png"]))
    assert [row["image_id"] for row in rows_in(made).values() if row["pseudo_mask"]] == ["1", "2"]
    assert storage.read_table(f"{made.folder}/rejects.parquet").num_rows == 0


def test_a_run_without_a_champion_or_a_pool_is_refused(finished_run: Path, tmp_path: Path) -> None:
    run = copy_run(finished_run, tmp_path / "run")
    champion: Champion = champion_of(str(run))
    (run / "pool.parquet").unlink()
    with refused("run/no-pool", "pool.parquet"):
        champion_predictions(champion, f"{tmp_path}/out")
    for number in (1, 2, 3):
        (run / f"stage{number}/done.json").unlink()
    with refused("run/no-champion", run):
        champion_of(str(run))
