"""Whether a Ray cluster is there and lets this process in: `threestage check` before it connects."""

import contextlib
import importlib.metadata
import platform

import ray

from threestage import __version__
from threestage.checks.lines import Found
from threestage.on_ray.entrance import lets_in
from threestage.on_ray.settings import ClusterSettings
from threestage.on_ray.train import connected


def connect(name: str, address: str, cluster: ClusterSettings, connection: contextlib.ExitStack) -> Found:
    """Connects this process, until `connection` is closed. Raises InputError like `lets_in` and `connected`."""
    found = lets_in(name, address)
    connection.enter_context(connected(cluster))
    return found


def versions() -> dict[str, str]:
    """Of this process."""
    return {
        "threestage": __version__,
        "Ray": ray.__version__,
        "Python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
    }
