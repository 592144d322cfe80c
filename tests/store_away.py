"""A store that is away, or silent, for tests of whatever needs one: reads and writes of `storage` fail as on S3."""

import threading
from typing import Any

import pytest

from threestage.data import outages, storage
from threestage.training import loop

BUSY = "AWS Error SLOW_DOWN (HTTP status 503) during PutObject operation: Message: Please reduce your request rate."


def busy() -> OSError:
    """What pyarrow raises once it has tried for a minute."""
    return OSError(f"When completing a request for key 'run/x' in bucket 'bucket': {BUSY}")


class StoreAway:
    """While `down` is set, all fails whose URI holds `part`; while `silent` is set, it gets no answer. Nobody pauses."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, part: str = "") -> None:
        self.down, self.silent, self.part = threading.Event(), threading.Event(), part
        self.failed = 0
        for name in ("write_bytes", "read_bytes"):
            monkeypatch.setattr(storage, name, self._guarded(getattr(storage, name)))
        monkeypatch.setattr(outages, "FIRST_PAUSE_S", 0.01)
        monkeypatch.setattr(outages, "LONGEST_PAUSE_S", 0.01)
        monkeypatch.setattr(loop, "POLL_S", 0.05)

    def _guarded(self, function: Any) -> Any:
        def guarded(uri: str, *data: Any) -> Any:
            while self.silent.is_set() and self.part in uri:
                threading.Event().wait(0.01)
            if self.down.is_set() and self.part in uri:
                self.failed += 1
                raise busy()
            return function(uri, *data)

        return guarded
