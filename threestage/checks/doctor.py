"""What this machine has and reaches, without a configuration: `threestage doctor`."""

import importlib.metadata
import os
import platform
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import torch

from threestage import __version__
from threestage.checks.result import CheckOutcome, CheckResult, Probe, run_check, try_all
from threestage.checks.step_time import machine_bytes
from threestage.checks.store import tracking, writable
from threestage.data import storage
from threestage.data.storage import StorageSettings
from threestage.format import gibibytes
from threestage.mlflow_sync.records import RegistrySettings
from threestage.ray_settings import ClusterSettings

PACKAGES = ("torch", "timm", "pyarrow", "ray", "mlflow")
HUB = "https://huggingface.co"
HUB_S, DEADLINE_S = 4.0, 7.0
LEAST_DISK = 2 * 2**30
LOCAL = "local"  # Ray's name for a cluster that is started here
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
WITHOUT_HUB = "give the encoder's weights as a file: --set network.weights=FILE"


def examine(out: str | None, address: str | None, tracking_uri: str | None) -> Iterator[CheckResult]:
    """A line each of versions, devices, memory, Ray, MLflow, a folder to write into and the hub of pretrained weights.

    Writes nothing but a small file that is deleted below `out`. None for `address` and `tracking_uri`: what the environment
    names.
    """
    yield run_check("versions", "", _versions)
    yield run_check("devices", "", _devices)
    yield run_check("memory", "", _memory)
    storage.configure(StorageSettings())
    ray = run_check("ray", "", lambda: _ray(address))
    folder = storage.absolute("runs" if out is None else out)
    probes = [
        tracking(RegistrySettings(tracking_uri=tracking_uri))._replace(name="mlflow"),
        writable("--out", folder)._replace(name="store"),
        Probe("hub", "", _hub),
    ]
    yield ray
    yield from try_all(probes, DEADLINE_S)


def _versions() -> CheckOutcome:
    found = {name: version for name in PACKAGES if (version := _version(name)) is not None}
    value = ", ".join(
        [f"threestage {__version__}", f"Python {platform.python_version()}", *map(" ".join, found.items())]
    )
    if not (missing := [name for name in PACKAGES if name not in found]):
        return CheckOutcome(value)
    return CheckOutcome(
        value, f"{value}; {' and '.join(missing)} not installed: only commands with --local run; install the rest"
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> CheckOutcome:
    cpus = f"{len(os.sched_getaffinity(0))} CPU cores"
    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    if gpus:
        named = ", ".join(f"{gpu.name} of {gibibytes(gpu.total_memory)}" for gpu in gpus)
        return CheckOutcome(f"{named}; {cpus}")
    value = f"no GPU, {cpus}"
    if NVIDIA_DRIVER.exists():
        return CheckOutcome(
            value,
            f"{value}: an NVIDIA driver is there, and torch {torch.__version__} finds no GPU of it; install the torch that fits "
            "the driver, and look at CUDA_VISIBLE_DEVICES",
        )
    return CheckOutcome(value)


def _memory() -> CheckOutcome:
    free = shutil.disk_usage(Path.cwd()).free
    value = f"{gibibytes(machine_bytes())} of memory; {gibibytes(free)} free on the disk of this folder"
    return CheckOutcome(value, f"{value}: too little for a run; make room" if free < LEAST_DISK else None)


def _ray(address: str | None) -> CheckOutcome:
    if _version("ray") is None:
        return CheckOutcome("", "not installed")
    if (address or os.environ.get("RAY_ADDRESS") or LOCAL) == LOCAL:  # Ray itself takes seconds to load
        on = "the CPU" if torch.cuda.device_count() == 0 else "a GPU of its own, while there are enough"
        return CheckOutcome(f"no cluster is named: a command starts Ray on this machine, and a worker trains on {on}")
    from threestage.ray_backend.connect import address_of, probe_cluster

    named = address_of(ClusterSettings(address=address))
    assert named is not None
    return probe_cluster(*named)


def _hub() -> CheckOutcome:
    """Through a proxy where the environment names one. Whatever it answers, it is there."""
    place = os.environ.get("HF_ENDPOINT", HUB)
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return CheckOutcome(place, f"{place}: HF_HUB_OFFLINE is set; {WITHOUT_HUB}")
    try:
        urllib.request.urlopen(urllib.request.Request(place, method="HEAD"), timeout=HUB_S).close()
    except urllib.error.HTTPError:
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return CheckOutcome(place, f"{place}: no pretrained weights from there ({reason}); {WITHOUT_HUB}")
    return CheckOutcome(f"{place} answers: timm's pretrained weights can be fetched")
