"""Ray on this machine, for this machine: it listens on loopback only, and a token that nobody else can read is asked for."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from ray._private import ray_constants

CLOSED = {ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}  # Ray's own way on macOS: every port on 127.0.0.1
TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@contextlib.contextmanager
def closed_to_others() -> Iterator[None]:
    """What Ray starts meanwhile opens no port to other machines; it asks for a token unless RAY_AUTH_MODE says otherwise."""
    if not any(name in os.environ for name in TOKEN_VARIABLES):
        keep_token_private(Path.home() / ".ray" / "auth_token")
    before = {name: os.environ.get(name) for name in CLOSED}, ray_constants.ENABLE_RAY_CLUSTER
    os.environ.update(CLOSED)
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before[1]
        for name, value in before[0].items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def keep_token_private(file: Path) -> None:
    """Make Ray's token where there is none, and take it from other users of the machine: Ray itself lets them read it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.write(descriptor, secrets.token_hex(32).encode())
        os.close(descriptor)
    if file.stat().st_mode & 0o077:
        file.chmod(0o600)
