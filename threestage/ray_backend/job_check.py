"""`threestage check --address URL`: the same check as a job, where `threestage submit` would run it.

The job is `checks.run_check` of the package as it is here, in the environment of the cluster. It prints each result as JSON
behind MARK.
"""

import contextlib
import importlib.metadata
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

import threestage
from threestage.checks.result import CheckOutcome, CheckResult, not_tried, run_check
from threestage.config import Config
from threestage.data import storage
from threestage.data.storage_errors import without_secrets
from threestage.errors import InputError
from threestage.ray_backend.connect import OPEN
from threestage.ray_backend.job_package import is_shared_uri
from threestage.ray_backend.node_checks import JOB, versions
from threestage.ray_backend.submit import ANSWER_S, NO_CONNECTION, OVER, UPLOAD_S, answer_of, job_client, ray_reason
from threestage.settings import Settings

CODE = "check/job"
MAIN = "threestage.checks.run_check"  # what the job runs
MARK = "threestage-check "
SPECIFICATION = "check.json"
PYTHON = "python"  # the cluster's, as for what is submitted
SILENCE_S, POLL_S = 240.0, 1.0  # the longest wait inside is for nodes, and for the first steps of a stage
MEND = "see `ray job logs --address {url} {job}`"


class JobSpecification(Settings):
    """`versions`: those of the machine that asks."""

    config: Config
    out: str
    versions: dict[str, str]


def check_by_job(config: Config, out: str, address: str) -> Iterator[CheckResult]:
    """First what can be seen from here, then the lines of a job, as it finds them. Nothing stays of one that ends well."""
    travels = run_check("what travels", "", lambda: _travels(config, out))
    yield travels
    clients: list[JobSubmissionClient] = []
    yield (entry := run_check("--address", address, lambda: _lets_in(address, clients)))
    if travels.problem is not None or entry.problem is not None:
        wrong = [line.name for line in (travels, entry) if line.problem is not None]
        yield not_tried(["all that is tried on the cluster"], wrong)
        return
    yield from _run(clients[0], JobSpecification(config=config, out=storage.absolute(out), versions=versions()))


def _travels(config: Config, out: str) -> CheckOutcome:
    """Raises InputError for what means nothing on another machine, or should not be sent there."""
    paths = {"--out": out, "data.root": config.data.root, "data.unlabelled": config.data.unlabelled}
    paths |= {
        "data.labelled": config.data.labelled_list,
        "data.group": config.data.group_list,
        "data.exclude": config.data.exclude,
    }
    for name, path in {**paths, "network.weights": config.network.weights}.items():
        if path is not None and not is_shared_uri(path):
            raise InputError(
                f"{name}={path}: is a path below this folder, which no job sees; give s3://bucket/prefix, or an absolute path "
                "that all nodes share",
                "submit/unshared-place",
            )
    text = config.model_dump_json()
    if without_secrets(text) != text:
        raise InputError(
            "the configuration: holds a credential, which would travel with the job; set it in the cluster's environment",
            "submit/secret-setting",
        )
    return CheckOutcome("every path is one that other machines can have; no credential is in the configuration")


def _lets_in(address: str, clients: list[JobSubmissionClient]) -> CheckOutcome:
    clients.append(job_client(address))
    url = clients[0].get_address()
    try:
        urlopen(f"{url}/api/version", timeout=5).close()
    except URLError:  # 401: it asks for one
        return CheckOutcome(f"{url}: its job API answers, it takes our token")
    return CheckOutcome(url, f"{url}: {OPEN}")


def _run(client: JobSubmissionClient, specification: JobSpecification) -> Iterator[CheckResult]:
    """The lines of a job. It is stopped when nothing comes for SILENCE_S, and when the caller ends."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, SPECIFICATION).write_text(specification.model_dump_json())
        code = str(Path(threestage.__file__).parent)
        try:
            environment = {"working_dir": folder, "py_modules": [code], "env_vars": {JOB: "1"}}
            job = answer_of(
                UPLOAD_S, client.submit_job, entrypoint=f"{PYTHON} -m {MAIN} {SPECIFICATION}", runtime_env=environment,
                metadata={"threestage.command": "check"},
            )  # fmt: skip
        except (AuthenticationError, *NO_CONNECTION) as error:
            yield CheckResult("the job", "", problem=f"it cannot be submitted: {ray_reason(error)}", code=CODE)
            return
    try:
        yield from _follow(client, job)
    except AuthenticationError as error:
        problem = f"the cluster does not take the token any more: {ray_reason(error)}"
        yield CheckResult("the job", job, problem=problem, code="ray/wrong-token")
    finally:
        with contextlib.suppress(*NO_CONNECTION, AuthenticationError):
            answer_of(ANSWER_S, client.stop_job, job)


def _follow(client: JobSubmissionClient, job: str) -> Iterator[CheckResult]:
    read, heard = 0, time.monotonic()
    mend = MEND.format(url=client.get_address(), job=job)
    while time.monotonic() - heard < SILENCE_S:
        try:
            status = answer_of(ANSWER_S, client.get_job_status, job)
            log = answer_of(ANSWER_S, client.get_job_logs, job)
        except NO_CONNECTION:
            time.sleep(POLL_S)
            continue
        lines = [line for line in log.splitlines(keepends=True) if line.startswith(MARK) and line.endswith("\n")]
        for line in lines[read:]:
            heard = time.monotonic()
            yield CheckResult.from_json(line.removeprefix(MARK))
        read = len(lines)
        if status in OVER:
            if status == JobStatus.SUCCEEDED:
                answer_of(ANSWER_S, client.delete_job, job)
                return
            last = (log.strip().splitlines() or [answer_of(ANSWER_S, client.get_job_info, job).message])[-1]
            yield CheckResult("the job", job, problem=f"it ended too early: {last[:300]}; {mend}", code=CODE)
            return
        time.sleep(POLL_S)
    problem = f"no word of it for {SILENCE_S:.0f} s: has the cluster room for it? {mend}"
    yield CheckResult("the job", job, problem=problem, code=CODE)


# ---- On the cluster


def image_code(asking: dict[str, str]) -> CheckOutcome:
    """Versions here, on the head, where the job runs, and there, where it was asked for."""
    here = versions()
    value = ", ".join(f"{what} {version}" for what, version in here.items())
    others = [f"{what} {asking[what]}" for what in here if asking[what] != here[what]]
    differ = f"; where you are: {', '.join(others)}" if others else " there and here"
    try:
        own = importlib.metadata.version("threestage")
    except importlib.metadata.PackageNotFoundError:
        return CheckOutcome(
            value, f"{value}{differ}; the cluster's image holds no threestage: submit with --wheel FILE"
        )
    if own != asking["threestage"]:
        return CheckOutcome(
            value, f"{value}{differ}; the image's threestage is {own}: submit with --wheel FILE, or renew the image"
        )
    return CheckOutcome(f"{value}{differ}")
