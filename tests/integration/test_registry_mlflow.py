"""Why: MLflow must hold each run once, however often and wherever a recording was cut, and give back the very model."""

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.mlflow_server import mlflow_server
from threestage import registry as registry_module
from threestage.errors import InputError
from threestage.models.export import ModelCard, save_model
from threestage.models.network import NetworkSettings, build_network
from threestage.registry import Registry, RegistrySettings, StageRecord, open_registry

pytestmark = pytest.mark.integration

CLASSES = ("background", "disc", "square")


def write_model(folder: Path, stage: str = "stage3", seed: int = 0, downscale: int = 1) -> str:
    """A model folder with a tiny, untrained network."""
    settings = NetworkSettings(encoder="test_resnet", output_stride=32, dilations=(1,))
    network = build_network(settings, len(CLASSES), seed=seed)
    colours = ((0, 0, 0), (200, 0, 0), (0, 200, 0))
    card = ModelCard(network=settings, classes=CLASSES, colours=colours, downscale=downscale, stage=stage)
    save_model(str(folder), network, card)
    return str(folder)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def record(model_dir: str) -> StageRecord:
    return StageRecord(
        run_name="team/shapes",
        run_key="/runs/it's/shapes",
        stage="stage3",
        config={"data": {"root": "s3://KEY:SECRET@bucket/shapes"}, "seed": 0},
        model_dir=model_dir,
        metrics=[{"step": step, "loss": 1 / step, "iou/disc": float("nan")} for step in range(1, 801)],
        summary={"mean_iou": 0.625, "mean_confidence": 0.9},
        tags={"data_digest": "d" * 64, "encoder": "test_resnet"},
    )


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh store costs seconds of waiting for the disk: make one, hand out copies."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    open_registry(RegistrySettings(tracking_uri=f"sqlite:///{path}", experiment="other"))
    return path


@pytest.fixture
def registry(tmp_path: Path, empty_store: Path) -> Registry:
    path = tmp_path / "a folder/mlflow.db"
    path.parent.mkdir()
    shutil.copy(empty_store, path)
    return open_registry(RegistrySettings(tracking_uri=f"sqlite:///{path}"))


def runs_of(registry: Registry) -> list[Any]:
    experiment = registry._client.get_experiment_by_name("threestage")
    return list(registry._client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"]))


def test_a_stage_is_recorded_once_with_all_that_belongs_to_it(
    registry: Registry, record: StageRecord, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = dict(os.environ)
    first = registry.record_stage(record)
    again = registry.record_stage(record)
    assert first == again
    assert (first.name, first.version, first.alias) == ("team-shapes", 1, "stage3")

    parent, stage = runs_of(registry)
    assert stage.info.run_id == first.run_id
    assert stage.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert (parent.info.status, stage.info.status) == ("RUNNING", "FINISHED")
    assert stage.data.params == parent.data.params == {"data.root": "s3://bucket/shapes", "seed": "0"}
    assert stage.data.metrics["mean_iou"] == 0.625
    assert len(registry._client.get_metric_history(stage.info.run_id, "loss")) == 800
    assert [entry.dataset.name for entry in stage.inputs.dataset_inputs] == ["shapes"]
    assert (tmp_path / "a folder/mlartifacts" / stage.info.run_id / "artifacts/config.yaml").is_file()
    stored = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"SECRET" not in stored
    assert capfd.readouterr() == ("", "")
    assert dict(os.environ) == before


@pytest.mark.parametrize("killed_in", ["_describe", "_log_data_set", "_register", "_complete"])
def test_a_killed_recording_is_completed_by_the_next(
    registry: Registry, record: StageRecord, monkeypatch: pytest.MonkeyPatch, killed_in: str
) -> None:
    original = getattr(Registry, killed_in)

    def work_then_die(*arguments: Any) -> None:
        original(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Registry, killed_in, work_then_die)
        registry.record_stage(record)
    version = registry.record_stage(replace(record, config={**record.config, "seed": 1}))
    assert version.version == 1
    assert len(runs_of(registry)) == 2
    assert len(registry._client.get_metric_history(version.run_id, "loss")) == 800
    assert [row["aliases"] for row in registry.list_models()] == [["stage3"]]


def test_stages_share_a_parent_and_a_retrained_one_gets_a_version_of_its_own(
    registry: Registry, record: StageRecord, tmp_path: Path
) -> None:
    registry.record_stage(replace(record, stage="stage1", summary={}))
    registry.record_stage(record)
    newer = registry.record_stage(replace(record, model_dir=write_model(tmp_path / "newer", seed=1)))
    assert newer.version == 3
    rows = registry.list_models()
    assert [(row["version"], row["stage"], row["aliases"]) for row in rows] == [
        (3, "stage3", ["stage3"]),
        (2, "stage3", []),
        (1, "stage1", ["stage1"]),
    ]
    assert [row["mean_iou"] for row in rows] == [0.625, 0.625, None]
    assert rows[0]["run_id"] == newer.run_id and rows[0]["tracking_uri"] == registry.uri
    assert sum("mlflow.parentRunId" in run.data.tags for run in runs_of(registry)) == 3
    assert len(runs_of(registry)) == 4


def test_the_parent_is_closed_with_its_final_values_and_files(
    registry: Registry, record: StageRecord, tmp_path: Path
) -> None:
    registry.record_stage(record)
    report = tmp_path / "report.html"
    report.write_text("<p>first</p>")
    for text, mean_iou in (("first", 0.5), ("second", 0.4), ("second", 0.4)):
        report.write_text(text)
        run_id = registry.close_run(record.run_key, "FINISHED", {"mean_iou": mean_iou}, {"report.html": str(report)})
    parent = runs_of(registry)[0]
    assert (parent.info.run_id, parent.info.status) == (run_id, "FINISHED")
    assert parent.data.metrics["mean_iou"] == 0.4
    assert len(registry._client.get_metric_history(run_id, "mean_iou")) == 2
    assert (tmp_path / f"a folder/mlartifacts/{run_id}/artifacts/report.html").read_text() == "second"


def test_pull_gives_back_the_very_files_and_names_what_is_wrong(
    registry: Registry, record: StageRecord, tmp_path: Path
) -> None:
    version = registry.record_stage(record)
    for uri in ("models:/team-shapes@stage3", "models:/team-shapes/1"):
        folder = registry.pull(uri, tmp_path / "pulled")
        assert sorted(path.name for path in folder.iterdir()) == ["model.json", "model.safetensors"]
        for path in folder.iterdir():
            assert path.read_bytes() == Path(record.model_dir, path.name).read_bytes()
    for wrong in ("models:/team-shapes@stage2", "models:/team-shapes/7", "models:/other@stage3", "team-shapes"):
        with pytest.raises(InputError, match=wrong):
            registry.pull(wrong, tmp_path / "wrong")
    artifacts = tmp_path / "a folder/mlartifacts" / version.run_id / "artifacts"
    (artifacts / "model/artifacts/model/model.safetensors").write_bytes(b"tampered")
    with pytest.raises(InputError, match="not what was registered"):
        registry.pull("models:/team-shapes@stage3", tmp_path / "wrong")


def test_a_model_folder_without_weights_is_named(registry: Registry, record: StageRecord, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.safetensors"):
        registry.record_stage(replace(record, model_dir=str(tmp_path)))
    assert runs_of(registry) == []


@pytest.mark.filterwarnings("ignore")  # MLflow's and pandas' own, when a model is loaded
@pytest.mark.parametrize("downscale", [1, 2])
def test_the_packed_model_loads_without_pickle_and_predicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, downscale: int
) -> None:
    import mlflow.pyfunc

    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    folder = Path(write_model(tmp_path / "model", downscale=downscale))
    registry_module.pack_model({path.name: path.read_bytes() for path in folder.iterdir()}, tmp_path / "packed")
    assert not list((tmp_path / "packed").rglob("*.pkl"))

    model = mlflow.pyfunc.load_model(str(tmp_path / "packed"))
    images = np.random.default_rng(0).integers(0, 256, (2, 33, 47, 3), dtype=np.uint8)
    class_ids = model.predict(images)
    assert (class_ids.shape, class_ids.dtype) == ((2, 33, 47), np.uint8)
    if downscale == 1:
        network = build_network(NetworkSettings(encoder="test_resnet", output_stride=32, dilations=(1,)), len(CLASSES))
        with torch.inference_mode():
            logits, _ = network.eval()(torch.from_numpy(images).permute(0, 3, 1, 2) / 255)
        np.testing.assert_array_equal(class_ids, logits.argmax(1).numpy())


@pytest.fixture
def server(tmp_path: Path, empty_store: Path) -> Iterator[tuple[str, int]]:
    shutil.copy(empty_store, tmp_path / "server.db")
    with mlflow_server(tmp_path, str(tmp_path / "up")) as started:
        yield started


def test_with_a_server_everything_works_and_its_death_is_told_at_once(
    server: tuple[str, int], record: StageRecord, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    uri, group = server
    registry = open_registry(RegistrySettings(tracking_uri=uri, model_name="shapes"))
    version = registry.record_stage(record)
    assert registry.record_stage(record) == version
    assert len(runs_of(registry)) == 2
    registry.close_run(record.run_key, "FINISHED", {"mean_iou": 0.5}, {"x/card.json": f"{record.model_dir}/model.json"})
    assert [(row["name"], row["version"], row["aliases"]) for row in registry.list_models()] == [
        ("shapes", 1, ["stage3"])
    ]
    pulled = registry.pull("models:/shapes@stage3", tmp_path / "pulled")
    assert json.loads((pulled / "model.json").read_text())["classes"] == list(CLASSES)
    assert (pulled / "model.safetensors").read_bytes() == Path(record.model_dir, "model.safetensors").read_bytes()

    os.killpg(group, signal.SIGSTOP)
    assert_told_within(8, registry, record, uri)
    os.killpg(group, signal.SIGCONT)
    assert registry.record_stage(record) == version
    os.killpg(group, signal.SIGKILL)
    assert_told_within(4, registry, record, uri)
    with pytest.raises(InputError, match=uri):
        open_registry(RegistrySettings(tracking_uri=uri))
    assert capfd.readouterr() == ("", "")


def assert_told_within(limit_s: float, registry: Registry, record: StageRecord, uri: str) -> None:
    start = time.monotonic()
    with pytest.raises(InputError, match=uri):
        registry.record_stage(record)
    assert time.monotonic() - start < limit_s
