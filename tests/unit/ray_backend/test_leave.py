"""The end of a connection to Ray must not be the end of the process."""

import gc
import subprocess
import sys
import weakref

import pytest

from threestage.ray_backend.connect import leave

# References in cycles, which only the garbage collector frees, and a thread that makes it run all the time.
COLLECTED_WHILE_LEAVING = """
import gc, threading, time, ray
from threestage.ray_backend.connect import leave

class Cycle:
    def __init__(self, number):
        self.itself, self.reference = self, ray.put(number)

def allocate():
    while True:
        lists = [[] for _ in range(2000)]
        time.sleep(0.0005)

ray.init("local", num_cpus=1, log_to_driver=False, include_dashboard=False)
cycles = [Cycle(number) for number in range(3000)]
threading.Thread(target=allocate, daemon=True).start()
gc.disable()
del cycles
gc.enable()
leave()
print("goes on")
"""


class Garbage:
    def __init__(self) -> None:
        self.itself = self


def test_nothing_is_collected_while_ray_shuts_down(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, bool]] = []
    garbage = weakref.ref(Garbage())
    monkeypatch.setattr("ray.shutdown", lambda: seen.append((gc.isenabled(), garbage() is None)))
    leave()
    assert seen == [(False, True)] and gc.isenabled()


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(200)
def test_the_process_goes_on() -> None:
    """With ray.shutdown() alone it ends in most tries."""
    for _ in range(3):
        command = [sys.executable, "-W", "ignore", "-c", COLLECTED_WHILE_LEAVING]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.stdout.endswith("goes on\n"), done.stderr
