"""`threestage init` writes a project that loads as it is, and overwrites nothing."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import threestage
from tests.refusals import refused
from threestage.cli import app, init
from threestage.config import load
from threestage.data.classes import load_class_map
from threestage.ray_backend.job_package import what_travels
from threestage.sweeps.space import check_space, load_space

ROOT = Path(__file__).parents[3]
NEEDED = {".gitignore", "README.md", "classes.yaml", "config.yaml"}
WRITTEN = NEEDED | {
    ".dockerignore",
    ".rayignore",
    "cluster/Dockerfile",
    "cluster/aws.yaml",
    "cluster/kuberay/overlays/gpu/kustomization.yaml",
    "constraints.txt",
    "jobs/run.py",
    "sweep.yaml",
}


def files_below(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def test_all_is_there_and_loads(tmp_path: Path) -> None:
    project = tmp_path / "new" / "streets"
    written = init.write_project(str(project), cluster=True)
    assert set(written) == files_below(project) >= WRITTEN
    assert not any("__pycache__" in path or "PROJECT" in (project / path).read_text() for path in written)
    for folder in ("jobs", "cluster"):
        shipped = {path for path in files_below(ROOT / folder) if "__pycache__" not in path}
        assert files_below(project / folder) == shipped

    config = load(str(project / "config.yaml"))
    assert config == load("own_images", ["name=streets", "data.root=data/streets"])
    assert len(load_class_map(str(project / "classes.yaml")).classes) == 3
    check_space(load_space(str(project / "sweep.yaml")), config)


def test_only_what_one_needs_and_later_the_rest(tmp_path: Path) -> None:
    assert set(init.write_project(str(tmp_path))) == files_below(tmp_path) == NEEDED
    (tmp_path / "config.yaml").write_text("mine")
    added = init.write_project(str(tmp_path), cluster=True)
    assert not NEEDED & set(added) and files_below(tmp_path) >= WRITTEN
    assert (tmp_path / "config.yaml").read_text() == "mine"


def test_what_a_job_reads_travels_and_data_does_not(tmp_path: Path) -> None:
    init.write_project(str(tmp_path), cluster=True)
    for path in ("data/mine/a.parquet", "images/1.png", "runs/mine/results.json", "mlflow.db", "dist/threestage.whl"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    top = {path.split("/")[0] for path in what_travels(str(tmp_path)).sizes}
    assert {"config.yaml", "classes.yaml", "sweep.yaml", "jobs"} <= top
    assert top.isdisjoint({"data", "images", "runs", "mlflow.db", "dist", "cluster"})


@pytest.mark.parametrize("taken", ["config.yaml", "cluster/Dockerfile", "jobs", "dangling"])
def test_nothing_is_overwritten(tmp_path: Path, taken: str) -> None:
    file = tmp_path / ("classes.yaml" if taken == "dangling" else taken)
    file.parent.mkdir(exist_ok=True)
    file.symlink_to("nowhere") if taken == "dangling" else file.write_text("mine")
    with refused("init/exists", f"{file}: "):
        init.write_project(str(tmp_path), cluster="/" in taken or taken == "jobs")
    assert [path for path in tmp_path.rglob("*") if not path.is_dir()] == [file]
    assert taken == "dangling" or file.read_text() == "mine"


def test_a_file_in_place_of_the_folder_and_a_bucket(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with refused("init/exists", "file: "):
        init.write_project(str(tmp_path / "file"))
    with refused("storage/scheme", "s3://bucket/mine"):
        init.write_project("s3://bucket/mine")


@pytest.mark.parametrize("folder, name", [("Mine_2.0", "Mine_2.0"), ("my streets", "my-streets"), ("-ü-", "mine")])
def test_the_name_is_one_that_a_run_can_have(tmp_path: Path, folder: str, name: str) -> None:
    init.write_project(str(tmp_path / folder))
    assert load(str(tmp_path / folder / "config.yaml")).name == name


def test_shipped_files_of_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, shipped = tmp_path / "site" / "threestage", tmp_path / "site" / "threestage" / "_shipped"
    shutil.copytree(ROOT / "threestage" / "project", package / "project")
    monkeypatch.setattr(threestage, "__file__", str(package / "__init__.py"))
    with refused("init/incomplete-install", "_shipped: "):
        init.write_project(str(tmp_path / "mine"), cluster=True)
    assert not (tmp_path / "mine").exists()
    for name in ("jobs", "tune", "cluster"):
        shutil.copytree(ROOT / name, shipped / name)
    for name in ("constraints.txt", ".dockerignore"):
        shutil.copy(ROOT / name, shipped)
    init.write_project(str(tmp_path / "mine"), cluster=True)
    assert files_below(tmp_path / "mine") >= WRITTEN


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["threestage", "init", "mine"])
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert not ended.value.code
    lines = capsys.readouterr().out.splitlines()
    assert {"config.yaml", "next:", "  threestage check config.yaml"} <= set(lines)
    with pytest.raises(SystemExit) as ended:
        app.main()
    error = capsys.readouterr().err
    assert ended.value.code == 2 and "mine/README.md: exists already" in error and error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_real_wheel(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    built = subprocess.run(pip, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import threestage; from threestage.config import load; from threestage.cli.init import write_project\n"
        "print(threestage.__file__); write_project('streets', cluster=True); load('streets/config.yaml')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": "site"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "site")) or done.stdout.startswith("site"), done.stdout
    assert files_below(tmp_path / "streets") >= WRITTEN
    assert not any("__pycache__" in path for path in files_below(tmp_path / "streets"))
