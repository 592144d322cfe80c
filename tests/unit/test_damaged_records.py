"""A file of ours that says something else than we wrote, in JSON or Parquet, is an error of one line, whoever reads it."""

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.conftest import local_config, write_photos
from tests.refusals import refused
from tests.runs import copy_run, run_local
from threestage.data import storage
from threestage.data.ingest import IngestSettings, ingest
from threestage.data.listing import list_images
from threestage.data.publish import ENTRY, look_up_ids, row_digests
from threestage.data.records import load_manifest
from threestage.errors import InputError, StageFailure
from threestage.mlflow_sync import run_sync
from threestage.mlflow_sync.records import RegistrySettings
from threestage.prediction import predict
from threestage.report import report, scores
from threestage.run import budget, clean
from threestage.run_folder import lease, reuse
from threestage.sweeps.trials import Trial, curve_of, load_trials
from threestage.training.checkpoint import Checkpoints

WRONG: tuple[object, ...] = ([], "x", 5, None, {}, [[1]], {"a": 1})


class Registry:
    """Takes whatever it is sent."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *given: None


@pytest.fixture(scope="module")
def finished(scenes: Path, finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, an evaluation, a trial of a sweep of the version before, and photos."""
    folder = tmp_path_factory.mktemp("damaged")
    config = local_config(scenes, stages=1)
    out = str(copy_run(finished_run, folder / "run", stages=1))

    def record(outcome: Any) -> None:
        run_sync.keep_outcome(out, outcome)

    run_local(config, out, lambda stage, row: None, record=record)
    run_sync.keep_settings(out, config.model_dump(mode="json"))
    storage.write_json(f"{out}/run.json", {"run_key": "k"})
    storage.write_json(f"{out}/reused.json", {})
    costs = {"steps": {"stage1": 1}, "evaluation": 1, "pool_pass": 1}
    storage.write_json(f"{out}/budget.json", {"budget": "4h", "steps": {"stage1": 4}, "costs": costs})
    scores = {"stage": "stage1", "model": "m", "split": "val", "protocol": "p", "mean_iou": 0.5, "per_class_iou": {}}
    storage.write_json(f"{folder}/scores/metrics.json", scores)
    storage.write_json(f"{folder}/trials/0001.json", Trial(number=1, params={}, seed=0).model_dump(mode="json"))
    write_photos(folder, 3)
    return folder


def readers(folder: Path, scenes: Path) -> dict[str, Callable[[], object]]:
    run, config = str(folder / "run"), local_config(scenes, stages=1)
    digests = json.loads((folder / "run/stage1/inputs.json").read_text())
    return {
        "budget": lambda: budget.resolve(config, run, None, True),
        "clean": lambda: clean.what_is_left(run),
        "curve": lambda: curve_of(run, [1], config),
        "ingest": lambda: ingest(f"{folder}/images", f"{folder}/data", IngestSettings(format="images")),
        "list": lambda: list_images(f"{folder}/images", f"{folder}/listing", 2),
        "manifest": lambda: load_manifest(str(folder / "data")),
        "predict": lambda: predict.read_model(run, RegistrySettings()),
        "report": lambda: report.write_report(run, f"{folder}/page.html"),
        "reuse": lambda: reuse.shared_parts(config, run, {k: digests[k] for k in ("labelled", "validation")}),
        "rows": lambda: Checkpoints(f"{run}/stage1/checkpoints").rows(),
        "scores": lambda: scores.seeds_table([], [str(folder / "scores")]),
        "seeds": lambda: scores.seeds_table([run]),
        "sync": lambda: run_sync.sync(run, None, lambda text: None),
        "trials": lambda: load_trials(str(folder)),
    }


READ_BY = {
    "run/results.json": "report sync predict seeds",
    "run/config.json": "report sync",
    "run/run.json": "sync",
    "run/split.json": "report clean",
    "run/reused.json": "report sync reuse",
    "run/budget.json": "budget",
    "run/record/stage1.json": "sync",
    "run/stage1/done.json": "report sync",
    "run/stage1/inputs.json": "reuse",
    "run/stage1/result.json": "report sync curve",
    "run/pseudo_masks1/done.json": "report reuse",
    "run/stage1/checkpoints/latest.json": "rows report",
    "run/stage1/checkpoints/rows.json": "rows",
    "scores/metrics.json": "scores",
    "trials/0001.json": "trials",
    "data/manifest.json": "manifest ingest",
    "data/shards/*.json": "ingest",
    "listing/partitions.json": "list",
    "listing/ranges/0.json": "list",
}


def damaged(value: Any) -> Iterator[Any]:
    """Other values in place of the whole, and of each of its keys."""
    yield from WRONG
    for key in value if isinstance(value, dict) else ():
        yield {other: kept for other, kept in value.items() if other != key}
        wrong: object
        for wrong in ("x", None, [], {}):
            yield {**copy.deepcopy(value), key: wrong}


@pytest.mark.parametrize("name", READ_BY)
def test_json_of_another_shape(
    name: str, finished: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "_look", lambda *given: None)
    monkeypatch.setattr(run_sync, "open_registry", lambda settings: Registry())
    monkeypatch.setitem(lease.SETTLE_S, "local", 0)
    folder = Path(shutil.copytree(finished, tmp_path / "copy"))
    ask = readers(folder, scenes)
    ask["ingest"](), ask["list"]()
    (file,) = folder.glob(name)
    readers_that_refused = set()
    for wrong in damaged(json.loads(file.read_text())):
        for reader in READ_BY[name].split():
            file.parent.mkdir(exist_ok=True)  # a listing without an image removes itself
            file.write_text(json.dumps(wrong))
            try:
                ask[reader]()
            except (InputError, StageFailure) as error:
                assert "\n" not in str(error)
                readers_that_refused.add(reader)
    assert readers_that_refused, "not all of it is taken for what it is not"


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    uri = f"{tmp_path}/a.parquet"
    for content in (b"", b"PAR1", b"no table, but long enough to look for a footer"):
        storage.write_bytes(uri, content)
        for read in (storage.read_table, storage.read_metadata, lambda uri: storage.read_rows(uri, "id", ["a"])):
            with refused("storage/damaged-file", uri):
                read(uri)
    storage.write_table(uri, pa.table({"image_id": ["a"]}))
    with refused("storage/damaged-json", uri):
        storage.read_models(uri, Trial)


def test_damaged_rows_of_a_data_set_are_named(tmp_path: Path) -> None:
    write_photos(tmp_path, 3)
    (file,) = ingest(f"{tmp_path}/images", f"{tmp_path}/data", IngestSettings(format="images")).manifest.files
    uri = f"{tmp_path}/data/{file.path}"
    table = storage.read_table(uri)
    assert [image_id for image_id, _, _ in row_digests(f"{tmp_path}/data", file)] == table["image_id"].to_pylist()
    for digests, code in (
        (None, "storage/damaged-json"),
        ("[]", "data/damaged-file"),
        ('["a", "b", "c"]', "storage/damaged-json"),
        ('[["a", null], ["b", null], ["c", null]]', "storage/damaged-json"),
    ):
        storage.write_table(
            uri, table.replace_schema_metadata(digests and {"threestage.row_digests": digests.encode()})
        )
        with refused(code, uri):
            row_digests(f"{tmp_path}/data", file)


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    assert ENTRY.itemsize == 42  # docs/data.md
    for number, (bits, part) in enumerate([(0, b"no array"), (0, b""), ("x", b""), (64, b""), (-1, b"")]):
        storage.write_json(f"{tmp_path}/{number}/index.json", {"bits": bits})
        storage.write_bytes(f"{tmp_path}/{number}/0.npy", part)
        with refused("storage/damaged-json" if bits else "data/damaged-file", f"{tmp_path}/{number}/"):
            look_up_ids(f"{tmp_path}/{number}", ["a"])
