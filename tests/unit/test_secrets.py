"""Why: a key in a log, a pickle or a checkpoint is a key on every machine that holds a copy of it."""

import json
import logging
import pickle
import time
from pathlib import Path

import pytest

from tests.conftest import tiny_config
from tests.failing_s3 import ERRORS, failing_s3
from tests.refusals import refused
from tests.runs import run_trained_by
from tests.s3 import SECRET
from threestage.checks import store
from threestage.checks.run_check import check
from threestage.checks.store import check_store
from threestage.cli.app import main
from threestage.config import Config, load
from threestage.data import storage
from threestage.data.split import Split
from threestage.data.storage import StorageSettings
from threestage.data.storage_errors import explain, without_secrets
from threestage.errors import InputError
from threestage.mlflow_sync.connection import params_of, redact
from threestage.run.stages import StageTask

KEY_ID, TOKEN, PASSWORD = "AKIAKEYIDOFTHETEST", "TokenThatMustAppearNowhere", "PasswordThatMustAppearNowhere"
SECRETS = (SECRET, KEY_ID, TOKEN, PASSWORD)


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)


def config_on_s3(endpoint: str) -> Config:
    return tiny_config(Path("x"), data={"root": "s3://bucket/data", "labelled": 8}, storage={"endpoint": endpoint})


def holds_no_secret(content: object) -> None:
    text = content if isinstance(content, bytes) else str(content).encode()
    for secret in SECRETS:
        assert secret.encode() not in text, f"{secret} in {text[:500]!r}"


@pytest.mark.parametrize("endpoint", [None, "http://127.0.0.1:9"])
def test_a_file_system_is_pickled_without_them(endpoint: str | None) -> None:
    storage.configure(StorageSettings(endpoint=endpoint, region="eu-central-1"))
    files = storage.filesystem("s3://bucket/key")[0]
    holds_no_secret(pickle.dumps(files))
    holds_no_secret(pickle.dumps(pickle.loads(pickle.dumps(files))))


def test_the_file_system_of_listings_is_pickled_without_them() -> None:
    storage.configure(StorageSettings(endpoint="http://127.0.0.1:9"))
    holds_no_secret(pickle.dumps(storage.s3fs_filesystem()))


def test_the_variables_that_travel_are_not_credentials() -> None:
    holds_no_secret(storage.environment(StorageSettings(endpoint="http://127.0.0.1:9")))


def test_a_task_and_a_configuration_hold_none() -> None:
    config = config_on_s3("http://127.0.0.1:9")
    holds_no_secret(config.model_dump_json())
    holds_no_secret(params_of(config.model_dump(mode="json")))
    split = Split(labelled=("a",), validation=("b",), validation_split="val")
    task = StageTask(stage="stage1", config=config.model_dump(mode="json"), manifest_version=1, split=split, folder="f",
                     pool=None, pseudo_masks=None, previous_model=None)  # fmt: skip
    holds_no_secret(task.model_dump_json())
    holds_no_secret(pickle.dumps(task))


def test_workers_are_not_told_where_mlflow_is(scenes: Path, tmp_path: Path) -> None:
    config = tiny_config(scenes, registry={"tracking_uri": f"http://user:{PASSWORD}@host"})
    tasks: list[StageTask] = []

    def train(task: StageTask) -> None:
        tasks.append(task)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_trained_by(train, config, tmp_path)
    holds_no_secret(tasks[0].model_dump_json())
    assert tasks[0].settings().network == config.network


def test_no_setting_takes_a_credential() -> None:
    with refused("storage/endpoint", "AWS_ACCESS_KEY_ID"):
        load("demo", [f"storage.endpoint=http://user:{PASSWORD}@127.0.0.1:9"])
    for key in ("access_key", "secret_key", "secret", "session_token"):
        with refused("config/unknown-key", f"storage.{key}="):
            load("demo", [f"storage.{key}="])


@pytest.mark.parametrize("name", ERRORS)
def test_neither_lines_nor_logs_hold_them(
    name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the store refuses, at the most talkative level."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(store, "BUSY_S", 0.2)
    with failing_s3(ERRORS[name]) as (endpoint, _):
        config = config_on_s3(endpoint)
        outcomes = list(check(config, "s3://bucket/run", local=True))
        assert outcomes[0].problem
        holds_no_secret(json.dumps(outcomes))
        if name != "busy":
            with pytest.raises(InputError) as raised:
                check_store(config, "s3://bucket/run")
            holds_no_secret(raised.value)
    holds_no_secret([record.getMessage() for record in caplog.records if record.name.startswith("threestage")])


def test_credentials_in_the_endpoint_of_the_environment_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = f"http://user:{PASSWORD}@127.0.0.1:9"
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    error = OSError(
        "When listing in bucket 'b': AWS Error NETWORK_CONNECTION during ListObjectsV2 operation: curlCode: 7"
    )
    line = str(explain(None, error))
    holds_no_secret(line)
    assert "http://127.0.0.1:9 refuses the connection" in line


def test_words_of_a_store_that_repeat_a_secret_are_cut() -> None:
    error = OSError(f"AWS Error UNKNOWN (HTTP status 418) during PutObject operation: {SECRET} {KEY_ID} {TOKEN}")
    line = str(explain(None, error))
    holds_no_secret(line)
    assert "418" in line
    assert without_secrets(f"{SECRET} at http://a:{PASSWORD}@host:1/x?y=z@w") == "… at http://host:1/x?y=z@w"
    assert redact(f"http://a:{PASSWORD}@host") == "http://host"


@pytest.mark.parametrize(
    ("uri", "kept"),
    [
        (
            f"https://host/w.pth?X-Amz-Credential={KEY_ID}%2F1&X-Amz-Expires=60&X-Amz-Signature={TOKEN}",
            "X-Amz-Expires=60",
        ),
        (f"https://host/w.pth?AWSAccessKeyId={KEY_ID}&Signature={TOKEN}&Expires=1", "Expires=1"),
        (f"https://account.blob/w.pth?sv=2024&sig={TOKEN}", "sv=2024"),
        (f"postgresql://host/db?sslmode=require&password={PASSWORD}", "sslmode=require"),
        (f"http://host/?api_key={TOKEN}#part", "#part"),
    ],
)
def test_a_query_s_secrets_are_cut(uri: str, kept: str) -> None:
    for cut in (redact, without_secrets):
        holds_no_secret(cut(f"cannot read {uri} now"))
        assert kept in cut(uri)
    assert params_of({"uri": uri})["uri"] == redact(uri)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://u:p@ss/w@h/x", "http://h/x"),
        ("http://h/#access_token=abc", "http://h/#access_token=…"),
        ("jdbc:mysql://h/d;password=abc;ssl=true", "jdbc:mysql://h/d;password=…;ssl=true"),
        ("http://h/x?auth=abc&key=zz&pass=q&page=2", "http://h/x?auth=…&key=…&pass=…&page=2"),
        ("u:p@h:5000", "h:5000"),
        ("http:\\\\u:p@h", "http:\\\\h"),
        ("password=hunter2", "password=…"),
        ("Authorization: Basic abc", "Authorization: Basic …"),
        ("got ghp_0123456789abcdef here", "got … here"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY----- left", "… left"),
        ("{'password': 'a b', 'seed': 1}", "{'password': '…', 'seed': 1}"),
        ('{"AWS_SECRET_ACCESS_KEY": "abc", "seed": 1}', '{"AWS_SECRET_ACCESS_KEY": "…", "seed": 1}'),
        ("db_password: hunter2\nseed: 1", "db_password: …\nseed: 1"),
        ("aws_secret_access_key = abc", "aws_secret_access_key = …"),
        ("X-Amz-Security-Token: abc", "X-Amz-Security-Token: …"),
        ("'Proxy-Authorization': 'Basic abc'", "'Proxy-Authorization': '…'"),
        ("Cookie: a=b; session=c\nHost: h", "Cookie: …\nHost: h"),
        ("--key AIzaSyA0123456789abcdefghijklmnopqrstuvw", "--key …"),
        ("it wants a token: set RAY_AUTH_TOKEN", "it wants a token: set RAY_AUTH_TOKEN"),
        ("key=value: unknown key", "key=value: unknown key"),
        ("repo:tag@sha256:18cfe3ef", "repo:tag@sha256:18cfe3ef"),
        ("RAY_AUTH_MODE=token", "RAY_AUTH_MODE=token"),
    ],
)
def test_credentials_of_every_kind_are_cut(text: str, expected: str) -> None:
    assert redact(text) == expected


@pytest.mark.parametrize(
    "unit",
    ["a", "://", "://a:b", "a@", "?token", "token", "&key=", "token=", "eyJ-", "eyJaaaaa.", "bearer ", "authorization",
     "u:p@h:5", "-----BEGIN PRIVATE KEY-----", "s3://a:b/", "http://u:p@", "password", "a.b-", "://a@b/", "(=",
     "x-", "cookie:", "'password': '", "password: ", "api_key = "],
)  # fmt: skip
def test_long_texts_take_no_longer_by_the_character(unit: str) -> None:
    begun = time.process_time()
    redact(unit * (80_000 // len(unit)))
    assert time.process_time() - begun < 2  # a quadratic pattern takes a quarter of a minute


def test_the_command_line_prints_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with failing_s3(ERRORS["secret"]) as (endpoint, _):
        sets = ["--set", "data.root=s3://bucket/data", "--set", f"storage.endpoint={endpoint}"]
        for command in (["check", "demo", "--local", *sets], ["config", "demo", *sets]):
            monkeypatch.setattr("sys.argv", ["threestage", *command])
            with pytest.raises(SystemExit):
                main()
            captured = capsys.readouterr()
            assert endpoint in captured.out
            holds_no_secret(captured.out + captured.err)


@pytest.mark.parametrize(
    "arguments",
    [
        "config demo --set registry.tracking_url=http://me:{0}@host:5000",
        "config demo --set storage.endpoint=[http://me:{0}@host:9]",
        "config demo --set stage1.steps=http://me:{0}@host:9",
        "config http://me:{0}@host/x.yaml",
        "ingest s3://KEY:{0}@bucket/photos out --format images --local",
        "ingest photos out --masks http://me:{0}@host/masks --class-map voc --local",
        "predict http://me:{0}@host/model photos out --local",
        "predict models:/name@stage1 photos out --tracking-uri http://me:{0}@127.0.0.1:9 --local",
        "evaluate s3://KEY:{0}@bucket/model data",
        "run demo --out s3://KEY:{0}@bucket/run --local",
        "run demo --reuse http://me:{0}@host/run --local",
        "report http://me:{0}@host/run",
        "sync run --tracking-uri postgresql://me:{0}@127.0.0.1:9/db",
        "models list --tracking-uri http://me:{0}@127.0.0.1:9",
        "models pull models:/name/1 s3://KEY:{0}@bucket/model",
        "submit run demo --address http://me:{0}@127.0.0.1:9",
        "clean s3://KEY:{0}@bucket/run --yes",
    ],
)
def test_an_error_shows_no_password_of_what_was_typed(
    arguments: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["threestage", *arguments.format(PASSWORD).split()])
    with failing_s3(ERRORS["secret"]) as (endpoint, _):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises(SystemExit) as ended:
            main()
    captured = capsys.readouterr()
    assert ended.value.code == 2 and captured.err
    assert PASSWORD not in captured.out + captured.err
