"""A real S3 store, Ceph's gateway, in a folder of its own, for tests of faults."""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.s3 import free_port, variables

SCRIPT = Path(__file__).parents[2] / "shared" / "tools" / "ceph_rgw.sh"
DAEMONS = ("client.rgw", "osd.0", "mgr.x", "mon.a")
missing = [name for name in ("ceph-mon", "ceph-osd", "ceph-mgr", "radosgw", "radosgw-admin") if not shutil.which(name)]

needs_ceph = [
    pytest.mark.skipif(not SCRIPT.is_file(), reason=f"needs {SCRIPT.name}, which starts Ceph on one machine"),
    pytest.mark.skipif(bool(missing), reason=f"needs Ceph: {', '.join(missing)} not found"),
]


@dataclass(frozen=True)
class Gateway:
    """Its address and its one user. `folder` is Ceph's."""

    endpoint: str
    key_id: str
    secret: str
    folder: Path

    def variables(self) -> dict[str, str]:
        """What a process needs in its environment to use it."""
        return variables(self.endpoint) | {"AWS_ACCESS_KEY_ID": self.key_id, "AWS_SECRET_ACCESS_KEY": self.secret}

    def kill(self) -> None:
        """SIGKILL to the gateway; what it stored stays."""
        _kill(self.folder / "run", "client.rgw")

    def start(self) -> None:
        """Again after `kill`, on the same port. Returns when it answers."""
        front = f"beast endpoint={self.endpoint.removeprefix('http://')} tcp_nodelay=1"
        command = ["radosgw", "-n", "client.rgw", "--keyring", str(self.folder / "rgw" / "keyring")]
        _run([*command, f"--rgw-frontends={front}"], _environment(self.folder), self.folder / "again.log")
        for _ in range(300):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(self.endpoint, timeout=2).close()
                return
            time.sleep(0.2)
        raise TimeoutError(f"{self.endpoint} does not answer")


@contextlib.contextmanager
def ceph_gateway() -> Iterator[Gateway]:
    """Ceph in a folder of a short name (it holds sockets); everything ends with the context."""
    folder, port = Path(tempfile.mkdtemp(prefix="ceph-")), free_port()
    keys = Gateway(f"http://127.0.0.1:{port}", secrets.token_hex(10).upper(), secrets.token_hex(20), folder / "data")
    user = ["radosgw-admin", "user", "create", "--uid=test", "--display-name=test"]
    try:
        _run(["bash", str(SCRIPT), "init"], _environment(keys.folder) | {"PORT": str(port)}, folder / "init.log")
        user += [f"--access-key={keys.key_id}", f"--secret-key={keys.secret}"]
        _run(user, _environment(keys.folder), folder / "user.log")
        yield keys
    finally:
        for name in DAEMONS:
            _kill(keys.folder / "run", name)
        shutil.rmtree(folder, ignore_errors=True)


def _environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "CEPH_DIR": str(folder), "CEPH_CONF": str(folder / "ceph.conf")}


def _run(command: list[str], environment: dict[str, str], log: Path) -> None:
    """Run to the end of the command, which may leave daemons behind that hold its output open."""
    with log.open("w") as output:
        done = subprocess.run(command, env=environment, stdout=output, stderr=output, timeout=300)
    assert done.returncode == 0, log.read_text()[-3000:]


def _kill(run: Path, name: str) -> None:
    with contextlib.suppress(FileNotFoundError, ValueError, ProcessLookupError):
        pid = int((run / f"{name}.pid").read_text())
        os.kill(pid, signal.SIGKILL)
        while Path(f"/proc/{pid}").exists():
            time.sleep(0.05)
