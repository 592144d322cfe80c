"""Ray's own autoscaler whose machines are processes of this one (its fake multi-node provider).

`ray.cluster_utils.AutoscalingCluster` does the same, but the wheel lacks the file that it reads, and it ends with `ray stop`,
which acts on the whole machine.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from ray.util import get_node_ip_address

from cluster.local import HEAD_SETTINGS, kill, members
from tests.s3 import free_port

START_S = 120
LISTS = (
    "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands", "head_start_ray_commands",
    "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter",
)  # fmt: skip


class Machines(NamedTuple):
    """A head that starts others when they are asked for. `environment`: of whoever uses it."""

    address: str
    environment: dict[str, str]
    head: int
    log: Path

    def raylets(self, resource: str) -> list[int]:
        """The processes of the machines that have a resource."""
        found = []
        for pid in members({self.head}):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
                has = any(word.startswith("--static_resource_list=") and f"{resource}," in word for word in words)
                if has and Path(words[0]).name == "raylet":
                    found.append(pid)
        return found


@contextlib.contextmanager
def autoscaled(
    folder: Path, sockets: Path, head_cpus: int, machine: Mapping[str, float], most: int
) -> Iterator[Machines]:
    """A cluster with a head alone that may get `most` machines of the resources. `sockets`: a folder with a short path."""
    port = free_port()
    address = f"{get_node_ip_address()}:{port}"
    types = {
        "ray.head.default": {"resources": {"CPU": head_cpus}, "node_config": {}, "max_workers": 0},
        "machine": {"resources": dict(machine), "node_config": {}, "min_workers": 0, "max_workers": most},
    }
    settings: dict[str, Any] = {
        "cluster_name": "machines", "max_workers": most, "auth": {}, "docker": {}, "file_mounts": {}, "upscaling_speed": 1.0,
        "idle_timeout_minutes": 10, "head_node_type": "ray.head.default", "available_node_types": types,
        "provider": {"type": "fake_multinode", "gcs_address": address, "disable_node_updaters": True},
        **{name: list[str]() for name in LISTS},
    }  # fmt: skip
    (folder / "machines.json").write_text(json.dumps(settings))
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    own |= {"RAY_AUTH_MODE": "disabled", "RAY_FAKE_CLUSTER": "1", **HEAD_SETTINGS}
    own |= {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "AUTOSCALER_HEARTBEAT_TIMEOUT_S": "10"}
    start = ["start", "--head", "--block", f"--port={port}", f"--num-cpus={head_cpus}", "--include-dashboard=false"]
    start += [f"--autoscaling-config={folder}/machines.json", f"--temp-dir={sockets}"]
    log = folder / "head.log"
    with log.open("wb") as output:
        head = subprocess.Popen(
            [str(Path(sys.executable).with_name("ray")), *start],
            env=own | {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_S
        while "Ray runtime started" not in log.read_text():
            assert head.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        yield Machines(address, own, head.pid, log)
    finally:
        kill({head.pid})
        head.wait()
