"""One Ray cluster for all integration tests of a session: 8 logical CPUs, whatever the machine has."""

import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.s3 import variables


@pytest.fixture(scope="session")
def s3_of_session(s3_endpoint: str) -> Iterator[None]:
    """The S3 endpoint in the environment of this process and of the cluster's, which are started after it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables(s3_endpoint).items():
            patch.setenv(name, value)
        yield


@pytest.fixture
def s3_root(s3_of_session: None, ray_cluster: None) -> str:
    """A folder of its own, empty, in the session's bucket, which the cluster's processes reach too."""
    return f"s3://bucket/{uuid.uuid4().hex}"


@pytest.fixture(scope="session")
def ray_cluster(s3_of_session: None) -> Iterator[None]:
    ray = pytest.importorskip("ray")
    from threestage.ray_backend.connect import leave

    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "300")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")
    os.environ.setdefault("RAY_metrics_report_interval_ms", "1000")  # so that a test need not wait for it
    ray.init("local", num_cpus=8, dashboard_host="127.0.0.1", log_to_driver=False, logging_level=logging.ERROR)
    yield
    leave()  # other threads serve S3 in this process


@pytest.fixture(autouse=True)
def ray_logs_on_failure(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[None]:
    """Print the end of Ray's logs when a test of the cluster fails."""
    failed_before = request.session.testsfailed
    yield
    logs = Path("/tmp/ray/session_latest/logs")
    if request.session.testsfailed > failed_before and "ray_cluster" in request.fixturenames and logs.is_dir():
        for log in sorted(logs.rglob("*train*.log"), key=lambda path: path.stat().st_mtime)[-3:]:
            print(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}")
    shutil.rmtree(tmp_path, ignore_errors=True)
