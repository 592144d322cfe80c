"""A cluster that has no node with room until it is asked for: Ray's own autoscaler, whose machines are processes here."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from ray.util import get_node_ip_address

from cluster.local import kill
from tests.s3 import free_port

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(240)]

LISTS = (
    "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands", "head_start_ray_commands",
    "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter",
)  # fmt: skip
MACHINES = {
    "cluster_name": "machines",
    "max_workers": 1,
    "auth": {},
    "docker": {},
    "file_mounts": {},
    "upscaling_speed": 1.0,
    "idle_timeout_minutes": 10,
    "head_node_type": "ray.head.default",
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
        "gpu": {"resources": {"CPU": 1, "GPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 1},
    },
    **{name: list[str]() for name in LISTS},
}
DRIVER = """
import sys, time, ray
from threestage.ray_backend.stall_monitor import await_resources
from threestage.ray_backend.capacity import room_for_one
from threestage.ray_settings import ClusterSettings

ray.init(sys.argv[1], log_to_driver=False)
cluster = ClusterSettings(gpus_per_worker=1, start_timeout_s=60, report_after_s=1)
print("before", len(ray.nodes()), room_for_one(cluster))
await_resources("pseudo-masks", cluster, print)
time.sleep(3)
print("after", len(ray.nodes()), room_for_one(cluster))
"""


@pytest.fixture
def short_path() -> Iterator[Path]:
    """Names of sockets are cut at 107 bytes."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def test_predicting_brings_a_node(tmp_path: Path, short_path: Path) -> None:
    port = free_port()
    address = f"{get_node_ip_address()}:{port}"
    provider = {"type": "fake_multinode", "gcs_address": address}
    (tmp_path / "machines.json").write_text(json.dumps(MACHINES | {"provider": provider}))
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    own |= {"RAY_AUTH_MODE": "disabled", "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    start = ["start", "--head", "--block", f"--port={port}", "--num-cpus=1", "--include-dashboard=false"]
    start += [f"--autoscaling-config={tmp_path}/machines.json", f"--temp-dir={short_path}"]
    with open(tmp_path / "log", "wb") as log:
        head = subprocess.Popen(
            [str(Path(sys.executable).with_name("ray")), *start],
            env=own | {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        while "Ray runtime started" not in (tmp_path / "log").read_text():
            assert head.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.5)
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, address],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=own,
            cwd=tmp_path,
            timeout=120,
        )
    finally:
        kill({head.pid})
        head.wait()
    lines = done.stdout.splitlines()
    assert "before 1 False" in lines and "after 2 True" in lines, (
        done.stdout[-3000:] + (tmp_path / "log").read_text()[-2000:]
    )
    assert any(line.startswith("pseudo-masks: waiting for ") for line in lines)
