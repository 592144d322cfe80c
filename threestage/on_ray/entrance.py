"""Which Ray cluster a run connects to, and whether it lets this process in: `ray.init` tries a wrong address for minutes."""

import json
import os
import platform
from collections.abc import Mapping

import grpc  # type: ignore[import-untyped]
import ray
import ray.exceptions
from ray._private import services
from ray._private.gcs_utils import create_gcs_channel
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from threestage.checks.lines import Found
from threestage.errors import InputError
from threestage.hosts import refuse_unconfirmed
from threestage.on_ray.settings import ClusterSettings

ANSWER_S = 5.0
TOKEN = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH (a file) or RAY_AUTH_TOKEN to the cluster's"
OPEN = "it asks for no token: whoever reaches it can run programs there; start it with RAY_AUTH_MODE=token"


def address_of(cluster: ClusterSettings) -> tuple[str, str] | None:
    """What names the cluster that a run connects to, and its address; None where a run starts Ray on its machine.

    Raises InputError for an address that only a file names (hosts.py)."""
    if ray.is_initialized():
        return "cluster.address", ray.get_runtime_context().gcs_address
    if cluster.address is not None:
        refuse_unconfirmed("cluster.address", cluster.address, cluster.host_from)
        return "cluster.address", cluster.address
    return ("RAY_ADDRESS", os.environ["RAY_ADDRESS"]) if os.environ.get("RAY_ADDRESS") else None


def lets_in(name: str, address: str) -> Found:
    """What `threestage check` says of the cluster. Raises as `admitted`."""
    address, there = admitted(name, address)
    value = f"{address}: Ray {there['ray_version']} and Python {there['python_version']} there and here"
    return Found(f"{value}; it takes our token") if _wants_token(address) else Found(value, f"{address}: {OPEN}")


def admitted(name: str, address: str) -> tuple[str, dict[str, str]]:
    """The cluster's HOST:PORT and versions. Raises InputError within seconds where `ray.init` would try for minutes: nobody
    listens, the token is wrong, the versions differ."""
    if "://" in address:
        raise InputError(
            f"{name}={address}: a run connects to HOST:PORT of the cluster's head, from one of its nodes; from elsewhere, "
            "`threestage check --address http://…` (the dashboard) tries it there, as `threestage submit` would run it",
            "ray/address",
        )
    if address == "auto":
        try:
            address = str(services.canonicalize_bootstrap_address_or_die(address))
        except ConnectionError:
            raise InputError(
                f"{name}={address}: no Ray runs on this machine; start it, or give HOST:PORT", "ray/no-answer"
            ) from None
    there = _versions_there(name, address)
    _refuse_other_versions(name, address, there)
    return address, there


def _versions_there(name: str, address: str) -> dict[str, str]:
    try:
        return _metadata(create_gcs_channel(address))
    except ray.exceptions.AuthenticationError:
        raise InputError(f"{name}={address}: wants a token, and none was found; {TOKEN}", "ray/no-token") from None
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            raise InputError(f"{name}={address}: refuses the token; {TOKEN}", "ray/wrong-token") from None
        raise InputError(
            f"{name}={address}: no Ray answers there ({error.code().name}); start the cluster, or correct the address",
            "ray/no-answer",
        ) from None
    except (ValueError, KeyError):
        raise InputError(
            f"{name}={address}: answers, but not as a Ray cluster; correct the address", "ray/other-service"
        ) from None


def _metadata(channel: grpc.Channel) -> dict[str, str]:
    """What the cluster says of itself, and `ray.init` compares with what it has here."""
    with channel:
        request = gcs_service_pb2.InternalKVGetRequest(namespace=b"cluster", key=b"CLUSTER_METADATA")
        stub = gcs_service_pb2_grpc.InternalKVGcsServiceStub(channel)
        return dict(json.loads(stub.InternalKVGet(request, timeout=ANSWER_S).value))


def _wants_token(address: str) -> bool:
    try:
        return not _metadata(grpc.insecure_channel(address))
    except (grpc.RpcError, ValueError):
        return True


def _refuse_other_versions(name: str, address: str, there: Mapping[str, str]) -> None:
    here = {"Ray": ray.__version__, "Python": platform.python_version()}
    for what, version in here.items():
        other = there[f"{what.lower()}_version"]
        if other != version:
            raise InputError(
                f"{name}={address}: has {what} {other}, here is {version}, and Ray connects only equal versions; install {what} "
                f"{other} here, or submit the run with `threestage submit`, which needs no equal versions",
                "ray/other-version",
            )
