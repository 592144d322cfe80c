"""A host that only a file names gets no credentials of the user's: the file may be somebody else's."""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.parsers import PARSERS
from tests.refusals import refused
from threestage import hosts
from threestage.checks.run_check import check
from threestage.cli.job_arguments import read_job
from threestage.config import changed, confirmed_hosts, load, refuse_unconfirmed_hosts
from threestage.data import storage
from threestage.hosts import refuse_foreign_source
from threestage.mlflow_sync.client import open_registry
from threestage.mlflow_sync.records import RegistrySettings
from threestage.mlflow_sync.run_sync import registry_of, sync
from threestage.ray_backend import job_package
from threestage.ray_backend.connect import address_of
from threestage.report.run_reader import log_page
from threestage.sweeps.space import Space, check_space

VARIABLES = {name for names in hosts.CONFIRMING.values() for name in names} | {hosts.TRUSTED}
PASSWORD = "PasswordThatMustAppearNowhere"
NAMED = {
    "registry.tracking_uri": "http://mlflow.other:5000",
    "storage.endpoint": "http://store.other:9000",
    "cluster.address": "ray.other:6379",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "alice")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def thief() -> Iterator[tuple[str, list[str]]]:
    """A server of somebody else's, and the credentials that it was sent."""
    sent: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            sent.append(str(self.headers.get("Authorization")))
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        do_POST = do_GET

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", sent
        server.shutdown()


def write(named: dict[str, str]) -> str:
    """A configuration file that names the hosts (dotted key → value)."""
    tree: dict[str, object] = {"base": "demo", "data": {"root": "/nowhere"}}
    for key, value in named.items():
        section, _, name = key.partition(".")
        tree[section] = {name: value}
    Path("other.yaml").write_text(json.dumps(tree))
    return "other.yaml"


def refused_host(action: Callable[[], object], *named: str) -> None:
    with refused(hosts.CODE, hosts.TRUSTED, *named):
        action()


@pytest.mark.parametrize("key", hosts.CONFIRMING)
def test_only_what_the_user_has_named_is_confirmed(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value = NAMED[key]
    file = write({key: value})
    refused_host(lambda: refuse_unconfirmed_hosts(load(file)), key, value, file)
    refused_host(lambda: refuse_unconfirmed_hosts(changed(load(file), {"seed": 3})), key)
    refuse_unconfirmed_hosts(load(file, [f"{key}={value}"]))
    refuse_unconfirmed_hosts(changed(load(file), {key: value}))
    refuse_unconfirmed_hosts(type(load(file)).model_validate_json(load(file).model_dump_json()))  # came from a driver
    for variable in hosts.CONFIRMING[key]:
        monkeypatch.setenv(variable, value)
        refuse_unconfirmed_hosts(load(file))
        monkeypatch.setenv(variable, value.replace("other", "own"))
        refused_host(lambda: refuse_unconfirmed_hosts(load(file)), key)
        monkeypatch.delenv(variable)
    host = value.rpartition("//")[2]
    for trusted in (host, host.partition(":")[0], f"elsewhere, {host}", hosts.host_of(key, value) or ""):
        monkeypatch.setenv(hosts.TRUSTED, trusted)
        refuse_unconfirmed_hosts(load(file))
    for other in ("other", f"x{host}", host.replace(":", ":1"), "https://" + host):
        monkeypatch.setenv(hosts.TRUSTED, other)
        refused_host(lambda: refuse_unconfirmed_hosts(load(file)), key)


def test_each_place_of_use_refuses(tmp_path: Path) -> None:
    config = load(write(NAMED))
    refused_host(lambda: storage.configure(config.storage), "storage.endpoint")
    refused_host(lambda: open_registry(config.registry), "registry.tracking_uri")
    refused_host(lambda: address_of(config.cluster), "cluster.address")
    job = ("other.yaml", "--set", "data.root=s3://bucket/data", "--out", "s3://bucket/run")
    refused_host(lambda: read_job("run", job, ".", PARSERS))
    searched = {"consistency.confidence_threshold": {"uniform": [0, 0.9]}}
    space = Space.model_validate(
        {"stages": [2], "trials": 3, "search": searched, "fixed": {"storage.endpoint": "http://store.other"}}
    )
    with refused(hosts.CODE, "fixed.storage.endpoint"):
        check_space(space, load("demo"))


@pytest.mark.parametrize("uri", ["sqlite:///mlflow.db", "mlruns", "file:///mlruns"])
def test_a_store_on_this_machine_is_no_host(uri: str) -> None:
    refuse_unconfirmed_hosts(load(write({"registry.tracking_uri": uri})))


@pytest.mark.parametrize(
    "uri",
    [
        "http://own:5000@other/",
        "http://other\\@own:5000/",
        "http://other#@own:5000",
        "https://own:5000",
        "postgresql://own:5000/db",
        "uc:http://other",
    ],
)
def test_a_uri_that_only_looks_like_the_own_one_is_another_host(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://own:5000")
    refuse_unconfirmed_hosts(load(write({"registry.tracking_uri": "http://OWN:5000/"})))
    refused_host(lambda: refuse_unconfirmed_hosts(load(write({"registry.tracking_uri": uri}))))


def test_without_credentials_for_mlflow_none_can_be_sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in hosts.MLFLOW_CREDENTIALS:
        monkeypatch.delenv(name, raising=False)
    file = write({"registry.tracking_uri": "http://mlflow.other:5000"})
    refuse_unconfirmed_hosts(load(file))
    (tmp_path / ".mlflow").mkdir()
    (tmp_path / ".mlflow/credentials").touch()
    refused_host(lambda: refuse_unconfirmed_hosts(load(file)))


def test_a_job_may_find_credentials_that_are_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in hosts.MLFLOW_CREDENTIALS:
        monkeypatch.delenv(name, raising=False)
    file = write({"registry.tracking_uri": "http://mlflow.other:5000"})
    job = (file, "--set", "data.root=s3://bucket/data", "--out", "s3://bucket/run")
    refused_host(lambda: read_job("run", job, ".", PARSERS), "http://mlflow.other:5000")
    refused_host(lambda: list(check(load(file), "s3://bucket/run", local=False, address="http://dashboard:8265")))


@pytest.mark.parametrize(
    "uri", ["http://[x", "http://own:5000.other", "http://host:99999", "http://host:x", "http://a\u2100b"]
)
def test_what_is_no_uri_is_refused(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "x")
    calls: list[Callable[[], object]] = [
        lambda: refuse_unconfirmed_hosts(load(write({"registry.tracking_uri": uri}))),
        lambda: refuse_foreign_source("a version", f"{uri}/model", OURS, list),
        lambda: open_registry(RegistrySettings(tracking_uri=uri)),
    ]
    for call in calls:
        with refused("hosts/not-a-uri"):
            call()


def test_a_password_never_reaches_a_host_of_a_file(thief: tuple[str, list[str]], tmp_path: Path) -> None:
    uri, sent = thief
    run = tmp_path / "run"
    run.mkdir()
    (run / "split.json").write_text('{"split": {}}')
    (run / "config.json").write_text(json.dumps({"name": "x", "registry": {"tracking_uri": uri}}))
    (run / "run.json").write_text('{"run_key": "abc"}')
    refused_host(lambda: sync(str(run)), uri, "config.json")
    assert uri in str(log_page(str(run), "page", finished=True))
    codes = {line.name: line.code for line in check(load(write({"registry.tracking_uri": uri})), "out", local=False)}
    assert codes["registry.tracking_uri"] == hosts.CODE
    assert sent == []
    assert registry_of({"registry": {"tracking_uri": uri}}, uri, "config.json").host_from is None  # --tracking-uri


def test_a_run_folder_of_the_own_store_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://alice:secret@own:5000")
    settings = registry_of({"registry": {"tracking_uri": "http://own:5000"}}, None, "config.json")
    hosts.refuse_unconfirmed("registry.tracking_uri", settings.tracking_uri, settings.host_from)


def test_a_job_is_told_which_hosts_are_confirmed_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", NAMED["storage.endpoint"])
    file = write({"storage.endpoint": NAMED["storage.endpoint"]})
    job = read_job("run", (file, "--set", "data.root=s3://bucket/data", "--out", "s3://bucket/run"), ".", PARSERS)
    sent = job_package.job_environment(job, [], {})
    assert sent[hosts.TRUSTED] == NAMED["storage.endpoint"]
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setenv(hosts.TRUSTED, sent[hosts.TRUSTED])
    refuse_unconfirmed_hosts(load(file))
    assert confirmed_hosts(load("demo")) == []


OURS = "http://mlflow:5000"


@pytest.mark.parametrize(
    ("source", "allowed"),
    [
        ("mlflow-artifacts:/0/model", True),
        ("mlflow-artifacts://mlflow:5000/0/model", True),
        ("/store/model", True),
        ("file:///store/model", True),
        ("http://mlflow:5000/model", True),
        ("s3://ours/0/model", True),
        ("s3://theirs/0/model", False),
        ("gs://ours/0/model", False),
        ("http://other/model", False),
        ("https://mlflow:5000/model", False),
        ("mlflow-artifacts://other/model", False),
        ("http://mlflow:5000@other/model", False),
        ("http://other\\@mlflow:5000/model", False),
        ("ftp://other/model", False),
        ("runs:/abc/model", False),
        ("models:/m-abc", False),
    ],
)
def test_a_version_s_files_are_the_registry_s(source: str, allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def check_source() -> None:
        refuse_foreign_source("models:/a/1", source, OURS, lambda: ["s3://ours/0", "mlflow-artifacts:/1"])

    if allowed:
        check_source()
        return
    with refused("hosts/foreign-source"):
        check_source()
    if source.startswith("s3://theirs"):
        monkeypatch.setenv(hosts.TRUSTED, "s3://theirs")
        check_source()


def test_an_experiment_s_files_are_the_registry_s(tmp_path: Path, empty_store: Path) -> None:
    import mlflow

    shutil.copy(empty_store, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    mlflow.MlflowClient(uri).create_experiment("theirs", artifact_location="http://other/x")
    with refused("hosts/foreign-source", "registry.experiment=theirs"):
        open_registry(RegistrySettings(tracking_uri=uri, experiment="theirs"))
