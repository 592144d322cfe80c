"""Why: the models of `threestage suspects` are trained where runs are, and nothing of them lies on a local disk."""

from pathlib import Path

import pytest

from tests.conftest import copy_to, tiny_config
from tests.runs import run_local
from threestage.data import storage
from threestage.run.run import _settings
from threestage.selection.suspects import SuspectsSettings, suspects

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.timeout(420),
    pytest.mark.filterwarnings("default"),  # Ray's own
]


def test_models_are_trained_on_the_cluster(ray_cluster: None, s3_root: str, scenes: Path) -> None:
    copy_to(f"{s3_root}/data", scenes)
    config = tiny_config(scenes, stages=1, data={"root": f"{s3_root}/data", "labelled": 8})
    run_local(config, f"{s3_root}/run", warn=lambda text: None)
    storage.write_json(f"{s3_root}/run/config.json", _settings(config))
    settings = SuspectsSettings(folds=2, steps=2, count=3, export="masks")
    report = suspects(f"{s3_root}/run", f"{s3_root}/out", settings, local=False, warn=lambda text: None)
    assert len(report.images) == 3 and storage.exists(f"{s3_root}/out/suspects.html")
    assert storage.exists(f"{s3_root}/out/folds/fold2/stage1/done.json")
