"""Processes that know nothing of the tests' own."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

OWN = ("PYTHON", "AWS_", "MLFLOW_", "RAY_", "VIRTUAL_ENV")


def environment() -> dict[str, str]:
    """This process's, without its import path, object store, model registry and cluster."""
    return {name: value for name, value in os.environ.items() if not name.startswith(OWN)}


def command_of(program: Path, *arguments: str, env: Mapping[str, str]) -> None:
    """Fails with what the process printed. env: beside `environment()`."""
    done = subprocess.run([program, *arguments], env={**environment(), **env}, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
