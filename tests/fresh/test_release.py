"""What is released: the wheel that comes out of the sdist, in an empty environment, runs the demo."""

import json
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.fresh.processes import command_of
from tests.unit.test_cluster_files import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

SHORT = [
    part
    for change in ("stage1.steps=10", "stage2.steps=10", "stage3.steps=10", "pseudo_mask.on_collapse=ignore")
    for part in ("--set", change)
]


def test_the_demo_from_sdist_and_wheel(tmp_path: Path) -> None:
    builder, empty, dist, run = (tmp_path / name for name in ("builder", "empty", "dist", "run"))
    for venv in (builder, empty):
        command_of(Path(sys.executable), "-m", "venv", str(venv), env={})
    command_of(builder / "bin/pip", "install", "-q", "build", env={})
    command_of(builder / "bin/python", "-m", "build", str(ROOT), "--outdir", str(dist), env={})
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "constraints.txt", "tests/conftest.py"} <= names
    assert not {name for name in names if name.startswith((".venv", "runs", "docs/camvid/train"))}
    with zipfile.ZipFile(wheel) as archive:
        shipped = {"presets/best.yaml", "_shipped/constraints.txt", "report/template.html.j2", "report/charts.svg.j2"}
        assert {f"threestage/{name}" for name in shipped} <= set(archive.namelist())

    command_of(empty / "bin/pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), str(wheel), env={})
    elsewhere = {"HOME": str(tmp_path), "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    command_of(empty / "bin/threestage", "demo", "--out", str(run), *SHORT, env=elsewhere)
    assert list(json.loads((run / "results.json").read_text())["stages"]) == ["stage1", "stage2", "stage3"]
