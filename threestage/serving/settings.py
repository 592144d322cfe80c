"""Limits of a server, and what must be installed for one."""

import importlib.util
import ipaddress

from pydantic import Field

from threestage.errors import InputError
from threestage.settings import Settings

PACKAGES, RAY_PACKAGES = ("fastapi", "uvicorn", "prometheus_client"), ("grpc_reflection",)
"""What a server imports, and what Ray Serve imports beside what Ray itself needs."""


class ServeSettings(Settings):
    """`most_requests`: being answered or waiting, others get 429; `most_bytes`: of a request; `follow_every_s`: how often the
    alias is looked up; `drain_s`: how long a server that ends waits for its open requests."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    most_requests: int = Field(default=32, ge=1)
    most_bytes: int = Field(default=32 * 2**20, ge=1)
    follow_every_s: float = Field(default=10, gt=0)
    drain_s: int = Field(default=30, ge=0)


def require_serve_extra(on_ray: bool) -> None:
    """Raise InputError where the extra `serve` is not installed."""
    wanted = PACKAGES + (RAY_PACKAGES if on_ray else ())
    if missing := [name for name in wanted if importlib.util.find_spec(name) is None]:
        raise InputError(
            f"serve: {', '.join(missing)} not installed; pip install 'threestage[serve]'", "serve/missing-package"
        )


def is_loopback(host: str) -> bool:
    """Whether other machines cannot reach a server at this address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
