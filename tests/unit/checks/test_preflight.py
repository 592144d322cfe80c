"""Why: a message that says "raise it" and then "lower it" sends the user in a circle; the fix it names must work."""

import re
from pathlib import Path

import pytest

from tests.conftest import write_photos
from tests.refusals import refused
from threestage.checks.preflight import _check_labelled_batches, _check_unlabelled
from threestage.config import Config, changed, load
from threestage.data.ingest import IngestSettings, ingest
from threestage.errors import InputError


def with_fix(config: Config, available: int) -> Config | None:
    """The configuration as the refusal says to change it; None where nothing is refused."""
    try:
        _check_labelled_batches(config, available)
    except InputError as error:
        assert error.code == "config/batch"
        fix = re.search(r": set (.+), or label more images$", error.message)
        assert fix is not None, error
        return changed(config, dict(setting.split("=", 1) for setting in fix[1].split(" and ")))
    return None


@pytest.mark.parametrize("available", [1, 2, 3, 40])
@pytest.mark.parametrize("batch", [1, 2, 50])
@pytest.mark.parametrize("preset", ["demo", "own_images"])
@pytest.mark.parametrize(
    "settings",
    [[], ["cluster.workers=4"], ["cluster.workers=4", "training.batch_scope=global"], ["training.accumulate=3"]],
)
def test_the_fix_of_a_refused_batch_works_at_once(preset: str, settings: list[str], batch: int, available: int) -> None:
    config = load(preset, ["data.root=x", f"stage1.labelled_batch={batch}", *settings])
    fixed = with_fix(config, available)
    assert fixed is None or with_fix(fixed, available) is None


def test_one_image_needs_another_head() -> None:
    for batch in (1, 2):
        with refused("config/batch", "set network.head=deeplabv2 and ", "label more images"):
            _check_labelled_batches(load("demo", ["data.root=x", f"stage1.labelled_batch={batch}"]), 1)


def test_a_pool_of_two_kinds_is_refused(tmp_path: Path) -> None:
    write_photos(tmp_path, 2)
    (tmp_path / "images/manifest.json").write_text('{"name": "page"}')
    _check_unlabelled(f"{tmp_path}/images")
    ingest(f"{tmp_path}/images", f"{tmp_path}/data", IngestSettings(format="images"))
    _check_unlabelled(f"{tmp_path}/data")
    (tmp_path / "images/0.jpg").rename(tmp_path / "data/0.jpg")
    with refused("data/two-inputs", f"{tmp_path}/data/0.jpg"):
        _check_unlabelled(f"{tmp_path}/data")
    (tmp_path / "empty").mkdir()
    with refused("data/no-images", f"data.unlabelled={tmp_path}/empty"):
        _check_unlabelled(f"{tmp_path}/empty")
