"""A real PostgreSQL server in a folder of its own, for tests."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.s3 import free_port

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))  # Debian keeps the server's programs out of PATH
INITDB = shutil.which("initdb", path=os.pathsep.join([*map(str, BINARIES), os.environ["PATH"]]))

needs_postgres = pytest.mark.skipif(INITDB is None, reason="needs PostgreSQL: initdb not found")


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """The URI of an empty database, as SQLAlchemy takes it. The server listens on 127.0.0.1 and wants a password."""
    assert INITDB is not None
    port, programs = free_port(), Path(INITDB).parent
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data, password = folder / "data", folder / "password"
        data.mkdir()
        password.write_text("not-a-secret")
        as_owner = []
        if os.getuid() == 0:  # the server refuses root
            for path in (folder, data, password):
                shutil.chown(path, "postgres")
            as_owner = ["runuser", "-u", "postgres", "--"]
        make = ["-D", str(data), "-U", "mlflow", "--pwfile", str(password), "-A", "scram-sha-256", "-N"]
        subprocess.run([*as_owner, str(programs / "initdb"), *make], check=True, stdout=subprocess.DEVNULL)
        serve = [*as_owner, str(programs / "pg_ctl"), "-D", str(data), "-w"]
        options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories={data} -c fsync=off"
        start = [*serve, "-l", str(data / "log"), "-o", options, "start"]
        subprocess.run(start, check=True, stdout=subprocess.DEVNULL)
        try:
            yield f"postgresql+psycopg2://mlflow:not-a-secret@127.0.0.1:{port}/postgres"
        finally:
            subprocess.run([*serve, "-m", "immediate", "stop"], check=True, stdout=subprocess.DEVNULL)
