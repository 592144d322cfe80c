"""What the fault tests share."""

from collections.abc import Iterator

import pytest

from tests.faulty_s3 import Faults, faulty_s3
from tests.s3 import s3_server, variables


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """An empty bucket behind a proxy that fails on command."""
    with s3_server() as endpoint, faulty_s3(endpoint) as (proxy, faults):
        for name, value in variables(proxy).items():
            monkeypatch.setenv(name, value)
        yield faults
