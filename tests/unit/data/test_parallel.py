"""What is made ahead must keep its order, stay few, and pass errors on: else a batch is lost, or the memory fills."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.failing_s3 import silent_server
from tests.s3 import variables
from threestage.data.parallel import ahead, map_ahead


@pytest.mark.parametrize("depth", [1, 3])
def test_ahead_gives_all_and_passes_errors_on(depth: int) -> None:
    def failing() -> Iterator[int]:
        yield from range(5)
        raise OSError("disk gone")

    items = ahead(failing(), depth)
    assert [next(items) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(OSError, match="disk gone"):
        next(items)
    assert list(ahead(iter([]), depth)) == []


def test_few_items_are_made_ahead() -> None:
    made = list[int]()

    def source() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    items = ahead(source(), 3)
    assert next(items) == 0
    items.close()
    assert len(made) <= 4
    made.clear()
    results = map_ahead(lambda number: -number, source(), threads=2)
    assert next(results) == 0 and len(made) <= 4
    assert list(results) == [-number for number in range(1, 100)]


UNANSWERED = """
import threading, time
from threestage.data import storage
from threestage.data.parallel import end_process
write = lambda: storage.write_bytes("s3://bucket/checkpoint", b"")
threading.Thread(target=write, name="checkpoint", daemon=True).start()
time.sleep(0.3)
print("written so far")
end_process(3)
"""


def test_a_process_ends_though_a_store_does_not_answer() -> None:
    """pyarrow would wait for its request: twelve tries of a minute each."""
    with silent_server() as endpoint:
        environment = {**os.environ, **variables(endpoint)}
        begun = time.monotonic()
        done = subprocess.run([sys.executable, "-c", UNANSWERED], env=environment, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (3, b"written so far\n"), done.stderr
    assert time.monotonic() - begun < 30
