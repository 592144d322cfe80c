"""Why: what reaches a tracking store is seen by many and never taken back: secrets and limits are decided here."""

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import tiny_config
from tests.refusals import refused
from threestage.config import validated
from threestage.mlflow_sync.client import open_models, open_registry
from threestage.mlflow_sync.connection import (
    MAX_PARAM,
    TIMEOUT,
    VARIABLES,
    clean_tags,
    metric_points,
    mlflow_session,
    model_name_of,
    params_of,
    quietly,
    redact,
    reserve_variables,
    resolve_uri,
)
from threestage.mlflow_sync.records import RegistrySettings
from threestage.mlflow_sync.run_sync import sync
from threestage.run import run
from threestage.run.backend import RunCallbacks

NAMES = st.text("abcXYZ019_-", min_size=1, max_size=12)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://AKIA:secret@bucket/data", "s3://bucket/data"),
        ("s3://AKIA:se/cret+x@bucket/data", "s3://bucket/data"),
        ("https://user:p@ss@host:5000/x", "https://host:5000/x"),
        ("postgresql+psycopg2://me:pw@db/mlflow", "postgresql+psycopg2://db/mlflow"),
        ("https://token@host/x", "https://host/x"),
        ("from s3://a:b@c/d to http://e:f@g", "from s3://c/d to http://g"),
        ("http://host:5000/a@b", "http://host:5000/a@b"),
        ("models:/name@stage3", "models:/name@stage3"),
        ("s3://bucket/me@work.png", "s3://bucket/me@work.png"),
        ("plain a:b@c", "plain a:b@c"),
    ],
)
def test_credentials_leave_a_uri_and_nothing_else_does(text: str, expected: str) -> None:
    assert redact(text) == expected


@given(NAMES, NAMES, NAMES, st.sampled_from(["", "/p", ":9000/p"]))
def test_any_user_and_password_is_stripped(user: str, password: str, host: str, rest: str) -> None:
    assert redact(f"s3://{user}:{password}@{host}{rest}") == f"s3://{host}{rest}"


def test_a_config_becomes_dotted_params_within_limits() -> None:
    config = {
        "data": {"root": "s3://key:secret@bucket/set", "labelled": "all", "extra": ["s3://a:b@c", 1]},
        "optimiser": {"lr": 3e-5, "frozen": True, "decay": None, "empty": {}},
        "class (odd)": "x" * 10_000,
    }
    flat = params_of(config)
    assert flat["data.root"] == "s3://bucket/set"
    assert flat["data.labelled"] == "all"
    assert flat["data.extra"] == '["s3://c", 1]'
    assert (flat["optimiser.lr"], flat["optimiser.frozen"], flat["optimiser.decay"]) == ("3e-05", "true", "null")
    assert flat["optimiser.empty"] == "{}"
    assert len(flat["class _odd_"]) == MAX_PARAM


def test_tags_are_text_without_secrets() -> None:
    assert clean_tags({"teacher": "s3://a:b@c/d", "classes": 11}) == {"teacher": "s3://c/d", "classes": "11"}


def test_the_summary_is_the_last_point_and_no_point_comes_twice() -> None:
    rows = [{"step": 1, "loss": 2.0}, {"step": 5, "loss": 1.0, "mean_iou": 0.4}]
    points = metric_points(rows, {"mean_iou": 0.5, "loss": 1.0, "confidence": 0.9})
    assert points == [
        ("loss", 2.0, 1, 1),
        ("loss", 1.0, 5, 5),
        ("mean_iou", 0.4, 5, 5),
        ("mean_iou", 0.5, 5, 6),
        ("confidence", 0.9, 5, 6),
    ]
    assert metric_points(rows[1:], {}) == points[1:3], "a row gives the same points, whatever was sent before it"
    assert metric_points([], {"mean_iou": 0.5}) == [("mean_iou", 0.5, 0, 1)]


def test_a_run_name_becomes_a_model_name() -> None:
    assert model_name_of("team/camvid:46@home") == "team-camvid-46-home"


def test_where_the_store_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert resolve_uri(None) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somewhere:5000")
    assert resolve_uri(None) == "http://somewhere:5000"
    assert resolve_uri("sqlite:///sub/x.db") == f"sqlite:///{tmp_path}/sub/x.db"
    assert resolve_uri("sqlite:///sub/x.db?timeout=60") == f"sqlite:///{tmp_path}/sub/x.db?timeout=60"


def test_a_model_name_that_no_uri_can_hold_is_refused() -> None:
    with refused("config/invalid-value", "model_name"):
        validated(RegistrySettings, {"model_name": "a/b"})


def test_a_failing_store_is_the_users_error_and_our_own_is_not(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/x.db"
    with refused("mlflow/unavailable", "tracking store sqlite"), mlflow_session(uri):
        raise ConnectionResetError("http://me:pw@host hung up")
    with pytest.raises(KeyError), mlflow_session(uri):
        raise KeyError("a bug")


def test_what_follows_the_path_of_a_database_is_no_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_store: Path
) -> None:
    """SQLAlchemy's way to wait for a database that is locked."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    settings = RegistrySettings(tracking_uri="sqlite:///mlflow.db?timeout=60", experiment="other")
    assert open_models(settings).versions() == []
    open_registry(settings)
    assert [path.name for path in tmp_path.iterdir() if "?" in path.name] == []


def answered(status: int, body: str) -> Exception:
    """What MLflow makes of it."""
    from mlflow.utils.rest_utils import verify_rest_response

    response = requests.Response()
    response.status_code, response._content = status, body.encode()
    try:
        verify_rest_response(response, "/api/2.0/mlflow/runs/search")
    except Exception as error:
        return error
    raise AssertionError


@pytest.mark.parametrize(
    ("error", "code", "named"),
    [
        (lambda: answered(401, "You are not authenticated."), "mlflow/credentials", "MLFLOW_TRACKING_PASSWORD"),
        (lambda: answered(403, "Invalid Host header"), "mlflow/denied", "Invalid Host header"),
        (lambda: answered(403, '{"error_code": "PERMISSION_DENIED", "message": "no"}'), "mlflow/denied", "403"),
        (
            lambda: answered(413, "<html>413 Request Entity Too Large</html>"),
            "mlflow/too-large",
            "client_max_body_size",
        ),
        (lambda: answered(502, "<html>502 Bad Gateway</html>"), "mlflow/unavailable", "502"),
        (lambda: upload_refused(413), "mlflow/too-large", "client_max_body_size"),
    ],
)
def test_what_a_server_refuses_has_its_own_line(
    tmp_path: Path, error: Callable[[], Exception], code: str, named: str
) -> None:
    uri = f"sqlite:///{tmp_path}/x.db"
    with refused(code, "tracking store sqlite", named), mlflow_session(uri):
        raise error()


def upload_refused(status: int) -> Exception:
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError("413 Client Error: for url: http://mlflow/artifacts", response=response)


def test_tables_of_an_older_mlflow_are_named(tmp_path: Path, empty_store: Path) -> None:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        database.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
        database.commit()
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with refused("mlflow/old-schema", f"mlflow db upgrade {uri}"):
        open_registry(RegistrySettings(tracking_uri=uri))


def test_a_file_that_is_no_database_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "x.db").write_text("certainly not a database, " * 100)
    with refused("mlflow/unavailable", "x.db"):
        open_registry(RegistrySettings(tracking_uri=f"sqlite:///{tmp_path}/x.db"))


def test_what_mlflow_takes_where_nothing_is_set() -> None:
    from mlflow import environment_variables

    defaults = {name: str(getattr(environment_variables, name).default).lower() for name in VARIABLES}
    assert defaults == {name: own for name, (_, own) in VARIABLES.items()}


def test_quiet_calls_put_values_back_and_keep_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "9")
    users = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "9"}
    with quietly(17):
        ours = {name: ours for name, (ours, _) in VARIABLES.items()}
        assert {name: os.environ[name] for name in VARIABLES} == ours | {TIMEOUT: "17"} | users
    own = {name: own for name, (_, own) in VARIABLES.items()}
    assert {name: os.environ[name] for name in VARIABLES} == own | users


def test_no_variable_comes_or_goes_while_other_threads_may_read_the_environment() -> None:
    """It would end the process: see reserve_variables."""
    reserve_variables()
    there, put = set(os.environ), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "putenv", lambda name, value: put.append(os.fsdecode(name)))
        patch.setattr(os, "unsetenv", lambda name: pytest.fail(f"{name} went"))
        with quietly():
            pass
    assert TIMEOUT in put and set(put) <= there


@pytest.mark.parametrize("command", ["run", "sync"])
def test_variables_have_their_places_before_a_lease_beats(
    command: str, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread asks S3."""

    class Begun(Exception):
        pass

    def held(*_: object) -> None:
        assert {name: own for name, (_, own) in VARIABLES.items()}.items() <= os.environ.items()
        raise Begun

    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("threestage.run_folder.lease.held", held)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "split.json").write_text('{"split": {}}')
    with pytest.raises(Begun):
        if command == "run":
            run.run(tiny_config(scenes), str(tmp_path), False, RunCallbacks(on_warning=pytest.fail))
        else:
            sync(str(tmp_path))


def test_the_module_is_free_to_import_and_needs_no_mlflow() -> None:
    code = (
        "import sys; sys.modules['mlflow'] = None; import threestage.mlflow_sync.records as r;"
        "r.RegistrySettings(); assert not {'torch', 'ray', 'pandas', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
