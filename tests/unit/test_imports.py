"""The core must run where neither Ray nor MLflow is installed, and importing it must do nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

BLOCKED = ("ray", "mlflow", "typer", "rich", "s3fs", "optuna", "simplejpeg", "segmentation_models_pytorch")


def run_python(code: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=cwd, timeout=110
    )


def test_importing_the_stages_loads_neither_ray_nor_mlflow(tmp_path: Path) -> None:
    done = run_python(
        "import sys, threestage.stages, threestage.pipeline, threestage.local\n"
        "print([m for m in ('ray', 'mlflow', 'timm', 'typer') if m in sys.modules])",
        cwd=tmp_path,
    )
    assert done.stdout.strip() == "[]", done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", ["on_ray.pulse", "on_ray.reading", "data.ingest"])
def test_processes_that_do_not_train_load_no_torch(module: str) -> None:
    """The monitor of a stage, the readers of its pool and an ingest: hundreds of megabytes and seconds less for each process."""
    done = run_python(f"import sys, threestage.{module}\nprint('torch' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


def test_local_mode_runs_with_torch_timm_pyarrow_and_pydantic_only(scenes: Path, tmp_path: Path) -> None:
    settings = {
        "data.root": scenes, "data.labelled": 8, "network.head": "deeplabv2", "stage1.steps": 2, "stage1.labelled_batch": 2,
        "stage2.steps": 2, "stage2.labelled_batch": 2, "stage2.unlabelled_batch": 2,
        "stage3.steps": 2, "stage3.labelled_batch": 2, "stage3.unlabelled_batch": 2,
    }  # fmt: skip
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    done = run_python(
        f"import sys\nfor name in {BLOCKED!r}: sys.modules[name] = None\n"
        "from threestage.local import main\nsys.exit(main(sys.argv[1:]))",
        "demo", "--out", str(tmp_path / "run"), *overrides,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "results.json").is_file()
