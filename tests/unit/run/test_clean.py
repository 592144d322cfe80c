"""What a run left goes only as far as nothing needs it: a rerun still finds everything done, nothing else is touched."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.conftest import local_config
from tests.refusals import refused
from tests.runs import copy_run, run_local
from threestage.cli import app
from threestage.config import Config
from threestage.data import storage
from threestage.run.clean import Leftover, clean, what_is_left
from threestage.run_folder import lease

Run = Callable[[], list[Any]]


@pytest.fixture(scope="module")
def config(scenes: Path) -> Config:
    return local_config(scenes, stages=2)


@pytest.fixture(scope="module")
def finished(config: Config, finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two stages, that nobody may change."""
    out = copy_run(finished_run, tmp_path_factory.mktemp("finished") / "run", stages=2)
    _rerun(config, out)
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, as Ray leaves one."""
    copy_run(finished, tmp_path / "run")
    (tmp_path / "run" / "stage1" / "ray_train" / "state").mkdir(parents=True)
    (tmp_path / "run" / "stage1" / "ray_train" / "state" / "snapshot.json").write_text("{}")
    return tmp_path / "run"


def _rerun(config: Config, out: Path) -> list[Any]:
    """The same command again: the rows that it trained."""
    rows: list[Any] = []
    run_local(config, str(out), lambda stage, row: rows.append(row), rows.append)
    return rows


def _yes(left: Leftover) -> bool:
    return True


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def _quiet(text: str) -> None:
    pass


def test_a_rerun_after_it_finds_all_done(run: Path, config: Config) -> None:
    before = _files(run)
    left, removed = clean(str(run), False, _yes, _quiet)
    assert removed and left.deleted == ["stage1/checkpoints", "stage1/ray_train", "stage2/checkpoints"]
    deleted = before - _files(run)
    assert deleted and all(name.split("/")[1] in ("checkpoints", "ray_train") for name in deleted)
    shown = {kind.name: (kind.files, kind.bytes, kind.will_delete) for kind in left.kinds}
    assert sum(files for files, _, will_delete in shown.values() if will_delete) == len(deleted)
    assert shown["Ray Train's (stage1)"] == (1, 2, True) and not shown["pseudo-masks"][2]
    assert _rerun(config, run) == [], "nothing was trained, and nothing warned about"
    assert clean(str(run), False, _yes, _quiet) == (what_is_left(str(run)), False)


def test_an_unfinished_stage_keeps_its_checkpoints(run: Path) -> None:
    (run / "stage2" / "done.json").unlink()
    assert what_is_left(str(run)).deleted == ["stage1/checkpoints", "stage1/ray_train"]


def test_all_of_a_run_is_what_the_run_wrote(run: Path) -> None:
    (run / "data").mkdir()
    (run / "data" / "manifest.json").write_text("{}")
    (run / "notes.txt").write_text("mine")
    left, _ = clean(str(run), True, _yes, _quiet)
    assert _files(run) == {"data/manifest.json", "notes.txt"}
    assert [(kind.name, kind.files) for kind in left.kinds if not kind.will_delete] == [("not the run's", 2)]
    with refused("run/no-run", run):
        clean(str(run), True, _yes, _quiet)


def test_a_folder_that_held_nothing_else_goes_with_it(run: Path) -> None:
    clean(str(run), True, _yes, _quiet)
    assert not run.exists() and run.parent.exists()


def test_parts_of_another_run_stay(run: Path, config: Config, tmp_path: Path) -> None:
    other = tmp_path / "other"
    run_local(config, str(other), lambda stage, row: None, _quiet, reuse=str(run))
    before = _files(run)
    clean(str(other), True, _yes, _quiet)
    assert _files(run) == before and not other.exists()


def test_a_link_is_removed_and_not_followed(run: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_text("")
    (run / "stage1" / "checkpoints" / "link").symlink_to(tmp_path / "elsewhere")
    (run / "stage2" / "ray_train").symlink_to(tmp_path / "elsewhere")
    clean(str(run), False, _yes, _quiet)
    assert _files(tmp_path / "elsewhere") == {"kept"} and not (run / "stage2" / "ray_train").is_symlink()


def test_it_is_refused_where_there_is_no_run_or_a_driver(run: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, run / "stage1", tmp_path / "nothing"):
        with refused("run/no-run", f"{folder}:", "split.json", "--out"):
            clean(str(folder), True, _yes, _quiet)
    storage.write_json(str(tmp_path / "sweep.json"), {})
    with refused("run/no-run", f"{tmp_path}:", "sweep"):
        what_is_left(str(tmp_path))
    before = _files(run)
    with lease.held(str(run), _quiet), refused("run/another-driver", run):
        clean(str(run), True, _yes, _quiet)
    assert _files(run) == before


def test_on_s3(run: Path, bucket: str) -> None:
    for name in _files(run):
        storage.write_bytes(f"{bucket}/run/{name}", b"" if name.endswith(".pt") else (run / name).read_bytes())
    storage.write_bytes(f"{bucket}/run-2/split.json", b"another")
    clean(f"{bucket}/run/", False, _yes, _quiet)
    left = {uri.partition("/run/")[2] for uri in storage.list_files(f"{bucket}/run")}
    clean(str(run), False, _yes, _quiet)
    assert left == _files(run)
    clean(f"{bucket}/run", True, _yes, _quiet)
    assert storage.list_files(bucket) == [f"{bucket}/run-2/split.json"]


def test_pseudo_masks_that_no_stage_needs_go_and_are_not_predicted_again(
    run: Path, config: Config, tmp_path: Path
) -> None:
    before = _files(run)
    left, removed = clean(str(run), False, _yes, _quiet, pseudo_masks=True)
    assert removed and {"pseudo_masks1/*.parquet", "pseudo_masks2/*.parquet"} < set(left.deleted)
    gone = {name for name in before - _files(run) if name.startswith("pseudo_masks")}
    assert gone and all(name.endswith(".parquet") for name in gone)
    assert {"pseudo_masks1/done.json", "pseudo_masks1/index.parquet"} < _files(run)
    assert _rerun(config, run) == [], "nothing was trained, predicted or warned about"
    rows = _rerun(config.model_copy(update={"stages": 3}), run)
    assert {"pseudo_masks2/done.json"} < _files(run) and len(rows) > 0, (
        "stage 3 needs what was removed: it is made again"
    )
    other = tmp_path / "other"
    run_local(config, str(other), lambda stage, row: None, _quiet, reuse=str(run))
    assert not (other / "stage1").exists() and (other / "pseudo_masks1/index.parquet").exists()


def test_pseudo_masks_that_a_stage_learns_from_stay(run: Path) -> None:
    (run / "stage2" / "done.json").unlink()
    assert what_is_left(str(run), pseudo_masks=True).deleted == [
        "pseudo_masks2/*.parquet", "stage1/checkpoints", "stage1/ray_train"
    ]  # fmt: skip


def test_only_old_runs_are_cleaned(run: Path) -> None:
    def threestage(age: str) -> Any:
        command = ["clean", str(run.parent), "--older-than", age, "--json", "--yes"]
        return CliRunner().invoke(app.app, command)

    assert json.loads(threestage("1d").stdout) == []
    sweep = run.parent / "a sweep"
    sweep.mkdir()
    (sweep / lease.NAME).write_text("{}")
    (sweep / "sweep.json").write_text("{}")
    for path in run.parent.rglob("*"):
        os.utime(path, (0, 0))
    done = threestage("1d")
    assert [one["removed"] for one in json.loads(done.stdout)] == [True]
    assert "a sweep" in done.stderr and "run/no-run" in done.stderr, "which ends nothing"
    with refused("clean/not-an-age", "--older-than soon"):
        raise threestage("soon").exception


def test_the_command_asks(run: Path) -> None:
    def threestage(*arguments: object, answer: str = "") -> Any:
        return CliRunner().invoke(app.app, ["clean", str(run), *map(str, arguments)], input=answer)

    before = _files(run)
    shown = json.loads(threestage("--json").stdout)
    assert not shown["removed"] and "stage1/checkpoints" in shown["gone"]
    assert threestage(answer="n\n").exit_code == 0 and threestage().exit_code == 1, "nobody is there to answer"
    assert _files(run) == before
    assert threestage(answer="y\n").stdout.endswith("deleted\n")
    assert "nothing to delete" in threestage("--yes").stdout
    assert json.loads(threestage("--all", "--yes", "--json").stdout)["removed"] and not run.exists()
