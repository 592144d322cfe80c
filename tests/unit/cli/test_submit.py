"""What is refused before anything is uploaded, what travels, and how a job is followed: without a cluster."""

import contextlib
import os
import runpy
import sys
import time
import zipfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus

from tests.failing_s3 import black_hole, failing_s3, silent_server
from tests.parsers import PARSERS
from tests.refusals import refused
from tests.s3 import free_port
from threestage.__main__ import main_on_cluster
from threestage.cli import app
from threestage.cli.job_arguments import read_job
from threestage.errors import StageFailure
from threestage.ray_backend import job_package, submit
from threestage.ray_backend.webhook import Webhooks

ROOT = Path(__file__).parents[3]
OUT = "s3://bucket/run"
DATA = ("--set", "data.root=s3://bucket/data")
RUN = ("demo", *DATA, "--out", OUT)
UNSHARED = "submit/unshared-place"
COMMANDS = {
    "run": (RUN, "demo", OUT),
    "sweep": (("thresholds", "demo", *DATA, "--out", "s3://bucket/s"), "demo-sweep", "s3://bucket/s"),
    "ingest": (("s3://bucket/photos", "s3://bucket/my data/"), "ingest-my data", "s3://bucket/my data"),
    "predict": (("models:/demo@stage3", "photos", "/shared/p/"), "predict-p", "/shared/p"),
    "evaluate": (("models:/demo@stage3", "s3://bucket/data"), "evaluate-demo@stage3", ""),
}


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a configuration, and an environment that says nothing of storage and MLflow."""
    for name in (*job_package.OF_STORAGE_AND_MLFLOW, *job_package.ENDPOINT, job_package.TRACKING, "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "mine.yaml").write_text((ROOT / "threestage/presets/demo.yaml").read_text())
    monkeypatch.chdir(folder)
    return folder


def read(command: str, *arguments: str) -> job_package.Job:
    return read_job(command, arguments, ".", PARSERS)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_job_is_the_command_with_the_name_of_its_run(command: str) -> None:
    arguments, name, out = COMMANDS[command]
    job = read(command, *arguments)
    assert (job.name, job.out, job.arguments) == (name, out, arguments)
    assert job.entrypoint.startswith(f"python -m threestage {command} ")
    first, second = job.new_id(), job.new_id()
    assert first != second and first.rsplit("-", 1)[0] == name.replace(" ", "-").replace("@", "-")
    assert job.metadata == {"threestage.command": command, "threestage.name": name, "threestage.out": out}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_script_is_the_command(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["script", "a", "--b"])
    seen: list[list[str]] = []
    monkeypatch.setattr("threestage.cli.main", lambda: seen.append(sys.argv[1:]))
    runpy.run_path(str(ROOT / "jobs" / f"{command}.py"), run_name="__main__")
    assert seen == [[command, "a", "--b"]]


@pytest.mark.parametrize(
    ("command", "arguments", "code", "words"),
    [
        ("run", ("demoo", "--out", OUT), "config/not-found", ["demoo"]),
        (
            "run",
            ("demo", *DATA, "--set", "stage1.stps=1", "--out", OUT),
            "config/unknown-key",
            ["stage1.stps", "steps"],
        ),
        ("run", ("demo", *DATA), UNSHARED, ["--out", "s3://bucket/prefix"]),
        ("run", ("demo", *DATA, "--out", "runs/x"), UNSHARED, ["--out runs/x"]),
        ("run", (*RUN, "--reuse", "runs/y"), UNSHARED, ["--reuse runs/y"]),
        ("run", (*RUN, "--local"), "config/usage", ["--local"]),
        ("run", (*RUN, "--set", "network.weights=w.pth"), UNSHARED, ["network.weights=w.pth", "network.pretrained"]),
        ("run", ("demo", "--out", OUT), UNSHARED, ["data.root="]),
        ("run", (*RUN, "--set", "data.unlabelled=more"), UNSHARED, ["data.unlabelled=more"]),
        ("sweep", ("thresholds", "demo", "--out", OUT, "--set", "data.root=data"), UNSHARED, ["data.root=data"]),
        ("run", (*RUN, "--set", "registry.tracking_uri=http://me:pass@h"), "submit/secret-setting", ["http://h"]),
        ("sweep", ("thresholdz", "demo", *DATA, "--out", OUT), "sweep/not-found", ["thresholdz", "thresholds?"]),
        ("sweep", ("thresholds", "demo", *DATA, "--set", "network.weights=w.pth"), UNSHARED, ["network.weights=w.pth"]),
        ("ingest", ("photos", "data"), UNSHARED, ["OUT data"]),
        ("predict", ("models:/m@stage1", "photos", "masks"), UNSHARED, ["OUT masks"]),
        ("evaluate", ("models:/m@stage1", "data", "--out", "scores"), UNSHARED, ["--out scores"]),
    ],
)
def test_what_is_refused_here(command: str, arguments: Sequence[str], code: str, words: Sequence[str]) -> None:
    with refused(code, *words) as raised:
        read(command, *arguments)
    assert "pass@" not in str(raised.value)


def check_files(job: job_package.Job, folder: str = ".") -> None:
    job_package.check_package(folder, job_package.what_travels(folder).sizes, job.files)


def test_a_configuration_must_travel(project: Path) -> None:
    job = read("run", "mine.yaml", *RUN[1:])
    assert job.files == ("mine.yaml",) and job.name == "demo"
    check_files(job)
    assert read_job("run", ["project/mine.yaml", *RUN[1:]], "..", PARSERS).files == ("project/mine.yaml",)
    (project.parent / "outside.yaml").write_text((project / "mine.yaml").read_text())
    for outside in ("../outside.yaml", str(project / "mine.yaml")):
        with refused("submit/file-outside", outside):
            check_files(read("run", outside, *RUN[1:]))
    (project / ".rayignore").write_text("*.yaml\n")
    with refused("submit/file-ignored", "mine.yaml", ".rayignore"):
        check_files(job)
    with refused("storage/not-found", "--working-dir nowhere"):
        read_job("run", RUN, "nowhere", PARSERS)


def test_a_checkout_travels_whole(project: Path) -> None:
    for module in ("threestage/__init__.py", "threestage/data/pool.py", "data/pool.parquet"):
        (project / module).parent.mkdir(parents=True, exist_ok=True)
        (project / module).touch()
    (project / ".rayignore").write_text("/data\n")
    check_files(read("run", *RUN))
    assert set(job_package.what_travels(".").sizes) >= {"threestage/__init__.py", "threestage/data/pool.py"}
    (project / ".rayignore").write_text("data\n")
    with refused("submit/file-ignored", "threestage/data/pool.py", ".rayignore"):
        check_files(read("run", *RUN))


def test_what_travels_is_counted_first(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_package, "LIMIT_BYTES", 2**20)
    for name, size in {"runs/old.pt": 3 * 2**20, "photos/1.jpg": 2**20, "a.py": 5, ".venv/x": 2**21}.items():
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).write_bytes(bytes(size))
    assert job_package.what_travels(".").sizes == job_package.what_travels(str(project)).sizes
    largest = "runs/old.pt (3.0 MiB), photos/1.jpg (1.0 MiB)"
    with refused("submit/too-large", "4.0 MiB in 4 files", "1.0 MiB", "./.rayignore", largest):
        check_files(read("run", *RUN))
    (project / ".gitignore").write_text("runs/\n")
    (project / "photos" / ".rayignore").write_text("*.jpg\n")
    assert set(job_package.what_travels(".").sizes) == {"mine.yaml", "a.py", ".gitignore", "photos/.rayignore"}
    check_files(read("run", *RUN))


def test_variables_travel_by_name() -> None:
    job = read("run", *RUN)
    here = {
        "AWS_ACCESS_KEY_ID": "AKIA",
        "AWS_SECRET_ACCESS_KEY": "very secret",
        "AWS_ENDPOINT_URL": "http://minio:9000",
    }
    sent = job_package.job_environment(job, ["CUDA_HOME"], here | {"HOME": "/root"})
    assert sent == {
        job_package.EXPECTED: "CUDA_HOME,MLFLOW_TRACKING_URI,AWS_ENDPOINT_URL_S3|AWS_ENDPOINT_URL,"
        "AWS_ACCESS_KEY_ID?,AWS_SECRET_ACCESS_KEY?"
    }
    values = ["AWS_ENDPOINT_URL=http://minio:9000", "MLFLOW_TRACKING_URI=http://mlflow:5000"]
    sent = job_package.job_environment(job, values, {"AWS_ENDPOINT_URL": "http://localhost:9000"})
    assert sent == {"AWS_ENDPOINT_URL": "http://minio:9000", "MLFLOW_TRACKING_URI": "http://mlflow:5000"}
    own = ("--set", "registry.tracking_uri=http://m:5000", "--set", "storage.endpoint=http://minio:9000")
    assert job_package.job_environment(read("run", *RUN, *own), [], here).keys() == {job_package.EXPECTED}
    assert job_package.job_environment(read("predict", "/models/m", "/photos", "/out"), [], {}) == {}


@pytest.mark.parametrize("text", ["AWS_SECRET_ACCESS_KEY=x", "MY_TOKEN=x", "MLFLOW_TRACKING_URI=http://me:pass@host"])
def test_a_value_that_may_be_a_secret_does_not_travel(text: str) -> None:
    with refused("submit/secret-variable", f"--env {text.partition('=')[0]}") as raised:
        job_package.job_environment(read("run", *RUN), [text], {})
    assert "pass" not in str(raised.value)


def test_a_name_that_no_variable_has() -> None:
    with refused("config/usage", "--env A B"):
        job_package.job_environment(read("run", *RUN), ["A B"], {})


@pytest.mark.parametrize(
    "text",
    [
        "DB_PASS=hunter2",
        "PGPASS=x",
        "SMTP_PASSWD=x",
        "SSH_PASSPHRASE=x",
        "HF_AUTH=x",
        "MYSQL_PWD=x",
        "GITHUB_PAT=x",
        "MY_CRED=x",
        "DB_PW=x",
        "COOKIE=session=abc",
        "WANDB=0123456789abcdef0123456789abcdef01234567",
        "CONN=AccountName=a;AccountKey=abc==",
        "URL=?sv=1&sig=abcd",
        "X=AKIAIOSFODNN7EXAMPLE",
        "HEADER=Bearer abcdef",
        "J=eyJhbGciOiJIUzI1NiJ9.e30.abc",
        "DSN=postgresql://u:p@h/d",
        "P=-----BEGIN RSA PRIVATE KEY-----",
    ],
)
def test_a_secret_is_known_by_its_name_or_its_shape(text: str) -> None:
    with refused("submit/secret-variable") as raised:
        job_package.job_environment(read("run", *RUN), [text], {})
    assert text.partition("=")[2] not in str(raised.value)


@pytest.mark.parametrize(
    "text",
    [
        "OMP_NUM_THREADS=1",
        "PATH=/bin",
        "PATTERN=x",
        "COMPASSES=1",
        "TOKENIZERS_PARALLELISM=false",
        "AUTHOR=me",
        "GIT_COMMIT=",
        "MODE=bearer of news",
    ],
)
def test_other_variables_travel(text: str) -> None:
    text += "0123456789abcdef0123456789abcdef01234567" if text.endswith("=") else ""
    name, _, value = text.partition("=")
    assert job_package.job_environment(read("run", *RUN), [text], {})[name] == value


def test_links_out_of_the_folder_are_not_followed(project: Path, tmp_path: Path) -> None:
    outside = tmp_path / "home"
    (outside / "deep").mkdir(parents=True)
    (outside / "id").write_text("x")
    (outside / "deep" / "round").symlink_to(outside)
    (project / "inside").mkdir()
    (project / "inside" / "a.py").touch()
    (project / "alias").symlink_to("inside")
    assert job_package.what_travels(".").links == []
    (project / "ssh").symlink_to(outside)
    (project / "inside" / "id").symlink_to(outside / "id")
    found = job_package.what_travels(".")
    assert set(found.sizes) == {"mine.yaml", "inside/a.py", "alias/a.py"}
    assert sorted(found.links) == ["alias/id", "inside/id", "ssh"]
    with refused("submit/link-outside", "alias/id, inside/id, ssh"):
        job_package.check_secrecy(".", found.sizes, found.links, with_secrets=True)
    (project / ".rayignore").write_text("ssh\nid\n")
    assert job_package.what_travels(".").links == []


@pytest.mark.parametrize(
    "path",
    [
        ".env",
        "a/.env.local",
        "env.sh",
        ".netrc",
        "key.pem",
        ".aws/credentials",
        "token",
        "auth_token",
        "my-secrets.toml",
        "id_ed25519",
        ".ssh/config",
        "service.p12",
        "credentials.json",
        "db_password.txt",
        "prod.env",
        ".envrc",
        ".git-credentials",
        ".config/gcloud/access_tokens.db",
        ".kube/config",
        "gcp-service-account.json",
        "a/private_key",
    ],
)
def test_files_that_look_like_credentials_need_a_flag(path: str) -> None:
    with refused("submit/secret-file", path, "--with-secrets"):
        job_package.check_secrecy(".", ["a.py", path], [], with_secrets=False)
    assert job_package.check_secrecy(".", ["a.py", path], [], with_secrets=True) == [path]


def test_other_files_travel_without_a_flag() -> None:
    names = [
        "tokens.py",
        "tokenizer.json",
        "environment.yaml",
        "keyboard.yaml",
        "kuberay/secrets.yaml",
        "src/secrets.py",
        "private_keypoints.py",
        "monkey.png",
        "env.py",
    ]
    assert job_package.check_secrecy(".", names, [], with_secrets=False) == []


@pytest.mark.parametrize("text", ["driver", "[1]", '{"driver": "much"}', "1"])
def test_resources_that_are_none(text: str) -> None:
    with refused("config/usage", f"--entrypoint-resources {text}"):
        job_package.resources(text)
    assert job_package.resources(None) == {}


def test_the_job_looks_for_them(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    warnings: list[str] = []
    here = {job_package.EXPECTED: "AWS_ENDPOINT_URL_S3|AWS_ENDPOINT_URL,AWS_SESSION_TOKEN?", "AWS_ENDPOINT_URL": "x"}
    job_package.check_environment(here, warnings.append)
    assert warnings == ["AWS_SESSION_TOKEN is set where this job was submitted, but not on the cluster"]
    with refused("submit/missing-variable", "MLFLOW_TRACKING_URI", "--env MLFLOW_TRACKING_URI=VALUE"):
        job_package.check_environment({job_package.EXPECTED: "MLFLOW_TRACKING_URI"}, warnings.append)
    monkeypatch.setenv(job_package.EXPECTED, "MY_KEY")
    with pytest.raises(SystemExit) as ended:
        main_on_cluster()
    out, line = capsys.readouterr()
    assert ended.value.code == 2 and out == "" and line.count("\n") == 1
    assert line.startswith("error: MY_KEY: ") and "--env" not in line
    assert line.endswith(" [submit/missing-variable]\n")


def test_a_wheel_is_unpacked(tmp_path: Path) -> None:
    wheel = tmp_path / "threestage-9-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("threestage/__main__.py", "")
        archive.writestr("threestage-9.dist-info/METADATA", "Requires-Dist: torch")
    with job_package.unpacked_wheel(str(wheel)) as folder:
        assert Path(folder).name == "threestage" and os.listdir(Path(folder).parent) == ["threestage"]
    with pytest.raises(ConnectionError), job_package.unpacked_wheel(str(wheel)):
        raise ConnectionError  # while it is uploaded
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("other/__main__.py", "")
    for wrong in (wheel, tmp_path / "nothing.whl", ROOT / "README.md"):
        with refused("submit/wheel", f"--wheel {wrong}"), job_package.unpacked_wheel(str(wrong)):
            pass


def test_options_stand_anywhere(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    submitted: list[Any] = []

    def note(client: Any, job: job_package.Job, package: job_package.JobPackage, say: Any) -> str:
        submitted.extend([job.arguments, *package])
        return "demo-123456"

    monkeypatch.setattr(submit, "job_client", lambda url: SimpleNamespace(get_address=lambda: url))
    monkeypatch.setattr(submit, "submit", note)
    options = ["--address", "http://head:8265", "--env", "MLFLOW_TRACKING_URI=http://m:1", "--no-wait"]
    options += ["--entrypoint-resources", '{"driver": 1}']
    monkeypatch.setattr("sys.argv", ["threestage", "submit", "run", RUN[0], *options[:2], *RUN[1:], *options[2:]])
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert not ended.value.code and submitted[:3] == [RUN, ".", None]
    assert submitted[3:5] == [{"MLFLOW_TRACKING_URI": "http://m:1"}, {"driver": 1.0}]
    assert list(submitted[5]) == ["mine.yaml"]
    shown = capsys.readouterr()
    assert shown.out == "demo-123456\n" and "ray job stop --address http://head:8265 demo-123456" in shown.err
    assert "1 file, 0.0 MiB; code: the image's threestage" in shown.err


def test_an_address_that_is_no_job_api(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in submit.ADDRESS_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for wrong in ("127.0.0.1:6379", "ray://host:1"):
        with refused("ray/address", f"--address {wrong}: "):
            submit.job_client(wrong)
    with refused("ray/address", "--address: "):
        submit.job_client(None)
    for name in reversed(submit.ADDRESS_VARIABLES):  # the first has the last word
        monkeypatch.setenv(name, "127.0.0.1:6379")
        with refused("ray/address", f"{name}=127.0.0.1:6379: ", "--address"):
            submit.job_client(None)
    with failing_s3({}) as (other, _), refused("ray/other-service", other):
        submit.job_client(other)


def test_an_address_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "ANSWER_S", 0.3)
    with black_hole() as hole, silent_server() as silent:
        for url in (f"http://127.0.0.1:{free_port()}", hole, silent):
            begun = time.monotonic()
            with refused("ray/no-answer", f"--address {url}"):
                submit.job_client(url)
            assert time.monotonic() - begun < 8


def details(status: JobStatus, code: int | None = None, **values: Any) -> Any:
    known = {"status": status, "driver_exit_code": code, "submission_id": "demo-1", "message": "it\nwaits"}
    return SimpleNamespace(**{**known, **values})


class Cluster:
    """Stands in for the job API: `logs` are what each opening of the log yields, an exception is raised; `states` are the
    answers about the job, the last one for ever."""

    def __init__(self, logs: Sequence[Sequence[str | Exception]], states: Sequence[Any], rest: str = "") -> None:
        self._logs, self._states, self._rest = list(logs), list(states), rest

    def get_address(self) -> str:
        return "http://head:8265"

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        for text in self._logs.pop(0) if self._logs else ():
            if isinstance(text, Exception):
                raise text
            yield text

    def get_job_info(self, job_id: str) -> Any:
        state = self._states.pop(0) if len(self._states) > 1 else self._states[0]
        if isinstance(state, BaseException):
            raise state
        return state

    def get_job_logs(self, job_id: str) -> str:
        return self._rest


@pytest.fixture
def follow(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[Cluster], tuple[int, str, str]]:
    """Follow a job: exit code, what was printed of the log, what was said."""
    monkeypatch.setattr(submit, "PAUSES_S", (0.0,))
    monkeypatch.setattr(submit, "PATIENCE_S", 0.5)

    def run(cluster: Cluster) -> tuple[int, str, str]:
        said: list[str] = []
        code = submit.follow(cluster, "demo-1", said.append).code
        return code, capsys.readouterr().out, "\n".join(said)

    return run


def test_a_lost_connection_repeats_nothing(follow: Callable[[Cluster], tuple[int, str, str]]) -> None:
    lost, down = RuntimeError("WebSocket connection closed unexpectedly"), ConnectionError("refused")
    logs: list[list[str | Exception]] = [
        ["one\n", "tw", lost],
        [lost],
        ["one\ntwo\nth", lost],
        ["one\n", "two\n", "three\n"],
    ]
    states = [details(JobStatus.RUNNING), down, details(JobStatus.RUNNING), details(JobStatus.SUCCEEDED)]
    code, log, said = follow(Cluster(logs, states, "one\ntwo\nthree\nfour\n"))
    assert code == 0 and log == "one\ntwo\nthree\nfour\n"
    assert said.count("connection lost, demo-1 continues") == said.count("reconnected") == 2


def test_a_log_s_commands_are_shown(follow: Callable[[Cluster], tuple[int, str, str]]) -> None:
    logs = [["\x1b[31mred\x1b[0m \x1b", "]8;;http://h\x07link\u202e\n"]]
    code, out, said = follow(Cluster(logs, [details(JobStatus.FAILED, None, message="a\x1b[2J")], rest=""))
    assert (code, out) == (1, "red \\x1b]8;;http://h\\x07link\\u202e\n")
    assert "\x1b" not in said


def test_patience_ends_with_what_to_do(follow: Callable[[Cluster], tuple[int, str, str]]) -> None:
    code, _, said = follow(Cluster([], [ConnectionError("refused")]))
    assert code == submit.LOST and said.count("connection lost") == 1
    for verb in ("logs --follow", "status", "stop"):
        assert f"ray job {verb} --address http://head:8265 demo-1" in said


@pytest.mark.parametrize(
    ("state", "code", "words"),
    [
        (details(JobStatus.SUCCEEDED, 0), 0, ""),
        (details(JobStatus.FAILED, 2), 2, ""),
        (details(JobStatus.FAILED, 1), 1, ""),
        (details(JobStatus.FAILED, -9), 1, ""),
        (details(JobStatus.FAILED, message="no pip\nthere"), 1, "demo-1 failed: no pip there"),
        (details(JobStatus.STOPPED), submit.STOPPED, "was stopped"),
    ],
)
def test_it_ends_as_the_job(
    state: Any, code: int, words: str, follow: Callable[[Cluster], tuple[int, str, str]]
) -> None:
    found = follow(Cluster([], [details(JobStatus.PENDING), state]))
    assert found[0] == code and words in found[2] and "demo-1 waits: it waits" in found[2]


@pytest.mark.parametrize(
    ("state", "log", "tries", "why"),
    [
        (details(JobStatus.FAILED, message="x" * 400 + " out of memory"), "", 3, "out of memory"),
        (details(JobStatus.FAILED, -9), "", 3, "was killed"),
        (details(JobStatus.FAILED, 1), "error: stage1: no room [ray/no-room]\n", 3, "stage1: no room"),
        (details(JobStatus.FAILED, 1), "error: [ray/no-room]\nerror: a NaN [stage/diverged]\n", 1, ""),
        (details(JobStatus.FAILED, 1), "Traceback\n", 1, ""),
        (details(JobStatus.FAILED, 2), "error: data.root=x: wrong [storage/not-found]\n", 1, ""),
        (details(JobStatus.FAILED, 3), "error: /x: full [stage/unwritable]\n", 1, ""),
        (details(JobStatus.STOPPED), "", 1, ""),
        (details(JobStatus.SUCCEEDED, 0), "", 1, ""),
    ],
)
def test_what_can_continue_is_submitted_again(
    monkeypatch: pytest.MonkeyPatch, state: Any, log: str, tries: int, why: str
) -> None:
    submitted, said = list[tuple[str, ...]](), list[str]()

    def note(client: Any, job: job_package.Job, *rest: Any) -> str:
        submitted.append(job.arguments)
        return "demo-1"

    monkeypatch.setattr(submit, "submit", note)
    monkeypatch.setattr(submit, "RETRY_PAUSES_S", (0.0,))
    job, package = read("sweep", *COMMANDS["sweep"][0]), job_package.JobPackage(".", variables={})
    cluster = Cluster([[log]] * 3, [state])
    code = submit.submit_and_follow(cluster, job, package, said.append, 2)
    assert code == submit._job_end(state, log, said.append).code and len(submitted) == tries
    assert ["--resume" in arguments for arguments in submitted] == [False, True, True][:tries]
    assert any(why in line and "submitting it again" in line for line in said) == (tries > 1)


@pytest.mark.parametrize(
    ("state", "posted"),
    [
        (details(JobStatus.SUCCEEDED, 0), (0, "")),
        (details(JobStatus.FAILED, 2), (2, "data.root=x: wrong")),
        (details(JobStatus.STOPPED), (submit.STOPPED, "it was stopped")),
        (RuntimeError("Request failed with status code 404"), (1, "demo-1: unknown")),
        (KeyboardInterrupt(), None),
    ],
)
def test_the_end_of_a_job_is_posted(
    monkeypatch: pytest.MonkeyPatch, state: Any, posted: tuple[int, str] | None
) -> None:
    found: list[tuple[int, str]] = []
    monkeypatch.setattr(Webhooks, "post", lambda self, code, report, say: found.append((code, report["reason"])))
    monkeypatch.setattr(submit, "submit", lambda *rest: "demo-1")
    cluster = Cluster([["error: data.root=x: wrong [storage/not-found]\n"]], [state])
    job, package = read("run", *RUN), job_package.JobPackage(".", variables={})
    with contextlib.suppress(StageFailure):
        submit.submit_and_follow(cluster, job, package, lambda text: None, 0)
    assert len(found) == (posted is not None)
    assert posted is None or (found[0][0] == posted[0] and found[0][1].startswith(posted[1]))


def test_a_cluster_that_has_forgotten_the_job(follow: Callable[[Cluster], tuple[int, str, str]]) -> None:
    with refused("submit/unknown-job", "demo-1", "--resume", error=StageFailure):
        follow(Cluster([], [RuntimeError("Request failed with status code 404: Job demo-1 does not exist.")]))


def test_a_token_that_is_no_longer_taken(follow: Callable[[Cluster], tuple[int, str, str]]) -> None:
    with refused("ray/wrong-token"):
        follow(Cluster([], [details(JobStatus.RUNNING), AuthenticationError("Authentication failed")]))


def test_ctrl_c_detaches(follow: Callable[[Cluster], tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(client: Any, job_id: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(submit, "_tail", interrupted)
    code, _, said = follow(Cluster([], [details(JobStatus.RUNNING)]))
    assert code == submit.DETACHED and "demo-1 continues" in said and "ray job stop" in said


def test_the_same_run_is_followed_and_another_is_refused(project: Path) -> None:
    (project / "not.checked").touch()  # so it does not travel
    job = read("run", *RUN)
    submitted: list[Mapping[str, Any]] = []

    def note(**given: Any) -> str:
        folder = Path(given["runtime_env"]["working_dir"])
        submitted.append(given | {"files": [str(file.relative_to(folder)) for file in folder.rglob("*.*")]})
        return str(given["submission_id"])

    def client(status: JobStatus, entrypoint: str = job.entrypoint, out: str = OUT) -> Any:
        known = details(status, entrypoint=entrypoint, metadata={"threestage.out": out})
        return SimpleNamespace(
            list_jobs=lambda: [known],
            get_address=lambda: "http://head:8265",
            submit_job=note,
        )

    def ask(client: Any) -> str:
        return submit.submit(
            client, job, job_package.JobPackage(".", variables={"A": "b"}, files=["mine.yaml"]), lambda text: None
        )

    for status in (JobStatus.RUNNING, JobStatus.PENDING):
        assert ask(client(status)) == "demo-1"
        with refused("submit/other-arguments", "demo-1", "--out s3://bucket/run", "ray job stop"):
            ask(client(status, "python -m threestage run other"))
    assert not submitted
    for new in (client(JobStatus.STOPPED), client(JobStatus.RUNNING, out="s3://bucket/other")):
        assert ask(new) == submitted[-1]["submission_id"]
    assert submitted[0]["files"] == ["mine.yaml"] and submitted[0]["runtime_env"]["env_vars"] == {
        "A": "b",
        "RAY_JOB_STOP_WAIT_TIME_S": submit.STOP_S,
    }
    assert submitted[0]["entrypoint"] == job.entrypoint and submitted[0]["metadata"]["threestage.out"] == OUT


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (AuthenticationError("Authentication required: Unauthorized"), "ray/no-token"),
        (AuthenticationError("Authentication failed: Forbidden"), "ray/wrong-token"),
    ],
)
def test_a_token_that_is_refused(error: Exception, code: str) -> None:
    with refused(code, "http://head:8265", "RAY_AUTH_MODE"):
        raise submit._explained("http://head:8265", error)
