"""Why: a cluster that refuses is found out in seconds; Ray's token on this machine is for its owner's eyes."""

import contextlib
import os
import platform
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc  # type: ignore[import-untyped]
import pytest
import ray
import torch

from tests.conftest import tiny_config
from tests.refusals import refused
from threestage import private_folder as module
from threestage.config import Config, changed
from threestage.private_folder import private_folder
from threestage.ray_backend import connect, ray_internals
from threestage.ray_backend.connect import keep_token_private


@pytest.fixture
def config(scenes: Path) -> Config:
    return tiny_config(scenes)


def test_a_token_is_made_and_kept_from_others(tmp_path: Path) -> None:
    file = tmp_path / ".ray" / "auth_token"
    keep_token_private(file)
    made = file.read_text()
    assert len(made) == 64 and stat.S_IMODE(file.stat().st_mode) == 0o600
    file.chmod(0o644)
    keep_token_private(file)
    assert file.read_text() == made and stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.filterwarnings("default")  # Ray's own
def test_connecting_adds_no_variable_while_threads_live(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread may be looking one up, as every request to S3 does."""
    connect.reserve_ray_variables(config.cluster)
    before = dict(os.environ)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(connect, "leave", lambda: None)
    monkeypatch.setattr(ray_internals, "loopback_only", contextlib.nullcontext)
    monkeypatch.setattr(ray, "init", lambda **options: None)
    with connect.connected(config.cluster):
        assert os.environ.keys() == before.keys()


def test_a_home_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers of some clusters have none."""
    monkeypatch.setenv("HOME", "/proc/nohome")
    with refused("ray/token-file", "/proc/nohome/.ray/auth_token", "RAY_AUTH_TOKEN_PATH"):
        keep_token_private(Path.home() / ".ray" / "auth_token")


@pytest.mark.filterwarnings("default")  # Ray's own
def test_the_token_of_a_ray_that_is_started_here(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is made before Ray starts; the user's own stays."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(connect, "leave", lambda: None)
    monkeypatch.setattr(ray, "init", lambda **options: None)
    token = tmp_path / ".ray" / "auth_token"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    with connect.connected(config.cluster):
        assert not token.exists()
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    with connect.connected(config.cluster):
        assert token.exists()


def test_sessions_of_processes_that_are_gone_are_removed(tmp_path: Path) -> None:
    """Each holds logs and sockets of some 10 MB; those of drivers that live stay."""
    names = [f"session_2026-01-01_00-00-00_00000{number}_{pid}" for number, pid in enumerate((os.getpid(), 2**22 + 1))]
    for name in (*names, "session_of_somebody", "other"):
        (tmp_path / name / "logs").mkdir(parents=True)
    (tmp_path / "session_latest").symlink_to(tmp_path / names[0])
    connect.remove_dead_sessions(tmp_path)
    kept = {"session_of_somebody", "other", "session_latest"}
    assert {path.name for path in tmp_path.iterdir()} == {names[0], *kept}
    connect.remove_dead_sessions(tmp_path, ended=os.getpid())
    assert {path.name for path in tmp_path.iterdir()} == kept


@pytest.mark.filterwarnings("default")  # Ray's own
@pytest.mark.parametrize("fails", [True, False])
def test_the_session_of_a_run_goes_with_it(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """TMPDIR is honoured. The logs of a run that failed are needed."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    monkeypatch.setattr(connect, "LONGEST_SOCKET", 1000)
    monkeypatch.setattr(connect, "leave", lambda: None)
    made = list[Path]()

    def init(_temp_dir: str, **options: Any) -> None:
        made.append(Path(_temp_dir) / f"session_2026-01-01_00-00-00_000000_{os.getpid()}")
        made[0].mkdir(parents=True)

    monkeypatch.setattr(ray, "init", init)
    with contextlib.suppress(KeyError), connect.connected(config.cluster):
        if fails:
            raise KeyError
    assert made[0].parent == private_folder() / "ray" and made[0].is_relative_to(tmp_path)
    assert made[0].exists() == fails


def test_a_path_that_is_too_long_for_sockets_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(connect, "LONGEST_SOCKET", len(str(tmp_path)) + 10)
    assert connect._sessions_folder() == private_folder("/tmp") / "ray"


def test_a_folder_that_somebody_else_has_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Path", lambda name: tmp_path / name.strip("/").replace("/", "-"))
    folder = private_folder()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and private_folder() == folder
    folder.chmod(0o777)
    with refused("run/private-folder", folder):
        private_folder()
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with refused("run/private-folder", folder):
        private_folder()


# ---- Does the cluster answer, and does it let us in?


def test_which_cluster(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    assert connect.address_of(config.cluster) is None
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert connect.address_of(config.cluster) is None, "Ray's own word for a cluster of this machine"
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert connect.address_of(config.cluster) == ("RAY_ADDRESS", "head:6379")
    named = changed(config, {"cluster.address": "other:6379"}).cluster
    assert connect.address_of(named) == ("cluster.address", "other:6379")
    assert connect.address_of(changed(config, {"cluster.address": "local"}).cluster) is None


@pytest.mark.parametrize("address", ["ray://head:10001", "http://head:8265"])
def test_an_address_that_a_run_cannot_use(address: str) -> None:
    with refused("ray/address", f"RAY_ADDRESS={address}: ", "HOST:PORT"):
        connect.probe_cluster("RAY_ADDRESS", address)


def test_nobody_listens() -> None:
    with refused("ray/no-answer", "cluster.address=127.0.0.1:1: ", "UNAVAILABLE"):
        connect.probe_cluster("cluster.address", "127.0.0.1:1")


class Refusing(grpc.GenericRpcHandler):
    """Answers every call as a cluster does whose token is another one."""

    def service(self, details: Any) -> Any:
        def refuse(request: bytes, context: Any) -> bytes:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
            return b""

        return grpc.unary_unary_rpc_method_handler(refuse)


@pytest.fixture
def refusing() -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(1), handlers=[Refusing()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def test_another_token(refusing: str) -> None:
    with refused("ray/wrong-token", f"cluster.address={refusing}: ", "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"):
        connect.probe_cluster("cluster.address", refusing)


def test_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_token(address: str) -> None:
        raise ray.exceptions.AuthenticationError("no token was found")

    monkeypatch.setattr(ray_internals, "cluster_metadata", no_token)
    with refused("ray/no-token", "cluster.address=127.0.0.1:1: ", "RAY_AUTH_MODE=token"):
        connect.probe_cluster("cluster.address", "127.0.0.1:1")


@pytest.mark.filterwarnings("default")  # Ray's own
def test_a_machine_that_is_no_node_of_it(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: str, **options: Any) -> None:
        raise RuntimeError("no raylet\nhere")

    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    monkeypatch.setattr(connect, "check_connection", lambda name, address: None)
    monkeypatch.setattr(ray, "init", refuse)
    with refused("ray/not-a-node", "RAY_ADDRESS=head:6379: ", "(no raylet here)"), connect.connected(config.cluster):
        pass


@pytest.mark.filterwarnings("default")  # Ray's own
def test_no_ray_on_this_machine(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_here(address: str, **options: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(ray, "init", none_here)
    with refused("ray/no-answer", "RAY_ADDRESS=auto: ", "HOST:PORT"), connect.connected(config.cluster):
        pass


@pytest.mark.parametrize("what", ["Ray", "Python"])
def test_other_versions(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"ray_version": ray.__version__, "python_version": platform.python_version()}
    monkeypatch.setattr(ray_internals, "cluster_metadata", lambda address: there | {f"{what.lower()}_version": "1.2.3"})
    with refused("ray/other-version", "cluster.address=127.0.0.1:1: ", f"{what} 1.2.3"):
        connect.probe_cluster("cluster.address", "127.0.0.1:1")


def test_a_cluster_that_anybody_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"ray_version": ray.__version__, "python_version": platform.python_version()}
    monkeypatch.setattr(ray_internals, "cluster_metadata", lambda address, with_token=True: there)
    assert "asks for no token" in str(connect.probe_cluster("cluster.address", "127.0.0.1:1").warning)


@pytest.mark.parametrize(
    ("gpus", "cluster", "runs", "taken"),
    [
        (0, {}, 1, 0),
        (1, {}, 1, 1),
        (1, {"workers": 2}, 1, 0),
        (2, {"workers": 2}, 1, 1),
        (1, {"predictors": 2}, 1, 0),
        (1, {}, 2, 0),
        (8, {"address": "10.0.0.1:6379"}, 1, 0),
        (1, {"workers": 4, "gpus_per_worker": 0.25}, 1, 0.25),
        (1, {"gpus_per_worker": 0}, 1, 0),
    ],
)
def test_the_gpus_of_this_machine_are_taken_where_each_worker_gets_one(
    config: Config, monkeypatch: pytest.MonkeyPatch, gpus: int, cluster: dict[str, Any], runs: int, taken: float
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    asked = changed(config, {f"cluster.{key}": value for key, value in cluster.items()})
    assert connect.with_gpus(asked, runs).cluster.gpus_per_worker == taken
