"""The guard of a local cluster, without Ray: what was started goes, whatever happens to the process that started it."""

import contextlib
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.local import Guard, members, split_cpus
from cluster.s3 import closed_to_pages

ROOT = Path(__file__).parents[2]
# Starts a shell with a child in a session of its own, as a Ray job has, and prints the guard's and the shell's ids.
STARTER = """
import os, sys, time
from pathlib import Path
from cluster.local import Guard
guard = Guard(Path(sys.argv[1]))
(guard.ray_folder / "node1" / "session_2026" / "logs").mkdir(parents=True)
(guard.ray_folder / "node1" / "session_2026" / "logs" / "raylet.out").write_text("kept")
pid = guard.start(["sh", "-c", "setsid sleep 1000 & sleep 1000"], dict(os.environ), Path(sys.argv[1]) / "logs" / "sh.log")
print(guard._undo.pid, pid, guard.ray_folder, flush=True)
time.sleep(1000)
"""


def test_the_nodes_share_evenly_and_the_head_has_the_rest() -> None:
    assert split_cpus(8, 2) == (2, 3)
    assert split_cpus(3, 2) == (1, 1)
    for cpus, nodes in ((2, 2), (8, 0)):
        with pytest.raises(ValueError, match=f"{cpus} CPUs and {nodes} nodes"):
            split_cpus(cpus, nodes)


def test_nothing_outlives_a_killed_process(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STARTER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        guard, shell, ray_folder = process.stdout.readline().split()
        _until(lambda: len(members({int(shell)})) == 3)
        started = members({int(shell)})
        with pytest.raises(RuntimeError, match="belongs to a running cluster"):
            Guard(tmp_path)
        process.kill()
    _until(lambda: not members({int(guard), *started}))
    assert not Path(ray_folder).exists()
    assert (tmp_path / "logs" / "node1" / "raylet.out").read_text() == "kept"


def test_the_logs_are_the_owner_s_alone(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "cluster"
    with contextlib.closing(Guard(folder)):
        assert [stat.S_IMODE(path.stat().st_mode) for path in (folder, folder / "logs")] == [0o700, 0o700]
    (folder / "logs").chmod(0o777)
    with contextlib.closing(Guard(folder)):
        assert stat.S_IMODE((folder / "logs").stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("headers", "passes"),
    [
        ({"HTTP_HOST": "127.0.0.1:9"}, True),
        ({"HTTP_HOST": "127.0.0.1:9", "HTTP_ORIGIN": "http://evil"}, False),
        ({"HTTP_HOST": "127.0.0.1:9", "HTTP_ORIGIN": "null"}, False),
        ({"HTTP_HOST": "127.0.0.1:9", "HTTP_SEC_FETCH_SITE": "cross-site"}, False),  # a picture of a page
        ({"HTTP_HOST": "127.0.0.1:9", "HTTP_SEC_FETCH_SITE": "none"}, True),
        ({"HTTP_HOST": "evil:9"}, False),
        ({}, False),
    ],
)
def test_the_store_answers_no_web_page(headers: dict[str, str], passes: bool) -> None:
    started: list[str] = []
    app = closed_to_pages(lambda environ, start: [b"in"], ["127.0.0.1:9"])
    answer = app(dict(headers), lambda status, _: started.append(status))
    assert (list(answer) == [b"in"]) == passes and started == ([] if passes else ["403 Forbidden"])


def _until(condition: Callable[[], bool], limit_s: float = 20) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
