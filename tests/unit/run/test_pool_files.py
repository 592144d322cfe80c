"""Why: an image that `data.exclude` names must be learnt by no stage, labels must not be lost, other runs stay as they were."""

from pathlib import Path

import pytest

from tests.conftest import local_config
from tests.refusals import refused
from tests.runs import run_local
from threestage.config import stage_keys
from threestage.data import storage
from threestage.data.parallel import map_ahead
from threestage.data.pool import data_set_files, load_pool, pseudo_mask_uri, rows_of
from threestage.data.records import load_manifest
from threestage.data.split import make_split
from threestage.run.pool_files import find_in_background, find_pool
from threestage.run_folder.folder import RunFolder


@pytest.fixture
def excluding(scenes: Path, tmp_path: Path) -> tuple[str, list[str], list[str]]:
    """A list of images, those of them that are labelled, and the others."""
    config, manifest = local_config(scenes), load_manifest(str(scenes))
    labelled = list(make_split(str(scenes), manifest, config.data).labelled)[:2]
    ids = storage.read_table(data_set_files(str(scenes), manifest)[0].uri, ["image_id"]).column(0).to_pylist()
    others = [image_id for image_id in ids if image_id not in make_split(str(scenes), manifest, config.data).labelled][
        :3
    ]
    (tmp_path / "exclude.txt").write_text("".join(f"{image_id}\n" for image_id in [*labelled, *others]))
    return f"{tmp_path}/exclude.txt", labelled, others


def test_excluded_images_have_no_pseudo_mask(
    scenes: Path, tmp_path: Path, excluding: tuple[str, list[str], list[str]]
) -> None:
    uri, labelled, others = excluding
    config = local_config(scenes, stages=2, stage1__steps=1, stage2__steps=1, data__exclude=uri)
    results = run_local(config, tmp_path / "out", warn=lambda text: None)
    assert results["data"]["pool"] == 40 - len(others)
    files = load_pool(f"{tmp_path}/out/pool.parquet")
    rows = [
        r
        for file in files
        for r in storage.read_table(pseudo_mask_uri(f"{tmp_path}/out/pseudo_masks1", file)).to_pylist()
    ]
    assert {row["image_id"] for row in rows if row["pseudo_mask"] is None} == set(others)
    assert set(labelled) <= {row["image_id"] for row in rows if row["pseudo_mask"] is not None}, "labels stay"
    Path(uri).write_text(f"{others[0]}\n")
    with refused("run/other-settings", "data.exclude", f"{tmp_path}/out/stage2"):
        run_local(config, tmp_path / "out")


def test_files_without_an_excluded_image_stay_as_they_are(
    scenes: Path, tmp_path: Path, excluding: tuple[str, list[str], list[str]]
) -> None:
    uri, _, others = excluding
    config, manifest = local_config(scenes, data__exclude=uri), load_manifest(str(scenes))
    before = data_set_files(str(scenes), manifest)
    found = find_pool(config, RunFolder(f"{tmp_path}/out"), manifest, map_ahead, pytest.fail, frozenset(others))
    assert found[0].digest != before[0].digest and found[1:] == before[1:]
    assert rows_of(found) == rows_of(before) - len(others)
    assert stage_keys(config, "stage2") == stage_keys(local_config(scenes), "stage2")
    missing = local_config(scenes, data__exclude="none.txt")
    with refused("storage/not-found", "data.exclude=none.txt"):
        find_in_background(missing, RunFolder(f"{tmp_path}/out"), manifest, map_ahead, pytest.fail)
