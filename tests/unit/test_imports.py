"""The core must run where neither Ray nor MLflow is installed, and importing it must do nothing."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle
from ray.data import DataContext

import threestage
from tests.conftest import tiny_config, write_photos
from threestage.data.pool import IndexRow, PoolFile, write_index, write_pool
from threestage.data.split import Split
from threestage.ray_backend import job_check
from threestage.ray_backend.pool_stream import unlabelled_stream
from threestage.run.stages import StageTask
from threestage.training.checkpoint import Pointer

BLOCKED = ("ray", "mlflow", "typer", "rich", "botocore", "optuna", "simplejpeg", "segmentation_models_pytorch")


def run_python(code: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=cwd, timeout=110
    )


def test_the_core_loads_neither_ray_nor_mlflow(tmp_path: Path) -> None:
    """The stages, the page of a run, and a sweep's space while it is read."""
    done = run_python(
        "import sys, threestage.run.stages, threestage.run.pipeline, threestage.local, threestage.report.report\n"
        "from threestage.sweeps import space, trials\n"
        "space.load_space('thresholds')\n"
        "print([m for m in ('ray', 'mlflow', 'timm', 'typer', 'rich', 'optuna') if m in sys.modules])",
        cwd=tmp_path,
    )
    assert done.stdout.strip() == "[]", done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("default")  # Ray's own
def test_processes_that_do_not_train_load_no_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The monitor of a stage, the readers of its pool and an ingest: hundreds of megabytes and seconds less for each process.
    Nor does what a stream sends to its readers, the settings that Ray sends along with every task among it."""
    sent: list[Any] = []

    class Items:
        """Stands for Ray's data set, which would start a cluster."""

        def map_batches(self, reader: object, batch_size: int) -> None:
            sent.append(reader)

    monkeypatch.setattr("ray.data.from_items", lambda items, override_num_blocks: Items())
    pool, masks = f"{tmp_path}/pool.parquet", f"{tmp_path}/masks"
    write_pool(pool, [PoolFile(uri="a.parquet", rows=9, digest="d")], None)
    write_index(masks, [IndexRow("a.parquet", images=9, max_height=50, max_width=50, labelled_ids=())])
    task = StageTask(
        stage="stage2", config=tiny_config(tmp_path).model_dump(mode="json"), manifest_version=1, folder=str(tmp_path),
        split=Split(labelled=("a",), validation=("b",), validation_split="val"),
        pool=pool, pseudo_masks=masks, previous_model=None,
    )  # fmt: skip
    with DataContext.current(DataContext()):
        unlabelled_stream(task, Pointer())
        sent.append(DataContext.get_current())
    (tmp_path / "sent").write_bytes(cloudpickle.dumps(sent))
    code = (
        "import pickle, sys; pickle.load(open('sent', 'rb'))\n"
        "import threestage.ray_backend.heartbeat, threestage.ray_backend.pool_reader, threestage.data.ingest\n"
        "print('torch' in sys.modules, 'ray.data' in sys.modules)"
    )
    done = run_python(code, cwd=tmp_path)
    assert done.stdout.strip() == "False True", done.stderr


@pytest.mark.slow
def test_training_and_prediction_run_with_torch_timm_pyarrow_and_pydantic_only(scenes: Path, tmp_path: Path) -> None:
    settings = {
        "data.root": scenes, "data.labelled": 8, "network.head": "deeplabv2", "stage1.steps": 2, "stage1.labelled_batch": 2,
        "stage2.steps": 2, "stage2.labelled_batch": 2, "stage2.unlabelled_batch": 2,
        "stage3.steps": 2, "stage3.labelled_batch": 2, "stage3.unlabelled_batch": 2,
    }  # fmt: skip
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    write_photos(tmp_path, 2)
    done = run_python(
        f"import sys\nfor name in {BLOCKED!r}: sys.modules[name] = None\n"
        "from threestage.run.local_main import main\nassert main(sys.argv[1:]) == 0\n"
        "from threestage.prediction.predict import PredictSettings, predict_input, read_model\n"
        "from threestage.mlflow_sync.records import RegistrySettings\n"
        "report = predict_input(read_model('run/stage3', RegistrySettings()), 'images', 'out', PredictSettings())\n"
        "assert report.images == 2",
        "demo", "--out", "run", *overrides, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/results.json").is_file() and (tmp_path / "out/masks/0.png").is_file()
    assert (tmp_path / "run/config.json").is_file() and (tmp_path / "run/report.html").is_file(), (
        "as `run --local` leaves it"
    )


RUN_BY_NAME = {"checks.step_time", "models.program", "checks.run_check"}


def test_modules_that_are_run_as_programs_have_a_main() -> None:
    package = Path(threestage.__file__).parent
    texts = {file: file.read_text() for file in package.rglob("*.py")}
    named = {
        ".".join(file.relative_to(package).with_suffix("").parts)
        for file, text in texts.items()
        if '"-m", __name__' in text or "-m {__name__}" in text
    }
    assert named | {job_check.MAIN.removeprefix("threestage.")} == RUN_BY_NAME
    for name in RUN_BY_NAME:
        assert '__name__ == "__main__"' in texts[package.joinpath(*name.split(".")).with_suffix(".py")], name
