"""Connect this process to a Ray cluster, or start Ray on this machine, and disconnect.

A cluster's address, token and versions are checked first, since `ray.init` tries a wrong address for minutes. Ray started
here opens no port to other machines.
"""

import contextlib
import gc
import logging
import os
import platform
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc  # type: ignore[import-untyped]
import ray
import ray.exceptions
import ray.train
import torch

from threestage.checks.result import CheckOutcome
from threestage.config import Config
from threestage.data import storage
from threestage.errors import InputError
from threestage.hosts import refuse_unconfirmed
from threestage.private_folder import TEMPORARY, private_folder
from threestage.ray_backend import ray_internals
from threestage.ray_backend.capacity import SPARE_CPUS
from threestage.ray_settings import ClusterSettings
from threestage.termination import handler_kept

# ---- Does the cluster answer, and does it let us in?

TOKEN = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH (a file) or RAY_AUTH_TOKEN to the cluster's"
OPEN = "it asks for no token: whoever reaches it can run programs there; start it with RAY_AUTH_MODE=token"
AUTO = "auto"  # Ray's name for the cluster that this machine is a node of
LOCAL = "local"  # Ray's name for one that is started on this machine


def address_of(cluster: ClusterSettings) -> tuple[str, str] | None:
    """What names the cluster that a run connects to, and its address; None where a run starts Ray on its machine.

    Raises InputError for an address that only a file names (hosts.py)."""
    if ray.is_initialized():
        return "cluster.address", ray.get_runtime_context().gcs_address
    if cluster.address == LOCAL:
        return None
    if cluster.address is not None:
        refuse_unconfirmed("cluster.address", cluster.address, cluster.host_from)
        return "cluster.address", cluster.address
    named = os.environ.get("RAY_ADDRESS", "")
    return ("RAY_ADDRESS", named) if named not in ("", LOCAL) else None


def with_gpus(config: Config, runs: int = 1) -> Config:
    """The configuration with `gpus_taken` in place of `cluster.gpus_per_worker: auto`."""
    return config.model_copy(update={"cluster": gpus_taken(config.cluster, runs)})


def gpus_taken(cluster: ClusterSettings, runs: int = 1) -> ClusterSettings:
    """The same with a number in place of `auto`: a GPU for each worker where Ray is started on this machine and so many `runs`
    at once find enough of them, else none."""
    if cluster.gpus_per_worker != "auto":
        return cluster
    wanted = runs * max(cluster.most_workers, cluster.number_of_predictors)
    enough = address_of(cluster) is None and torch.cuda.device_count() >= wanted
    return cluster.model_copy(update={"gpus_per_worker": float(enough)})


def probe_cluster(name: str, address: str) -> CheckOutcome:
    """What `threestage check` reports of the cluster. Raises like `check_connection`."""
    there = check_connection(name, address)
    if not there:
        return CheckOutcome(
            f"{address}: something listens there; Ray {ray.__version__} finds out what when it connects"
        )
    value = f"{address}: Ray {there['ray_version']} and Python {there['python_version']} there and here"
    wants_token = CheckOutcome(f"{value}; it takes our token")
    return wants_token if _wants_token(address) else CheckOutcome(value, f"{address}: {OPEN}")


def check_connection(name: str, address: str) -> dict[str, str]:
    """The cluster's versions, empty where Ray cannot be asked for them. Raises InputError within seconds where `ray.init` would
    try for minutes: nobody listens, the token is wrong, the versions differ."""
    if "://" in address:
        raise InputError(
            f"{name}={address}: a run connects to HOST:PORT of the cluster's head, from one of its nodes; from elsewhere, "
            "`threestage check --address http://…` (the dashboard) tries it there, as `threestage submit` would run it",
            "ray/address",
        )
    there = {} if address == AUTO else _versions_there(name, address)
    _refuse_other_versions(name, address, there)
    return there


def _versions_there(name: str, address: str) -> dict[str, str]:
    try:
        there = ray_internals.cluster_metadata(address)
        if there is None:
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), ray_internals.ANSWER_S).close()
        return there or {}
    except ray.exceptions.AuthenticationError:
        raise InputError(f"{name}={address}: requires a token, and none was found; {TOKEN}", "ray/no-token") from None
    except (grpc.RpcError, OSError) as error:
        reason = error.code().name if isinstance(error, grpc.RpcError) else str(error)
        if reason == "UNAUTHENTICATED":
            raise InputError(f"{name}={address}: refuses the token; {TOKEN}", "ray/wrong-token") from None
        raise InputError(
            f"{name}={address}: no Ray answers there ({reason}); start the cluster, or correct the address",
            "ray/no-answer",
        ) from None
    except ValueError:
        raise InputError(
            f"{name}={address}: answers, but not as a Ray cluster; correct the address", "ray/other-service"
        ) from None


def _wants_token(address: str) -> bool:
    try:
        return not ray_internals.cluster_metadata(address, with_token=False)
    except (grpc.RpcError, ValueError):
        return True


def _refuse_other_versions(name: str, address: str, there: Mapping[str, str]) -> None:
    here = {"Ray": ray.__version__, "Python": platform.python_version()}
    for what, version in here.items():
        other = there.get(f"{what.lower()}_version", version)
        if other != version:
            raise InputError(
                f"{name}={address}: has {what} {other}, here is {version}, and Ray connects only equal versions; install {what} "
                f"{other} here, or submit the run with `threestage submit`, which needs no equal versions",
                "ray/other-version",
            )


# ---- Connect and disconnect

STRAY_SECONDS = 5.0  # after which an elastic group that found no room is tried again with what is there then

_start_timeout = ""  # what this process has set for Ray Train


@contextlib.contextmanager
def connected(cluster: ClusterSettings, runs: int = 1) -> Iterator[None]:
    """A connection to the cluster of the settings, or to one started on this machine with room for so many runs at once;
    an existing one is kept. Raises InputError when the cluster does not let this process in, or this machine is no node of
    it."""
    reserve_ray_variables(cluster)
    quiet_ray_data()
    if ray.is_initialized():
        yield
        return
    named = address_of(cluster)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if named is not None:
        check_connection(*named)
        options["runtime_env"] = {"env_vars": storage.environment(storage.StorageSettings())}
    else:
        wanted = int((cluster.most_workers + cluster.number_of_predictors) * cluster.cpus_per_worker)
        options |= {"num_cpus": max(os.cpu_count() or 1, runs * (wanted + SPARE_CPUS)), "dashboard_host": "127.0.0.1"}
        options["_temp_dir"] = str(sessions := _sessions_folder())
        remove_dead_sessions(sessions)
        if not any(name in os.environ for name in TOKEN_VARIABLES):
            keep_token_private(Path.home() / ".ray" / "auth_token")
    with contextlib.nullcontext() if named else ray_internals.loopback_only():
        try:
            with handler_kept():
                ray.init(address=named[1] if named else LOCAL, **options)
        except (RuntimeError, OSError) as error:
            if named is None:
                raise
            raise _not_connected(*named, error) from error
        try:
            yield
        finally:
            leave()
        if named is None:
            remove_dead_sessions(sessions, ended=os.getpid())


def reserve_ray_variables(cluster: ClusterSettings) -> None:
    """What Ray reads from the environment: before threads begin, see mlflow_sync.connection.reserve_variables."""
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "2")  # a node lost with notice costs no failure
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")  # a job may have been given the variables of storage
    _set_start_timeout(cluster)


def _not_connected(name: str, address: str, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:200]
    if address == AUTO and isinstance(error, ConnectionError):
        return InputError(
            f"{name}={address}: no Ray runs on this machine ({reason}); start it, or give HOST:PORT", "ray/no-answer"
        )
    return InputError(
        f"{name}={address}: this machine cannot take part in the cluster ({reason}); try it on one of its nodes, or give "
        "--address the URL of its dashboard",
        "ray/not-a-node",
    )


@contextlib.contextmanager
def connected_on_demand(cluster: ClusterSettings) -> Iterator[Callable[[], None]]:
    """A function that connects like `connected` when it is first called, until the context ends."""
    with contextlib.ExitStack() as stack:

        def connect() -> None:
            if not ray.is_initialized():
                stack.enter_context(connected(cluster))

        yield connect


def _set_start_timeout(cluster: ClusterSettings) -> None:
    """Seconds in which a group must find room, before Ray Train decides anew; the user's own value is kept.

    For a fixed group that is all the time there is. An elastic one is made to fit what was there a moment ago.
    """
    global _start_timeout
    name, elastic = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", cluster.least_workers < cluster.most_workers
    if os.environ.get(name, _start_timeout) == _start_timeout:
        _start_timeout = str(min(STRAY_SECONDS, cluster.start_timeout_s) if elastic else cluster.start_timeout_s)
        os.environ[name] = _start_timeout


def leave() -> None:
    """ray.shutdown(). Ray (2.60) ends the whole process when a reference of its own is freed by another thread meanwhile, and
    the garbage collector runs in any thread: so it runs before, and then not until Ray has shut down."""
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        ray.shutdown()
    finally:
        if collecting:
            gc.enable()


def quiet_ray_data() -> None:
    """The CLI shows progress itself."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    for library in ("ray.data", "ray.train"):
        logging.getLogger(library).setLevel(logging.WARNING)


# ---- Ray started here: its sessions and its token

LONGEST_SOCKET = 107  # bytes of the path, on Linux
IN_A_SESSION = len("/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")


def _sessions_folder() -> Path:
    """In TMPDIR, unless its path is too long for sockets."""
    folder = private_folder() / "ray"
    return folder if len(str(folder)) + IN_A_SESSION <= LONGEST_SOCKET else private_folder(TEMPORARY) / "ray"


def remove_dead_sessions(folder: Path, ended: int | None = None) -> None:
    """Delete what Ray has left of sessions whose process is gone: their logs and sockets. `ended`: a process whose session is
    over too. That of a run that failed stays until the next one starts."""
    for session in folder.glob("session_*_*_*_*"):
        process = session.name.rpartition("_")[2]
        if process == str(ended) or not Path(f"/proc/{process}").exists():
            shutil.rmtree(session, ignore_errors=True)


TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def keep_token_private(file: Path) -> None:
    """Make Ray's token where there is none, and take it from other users of the machine: Ray itself lets them read it.

    Raises InputError where it cannot be written.
    """
    try:
        _keep_private(file)
    except OSError as error:
        raise InputError(
            f"{file}: Ray keeps its token there, and it cannot be written ({error.strerror}); set RAY_AUTH_TOKEN_PATH to a "
            f"file of yours that holds one, or HOME (now {os.environ.get('HOME')}) to a folder that can be written",
            "ray/token-file",
        ) from None


def _keep_private(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.write(descriptor, secrets.token_hex(32).encode())
        os.close(descriptor)
    if file.stat().st_mode & 0o077:
        file.chmod(0o600)
