"""`threestage check` and the start of a run, against a store that works, and against one that is wrong in each way."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from tests import refusals
from tests.conftest import copy_to, tiny_config
from tests.failing_s3 import ERRORS, black_hole, failing_s3, silent_server
from tests.s3 import SECRET, free_port
from threestage.checks import store
from threestage.checks.run_check import check
from threestage.checks.step_time import measure_here
from threestage.checks.store import check_store
from threestage.cli.app import app
from threestage.config import Config
from threestage.data import storage

KEY_ID = "AKIAKEYIDOFTHETEST"
Refused = Callable[..., str]


@pytest.fixture
def places(bucket: str, scenes: Path, tmp_path: Path) -> Config:
    """Data set and a prefix of images on S3, which hold nothing yet; MLflow in a file that is not there yet."""
    data = {"root": f"{bucket}/data", "labelled": 8, "unlabelled": f"{bucket}/photos"}
    return tiny_config(scenes, data=data, registry={"tracking_uri": f"sqlite:///{tmp_path}/mlflow/mlflow.db"})


@pytest.fixture
def config(places: Config, bucket: str, scenes: Path) -> Config:
    """All is there."""
    copy_to(f"{bucket}/data", scenes)
    storage.write_bytes(f"{bucket}/photos/a/1.jpg", b"not looked at")
    return places


@pytest.fixture
def keys(bucket: str) -> Iterator[Callable[[], list[str]]]:
    """All keys of the bucket, with those that end in a slash."""
    yield lambda: [entry["Key"] for entry in storage.ask_s3("list_objects_v2", "bucket").get("Contents", [])]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: no cluster, and no step is measured. A busy store is waited for during 0.2 s."""
    monkeypatch.setattr(store, "BUSY_S", 0.2)
    monkeypatch.setattr(store, "BUSY_PAUSE_S", 0.1)
    monkeypatch.setattr("threestage.ray_backend.connect.address_of", lambda cluster: None)
    monkeypatch.setattr("threestage.checks.run_check.measure_here", lambda specification: iter(()))


def changed(config: Config, section: str, **values: object) -> Config:
    tree = config.model_dump(mode="json")
    tree[section] |= values
    return Config.model_validate(tree)


def problems(config: Config, out: str) -> dict[str, str]:
    """The lines that fail, by the names of the places; found in less than 15 seconds."""
    start = time.monotonic()
    found = {line.name: f"{line.problem} [{line.code}]" for line in check(config, out, False) if line.problem}
    assert time.monotonic() - start < 15
    return found


def test_all_is_well_and_nothing_is_left_behind(
    config: Config, bucket: str, keys: Callable[[], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = keys()
    config = changed(config, "stage1", steps=1).model_copy(update={"stages": 1})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("threestage.checks.run_check.measure_here", measure_here)
    done = CliRunner().invoke(app, ["check", "config.yaml", "--out", f"{bucket}/run", "--json"])
    assert done.exit_code == 0 and done.stderr == "", done.output
    outcomes = json.loads(done.stdout)
    assert [outcome["name"] for outcome in outcomes] == [
        "data.root", "data.unlabelled", "--out", "registry.tracking_uri", "input", "classes", "split", "cluster", "stage1",
        "duration", "program", "onnx",
    ]  # fmt: skip
    assert all(outcome["problem"] is None for outcome in outcomes)
    assert keys() == before and [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    check_store(config, f"{bucket}/run")
    assert keys() == before


def test_a_wrong_bucket_is_one_line_for_its_places(config: Config, bucket: str) -> None:
    (line,) = problems(config, "s3://bukket/run").values()
    endpoint = os.environ["AWS_ENDPOINT_URL_S3"]
    assert line.startswith(f"s3://bukket: endpoint {endpoint} ") and line.endswith(" [storage/no-bucket]")
    with refusals.refused("storage/no-bucket", "data.root: s3://bukket: endpoint "):
        check_store(changed(config, "data", root="s3://bukket/data"), f"{bucket}/run")


def test_nothing_at_the_places(config: Config, bucket: str) -> None:
    wrong = changed(config, "data", root=f"{bucket}/nothing", unlabelled=f"{bucket}/data/labels")
    wrong = changed(wrong, "network", weights=f"{bucket}/w.safetensors")
    found = problems(wrong, f"{bucket}/run")
    assert "`threestage ingest`" in found["data.root"] and found["data.root"].endswith(" [data/no-data-set]")
    assert found["data.unlabelled"].endswith(" [data/no-images]")
    assert found["network.weights"].endswith(" [storage/not-found]")


def test_input_that_does_not_fit_the_settings(config: Config, bucket: str) -> None:
    found = problems(changed(config, "stage1", labelled_batch=9), f"{bucket}/run")
    assert list(found) == ["input"] and "stage1.labelled_batch=9" in found["input"]


def test_mlflow_that_is_not_there(config: Config, bucket: str, tmp_path: Path) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    found = problems(changed(config, "registry", tracking_uri=uri), f"{bucket}/run")
    assert uri in found["registry.tracking_uri"] and "registry.tracking_uri (MLFLOW_TRACKING_URI)" in str(found)
    names = [line.name for line in check(config, f"{bucket}/run", local=True)]
    assert names == ["data.root", "data.unlabelled", "--out", "input", "classes", "split", "duration", "onnx"]
    (tmp_path / "mlflow.db").write_text("no database")
    wrong = changed(config, "registry", tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    assert "not a database" in problems(wrong, f"{bucket}/run")["registry.tracking_uri"]


@pytest.fixture
def refused(places: Config, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Refused:
    """The one line about another endpoint, which all three places share; found in less than 15 seconds."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)

    def run(endpoint: str) -> str:
        ((names, line),) = problems(changed(places, "storage", endpoint=endpoint), f"{bucket}/run").items()
        assert names == "data.root, data.unlabelled, --out" and line.startswith("s3://bucket: ") and "\n" not in line
        assert SECRET not in line and KEY_ID not in line
        return line

    return run


def test_nobody_listens(refused: Refused) -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    line = refused(endpoint)
    assert endpoint in line and "storage.endpoint" in line and line.endswith(" [storage/unreachable]")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dead endpoint is waited for a tenth of the time; `test_the_command_ends_soon_with_exit_code_2` waits for all of it."""
    monkeypatch.setattr(store, "CONNECT_S", store.CONNECT_S / 10)
    monkeypatch.setattr(store, "ANSWER_S", store.ANSWER_S / 10)


def test_an_address_that_nobody_has(refused: Refused, impatient: None) -> None:
    with black_hole() as endpoint:
        line = refused(endpoint)
    assert endpoint in line and "storage.endpoint" in line and line.endswith(" [storage/unreachable]")


def test_a_server_that_never_answers(refused: Refused, impatient: None) -> None:
    with silent_server() as endpoint:
        line = refused(endpoint)
    assert endpoint in line and line.endswith(" [storage/unreachable]")


@pytest.mark.parametrize("name", ["key id", "secret", "region", "busy"])
def test_what_only_a_stub_can_refuse(refused: Refused, name: str) -> None:
    codes = {"key id": "storage/credentials", "secret": "storage/credentials", "region": "storage/region"}
    with failing_s3(ERRORS[name]) as (endpoint, _):
        assert refused(endpoint).endswith(f" [{codes.get(name, 'storage/busy')}]")


@pytest.mark.slow
def test_the_command_ends_soon_with_exit_code_2(config: Config, bucket: str, tmp_path: Path) -> None:
    """The whole process, less what Python takes to start and import here, as a refused connection beside it shows."""
    with black_hole() as unreachable, ThreadPoolExecutor(2) as pool:
        endpoints = {"refused": f"http://127.0.0.1:{free_port()}", "unreachable": unreachable}

        def seconds(name: str) -> float:
            folder = tmp_path / name
            folder.mkdir()
            settings = changed(config, "storage", endpoint=endpoints[name]).model_dump(mode="json")
            (folder / "config.yaml").write_text(yaml.safe_dump(settings))
            command = [sys.executable, "-m", "threestage", "check", "config.yaml", "--out", f"{bucket}/run"]
            start = time.monotonic()
            trusted = {**os.environ, "THREESTAGE_TRUSTED_HOSTS": endpoints[name]}
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, env=trusted)
            taken = time.monotonic() - start
            assert done.returncode == 2 and done.stderr == ""
            failed, passed, *others = done.stdout.splitlines()
            assert failed.startswith("✗ data.root, data.unlabelled, --out  s3://bucket: ") and endpoints[name] in failed
            assert passed.startswith("✓ registry.tracking_uri") and SECRET not in done.stdout
            assert [line[:9] for line in others] == ["! input  ", "! classes", "✓ cluster", "! stage1,", "! program"]
            return taken

        refused, waited = pool.map(seconds, endpoints)
    assert waited - refused < 13


def test_a_run_waits_for_a_store_that_is_busy(places: Config, bucket: str) -> None:
    with failing_s3(ERRORS["busy"]) as (endpoint, _):
        check_store(changed(places, "storage", endpoint=endpoint), f"{bucket}/run")
