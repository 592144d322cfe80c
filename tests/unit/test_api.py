"""`import threestage as ts`: from folders to a prediction in Python."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import threestage as ts
from tests.conftest import write_photos
from tests.narrow_resnet import NAME as NARROW
from tests.refusals import refused

SMALL = {
    "network.encoder": NARROW, "network.pretrained": False, "network.head": "deeplabv2", "network.dilations": [1, 2],
    "augment.crop_size": [32, 48], "stages": 1, "stage1.steps": 2, "stage1.labelled_batch": 2,
    "pseudo_mask.final_stage": False, "pseudo_mask.on_collapse": "ignore", "network.batch_norm": "live",
    "training.channels_last": False,  # torch 2.15.0 corrupts memory: 1×1, stride 2, 4 channels
}  # fmt: skip


def test_from_folders_to_a_prediction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path, 10)
    data = ts.ingest("images", masks="masks")
    assert data.root == "runs/images/data" and data.reports[0].added_labels == 10
    with refused("config/unknown-key", "stage1.stps"):
        ts.train(data, settings={"stage1.stps": 3})
    run = ts.train(data, settings=SMALL)
    assert set(run.results["stages"]) == {"stage1"} and Path("runs/images/report.html").exists()
    found = run.best.predict("images/3.jpg")
    assert found.class_ids.shape == found.confidence.shape == (40, 48) and found.overlay().size == (48, 40)
    assert found.shares().keys() == {"class_0", "class_1"} and sum(found.shares().values()) == pytest.approx(1)
    found.save("mask.png")
    with Image.open("mask.png") as mask:
        assert np.array_equal(np.asarray(mask), found.class_ids)
    with Image.open("images/3.jpg") as photo:
        again = ts.load("runs/images").predict(np.asarray(photo))
    assert np.array_equal(again.class_ids, found.class_ids)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # its pictures stay open
def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With smaller settings in the place of its cell of parameters."""
    monkeypatch.chdir(tmp_path)
    read = json.loads((Path(__file__).parents[2] / "docs/examples/first_model.ipynb").read_text())
    names: dict[str, Any] = {}
    cells = [cell for cell in read["cells"] if cell["cell_type"] == "code"]
    for cell in cells:
        if "parameters" in cell["metadata"].get("tags", []):
            names["settings"] = SMALL | {"augment.crop_size": [32, 32]}
        else:
            exec("".join(cell["source"]), names)
    assert len(cells) == 6 and all(not cell["outputs"] for cell in cells)
    assert names["found"].class_ids.shape == names["found"].confidence.shape
    assert {"pictures.png", "report.html", "results.json"} <= {file.name for file in Path("runs/scenes").iterdir()}


def test_the_import_loads_nothing_heavy() -> None:
    code = "import sys, threestage; print([m for m in ('torch', 'numpy', 'pydantic', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
    with pytest.raises(AttributeError):
        _ = ts.nothing
