"""Why: the next stage learns from the images on which a stage agrees with itself, all of them counted, on Ray as here; and a run
that does not ask for it is what it was."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests.conftest import local_config
from tests.refusals import refused
from tests.runs import run_local
from tests.store_away import StoreAway
from threestage.config import Config
from threestage.data import storage
from threestage.data.datasets import pool_set
from threestage.data.pool import IndexRow, least_agreement, load_pool, read_index
from threestage.data.records import decode_image, decode_mask
from threestage.data.samples import Decoding
from threestage.models.export import HALFWAY_MODEL, load_model
from threestage.prediction.pseudo_masks import agreement
from threestage.ray_backend.pool_reader import FilePart, FileReader

MODEL = Path("stage2/model/model.safetensors")


def quiet(stage: str, row: Mapping[str, float]) -> None:
    pass


def reliable(scenes: Path, share: float, **changes: object) -> Config:
    rates = {"optimiser__learning_rate": 5e-3, "optimiser__encoder_learning_rate": 5e-3}
    return local_config(scenes, stage2__reliable_share=share, stages=2, stage1__steps=40, **rates, **changes)


def run(config: Config, out: Path, reuse: Path | None = None) -> None:
    run_local(config, str(out), quiet, lambda text: None, reuse=None if reuse is None else str(reuse))


@pytest.fixture(scope="module")
def half(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("half")
    run(reliable(scenes, 0.5), out)
    return out


def test_agreement_is_the_mean_iou_of_the_classes_that_either_shows() -> None:
    one = torch.tensor([[[0, 0, 1, 1]], [[2, 2, 2, 2]], [[0, 1, 0, 1]]], dtype=torch.uint8)
    other = torch.tensor([[[0, 1, 1, 1]], [[2, 2, 2, 2]], [[1, 0, 1, 0]]], dtype=torch.uint8)
    assert agreement(one, other, 3).tolist() == [round(255 * (1 / 2 + 2 / 3) / 2), 255, 0]


@pytest.mark.parametrize(("share", "least"), [(1.0, 0), (0.9, 7), (0.5, 7), (0.4, 9), (0.1, 9), (0.05, 200)])
def test_the_least_agreement_lets_in_the_share_at_least(share: float, least: int) -> None:
    def row(counts: dict[int, int]) -> IndexRow:
        return IndexRow("a", sum(counts.values()), 1, 1, (), tuple(counts.get(value, 0) for value in range(256)))

    index = [row({3: 1, 7: 10}), IndexRow("no usable image", 0, 1, 1, (), ()), row({9: 8, 200: 1})]
    assert least_agreement(index, share) == least
    kept = sum(entry.images_of(least) for entry in index)
    assert kept >= share * 20 and kept == {0: 20, 7: 19, 9: 9, 200: 1}[least]


def test_a_stage_learns_from_the_half_that_is_reliable(half: Path) -> None:
    pool, index = load_pool(str(half / "pool.parquet")), read_index(str(half / "pseudo_masks1"))
    network, card = load_model(str(half / "stage1" / "model"))
    other, _ = load_model(str(half / "stage1" / HALFWAY_MODEL))
    values = {}
    for file in pool:
        images = storage.read_table(file.uri, ["image_id", "image"]).to_pylist()
        rows = pq.read_table(half / "pseudo_masks1" / file.name).to_pylist()
        for image, row in zip(images, rows, strict=True):
            pixels = torch.from_numpy(np.array(decode_image(image["image"]))).permute(2, 0, 1)[None].float() / 255
            with torch.no_grad():
                found, before = (model(pixels)[0].argmax(1).byte() for model in (network, other))
            assert np.array_equal(decode_mask(row["pseudo_mask"]), found[0])
            values[row["image_id"]] = row["agreement"]
            assert row["agreement"] == int(agreement(found, before, len(card.classes)))
    least = least_agreement(index, 0.5)
    assert least > 0 and len({*values.values()}) > 2
    reliable_ids = {image_id for image_id, value in values.items() if value >= least}
    assert len(values) / 2 <= len(reliable_ids) < len(values)
    config = reliable(half, 0.5)
    samples = pool_set(pool, str(half / "pseudo_masks1"), config.data, lambda reject: None, least).samples
    assert {sample.image_id for sample in samples} == reliable_ids
    assert sum(entry.images_of(least) for entry in index) == len(reliable_ids), "what a stream on Ray counts on"
    masks, rejects = str(half / "pseudo_masks1"), str(half / "rejects")
    reader = FileReader(masks, rejects, (0, "stage2"), Decoding(), (64, 64), least)
    parts = [FilePart(file=file, pass_=0, first=0, rows=file.rows, images=file.rows, block_rows=1) for file in pool]
    found = (reader({"part": np.array([part.model_dump_json()])}) for part in parts)
    read = [
        image_id for blocks in found for block in blocks for image_id in block["image_id"][block["filled"]].tolist()
    ]
    assert sorted(read) == sorted(reliable_ids), "and what its readers read"
    figures = json.loads((half / "results.json").read_text())["stages"]
    assert figures["stage1"]["mean_agreement"] == pytest.approx(np.mean(list(values.values())) / 255)
    assert "mean_agreement" not in figures["stage2"]


@pytest.mark.slow
def test_a_run_without_it_is_as_before_and_takes_pseudo_masks_with_it(scenes: Path, half: Path, tmp_path: Path) -> None:
    run(reliable(scenes, 1.0), tmp_path / "alone")
    shutil.copytree(half, tmp_path / "half")
    run(reliable(scenes, 1.0), tmp_path / "reusing", tmp_path / "half")
    models = [(tmp_path / out / "stage2/model/model.safetensors").read_bytes() for out in ("alone", "reusing")]
    assert models[0] == models[1] != (half / "stage2/model/model.safetensors").read_bytes()
    assert not (tmp_path / "reusing" / "pseudo_masks1").exists()
    (file, *_) = (tmp_path / "alone" / "pseudo_masks1").glob("train-*.parquet")
    assert "agreement" not in pq.read_schema(file).names


@pytest.mark.slow
def test_a_stage_that_was_the_only_one_of_its_run_serves_one_that_chooses(
    scenes: Path, half: Path, tmp_path: Path
) -> None:
    run(reliable(scenes, 1.0).model_copy(update={"stages": 1}), tmp_path / "first")
    run(reliable(scenes, 0.5), tmp_path / "second", tmp_path / "first")
    assert (tmp_path / "second" / MODEL).read_bytes() == (half / MODEL).read_bytes()
    assert not (tmp_path / "second" / "stage1").exists()


@pytest.mark.slow
def test_pseudo_masks_without_agreement_are_not_written_over(scenes: Path, half: Path, tmp_path: Path) -> None:
    run(reliable(scenes, 1.0), tmp_path / "all")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "all").rglob("*.parquet")}
    run(reliable(scenes, 0.5), tmp_path / "a", tmp_path / "all")
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "all").rglob("*.parquet")} == before
    assert (tmp_path / "a" / MODEL).read_bytes() == (half / MODEL).read_bytes()
    shutil.rmtree(tmp_path / "all" / "stage1" / HALFWAY_MODEL)  # as before there were any
    with refused("run/no-halfway-weights", "stage2.reliable_share=0.5", "stage1/halfway_model"):
        run(reliable(scenes, 0.5), tmp_path / "b", tmp_path / "all")


@pytest.mark.slow
def test_an_outage_at_half_way_costs_nothing(
    scenes: Path, half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, warnings, out = StoreAway(monkeypatch, HALFWAY_MODEL), list[str](), tmp_path / "a"

    def warn(text: str) -> None:
        warnings.append(text)
        store.down.clear()

    store.down.set()
    run_local(reliable(scenes, 0.5, training__checkpoint_every=10), str(out), quiet, warn)
    assert store.failed and "half-way" in warnings[0]
    assert (out / MODEL).read_bytes() == (half / MODEL).read_bytes()


def test_a_share_that_leaves_less_than_a_step_is_refused(scenes: Path, tmp_path: Path) -> None:
    with refused("config/batch", "stage2.unlabelled_batch=30", "20 unlabelled images"):
        run(reliable(scenes, 0.5, stage2__unlabelled_batch=30), tmp_path)
