"""`threestage check --address URL`: what is refused before a job is submitted, and the lines of the job."""

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import tiny_config
from tests.refusals import refused
from threestage.checks.result import CheckResult
from threestage.config import Config, changed
from threestage.ray_backend import job_check, node_checks


@pytest.fixture
def config(scenes: Path, tmp_path: Path) -> Config:
    return tiny_config(scenes, registry={"tracking_uri": f"sqlite:///{tmp_path}/mlflow.db"})


def test_what_a_job_could_not_read(config: Config, scenes: Path) -> None:
    assert job_check._travels(config, "s3://bucket/run").warning is None
    with refused("submit/unshared-place", "--out=runs/x: "):
        job_check._travels(config, "runs/x")
    relative = changed(config, {"data.root": "data"})
    with refused("submit/unshared-place", "data.root=data: "):
        job_check._travels(relative, "s3://bucket/run")
    secret = changed(config, {"registry.tracking_uri": "http://me:secret@mlflow:5000"})
    with refused("submit/secret-setting"):
        job_check._travels(secret, "s3://bucket/run")


class Client:
    """Stands in for the job API: a log that grows, then a status."""

    def __init__(self, *logs: str, status: str = "SUCCEEDED") -> None:
        self._logs, self._status, self.deleted = list(logs), status, False

    def get_address(self) -> str:
        return "http://head:8265"

    def get_job_status(self, job: str) -> str:
        return self._status if len(self._logs) == 1 else "RUNNING"

    def get_job_logs(self, job: str) -> str:
        return self._logs.pop(0) if len(self._logs) > 1 else self._logs[0]

    def delete_job(self, job: str) -> None:
        self.deleted = True


@pytest.fixture
def follow(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[CheckResult]]:
    monkeypatch.setattr(job_check, "POLL_S", 0.0)
    return lambda client: list(job_check._follow(client, "raysubmit_1"))


def logged(*lines: CheckResult) -> str:
    return "".join(f"threestage-check {json.dumps(line.as_json())}\n" for line in lines)


def test_the_lines_of_a_job(follow: Callable[[Any], list[CheckResult]]) -> None:
    one, two = CheckResult("a", "b", 1.0), CheckResult("c", "", problem="d")
    client = Client(logged(one), logged(one, two)[:-5], "noise\n" + logged(one, two))
    assert follow(client) == [one, two] and client.deleted


def test_a_job_that_ends_too_early(follow: Callable[[Any], list[CheckResult]]) -> None:
    (found,) = follow(Client("Traceback\nModuleNotFoundError: No module named 'torch'\n", status="FAILED"))
    assert found.problem == (
        "it ended too early: ModuleNotFoundError: No module named 'torch'; see `ray job logs --address http://head:8265 "
        "raysubmit_1`"
    )


def test_a_job_that_says_nothing(follow: Callable[[Any], list[CheckResult]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("threestage.ray_backend.job_check.SILENCE_S", 0.05)
    (found,) = follow(Client("", "", status="RUNNING"))
    assert "no word of it" in str(found.problem) and found.code == "check/job"


def test_the_image_of_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    here = node_checks.versions()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: here["torch"])
    assert "renew the image" in str(job_check.image_code(here).warning)

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(job_check, "versions", lambda: here)
    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert "holds no threestage: submit with --wheel FILE" in str(
        job_check.image_code(here | {"Python": "3.9"}).warning
    )
