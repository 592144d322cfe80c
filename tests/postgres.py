"""A real PostgreSQL server in a folder of its own, for tests."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.s3 import free_port

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))  # Debian keeps the server's programs out of PATH
INITDB = shutil.which("initdb", path=os.pathsep.join([*map(str, BINARIES), os.environ["PATH"]]))

needs_postgres = pytest.mark.skipif(INITDB is None, reason="needs PostgreSQL: initdb not found")


@contextlib.contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """The URI of an empty database, as SQLAlchemy takes it. The server listens on 127.0.0.1 and wants a password."""
    assert INITDB is not None
    data, port, programs = folder / "postgres", free_port(), Path(INITDB).parent
    data.mkdir(parents=True)
    (folder / "password").write_text("not-a-secret")
    as_owner = []
    if os.getuid() == 0:  # the server refuses root
        for path in (data, folder / "password"):
            shutil.chown(path, "postgres")
        for parent in data.parents[:3]:
            parent.chmod(parent.stat().st_mode | 0o011)
        as_owner = ["runuser", "-u", "postgres", "--"]
    make = ["-D", str(data), "-U", "mlflow", "--pwfile", str(folder / "password"), "-A", "scram-sha-256", "-N"]
    subprocess.run([*as_owner, str(programs / "initdb"), *make], check=True, stdout=subprocess.DEVNULL)
    serve = [*as_owner, str(programs / "pg_ctl"), "-D", str(data), "-w"]
    options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories={data} -c fsync=off"
    subprocess.run([*serve, "-l", str(data / "log"), "-o", options, "start"], check=True, stdout=subprocess.DEVNULL)
    try:
        yield f"postgresql+psycopg2://mlflow:not-a-secret@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([*serve, "-m", "immediate", "stop"], check=True, stdout=subprocess.DEVNULL)
