"""The whole product on a real cluster: its stages through Ray Train and Ray Data, mirrored in MLflow, predicted from there."""

import io
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import copy_to, tiny_config
from tests.mlflow_server import mlflow_server
from tests.s3 import SECRET
from threestage.data import storage
from threestage.evaluation import evaluate_model
from threestage.mlflow_sync.client import open_registry
from threestage.mlflow_sync.records import RegistrySettings
from threestage.prediction.predict import PredictSettings, open_model, predict_input, read_model
from threestage.run.backend import RunCallbacks
from threestage.run.run import run

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(420),
    pytest.mark.filterwarnings("default"),  # Ray's own
]


@pytest.fixture
def tracking_uri(s3_root: str, tmp_path: Path) -> Iterator[str]:
    """Of an MLflow server that keeps its artifacts on S3."""
    with mlflow_server(tmp_path, f"{s3_root}/mlflow") as (uri, _):
        yield uri


@pytest.mark.parametrize("stages", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_everything_on_s3_with_two_workers(
    ray_cluster: None,
    s3_root: str,
    scenes: Path,
    tracking_uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stages: int,
) -> None:
    """Data set, unlabelled prefix, checkpoints, pseudo-masks, models and MLflow's artifacts; a local disk sees scratch only."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    if stages == 2:  # exports take ten seconds each: tests/servers/test_registry_mlflow.py
        monkeypatch.setattr("threestage.run.run.without_program", lambda network: None)
        monkeypatch.setattr("threestage.mlflow_sync.packing.write_program", lambda folder: "not tried")
        monkeypatch.setattr("threestage.mlflow_sync.packing._failed", {})
    copy_to(f"{s3_root}/data", scenes)
    put_photos(f"{s3_root}/photos")
    registry = {"tracking_uri": tracking_uri}
    data = {"root": f"{s3_root}/data", "labelled": 8, "unlabelled": f"{s3_root}/photos", "max_bad_fraction": 0.1}
    cluster = {"workers": 2, "predictors": stages - 1}
    chosen = {"stage2__reliable_share": 0.8} if stages == 3 else {}
    config = tiny_config(scenes, stages=stages, data=data, cluster=cluster, registry=registry, **chosen)
    rows: list[tuple[str, Mapping[str, float]]] = []
    warnings: list[str] = []
    out = f"{s3_root}/run"
    results = run(config, out, False, RunCallbacks(lambda stage, row: rows.append((stage, row)), warnings.append))

    trained = ["stage1", "stage2", "stage3"][:stages]
    assert list(results["stages"]) == trained
    assert storage.read_json(f"{out}/results.json")["stages"][trained[-1]]["steps"] == 6
    assert results["data"]["pool"] == 40 + 21 and results["stages"][trained[-1]]["rejected"] == 1
    assert any("1 images of the pool could not be used" in warning for warning in warnings)
    assert ("mean_agreement" in results["stages"]["stage1"]) == (stages == 3)
    assert {stage for stage, row in rows if "mean_iou" in row} == {*trained}
    with Image.open(io.BytesIO(storage.read_bytes(f"{out}/pictures.png"))) as pictures:
        assert pictures.width > 400
    assert storage.list_files(f"{out}/stage2/checkpoints") and list((tmp_path / "empty").iterdir()) == []

    settings = RegistrySettings(**registry)
    models = open_registry(settings).models.versions()
    assert sorted(alias for model in models for alias in model["aliases"]) == ["champion", *trained]
    run(config, out, False, RunCallbacks(lambda stage, row: pytest.fail("a finished run trained again")))
    assert len(open_registry(settings).models.versions()) == stages

    network, card = open_model(f"models:/tiny@{trained[-1]}", settings)
    model, wanted = read_model(f"models:/tiny@{trained[-1]}", settings), PredictSettings(max_bad_fraction=0.1)
    done = predict_input(model, f"{s3_root}/photos", f"{s3_root}/predicted", wanted)
    assert done.images == 20 and [reject.source for reject in done.rejected] == [f"{s3_root}/photos/20.jpg"]
    with Image.open(io.BytesIO(storage.read_bytes(f"{s3_root}/predicted/masks/3.png"))) as mask:
        assert mask.size == (70, 50)
    score = evaluate_model(network, card, f"{s3_root}/data", "val")["mean_iou"]
    assert score == pytest.approx(
        results["stages"][trained[-1]]["mean_iou"], abs=1e-3
    )  # another batch size rounds otherwise
    mirrored = open_registry(settings)._client.search_runs(["1"])
    assert {run.data.metrics["rejected"] for run in mirrored if "rejected" in run.data.metrics} == {1}
    assert any(uri.endswith("rejects.parquet") for uri in storage.list_files(f"{s3_root}/mlflow"))
    assert any("mlflow" in uri and uri.endswith(".safetensors") for uri in storage.list_files(s3_root))
    assert_the_secret_is_nowhere(s3_root, tmp_path)


def put_photos(prefix: str) -> None:
    """20 images of 70×50 and a broken one."""
    for number in range(20):
        stream = io.BytesIO()
        Image.new("RGB", (70, 50), (number * 12, 128, 50)).save(stream, "JPEG")
        storage.write_bytes(f"{prefix}/{number}.jpg", stream.getvalue())
    storage.write_bytes(f"{prefix}/20.jpg", b"\xff\xd8\xff")


def assert_the_secret_is_nowhere(s3_root: str, folder: Path) -> None:
    """In no object (checkpoints, records, MLflow's artifacts), no log of Ray's, no file of MLflow's server."""
    found = [uri for uri in storage.list_files(s3_root) if SECRET.encode() in storage.read_bytes(uri)]
    logs = [path for place in (Path("/tmp/ray/session_latest/logs"), folder) for path in place.rglob("*")]
    assert any(path.suffix == ".log" for path in logs)
    found += [str(path) for path in logs if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert found == []
