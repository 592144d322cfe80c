"""Why: MLflow must hold each run once, however often and wherever a recording was cut, and give back the very model."""

import base64
import hashlib
import io
import json
import os
import shutil
import signal
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from tests.bad_inputs import models as bad_models
from tests.mlflow_server import die_after, mlflow_server
from tests.narrow_resnet import NAME as NARROW
from tests.refusals import refused
from threestage.cli.app import app
from threestage.cli.models import lineage_tree
from threestage.config import load
from threestage.mlflow_sync import packing
from threestage.mlflow_sync.client import MAX_DESCRIPTION, Registry, open_models, open_registry
from threestage.mlflow_sync.connection import shortened
from threestage.mlflow_sync.packing import pack_model, write_card
from threestage.mlflow_sync.records import RegistrySettings, StageRecord
from threestage.mlflow_sync.run_sync import describe
from threestage.models.export import ModelCard, load_card, save_model
from threestage.models.network import build_network
from threestage.models.settings import NetworkSettings
from threestage.prediction.predict import PredictSettings, predict_input, read_model

CLASSES = ("background", "disc", "square")
ROWS = [{"step": step, "loss": 1 / step, "iou/disc": float("nan")} for step in range(1, 801)]


def write_model(folder: Path, stage: str = "stage3", seed: int = 0, downscale: int = 1) -> str:
    """A model folder with a tiny, untrained network. Of the seeds, `exported_once` has the program of the first alone."""
    settings = NetworkSettings(encoder=NARROW, output_stride=32, dilations=(1,))
    network = build_network(settings, len(CLASSES), seed=seed)
    colours = ((0, 0, 0), (200, 0, 0), (0, 200, 0))
    card = ModelCard(network=settings, classes=CLASSES, colours=colours, downscale=downscale, stage=stage)
    save_model(str(folder), network, card)
    return str(folder)


def settings_of(root: str) -> dict[str, Any]:
    return load("demo", [f"data.root={root}"]).model_dump(mode="json")


def digest_of(model_dir: str) -> str:
    return hashlib.sha256(Path(model_dir, "model.safetensors").read_bytes()).hexdigest()


def lineage_of(stage: str, digest: str, root: str = "/shapes", **changes: Any) -> dict[str, Any]:
    """Of a stage without a teacher."""
    images = {"name": "shapes val", "images": 9, "digest": "v" * 64}
    data = {"root": root, "name": "shapes", "version": 2, "digest": "d" * 64}
    return {
        "run": "/runs/shapes", "stage": stage, "model_digest": digest, "code_version": "0", "data": data, "labelled": images,
        "validation": images, "split_seed": 0, "teacher": None, "learnt_from": None, "confidence_threshold": None,
        "made": None, **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def record(model_dir: str) -> StageRecord:
    return StageRecord(
        run_name="team/shapes",
        run_key="/runs/it's/shapes",
        stage="stage3",
        attempt="a",
        config=settings_of("s3://KEY:SECRET@bucket/shapes"),
        rows=ROWS[:8],
        model_dir=model_dir,
        summary={"mean_iou": 0.625, "mean_confidence": 0.9, "iou/disc": 0.625},
        tags={"data_digest": "d" * 64, "encoder": NARROW},
        lineage=lineage_of("stage3", digest_of(model_dir), "s3://KEY:SECRET@bucket/shapes"),
    )


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
    tags = {**record.tags, "labelled": "12", "code_version": "0", "continued_from": "s3://KEY:SECRET@bucket/before"}
    record, before = replace(record, rows=ROWS, tags=tags, steps_before=1000), dict(os.environ)
    first = registry.record_stage(record)
    again = registry.record_stage(record)
    assert first == again
    assert (first.name, first.version, first.alias) == ("team-shapes", 1, "stage3")

    experiment = registry._client.get_experiment_by_name("threestage")
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    parent, stage = runs_of(registry)
    assert stage.info.run_id == first.run_id
    assert stage.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert (parent.info.status, stage.info.status) == ("RUNNING", "FINISHED")
    assert stage.data.params == parent.data.params
    assert (stage.data.params["data.root"], stage.data.params["seed"]) == ("s3://bucket/shapes", "0")
    assert stage.data.metrics["mean_iou"] == 0.625
    assert len(registry._client.get_metric_history(stage.info.run_id, "loss")) == 800
    for run in (parent, stage):
        assert [entry.dataset.name for entry in run.inputs.dataset_inputs] == ["shapes"]
    for_people = {tag for tag in stage.data.tags if not tag.startswith(("mlflow.", "threestage."))}
    assert for_people == {"data", "encoder", "labelled", "validation"}, "and threestage.stage"
    details = json.loads(stage.data.tags["threestage.details"])
    assert details == {"data_digest": "d" * 64, "code_version": "0", "continued_from": "s3://bucket/before"}
    assert stage.data.tags["mlflow.note.content"].startswith("**mean IoU 0.625** on 9 images of shapes val")
    assert (tmp_path / "a folder/mlartifacts" / stage.info.run_id / "artifacts/config.yaml").is_file()
    stored = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"SECRET" not in stored
    assert capfd.readouterr() == ("", "")
    new = set(os.environ) - set(before) - {"TORCHINDUCTOR_CACHE_DIR"}  # torch's own, when it traces first
    assert not new and {name: os.environ[name] for name in before} == before


@pytest.mark.parametrize(
    ("call", "number"),
    [("log_batch", 2), ("log_inputs", 1), ("log_artifacts", 1), ("create_model_version", 1)],
)
def test_a_killed_recording_is_completed_by_the_next(
    registry: Registry, record: StageRecord, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        die_after(patch, call, number)
        registry.record_stage(record)
    version = registry.record_stage(replace(record, config={**record.config, "seed": 1}))
    assert version.version == 1
    assert len(runs_of(registry)) == 2
    assert len(registry._client.get_metric_history(version.run_id, "loss")) == 8
    assert [row["aliases"] for row in registry.models.versions()] == [["champion", "stage3"]]


def test_the_parent_has_the_curves_of_all_stages(registry: Registry, record: StageRecord) -> None:
    rows = [{"step": step, "mean_iou": step / 10, "supervised_loss": 1.0, "iou/disc": 0.5} for step in (2, 4)]
    first = replace(record, stage="stage1", rows=rows, summary={})
    for stage in (
        first,
        first,
        replace(record, rows=rows[:1], steps_before=4),
        replace(record, rows=rows, steps_before=4),
    ):
        registry.record_rows(stage)
    parent = runs_of(registry)[0]
    assert set(parent.data.metrics) == {"mean_iou", "supervised_loss"}
    history = registry._client.get_metric_history(parent.info.run_id, "mean_iou")
    assert [(point.step, point.value) for point in history] == [(2, 0.2), (4, 0.4), (6, 0.2), (8, 0.4)]


def test_a_run_is_described_by_its_score_and_verdict(registry: Registry) -> None:
    stages = {"stage1": {"mean_iou": 0.5}, "stage2": {"mean_iou": 0.625}}
    text = describe({"stages": stages, "no_verdict": "why"})
    assert (
        text.startswith("**mean IoU 0.625** by stage2") and "stage1 0.500" in text and text.endswith("measured: why.")
    )
    registry.close_run("key", "FINISHED", {}, description=text)
    assert runs_of(registry)[0].data.tags["mlflow.note.content"] == text


def test_stages_share_a_parent_and_a_retrained_one_gets_a_version_of_its_own(
    registry: Registry, record: StageRecord, tmp_path: Path
) -> None:
    registry.record_stage(replace(record, stage="stage1", summary={}))
    registry.record_stage(record)
    trained_again = write_model(tmp_path / "newer", seed=1)
    lineage = lineage_of("stage3", digest_of(trained_again))
    newer = registry.record_stage(replace(record, attempt="b", model_dir=trained_again, lineage=lineage))
    assert newer.version == 3
    rows = registry.models.versions()
    assert [(row["version"], row["stage"], row["aliases"]) for row in rows] == [
        (3, "stage3", ["stage3"]),
        (2, "stage3", ["champion"]),
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
    for uri, program in (("models:/team-shapes@stage3", ["program.pt2"]), ("models:/team-shapes/1", [])):
        folder = registry.models.pull(uri, tmp_path / "pulled", program=bool(program))
        names = sorted(path.name for path in folder.iterdir())
        assert names == ["README.md", "lineage.json", "model.json", "model.safetensors", *program]
        for path in Path(record.model_dir).iterdir():
            assert path.read_bytes() == (folder / path.name).read_bytes()
    for wrong in ("models:/team-shapes@stage2", "models:/team-shapes/7", "models:/other@stage3"):
        with refused("mlflow/no-model", wrong):
            registry.models.pull(wrong, tmp_path / "wrong")
    with refused("mlflow/no-model", "team-shapes"):
        registry.models.pull("team-shapes", tmp_path / "wrong")
    artifacts = tmp_path / "a folder/mlartifacts" / version.run_id / "artifacts"
    for name in names:
        file = artifacts / "model/artifacts/model" / name
        before = file.read_bytes()
        file.write_bytes(before + b" ")
        with refused("models/changed-file", name):
            registry.models.pull("models:/team-shapes@stage3", tmp_path / "wrong")
        file.write_bytes(before)
    assert set(json.loads(registry._client.get_model_version("team-shapes", "1").tags["threestage.files"])) == {
        path.relative_to(artifacts / "model").as_posix() for path in (artifacts / "model").rglob("*") if path.is_file()
    }


def test_a_version_of_an_older_threestage_is_pulled_with_a_warning(
    registry: Registry, record: StageRecord, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    version = registry.record_stage(record)
    registry._client.delete_model_version_tag("team-shapes", "1", "threestage.files")
    folder = registry.models.pull("models:/team-shapes/1", tmp_path / "pulled", program=True)
    assert (folder / "program.pt2").exists()
    assert "README.md, lineage.json, model.json, program.pt2 were changed" in capfd.readouterr().err
    artifacts = tmp_path / "a folder/mlartifacts" / version.run_id / "artifacts"
    (artifacts / "model/artifacts/model/model.safetensors").write_bytes(b"tampered")
    with refused("models/changed-file", "model.safetensors"):
        registry.models.pull("models:/team-shapes/1", tmp_path / "wrong")


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_cannot_be_exported_is_registered_without_its_program(
    registry: Registry, record: StageRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow.pyfunc

    tries: list[Path] = []

    def fails(folder: Path) -> str:
        tries.append(folder)
        return "UserError: no such op"

    monkeypatch.setattr(packing, "_failed", {})
    monkeypatch.setattr(packing, "write_program", fails)
    first = registry.record_stage(
        replace(record, stage="stage2", lineage=lineage_of("stage2", digest_of(record.model_dir)))
    )
    version = registry.record_stage(record)
    assert registry.record_stage(record) == version
    assert (first.no_program, version.no_program, len(tries)) == ("UserError: no such op",) * 2 + (1,)
    folder = registry.models.pull("models:/team-shapes@stage3", tmp_path / "pulled")
    assert (
        "no exported program, so `mlflow.pyfunc` cannot run it: UserError: no such op"
        in (folder / "README.md").read_text()
    )
    with refused("models/no-program", "--program"):
        registry.models.pull("models:/team-shapes@stage3", tmp_path / "other", program=True)
    packed = tmp_path / "a folder/mlartifacts" / version.run_id / "artifacts/model"
    with pytest.raises(ValueError, match=r"no program\.pt2: .*threestage predict"):
        mlflow.pyfunc.load_model(str(packed))


def test_weights_that_the_stage_did_not_end_with_are_refused(registry: Registry, record: StageRecord) -> None:
    with refused("models/changed-file", record.model_dir, "stage3"):
        registry.record_stage(replace(record, lineage=lineage_of("stage3", "other")))


def test_a_folder_with_a_readme_of_its_own_takes_no_model(
    registry: Registry, record: StageRecord, tmp_path: Path
) -> None:
    registry.record_stage(record)
    (tmp_path / "README.md").write_text("mine")
    with refused("data/foreign-folder", "README.md"):
        registry.models.pull("models:/team-shapes@stage3", tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_reading_creates_nothing(tmp_path: Path) -> None:
    with refused("mlflow/no-store", "typo/mlflow.db", "--tracking-uri"):
        open_models(RegistrySettings(tracking_uri=f"sqlite:///{tmp_path}/typo/mlflow.db"))
    assert list(tmp_path.iterdir()) == []


def test_a_card_of_many_classes_fits_the_column_of_every_database(record: StageRecord) -> None:
    card = load_card(record.model_dir).model_copy(update={"classes": tuple(f"a class {i}" for i in range(255))})
    text = write_card("shapes", card, record)
    assert len(text) > MAX_DESCRIPTION and len(shortened(text, MAX_DESCRIPTION)) == MAX_DESCRIPTION == 5000


def test_a_model_folder_without_weights_is_named(registry: Registry, record: StageRecord, tmp_path: Path) -> None:
    with refused("models/no-model", tmp_path, "model.safetensors"):
        registry.record_stage(replace(record, model_dir=str(tmp_path)))
    assert runs_of(registry) == []


@pytest.mark.filterwarnings("ignore")  # MLflow's and pandas' own, when a model is loaded
@pytest.mark.parametrize("downscale", [1, 2])
def test_the_packed_model_loads_without_pickle_and_says_what_predict_says(
    tmp_path: Path, record: StageRecord, monkeypatch: pytest.MonkeyPatch, downscale: int
) -> None:
    import mlflow.pyfunc

    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    folder = Path(write_model(tmp_path / "model", downscale=downscale))
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    pack_model(files, tmp_path / "packed", record, "shapes")
    assert not list((tmp_path / "packed").rglob("*.pkl"))

    model = mlflow.pyfunc.load_model(str(tmp_path / "packed"))
    assert model.input_example.shape == (1, 64, 96, 3)
    for height, width in ((133, 147), (96, 200), (256, 80)):
        images = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
        expected = predicted_by_command(folder, images, tmp_path / f"{height}")
        class_ids = model.predict(images)
        assert (class_ids.shape, class_ids.dtype) == ((2, height, width), np.uint8)
        np.testing.assert_array_equal(class_ids, expected)
        both = model.predict(images, params={"confidence": True})
        np.testing.assert_array_equal(both["class_ids"], expected)
        stored = predicted_by_command(folder, images, tmp_path / f"{height}", "confidence") / 255
        assert np.abs(both["confidence"] - stored).max() <= 0.51 / 255
        np.testing.assert_array_equal(model.predict([as_base64(image) for image in images]), expected)
    for shape in ((1, 20, 30), (0, 64, 64), (2, 1, 90), (1100, 5, 4)):
        assert model.predict(np.zeros((*shape, 3), np.uint8)).shape == shape
    with pytest.raises(Exception, match="sides up to"):
        model.predict(np.zeros((1, 2, 40000, 3), np.uint8))

    pandas = pytest.importorskip("pandas")
    small, large = (as_base64(np.full((size, 48, 3), 90, np.uint8)) for size in (40, 50))
    for served in ([{"b64": small}], {"b64": [small]}, pandas.DataFrame({"image": [small]}), np.array([small])):
        assert model.predict(served).shape == (1, 40, 48)
    for refused_images, reason in (
        ([small, large], "2 sizes"),
        ([small, small[:60]], "image 1: not a PNG"),
        (["ü"], "image 0"),
        ([as_base64(np.zeros((8, 8, 4), np.uint8))], "RGBA"),
    ):
        with pytest.raises(Exception, match=reason):
            model.predict(refused_images)


def as_base64(image: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def predicted_by_command(model: Path, images: np.ndarray, folder: Path, what: str = "masks") -> np.ndarray:
    """Masks, or confidences as bytes, of `threestage predict --local --confidence`."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"images/{number}.png")
    files = read_model(str(model), RegistrySettings())
    predict_input(files, str(folder / "images"), str(folder / "out"), PredictSettings(confidence=True))
    return np.stack([np.array(Image.open(folder / f"out/{what}/{number}.png")) for number in range(len(images))])


@pytest.mark.filterwarnings("ignore")  # MLflow's own
def test_a_changed_file_and_a_pickled_object_are_refused(tmp_path: Path, record: StageRecord) -> None:
    import mlflow.pyfunc

    files = {path.name: path.read_bytes() for path in Path(record.model_dir).iterdir()}
    pack_model(files, tmp_path / "packed", record, "shapes")
    program = tmp_path / "packed/artifacts/model/program.pt2"
    shutil.copy(program, tmp_path / "whole.pt2")
    with zipfile.ZipFile(tmp_path / "whole.pt2") as whole, zipfile.ZipFile(program, "w") as archive:
        for entry in whole.infolist():
            evil = entry.filename.endswith("sample_inputs/model.pt")
            archive.writestr(entry.filename, pickled_call(tmp_path / "touched") if evil else whole.read(entry))
    with pytest.raises(ValueError, match=r"program\.pt2 is missing or is not what was registered"):
        mlflow.pyfunc.load_model(str(tmp_path / "packed"))
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        bad_models.packed_model()._load_program(program, torch.device("cpu"))
    assert not (tmp_path / "touched").exists()


def pickled_call(path: Path) -> bytes:
    """What touches a file when it is unpickled."""

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(path),)

    stream = io.BytesIO()
    torch.save(Evil(), stream)
    return stream.getvalue()


def test_the_champion_moves_only_to_a_better_one_on_the_same_images(
    registry: Registry, record: StageRecord, tmp_path: Path
) -> None:
    digest = digest_of(record.model_dir)
    others = lineage_of("stage3", digest, validation={"name": "other val", "images": 3, "digest": "o" * 64})
    named = {"name": "renamed val", "images": 3, "digest": "v" * 64}
    elsewhere, smaller = (
        lineage_of("stage3", digest, validation=named | {"name": name}) for name in ("renamed val", "x at 1/2 size")
    )
    tries: tuple[tuple[float, dict[str, Any]], ...]
    tries = (
        (0.5, {}), (0.4, {}), (0.5, {}), (0.6, {}), (0.9, {"lineage": others}),
        (0.5, {"lineage": elsewhere}), (0.9, {"lineage": smaller}),
    )  # fmt: skip
    decisions = [
        registry.record_stage(replace(record, attempt=str(number), summary={"mean_iou": score}, **changes)).champion
        for number, (score, changes) in enumerate(tries)
    ]
    assert [text.split(":")[0] for text in decisions] == [
        "the champion", "not the champion", "not the champion", "the champion", "not compared",
        "not the champion", "not compared",
    ]  # fmt: skip
    champion = {row["version"]: "champion" in row["aliases"] for row in registry.models.versions()}
    assert champion == {1: False, 2: False, 3: False, 4: True, 5: False, 6: False, 7: False}
    row, before = registry.models.promote("models:/team-shapes/2")
    assert (row["version"], row["aliases"]) == (2, ["champion"]) and before is not None and before["version"] == 4
    again = registry.record_stage(replace(record, attempt="3", summary={"mean_iou": 0.6}))
    assert again.version == 4, "the same record again moves nothing back"
    assert registry.models.promote("models:/team-shapes@champion")[0]["version"] == 2
    with refused("storage/scheme", "s3://bucket/model"):
        registry.models.pull("models:/team-shapes@champion", "s3://bucket/model")


def test_a_champion_waits_for_a_person_and_is_rolled_back(registry: Registry, record: StageRecord) -> None:
    def registered(score: float, approve: bool = True) -> str:
        settings = RegistrySettings(tracking_uri=registry.uri, approve_champion=approve)
        attempt = replace(record, attempt=str(score), summary={"mean_iou": score})
        return open_registry(settings).record_stage(attempt).champion

    def aliases() -> dict[str, int]:
        rows = registry.models.versions()
        return {alias: row["version"] for row in rows for alias in row["aliases"] if alias != "stage3"}

    assert "--approve" in registered(0.5) and aliases() == {"candidate": 1}
    assert "version 1 waits" in registered(0.4) and aliases() == {"candidate": 1}
    candidate = "models:/team-shapes@candidate"
    with refused("models/needs-approval", "models:/team-shapes/1", "--approve"):
        registry.models.promote(candidate)
    registry.models.promote(candidate, approved=True)
    assert aliases() == {"champion": 1}
    assert "waits" in registered(0.7, approve=False), "the project asks for a person, whatever a run's settings say"
    assert aliases() == {"champion": 1, "candidate": 3}
    registry.models.promote(candidate, approved=True)
    registry.models.promote("models:/team-shapes/2", approved=True)
    registry._client.delete_model_version("team-shapes", "3")
    back, before = registry.models.roll_back("models:/team-shapes@champion")
    assert (back["version"], before["version"]) == (1, 2) and aliases() == {"champion": 1}, (
        "a deleted one is passed over"
    )
    with refused("models/no-earlier-champion", "models:/team-shapes"):
        registry.models.roll_back("models:/team-shapes@champion")


def test_the_commands_list_promote_pull_and_tell_the_lineage(
    registry: Registry, record: StageRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry.uri)
    monkeypatch.setenv("COLUMNS", "200")
    for number, score in enumerate((0.5, 0.4)):
        registry.record_stage(replace(record, attempt=str(number), summary={"mean_iou": score}))
    assert "champion" in command("list") and "shapes val" in command("list")
    rows = json.loads(command("list", "--json"))
    assert [(row["version"], row["aliases"], row["mean_iou"]) for row in rows] == [
        (2, ["stage3"], 0.4),
        (1, ["champion"], 0.5),
    ]
    told = command("promote", "models:/team-shapes@stage3")
    assert "is version 2 (stage3, mean IoU 0.400 on shapes val); before, it was version 1" in " ".join(told.split())
    told = command("rollback", "models:/team-shapes@champion")
    assert "is version 1 (stage3, mean IoU 0.500 on shapes val); before, it was version 2" in " ".join(told.split())
    command("promote", "models:/team-shapes/2", "--approve")
    command("pull", "models:/team-shapes@champion", str(tmp_path / "pulled"))
    card = (tmp_path / "pulled/README.md").read_text()
    assert "| disc | not in these images |" in card and "SECRET" not in card
    assert "team-shapes version 2 @champion, @stage3" in command("lineage", "models:/team-shapes/2")
    assert (
        json.loads(command("lineage", "models:/team-shapes/1", "--json"))["lineage"]["data"]["root"]
        == "s3://bucket/shapes"
    )


def command(*arguments: str) -> str:
    """What `threestage models …` prints."""
    done = CliRunner().invoke(app, ["models", *arguments])
    assert done.exit_code == 0, done.output
    return done.output


def test_lineage_is_walked_both_ways(registry: Registry, record: StageRecord, tmp_path: Path) -> None:
    masks = {"uri": "/runs/shapes/pseudo_masks1", "digest": "p" * 64, "images": 5, "rejected": 1, "statistics": {}}
    folders = {stage: write_model(tmp_path / stage, stage, seed) for seed, stage in enumerate(("stage1", "stage2"))}
    one, two = (digest_of(folder) for folder in folders.values())
    teacher = {"stage": "stage1", "model_digest": one, "model": "/runs/shapes/stage1/model"}
    lineages = {
        "stage1": lineage_of("stage1", one, made=masks),
        "stage2": lineage_of("stage2", two, teacher=teacher, learnt_from=masks, confidence_threshold=0.8),
    }
    pupil = replace(record, stage="stage2", model_dir=folders["stage2"], lineage=lineages["stage2"])
    registry.record_stage(pupil)
    alone = registry.models.lineage("models:/team-shapes@stage2")
    assert alone["teacher"] == teacher and alone["pupils"] == []

    registry.record_stage(replace(record, stage="stage1", model_dir=folders["stage1"], lineage=lineages["stage1"]))
    tree = registry.models.lineage("models:/team-shapes@stage2")
    assert (tree["teacher"]["version"], tree["teacher"]["stage"], tree["teacher"]["teacher"]) == (2, "stage1", None)
    assert tree["lineage"]["learnt_from"] == masks and tree["lineage"]["confidence_threshold"] == 0.8
    back = registry.models.lineage("models:/team-shapes@stage1")
    assert [(pupil["version"], pupil["stage"]) for pupil in back["pupils"]] == [(1, "stage2")]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(lineage_tree(tree))
    text = console.export_text()
    assert "kept from confidence 0.8" in text and "made by team-shapes version 2 @stage1" in text


@pytest.fixture
def server(tmp_path: Path, empty_store: Path) -> Iterator[tuple[str, int]]:
    shutil.copy(empty_store, tmp_path / "server.db")
    with mlflow_server(tmp_path, str(tmp_path / "up")) as started:
        yield started


@pytest.mark.slow
def test_with_a_server_everything_works_and_its_death_is_told_at_once(
    server: tuple[str, int], record: StageRecord, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    uri, group = server
    registry = open_registry(RegistrySettings(tracking_uri=uri, model_name="shapes"))
    version = registry.record_stage(record)
    assert registry.record_stage(record) == version
    assert len(runs_of(registry)) == 2
    registry.close_run(record.run_key, "FINISHED", {"mean_iou": 0.5}, {"x/card.json": f"{record.model_dir}/model.json"})
    assert [(row["name"], row["version"], row["aliases"]) for row in registry.models.versions()] == [
        ("shapes", 1, ["champion", "stage3"])
    ]
    pulled = registry.models.pull("models:/shapes@stage3", tmp_path / "pulled")
    assert json.loads((pulled / "model.json").read_text())["classes"] == list(CLASSES)
    assert (pulled / "model.safetensors").read_bytes() == Path(record.model_dir, "model.safetensors").read_bytes()

    os.killpg(group, signal.SIGSTOP)
    assert_told_within(8, registry, record, uri)
    os.killpg(group, signal.SIGCONT)
    assert registry.record_stage(record) == version
    os.killpg(group, signal.SIGKILL)
    assert_told_within(4, registry, record, uri)
    with refused("mlflow/unavailable", uri):
        open_registry(RegistrySettings(tracking_uri=uri))
    assert capfd.readouterr() == ("", "")


def assert_told_within(limit_s: float, registry: Registry, record: StageRecord, uri: str) -> None:
    start = time.monotonic()
    with refused("mlflow/unavailable", uri):
        registry.record_stage(record)
    assert time.monotonic() - start < limit_s
