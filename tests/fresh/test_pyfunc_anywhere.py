"""Why: whoever pulls a model has mlflow, not this package; it must load there, and say what `threestage predict` says."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import tiny_config
from tests.fresh.processes import command_of
from tests.mlflow_server import mlflow_server
from tests.postgres import needs_postgres, postgres
from tests.runs import run_local
from threestage.mlflow_sync.client import open_registry
from threestage.mlflow_sync.records import RegistrySettings
from threestage.mlflow_sync.run_sync import keep_outcome, keep_settings, sync
from threestage.run.outcome import StageOutcome

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SIZES = ((120, 160), (97, 203), (256, 64))
ELSEWHERE = """
import importlib.util, sys
import mlflow, numpy as np
assert importlib.util.find_spec("threestage") is None and importlib.util.find_spec("timm") is None
model = mlflow.pyfunc.load_model("models:/tiny@champion")
images = np.load(sys.argv[1])
found = {name: model.predict(images[name]) for name in images.files}
sure = model.predict(images[images.files[0]], params={"confidence": True})
assert (sure["class_ids"] == found[images.files[0]]).all() and sure["confidence"].dtype == np.float32
np.savez(sys.argv[2], **found)
"""


@pytest.fixture(scope="module")
def run(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A finished run of `--local`."""
    config, out = tiny_config(scenes), str(tmp_path_factory.mktemp("run"))

    def record(outcome: StageOutcome) -> None:
        keep_settings(out, config.model_dump(mode="json"))
        keep_outcome(out, outcome)

    run_local(config, out, lambda stage, row: None, record=record)
    return out


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a subfolder per size and images.npz, (2,H,W,3) uint8 by the subfolder's name."""
    folder, random, batches = tmp_path_factory.mktemp("images"), np.random.default_rng(0), {}
    for height, width in SIZES:
        name = f"{height}x{width}"
        batches[name] = random.integers(0, 256, (2, height, width, 3), dtype=np.uint8)
        (folder / name).mkdir()
        for number, image in enumerate(batches[name]):
            Image.fromarray(image).save(folder / name / f"{number}.png")
    np.savez(folder / "images.npz", **batches)  # type: ignore[arg-type,unused-ignore]
    return folder


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an empty virtual environment."""
    folder = tmp_path_factory.mktemp("elsewhere")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    return folder / "bin" / "python"


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=needs_postgres)])
def tracking_uri(request: pytest.FixtureRequest, bucket: str, tmp_path: Path) -> Iterator[str]:
    """Of an MLflow server with its artifacts on S3 and its records in one of two databases."""
    if request.param == "sqlite":
        with mlflow_server(tmp_path, f"{bucket}/mlflow") as (uri, _):
            yield uri
        return
    with postgres() as database, mlflow_server(tmp_path, f"{bucket}/mlflow", database=database) as (uri, _):
        yield uri


def test_a_fresh_environment_predicts_what_the_command_predicts(
    run: str, images: Path, elsewhere: Path, tracking_uri: str, tmp_path: Path
) -> None:
    versions = sync(run, tracking_uri)
    assert [version.alias for version in versions] == ["stage1", "stage2", "stage3"]
    listed = open_registry(RegistrySettings(tracking_uri=tracking_uri)).models.versions()
    assert sum("champion" in row["aliases"] for row in listed) == 1

    command_of(elsewhere, "-m", "pip", "install", "-q", "-r", requirements(tracking_uri, tmp_path), env={})
    settings = {"MLFLOW_TRACKING_URI": tracking_uri, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    command_of(elsewhere, "-c", ELSEWHERE, str(images / "images.npz"), str(tmp_path / "found.npz"), env=settings)
    found = np.load(tmp_path / "found.npz")
    for name in (f"{height}x{width}" for height, width in SIZES):
        out = tmp_path / "predicted" / name
        command = ["predict", "models:/tiny@champion", str(images / name), str(out), "--local"]
        command_of(Path(sys.executable).with_name("threestage"), *command, env=settings)
        for number in range(2):
            np.testing.assert_array_equal(found[name][number], np.array(Image.open(out / f"masks/{number}.png")))


def requirements(tracking_uri: str, folder: Path) -> str:
    """The file that the registered model lists its needs in."""
    import mlflow

    registry = open_registry(RegistrySettings(tracking_uri=tracking_uri))
    run_id = next(row["run_id"] for row in registry.models.versions() if "champion" in row["aliases"])
    uri = f"runs:/{run_id}/model/requirements.txt"
    return str(mlflow.artifacts.download_artifacts(uri, dst_path=str(folder), tracking_uri=tracking_uri))
