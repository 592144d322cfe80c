"""A real S3 store, Ceph's gateway: it refuses wrong keys and bare uploads, which stores made for tests take."""

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.ceph import Gateway, ceph_gateway, needs_ceph
from tests.conditional_write import one_of_two_writes, the_store_compares
from tests.conftest import copy_to, tiny_config
from tests.mlflow_server import mlflow_server
from tests.s3 import free_port
from threestage.checks.run_check import check
from threestage.config import Config
from threestage.data import storage
from threestage.data.storage import StorageSettings
from threestage.data.synthetic import write_scenes
from threestage.run import local_main

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), *needs_ceph]


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    with ceph_gateway() as gateway:
        yield gateway


@pytest.fixture
def bucket(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder in a new bucket, which this process's environment can use."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", gateway.key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", gateway.secret)
    storage.configure(StorageSettings(endpoint=gateway.endpoint))
    name = f"bucket-{secrets.token_hex(4)}"
    storage.ask_s3("create_bucket", name)
    return f"s3://{name}/some/folder"


@pytest.fixture
def config(gateway: Gateway, bucket: str, scenes: Path) -> Config:
    copy_to(f"{bucket}/data", scenes)
    data = {"root": f"{bucket}/data", "labelled": 8}
    return tiny_config(scenes, data=data, storage={"endpoint": gateway.endpoint})


def changed(config: Config, section: str, **values: object) -> Config:
    tree = config.model_dump(mode="json")
    tree[section] |= values
    return Config.model_validate(tree)


def test_round_trip(bucket: str) -> None:
    large = np.random.default_rng(0).bytes(25 * 2**20)  # several parts
    for name, content in (("small", b"x"), ("empty", b""), ("large", large)):
        storage.write_bytes(f"{bucket}/a/{name}", content)
        assert storage.read_bytes(f"{bucket}/a/{name}") == content
    assert storage.list_files(bucket) == [f"{bucket}/a/{name}" for name in ("empty", "large", "small")]
    storage.delete(f"{bucket}/a/large", bucket)
    assert not storage.exists(f"{bucket}/a/large") and storage.exists(f"{bucket}/a/small")
    storage.delete(f"{bucket}/a", bucket)
    assert storage.list_files(bucket) == []


def test_of_two_writers_one_replaces_an_object(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one_of_two_writes(f"{bucket}/manifest.json")
    the_store_compares(f"{bucket}/absent.json", None, monkeypatch)


def test_the_store_compares_before_it_replaces(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    the_store_compares(f"{bucket}/manifest.json", b"1", monkeypatch)


def test_check_passes_and_leaves_nothing(config: Config, bucket: str) -> None:
    before = storage.list_files(bucket)
    for outcome in check(config, f"{bucket}/run", local=True):
        assert outcome.problem is None, outcome
    assert storage.list_files(bucket) == before


def the_line(config: Config, out: str) -> str:
    """The only line that fails, found in less than 15 seconds."""
    start = time.monotonic()
    (line,) = [outcome.problem for outcome in check(config, out, local=True) if outcome.problem]
    seconds = time.monotonic() - start
    print(f"{seconds:.2f} s: {line}")
    assert seconds < 15 and "\n" not in line
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert os.environ[name] not in line
    return line


def test_a_wrong_secret(config: Config, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong" * 8)
    line = the_line(config, f"{bucket}/run")
    assert "refuses the signature" in line and "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in line


def test_a_wrong_key_id(config: Config, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "WRONG" * 4)
    line = the_line(config, f"{bucket}/run")
    assert "does not know the access key" in line and "set AWS_ACCESS_KEY_ID" in line


def test_a_wrong_bucket(config: Config, gateway: Gateway) -> None:
    line = the_line(config, "s3://nobodys-bucket/run")
    assert line.startswith(f"s3://nobodys-bucket: endpoint {gateway.endpoint} has no bucket nobodys-bucket; make it")


def test_a_wrong_endpoint(config: Config, bucket: str) -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    line = the_line(changed(config, "storage", endpoint=endpoint), f"{bucket}/run")
    assert f"endpoint {endpoint} refuses the connection" in line and "correct storage.endpoint" in line


def test_a_whole_run_in_one_process(config: Config, bucket: str, tmp_path: Path) -> None:
    """Data, checkpoints, pseudo-masks and models all lie on Ceph."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert local_main.main([str(tmp_path / "config.yaml"), "--out", f"{bucket}/run"]) == 0
    stages = storage.read_json(f"{bucket}/run/results.json")["stages"]
    assert [stage["steps"] for stage in stages.values()] == [6, 6, 6]
    assert storage.list_files(f"{bucket}/run/stage3/checkpoints")
    assert local_main.main([str(tmp_path / "config.yaml"), "--out", f"{bucket}/run"]) == 0


def threestage(folder: Path, *arguments: str) -> str:
    """A command in a process of its own, which finds the store in its environment only; returns what it printed."""
    command = [sys.executable, "-c", "from threestage.cli.app import main; main()", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def test_the_commands_from_ingest_to_predict_on_ray(
    gateway: Gateway, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sources, data set, checkpoints, pseudo-masks, models, MLflow's artifacts and predictions all lie on Ceph."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", gateway.endpoint)
    write_scenes(f"{bucket}/scenes", {"train": 40, "val": 6}, seed=5)
    write_scenes(f"{bucket}/photos", {"train": 30}, seed=6)
    (tmp_path / "empty").mkdir()
    with mlflow_server(tmp_path, f"{bucket}/mlflow") as (tracking_uri, _):
        config = tiny_config(tmp_path, registry={"tracking_uri": tracking_uri}, cluster={"workers": 2})
        data = config.data.model_copy(update={"root": f"{bucket}/data", "unlabelled": f"{bucket}/photos/train/images"})
        config = config.model_copy(update={"data": data})
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
        run = partial(threestage, tmp_path / "empty")
        run("ingest", f"{bucket}/scenes", f"{bucket}/data", "--format", "camvid", "--rows-per-file", "16",
            "--class-map", f"{bucket}/scenes/class_map.yaml")  # fmt: skip
        run("check", "../config.yaml", "--out", f"{bucket}/run")
        run("run", "../config.yaml", "--out", f"{bucket}/run")
        photos = [f"{bucket}/photos/train/images", f"{bucket}/predicted", "--tracking-uri", tracking_uri]
        assert "30 images predicted, 0 left out" in run("predict", "models:/tiny@stage3", *photos)
    assert list((tmp_path / "empty").iterdir()) == []
    results = storage.read_json(f"{bucket}/run/results.json")
    assert results["data"]["pool"] == 70 and list(results["stages"]) == ["stage1", "stage2", "stage3"]
    assert any(uri.endswith(".safetensors") for uri in storage.list_files(f"{bucket}/mlflow"))
    assert len(storage.list_files(f"{bucket}/predicted/masks")) == 30
