"""`threestage check` on a cluster. Against stores that are wrong in each way: tests/servers/test_check_on_s3.py."""

import sys
from pathlib import Path

import pytest

from tests.conftest import copy_to, tiny_config
from threestage.checks.run_check import check
from threestage.config import changed
from threestage.data import storage

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,  # steps on a cluster: a minute
    pytest.mark.filterwarnings("default"),  # Ray's own
]

FILE = "registry.tracking_uri for others"


def test_a_cluster(
    ray_cluster: None, s3_root: str, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its nodes, a step on one of its workers; then the same as a job, of which only MLflow in a file is wrong."""
    import ray

    copy_to(f"{s3_root}/data", scenes)
    config = tiny_config(
        scenes,
        data={"root": f"{s3_root}/data", "labelled": 8},
        stages=2,
        registry={"tracking_uri": f"sqlite:///{tmp_path}/mlflow.db"},
    )
    before = storage.list_files(s3_root)
    found = {line.name: line for line in check(config, f"{s3_root}/run", local=False)}
    assert list(found) == ["data.root", "--out", "registry.tracking_uri", "input", "classes", "split", "cluster.address",
                           "cluster", "nodes", "stage1", "stage2", "duration", "program", "onnx"]  # fmt: skip
    assert not any(line.problem for line in found.values()), found
    assert "the cluster has CPU 8 (" in found["cluster"].value and "4 images a step: " in found["stage2"].value
    large = {line.name: line for line in check(changed(config, {"cluster.workers": 9}), f"{s3_root}/run", local=False)}
    assert "set cluster.workers=7, or add nodes" in str(large["cluster"].problem)

    monkeypatch.setattr("threestage.ray_backend.job_check.PYTHON", sys.executable)
    url = f"http://{ray.get_runtime_context().worker.node.webui_url}"
    by_job = list(check(config, f"{s3_root}/run", local=False, address=url))
    names = [line.name for line in by_job]
    assert names[:3] == ["what travels", "--address", "versions"] and names[9] == "RAY_ADDRESS", by_job
    assert set(names[10:]) == {"cluster", "nodes", FILE, "stage1", "stage2", "duration", "program"}, by_job
    assert [line.name for line in by_job if line.problem] == [FILE], by_job
    assert storage.list_files(s3_root) == before
