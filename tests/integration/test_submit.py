"""`threestage submit` from a folder that is no repository, with the package from a wheel, on a cluster that wants a token."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.client import HTTPException
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest
import yaml

from cluster.local import Cluster, local_cluster, members
from tests.conftest import copy_to, tiny_config
from tests.listening import listening
from threestage.data import storage
from threestage.ray_backend.job_package import EXPECTED
from threestage.ray_backend.submit import DETACHED, STOP_S, STOPPED

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,  # a cluster of its own, for minutes
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("default"),  # Ray's own
]
ROOT = Path(__file__).parents[2]
VERSION = "0.1.0+wheel"
OUT = "s3://bucket/run"
LIMIT_S = 240.0


class Wire:
    """A port on loopback that leads to another one, until it is cut."""

    def __init__(self, host: str, port: int) -> None:
        self._target, self._open = (host, port), True
        self._server = socket.create_server(("127.0.0.1", 0))
        self._ends: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"

    def cut(self) -> None:
        """Every connection breaks, and no new one comes about."""
        self._open = False
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._ends.clear()

    def mend(self) -> None:
        self._open = True

    def _accept(self) -> None:
        while True:
            here, _ = self._server.accept()
            if not self._open:
                here.close()
                continue
            there = socket.create_connection(self._target)
            self._ends += [here, there]
            for source, sink in ((here, there), (there, here)):
                threading.Thread(target=_pass_on, args=(source, sink), daemon=True).start()


def _pass_on(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
    source.close()


class Place(NamedTuple):
    """Where the user sits: a cluster, a folder of his own, the package as installed from a wheel, and the wheel."""

    cluster: Cluster
    folder: Path
    installed: Path
    wheel: Path
    wire: Wire

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "threestage", "submit", *arguments, "--address", self.wire.url]

    @property
    def environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
        return inherited | self.cluster.environment | {"PYTHONPATH": str(self.installed)}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the package as it is here, with a version that no other installation has."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in ("threestage", "jobs", "tune", "cluster"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "constraints.txt", ".dockerignore"):
        shutil.copy(ROOT / name, source)
    init = source / "threestage" / "__init__.py"
    init.write_text(init.read_text().replace('__version__ = "0.1.0"', f'__version__ = "{VERSION}"'))
    _pip("wheel", "--no-deps", "-w", str(built), str(source))
    (file,) = built.glob("*.whl")
    return file


def _pip(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, wheel: Path, scenes: Path) -> Iterator[Place]:
    """A cluster, a data set on its S3, and in a folder elsewhere a configuration that trains one stage for some seconds."""
    installed, folder = tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("project")
    _pip("install", "-q", "--no-deps", "--target", str(installed), str(wheel))
    config = tiny_config(
        scenes,
        data={"root": "s3://bucket/data", "labelled": 8},
        registry={"tracking_uri": f"sqlite:///{folder}/runs/mine.db"},
        pseudo_mask={"guard": "ignore", "final_stage": False},
        stages=1,
        stage1={"steps": 1500, "labelled_batch": 2},
        training={"log_every": 10, "checkpoint_every": 20, "evaluate_every": 20},
    )
    (folder / "mine.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    with (
        pytest.MonkeyPatch.context() as patch,
        local_cluster(folder / "runs", nodes=1, cpus=6, mlflow=False) as cluster,
    ):
        (folder / ".rayignore").write_text("runs/\n")
        for name, value in cluster.environment.items():
            if name.startswith("AWS_"):
                patch.setenv(name, value)
        copy_to("s3://bucket/data", scenes)
        address = urlsplit(cluster.environment["RAY_API_SERVER_ADDRESS"])
        yield Place(cluster, folder, installed, wheel, Wire(str(address.hostname), int(address.port or 0)))


class Submission:
    """A `threestage submit` that runs; `said` are the lines of both its outputs."""

    def __init__(self, place: Place, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        self.said: list[str] = []
        self._process = subprocess.Popen(
            place.command(*arguments),
            cwd=place.folder,
            env=environment or place.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout
        with self._process.stdout as lines:
            self.said.extend(line.rstrip() for line in lines)

    def until(self, condition: Callable[[str], bool]) -> str:
        """The first line that meets the condition."""
        deadline = time.monotonic() + LIMIT_S
        while not (found := next(filter(condition, self.said), None)):
            assert time.monotonic() < deadline and self._process.poll() is None, "\n".join(self.said)
            time.sleep(0.05)
        return found

    def after_step(self, step: int) -> None:
        self.until(lambda line: line.startswith("stage1 ") and int(line[7:].partition("/")[0]) >= step)

    def id(self) -> str:
        return self.until(lambda line: line.startswith("job ")).split()[1]

    def interrupt(self) -> None:
        self._process.send_signal(signal.SIGINT)

    def ends(self) -> int:
        try:
            return self._process.wait(LIMIT_S)
        finally:
            self._process.kill()


RUN = ("run", "mine.yaml", "--out", OUT, "--env", "AWS_REGION=us-east-1", "--wheel")


def test_submit_lose_detach_follow_stop_resubmit_finish(place: Place) -> None:
    first = Submission(place, *RUN, str(place.wheel))
    job = first.id()
    second = Submission(place, *RUN, str(place.wheel))
    second.until(lambda line: f"{job} already writes to {OUT}" in line)
    second.after_step(20)
    first.after_step(20)
    place.wire.cut()
    first.until(lambda line: line.startswith(f"connection lost, {job} continues"))
    place.wire.mend()
    first.until(lambda line: line == "reconnected")
    first.interrupt()
    assert first.ends() == DETACHED
    assert any(line.startswith(f"detached: {job} continues") for line in first.said)
    second.until(lambda line: line == "reconnected")
    second.after_step(60)
    with _asked(place, f"/api/jobs/{job}/stop", "POST"):
        assert second.ends() == STOPPED, "\n".join(second.said)
    for submission in (first, second):
        steps = [line for line in submission.said if line.startswith("stage1 ")]
        assert len(steps) == len(set(steps)), "nothing is printed twice"

    third = Submission(place, *RUN, str(place.wheel))
    assert third.id() != job and third.id().rsplit("-", 1)[0] == "tiny"
    assert third.ends() == 0, "\n".join(third.said)
    assert not any(line.startswith("stage1 20/") for line in third.said), "it went on from its checkpoint"
    assert storage.read_json(f"{OUT}/stage1/done.json")["code_version"] == VERSION, "the wheel's code"
    assert storage.exists(f"{OUT}/results.json")


def _asked(place: Place, path: str, method: str = "GET") -> Any:
    """The job API's answer to a request with the token."""
    request = Request(place.cluster.environment["RAY_API_SERVER_ADDRESS"] + path, method=method)
    token = Path(place.cluster.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    request.add_header("Authorization", f"Bearer {token}")
    return urlopen(request)


def test_a_job_s_own_exit_code(place: Place) -> None:
    missing = Submission(
        place, "evaluate", "/nothing", "s3://bucket/data", "--wheel", str(place.wheel), "--env", "MY_VARIABLE"
    )
    assert missing.ends() == 2
    assert any("MY_VARIABLE" in line and line.endswith("[submit/missing-variable]") for line in missing.said), (
        missing.said
    )


def test_the_cluster_shows_no_secret(place: Place) -> None:
    """Of what this process has in its environment, the job's variables hold the names."""
    token = Path(place.cluster.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    with _asked(place, "/api/jobs/") as answer:
        jobs = json.load(answer)
    (run, *_) = [job for job in jobs if (job["metadata"] or {}).get("threestage.out") == OUT]
    names = "AWS_ENDPOINT_URL_S3|AWS_ENDPOINT_URL,AWS_ACCESS_KEY_ID?,AWS_SECRET_ACCESS_KEY?,MLFLOW_S3_ENDPOINT_URL?"
    given = {"AWS_REGION": "us-east-1", "RAY_JOB_STOP_WAIT_TIME_S": STOP_S, EXPECTED: names}
    assert run["runtime_env"]["env_vars"] == given
    assert run["metadata"]["threestage.name"] == "tiny" and token not in json.dumps(jobs)


def test_without_the_token_nobody_gets_in(place: Place, tmp_path: Path) -> None:
    wrong = {"RAY_AUTH_TOKEN": "0" * 64, "RAY_AUTH_TOKEN_PATH": None}, "[ray/wrong-token]"
    no_file = {"RAY_AUTH_TOKEN_PATH": "/nowhere/token"}, "[ray/no-token]"
    none = {"RAY_AUTH_TOKEN_PATH": None, "RAY_AUTH_MODE": None}, "[ray/no-token]"
    begun = []
    for changes, words in (wrong, no_file, none):
        changed = {**place.environment, "HOME": str(tmp_path), **changes}
        environment = {name: value for name, value in changed.items() if value is not None}
        begun.append((Submission(place, *RUN[:-1], environment=environment), words))
    for submission, words in begun:
        assert submission.ends() == 2
        (line,) = [line for line in submission.said if line.startswith("error: ")]
        assert words in line and "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH" in line, submission.said
        assert not any(line.startswith("job ") for line in submission.said)


def test_what_listens(place: Place) -> None:
    """The dashboard with its job API, and S3, on loopback only. What Ray opens on all interfaces, and no option of its
    closes, are its own ports, where the token is the guard, and its metrics, which anyone may read who reaches the port."""
    parts = {part.pid for part in (place.cluster.head, *place.cluster.nodes, place.cluster.s3) if part}
    found = set(listening(members(parts)))
    on_all = {(port, program) for address, port, program in found if address in ("0.0.0.0", "::")}
    others = {ip_address(address.removeprefix("::ffff:")) for address, _, _ in found} - set(
        map(ip_address, ("0.0.0.0", "::"))
    )
    assert all(address.is_loopback for address in others) and len(others) >= 3
    for service in (place.cluster.environment["RAY_API_SERVER_ADDRESS"], place.cluster.environment["AWS_ENDPOINT_URL"]):
        assert urlsplit(service).port not in {port for port, _ in on_all}
    rays = ("ray::", "/ray/core/src/ray/", "/ray/dashboard/", "/ray/autoscaler/")
    assert all(any(name in program for name in rays) for _, program in on_all), on_all
    for port, program in on_all:
        answer = _answer(port)
        assert answer is None or answer.startswith("# HELP"), f"{program} answers on {port}: {answer[:200]}"


def _answer(port: int) -> str | None:
    """What an HTTP request without a token is answered; None where it is refused or HTTP is not spoken."""
    try:
        with urlopen(f"http://127.0.0.1:{port}/", timeout=2) as answer:
            return str(answer.read().decode())
    except (OSError, HTTPException):
        return None
