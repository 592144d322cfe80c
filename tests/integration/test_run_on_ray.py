"""The whole product on a real cluster: three stages through Ray Train and Ray Data, mirrored in MLflow, predicted from there."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import tiny_config
from threestage import runs
from threestage.evaluation import evaluate_model
from threestage.predict import open_model, predict_folder
from threestage.registry import RegistrySettings, open_registry

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(420),
    pytest.mark.filterwarnings("default"),  # Ray's own
]


def test_two_workers_train_three_stages_and_register_them(ray_cluster: None, scenes: Path, tmp_path: Path) -> None:
    registry = {"tracking_uri": f"sqlite:///{tmp_path}/mlflow.db"}
    config = tiny_config(scenes, cluster={"workers": 2, "predictors": 2}, registry=registry)
    rows: list[tuple[str, Mapping[str, float]]] = []
    out = tmp_path / "run"
    results = runs.run(config, str(out), False, lambda stage, row: rows.append((stage, row)), print)

    assert list(results["stages"]) == ["stage1", "stage2", "stage3"]
    assert json.loads((out / "results.json").read_text())["stages"]["stage3"]["steps"] == 6
    assert {stage for stage, row in rows if "mean_iou" in row} == {"stage1", "stage2", "stage3"}
    with Image.open(out / "pictures.png") as pictures:
        assert pictures.width > 400

    settings = RegistrySettings(**registry)
    models = open_registry(settings).list_models()
    assert sorted(alias for model in models for alias in model["aliases"]) == ["stage1", "stage2", "stage3"]

    runs.run(config, str(out), False, lambda stage, row: pytest.fail("a finished run trained again"), print)
    assert len(open_registry(settings).list_models()) == 3

    network, card = open_model("models:/tiny@stage3", settings)
    images = tmp_path / "images"
    images.mkdir()
    Image.fromarray(np.full((50, 70, 3), 128, np.uint8)).save(images / "grey.png")
    (images / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    done = predict_folder(network, card, str(images), str(tmp_path / "predicted"))
    assert done.images == 1 and [Path(file).name for file, _ in done.rejected] == ["broken.jpg"]
    with Image.open(tmp_path / "predicted" / "masks" / "grey.png") as mask:
        assert mask.size == (70, 50)
    score = evaluate_model(network, card, str(scenes), "val")["mean_iou"]
    assert score == pytest.approx(
        results["stages"]["stage3"]["mean_iou"], abs=1e-3
    )  # another batch size rounds otherwise
