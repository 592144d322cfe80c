"""Why: a wrong address or key must cost its user one line within seconds, not minutes of retries and a stack trace."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.failing_s3 import ERRORS, NO_SUCH_KEY, Answer, failing_s3
from tests.s3 import SECRET, free_port
from threestage.checks import store
from threestage.checks.result import CheckResult, Probe, merged, run_check, try_all
from threestage.checks.store import writable
from threestage.cli import app
from threestage.data import storage
from threestage.data.storage import StorageSettings
from threestage.data.storage_errors import complaint, explain
from threestage.errors import InputError
from threestage.run import local_main

KEY_ID = "AKIAKEYIDOFTHETEST"


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)


@pytest.fixture
def endpoint(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(store, "BUSY_S", 0.2)
    with failing_s3(ERRORS[request.param]) as (url, _):
        storage.configure(StorageSettings(endpoint=url))
        yield url


def problem_of(probe: Probe, code: str | None) -> str:
    """The one line of a probe that fails in less than 15 seconds, with this code."""
    outcome = run_check(*probe)
    assert outcome.problem is not None and "\n" not in outcome.problem and outcome.seconds < 15
    assert SECRET not in outcome.problem and KEY_ID not in outcome.problem
    assert outcome.code == code, outcome
    return outcome.problem


EXPECTED = {
    "key id": ("storage/credentials", "s3://bucket: endpoint {endpoint}", "AWS_ACCESS_KEY_ID"),
    "secret": ("storage/credentials", "s3://bucket: endpoint {endpoint}", "AWS_SECRET_ACCESS_KEY"),
    "denied": ("storage/denied", "s3://bucket/out: endpoint {endpoint} denies ListObjectsV2", "s3:ListBucket"),
    "bucket": ("storage/no-bucket", "s3://bucket: endpoint {endpoint}", "bucket bucket"),
    "region": ("storage/region", "s3://bucket: region us-east-1", "eu-central-1", "storage.region"),
    "redirect": ("storage/region", "s3://bucket: region us-east-1", "storage.region (or AWS_REGION)"),
    "busy": ("storage/busy", "s3://bucket: endpoint {endpoint}", "SLOW_DOWN: Please reduce"),
    "clock": ("storage/clock", "s3://bucket: endpoint {endpoint}", "clock"),
    "token": ("storage/credentials", "endpoint {endpoint}", "AWS_SESSION_TOKEN"),
    "web site": ("storage/not-s3", "s3://bucket: endpoint {endpoint}", "storage.endpoint"),
}


@pytest.mark.parametrize(("endpoint", "expected"), EXPECTED.items(), indirect=["endpoint"], ids=str)
def test_every_error_of_a_store_is_one_line_with_its_fix(endpoint: str, expected: tuple[str, ...]) -> None:
    code, *named = expected
    problem = problem_of(writable("--out", "s3://bucket/out"), code)
    for text in named:
        assert text.format(endpoint=endpoint) in problem


@pytest.mark.parametrize("endpoint", ["key id", "secret"], indirect=True)
def test_without_keys_in_the_environment_the_role_is_named(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error = OSError("When listing in bucket 'b': AWS Error INVALID_ACCESS_KEY_ID during ListObjectsV2 operation: no")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    assert "this machine's profile or role" in explain(None, error).message
    monkeypatch.setenv("AWS_PROFILE", "lab")
    assert "profile lab" in explain(None, error).message


def test_nobody_listens() -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    storage.configure(StorageSettings(endpoint=endpoint))
    problem = problem_of(store.data_set("data.root", "s3://bucket/data"), "storage/unreachable")
    assert problem == (
        f"s3://bucket: endpoint {endpoint} refuses the connection; start the store, or correct storage.endpoint "
        "(or AWS_ENDPOINT_URL)"
    )


def test_no_such_host_and_its_addressing_style() -> None:
    storage.configure(StorageSettings(endpoint="http://no-such-host.invalid:9000"))
    problem = problem_of(writable("--out", "s3://bucket/out"), "storage/unreachable")
    assert "no-such-host.invalid" in problem and "storage.endpoint" in problem
    storage.configure(StorageSettings(endpoint="http://localhost.invalid:9000", addressing_style="virtual"))
    problem = problem_of(writable("--out", "s3://bucket/out"), "storage/unreachable")
    assert "bucket.localhost.invalid is known (storage.addressing_style is virtual)" in problem


def test_http_and_https_confused() -> None:
    with failing_s3({}) as (url, _):
        storage.configure(StorageSettings(endpoint=url.replace("http:", "https:")))
        assert "write http://" in problem_of(writable("--out", "s3://bucket/out"), "storage/tls")


@pytest.mark.parametrize("method", ["PUT", "DELETE"])
def test_what_the_credentials_may_not_do_is_named(method: str) -> None:
    operation = f"{method.capitalize()}Object"
    with failing_s3({method: ERRORS["denied"]}) as (url, _):
        storage.configure(StorageSettings(endpoint=url))
        problem = problem_of(writable("--out", "s3://bucket/out"), "storage/denied")
    assert f"endpoint {url} denies {operation}; allow s3:{operation} to" in problem


def test_the_probe_is_removed_when_it_cannot_be_read_back() -> None:
    with failing_s3({"HEAD": NO_SUCH_KEY}) as (url, seen):
        storage.configure(StorageSettings(endpoint=url))
        assert "--out" in problem_of(writable("--out", "s3://bucket/out"), "storage/not-kept")
    (put,) = [path for method, path in seen if method == "PUT"]
    assert put.startswith("/bucket/out/.threestage-check-") and seen[-1] == ("DELETE", put)


def test_a_store_that_works_keeps_nothing_of_the_probe() -> None:
    with failing_s3({}) as (url, seen):
        storage.configure(StorageSettings(endpoint=url))
        assert run_check(*writable("--out", "s3://bucket/out")).problem is None
    assert [method for method, _ in seen if method in ("PUT", "DELETE")] == ["PUT", "DELETE"]


def test_a_store_that_is_busy_for_a_moment_passes() -> None:
    answers: dict[str, Answer] = {"GET": ERRORS["busy"]}
    with failing_s3(answers) as (url, _):
        storage.configure(StorageSettings(endpoint=url))
        threading.Timer(1.0, answers.clear).start()
        outcome = run_check(*store.file("network.weights", "s3://bucket/w.pth"))
    assert outcome.seconds > 0.9 and outcome.code == "storage/not-found"


def test_nothing_there() -> None:
    with failing_s3({}) as (url, _):
        storage.configure(StorageSettings(endpoint=url))
        problem = problem_of(store.data_set("data.root", "s3://bucket/data"), "data/no-data-set")
        assert "s3://bucket/data/manifest.json: " in problem and "data.root" in problem
        problem = problem_of(store.file("network.weights", "s3://bucket/w.pth"), "storage/not-found")
        assert "s3://bucket/w.pth: " in problem and "network.weights" in problem
        problem = problem_of(store.probe_images("data.unlabelled", "s3://bucket/photos"), "data/no-images")
        assert "s3://bucket/photos: " in problem and "data.unlabelled" in problem


def test_local_places(tmp_path: Path, scenes: Path) -> None:
    assert run_check(*store.data_set("data.root", str(scenes))).problem is None
    assert run_check(*writable("--out", str(tmp_path / "new" / "run"))).problem is None
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    problem = problem_of(writable("--out", str(tmp_path / "file/run")), "storage/not-a-folder")
    assert f"{tmp_path}/file is a file" in problem and "--out" in problem
    problem_of(store.data_set("data.root", str(tmp_path)), "data/no-data-set")
    (tmp_path / "manifest.json").write_text("no JSON")
    problem_of(store.data_set("data.root", str(tmp_path)), "storage/damaged-json")
    problem_of(store.file("network.weights", str(tmp_path / "w.pth")), "storage/not-found")
    assert run_check(*store.file("network.weights", str(tmp_path / "file"))).problem is None


@pytest.mark.skipif(not Path("/sys").is_dir(), reason="needs a folder that even root cannot write")
def test_a_folder_that_cannot_be_written() -> None:
    outcome = run_check(*writable("--out", "/sys/run"))
    assert str(outcome.problem).startswith("/sys/run: ") and outcome.code in ("storage/denied", "storage/not-found")


def test_a_probe_without_an_end_costs_the_deadline_and_the_others_nothing() -> None:
    never = threading.Event()
    probes = [Probe("data.root", "s3://slow", lambda: print(never.wait(20))), Probe("--out", "x", print)]
    start = time.monotonic()
    slow, quick = try_all(probes, deadline_s=0.5)
    never.set()
    assert time.monotonic() - start < 5
    assert slow.problem == "s3://slow: no answer within 0.5 s; start it, or correct data.root"
    assert slow.code == "storage/unreachable"
    assert quick.problem is None


def test_a_mistake_of_ours_is_not_taken_for_one_of_the_store() -> None:
    def wrong() -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        try_all([Probe("--out", "x", wrong)])


def fails(action: Callable[[], object]) -> OSError:
    with pytest.raises(OSError) as raised:
        action()
    return raised.value


def test_errors_that_are_not_of_s3(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    for error in (fails(absent.read_bytes), fails(lambda: storage.read_bytes(str(absent)))):
        found = explain(None, error)
        assert found.message.startswith(f"{absent}: ") and found.code == "storage/not-found"
    assert str(explain(None, ConnectionError("ray://head: no\n cluster"))) == "ray://head: no cluster [storage/failed]"
    found = explain("s3://b/x", FileNotFoundError(2, "Path does not exist 'b/x'"))
    assert found.message.startswith("s3://b/x: ") and found.code == "storage/not-found"


def test_an_error_of_botocore_is_explained_like_one_of_pyarrow() -> None:
    from botocore.exceptions import ClientError, EndpointConnectionError

    denied = ClientError({"Error": {"Code": "AccessDenied", "Message": "no"}}, "DeleteObject")
    wrapped = PermissionError("no")
    wrapped.__cause__ = denied
    for error in (denied, wrapped):
        found = explain("s3://b/x", error)
        assert found.message.startswith("s3://b/x: AWS S3 denies ") and found.code == "storage/denied"
    refused = EndpointConnectionError(endpoint_url="http://127.0.0.1:9")
    assert explain("s3://b/x", refused).code == "storage/unreachable"


@pytest.mark.parametrize(("name", "busy"), [("busy", True), ("denied", False)])
def test_only_what_may_pass_is_called_busy(name: str, busy: bool) -> None:
    answer = ERRORS[name]
    code = "SLOW_DOWN" if busy else "ACCESS_DENIED"
    error = OSError(f"When listing in bucket 'b': AWS Error {code} during ListObjectsV2 operation: {answer.message}")
    assert complaint(None, error).busy is busy


def test_outcomes_of_one_reason_share_a_line() -> None:
    same = [
        CheckResult("data.root", "a", 1.0, "down"),
        CheckResult("mlflow", "m", 0.1),
        CheckResult("--out", "b", 2.0, "down"),
    ]
    assert merged(same) == [CheckResult("data.root, --out", "a", 2.0, "down"), CheckResult("mlflow", "m", 0.1)]


def test_input_errors_are_one_line() -> None:
    def wrong() -> None:
        raise InputError("two\nlines", "data/x")

    assert problem_of(Probe("x", "y", wrong), "data/x") == "two lines"


def test_every_command_explains_what_a_store_refuses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line and exit code 2, from the command line and from `python -m threestage.local`."""
    with failing_s3(ERRORS["denied"]) as (endpoint, _):
        storage.configure(StorageSettings(endpoint=endpoint))
        monkeypatch.setattr("sys.argv", ["threestage", "evaluate", "s3://bucket/model", "data"])
        with pytest.raises(SystemExit) as ended:
            app.main()
        assert ended.value.code == 2
        arguments = ["demo", "--out", "s3://bucket/run", "--set", "data.root=s3://bucket/data"]
        assert local_main.main([*arguments, "--set", f"storage.endpoint={endpoint}"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert (
            line.startswith("error: ") and f"endpoint {endpoint} denies" in line and line.endswith(" [storage/denied]")
        )
