"""One driver for a folder: who holds it is told, who is dead is replaced, who was replaced stops."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import tiny_config
from tests.refusals import refused
from tests.store_away import StoreAway
from tests.waiting import wait_for
from threestage.data import storage
from threestage.errors import InputError, StageFailure
from threestage.run_folder import lease
from threestage.sweeps import sweep

INTERVAL_S = 0.1
HOLDER = """
import sys, time
from threestage.run_folder import lease
with lease.held(sys.argv[1], print, 0.2):
    print("held", flush=True)
    time.sleep(100)
"""


def elsewhere(out: str, beat: int = 1, **values: Any) -> None:
    """Write a lease as a driver on another machine does."""
    driver = {"id": "other", "host": "node-7", "pid": 4711, "machine": "boot/pid:[1]", "process": "1"}
    driver |= {"started": "2026-01-02 03:04:05 UTC", "interval_s": INTERVAL_S}
    storage.write_json(storage.join(out, lease.NAME), {**driver, "beat": beat, **values})


@pytest.fixture
def said() -> list[str]:
    return []


def test_it_beats_and_is_removed(tmp_path: Path, said: list[str]) -> None:
    out = tmp_path / "run"
    with lease.held(str(out), said.append, INTERVAL_S) as held:
        first = (out / lease.NAME).read_bytes()
        wait_for(lambda: (out / lease.NAME).read_bytes() != first)
        held.check()
    assert not out.exists() and said == []
    with pytest.raises(KeyError), lease.held(str(out), said.append):
        (out / "split.json").write_text("{}")
        raise KeyError
    assert [path.name for path in out.iterdir()] == ["split.json"]


def test_a_second_driver_is_told_who_holds_it(tmp_path: Path, said: list[str]) -> None:
    with lease.held(str(tmp_path), said.append):
        begun = time.monotonic()
        with refused("run/another-driver", f"process {os.getpid()} on ", " UTC)", "--out"):
            lease.Lease(str(tmp_path)).take(said.append)
        assert time.monotonic() - begun < 1, "one of this machine is seen at once"
    assert said == []


def test_a_driver_that_was_killed_here_is_replaced_at_once(tmp_path: Path, said: list[str]) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "held\n"
        process.kill()
    begun = time.monotonic()
    with lease.held(str(tmp_path), said.append):
        assert time.monotonic() - begun < 1
    assert len(said) == 1 and f"its last driver (process {process.pid} on" in said[0] and "is dead" in said[0]


def test_another_process_with_the_same_id_is_another(tmp_path: Path) -> None:
    elsewhere(str(tmp_path), machine=lease._machine(), pid=os.getpid(), process="1")
    with lease.held(str(tmp_path), lambda text: None):
        pass


def test_one_elsewhere_is_dead_when_it_does_not_beat(tmp_path: Path, said: list[str]) -> None:
    elsewhere(str(tmp_path))
    begun = time.monotonic()
    with lease.held(str(tmp_path), said.append):
        assert time.monotonic() - begun >= lease.MISSED * INTERVAL_S
    assert len(said) == 2 and "node-7" in said[0] and "is dead, this one takes over" in said[1]


def test_one_elsewhere_that_beats_is_alive_whatever_the_clocks_say(tmp_path: Path, said: list[str]) -> None:
    elsewhere(str(tmp_path), started="1999-01-01 00:00:00 UTC")
    timer = threading.Timer(INTERVAL_S, lambda: elsewhere(str(tmp_path), 2))
    timer.start()
    named = "process 4711 on node-7, since 2026"
    with refused("run/another-driver", named), lease.held(str(tmp_path), said.append):
        pass
    timer.join()
    assert storage.read_json(str(tmp_path / lease.NAME))["beat"] == 2, "it keeps what it had"


def test_one_that_nobody_can_read_is_watched_like_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "INTERVAL_S", INTERVAL_S)
    (tmp_path / lease.NAME).write_text('{"format": 9')
    with lease.held(str(tmp_path), lambda text: None):
        assert storage.read_json(str(tmp_path / lease.NAME))["pid"] == os.getpid()


def test_the_main_thread_stops_when_its_lease_is_taken(tmp_path: Path, said: list[str]) -> None:
    begun = time.monotonic()
    before = signal.getsignal(lease.LOST_SIGNAL)
    taken_over = refused("run/taken-over", "process 4711 on node-7", error=StageFailure)
    with taken_over, lease.held(str(tmp_path), said.append, INTERVAL_S):
        elsewhere(str(tmp_path))
        try:
            time.sleep(60)
        except Exception:  # a driver that keeps going on errors must not keep this one
            raise AssertionError from None
    assert time.monotonic() - begun < 5
    assert storage.read_json(str(tmp_path / lease.NAME))["id"] == "other", "it is not removed"
    assert signal.getsignal(lease.LOST_SIGNAL) == before


def test_another_thread_asks(tmp_path: Path) -> None:
    def drive() -> None:
        with lease.held(str(tmp_path), lambda text: None, INTERVAL_S) as held:
            elsewhere(str(tmp_path))
            wait_for(lambda: held.lost is not None)
            held.check()

    with ThreadPoolExecutor(1) as pool, refused("run/taken-over", "node-7", error=StageFailure):
        pool.submit(drive).result()


def test_a_store_that_is_down_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    down = threading.Event()
    read = storage.read_bytes

    def fails(uri: str) -> bytes:
        if down.is_set():
            raise OSError("AWS Error SERVICE_UNAVAILABLE")
        return read(uri)

    monkeypatch.setattr(storage, "read_bytes", fails)
    file = tmp_path / lease.NAME
    with lease.held(str(tmp_path), lambda text: None, INTERVAL_S):
        down.set()
        time.sleep(3 * INTERVAL_S)
        before = file.read_bytes()
        down.clear()
        wait_for(lambda: file.read_bytes() != before)
        file.unlink()
        wait_for(file.exists)
        down.set()
    assert file.exists(), "a release that fails is not the run's failure"


def _race(out: str, drivers: int) -> list[str]:
    """So many begin at the same moment and stay for two beats; what became of each."""
    barrier = threading.Barrier(drivers)

    def drive() -> str:
        barrier.wait()
        try:
            with lease.held(out, lambda text: None, INTERVAL_S) as held:
                time.sleep(2.5 * INTERVAL_S)
                held.check()
        except (InputError, StageFailure) as error:
            return type(error).__name__
        return "drove"

    with ThreadPoolExecutor(drivers) as pool:
        return sorted(future.result() for future in [pool.submit(drive) for _ in range(drivers)])


def test_of_those_that_begin_together_one_goes_on(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        for ended in pool.map(lambda number: _race(str(tmp_path / str(number)), 6), range(4)):
            assert ended == ["InputError"] * 5 + ["drove"]


def test_of_those_that_begin_together_on_s3_one_goes_on(bucket: str) -> None:
    assert _race(f"{bucket}/run", 6) == ["InputError"] * 5 + ["drove"]
    assert storage.list_files(bucket) == []


def test_a_slow_one_that_writes_late_leaves_one(tmp_path: Path) -> None:
    """It found no lease, and wrote its own only when the other had gone on: that one finds out."""
    late = lease.Lease(str(tmp_path), INTERVAL_S)
    taken_over = refused("run/taken-over", error=StageFailure)
    with taken_over, lease.held(str(tmp_path), lambda text: None, INTERVAL_S):
        late._write({})
        time.sleep(60)
    assert late._other() is None


def test_a_takeover_while_the_progress_is_read_is_seen_at_that_beat(tmp_path: Path) -> None:
    """Reading it asks the store three times: a beat that followed would take the lease back."""

    def progress() -> dict[str, Any]:
        elsewhere(str(tmp_path))
        return {}

    with refused("run/taken-over", error=StageFailure), lease.held(str(tmp_path), print, INTERVAL_S) as held:
        held.progress = progress
        time.sleep(60)
    assert storage.read_json(f"{tmp_path}/{lease.NAME}")["id"] == "other"


def test_an_end_does_not_wait_for_a_store_that_is_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "END_S", 0.2)
    store = StoreAway(monkeypatch, lease.NAME)
    with lease.held(str(tmp_path), print, INTERVAL_S):
        store.silent.set()
        begun = time.monotonic()
    assert time.monotonic() - begun < 5
    store.silent.clear()


def test_a_folder_within_another_driver_s_stops_with_it(tmp_path: Path) -> None:
    def inner() -> None:
        with lease.held(str(tmp_path / "trial"), lambda text: None, INTERVAL_S):
            elsewhere(str(tmp_path))
            time.sleep(60)

    outer = lease.held(str(tmp_path), lambda text: None, INTERVAL_S)
    with refused("run/taken-over", f"{tmp_path}: another driver", error=StageFailure), outer:
        inner()


def test_a_sweep_has_one_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "checked", lambda asked: asked)
    asked: Any = SimpleNamespace(out=str(tmp_path), config=tiny_config(tmp_path))
    show: Any = SimpleNamespace(warn=lambda text: None)
    with lease.held(asked.out, show.warn), refused("run/another-driver", tmp_path):
        sweep.run(asked, show)


def test_both_taking_over_a_dead_one_leave_one(tmp_path: Path) -> None:
    elsewhere(str(tmp_path))
    assert _race(str(tmp_path), 4) == ["InputError"] * 3 + ["drove"]


@pytest.mark.timeout(60)
def test_a_lease_that_is_no_file_of_ours_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / lease.NAME).write_text("[" * 100_000)
    with refused("storage/too-large"), lease.held(str(tmp_path), lambda text: None):
        pass
    (tmp_path / lease.NAME).unlink()
    os.mkfifo(tmp_path / lease.NAME)
    with refused("storage/not-a-file"), lease.held(str(tmp_path), lambda text: None):
        pass
