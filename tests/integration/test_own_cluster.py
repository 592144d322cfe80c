"""The Ray that `threestage run` starts on this machine: no port of it is open to another machine, none to who has no token."""

import os
import subprocess
import sys
from ipaddress import ip_address
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from cluster.local import members
from tests.listening import listening

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240), pytest.mark.filterwarnings("default")]

DRIVER = """
import sys, ray
from threestage.ray_settings import ClusterSettings
from threestage.ray_backend.train import connected
with connected(ClusterSettings()):
    ray.get(ray.remote(lambda: None).remote())
    node = ray._private.worker.global_worker.node
    print("ready", node.webui_url, node.get_session_dir_path(), flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_what_listens(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path), "RAY_AUTH_MODE": None, "RAY_ADDRESS": None, "RAY_AUTH_TOKEN_PATH": None}
    environment = {name: value for name, value in {**os.environ, **home}.items() if value is not None}
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as driver:
        try:
            assert driver.stdout
            ready = next(line for line in driver.stdout if line.startswith("ready"))
            found = set(listening(members({driver.pid})))
            assert any("gcs_server" in program for _, _, program in found) and len(found) > 8
            open_to_others = {
                (port, program)
                for address, port, program in found
                if not ip_address(address.removeprefix("::ffff:")).is_loopback
            }
            assert not open_to_others
            with pytest.raises(HTTPError, match="401"):
                urlopen(f"http://{ready.split()[1]}/api/jobs/")
            assert (tmp_path / ".ray" / "auth_token").stat().st_mode & 0o077 == 0
            assert Path(ready.split()[2]).parents[1].stat().st_mode & 0o077 == 0, "sockets, logs, code of jobs"
        finally:
            driver.communicate(timeout=60)
    assert driver.returncode == 0
