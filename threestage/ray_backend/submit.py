"""Submit a job to a cluster's job API, follow its log through lost connections, end as it ended."""

import asyncio
import contextlib
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from threestage.data.parallel import in_daemon_thread
from threestage.errors import CodedError, InputError, StageFailure
from threestage.plain_text import one_line as shown
from threestage.plain_text import visible_log
from threestage.ray_backend.connect import TOKEN
from threestage.ray_backend.job_package import Job, JobPackage, copied_files, unpacked_wheel
from threestage.ray_backend.webhook import Webhooks

ANSWER_S, UPLOAD_S = 10.0, 600.0
SILENCE_S = 60.0  # without a word of the job: it is asked whether it lives, and its log is opened anew
PATIENCE_S = 600.0  # without an answer of the cluster
PAUSES_S = (1.0, 2.0, 5.0, 10.0, 30.0)
STOP_S = "30"  # `ray job stop` lets a job save a checkpoint for so long; Ray's own 3 s are too few
OVER = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)
STOPPED, DETACHED, LOST = 143, 130, 75  # exit codes beside the job's own: of SIGTERM, of Ctrl-C, EX_TEMPFAIL
OWN = (1, 2, 3, STOPPED)  # exit codes of the commands; with any other, the process was killed
RETRY_PAUSES_S = (30.0, 60.0, 120.0, 300.0, 600.0)
MAY_PASS = ("ray/", "storage/", "stage/training-failed")
"""Codes of errors after which the same command may continue: of the cluster and of the store, not of the work itself."""
ERROR_LINE = re.compile(r"^error: (.*) \[([a-z-]+/[a-z0-9-]+)\]$", re.MULTILINE)
LONGEST_LINE, LONGEST_TAIL = 2000, 10_000
NO_CONNECTION = (requests.RequestException, aiohttp.ClientError, OSError, RuntimeError)  # the last: an answer of 5xx

ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")

Answer = TypeVar("Answer")
Say = Callable[[str], None]

# ---- The job API


def answer_of(seconds: float, call: Callable[..., Answer], *given: Any, **named: Any) -> Answer:
    """The answer of a call, or TimeoutError: Ray's client waits for ever. A call without an answer ends with the process."""
    answer = in_daemon_thread(call, *given, **named)
    if not wait([answer], seconds).done:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return answer.result()


def job_client(address: str | None) -> JobSubmissionClient:
    """A client of the job API at a URL; without one, at that of RAY_API_SERVER_ADDRESS, or else RAY_ADDRESS.

    Raises InputError within seconds when it is no URL, when nobody answers there, and when the token is missing or wrong.
    """
    named, url = _address(address)
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        why = "is not the URL of a dashboard" if url else "is not given"
        raise InputError(
            f"{named}: {why}; give that of the cluster's with --address, e.g. http://127.0.0.1:8265 (on Kubernetes: "
            "kubectl port-forward service/NAME-head-svc 8265)",
            "ray/address",
        )
    os.environ["RAY_API_SERVER_ADDRESS"] = url  # Ray puts it above what it is given
    for handler in logging.getLogger("ray").handlers:  # it logs each step of an upload
        handler.setLevel(logging.ERROR)
    try:
        return answer_of(ANSWER_S, JobSubmissionClient, url)
    except (requests.RequestException, ConnectionError, TimeoutError) as error:
        raise InputError(
            f"{named}: no answer ({ray_reason(error)}); start the cluster or its port-forward, or correct the address",
            "ray/no-answer",
        ) from None
    except (AuthenticationError, RuntimeError, ValueError) as error:
        raise _explained(url, error) from None


def _address(option: str | None) -> tuple[str, str]:
    """What an error says of the address, and the address. RAY_ADDRESS is HOST:PORT of a head where a run needs one."""
    given = {"--address ": option} | {f"{name}=": os.environ.get(name) for name in ADDRESS_VARIABLES}
    name, address = next(((name, value) for name, value in given.items() if value), ("--address", ""))
    url = address.rstrip("/")
    return f"{name}{url}", url


def _explained(url: str, error: Exception) -> Exception:
    """What the job API refuses, as one line with its fix."""
    text = str(error)
    if isinstance(error, AuthenticationError) and "Authentication failed" in text:
        return InputError(f"{url}: refuses the token; {TOKEN}", "ray/wrong-token")
    if isinstance(error, AuthenticationError) or "RAY_AUTH_TOKEN" in text:
        return InputError(f"{url}: requires a token, and none was found; {TOKEN}", "ray/no-token")
    if "404" in text or "ersion" in text:
        return InputError(
            f"{url}: answers, but not as Ray's job API ({ray_reason(error)}); correct the address", "ray/other-service"
        )
    return StageFailure(f"{url}: {ray_reason(error)}", "ray/job-api")


def ray_reason(text: object) -> str:
    """What Ray says, for the end of a line."""
    return shown(text)[:300]


# ---- Submit a job and follow it


def submit(client: JobSubmissionClient, job: Job, package: JobPackage, say: Say) -> str:
    """The id of the job: that of a new one or, where the cluster works on the same run already, of that one.

    Raises InputError when it works on that run with other arguments.
    """
    url = client.get_address()
    try:
        running = _running(client, job)
        if running is not None:
            say(f"{running} already writes to {job.out}: following it, nothing was submitted")
            return running
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(copied_files(package.folder, package.files))
            variables = {"RAY_JOB_STOP_WAIT_TIME_S": STOP_S, **package.variables}
            environment: dict[str, Any] = {"working_dir": folder, "env_vars": variables}
            if package.wheel is not None:
                environment["py_modules"] = [stack.enter_context(unpacked_wheel(package.wheel))]
            return answer_of(
                UPLOAD_S, client.submit_job, entrypoint=job.entrypoint, submission_id=job.new_id(),
                runtime_env=environment, metadata=job.metadata, entrypoint_resources=dict(package.resources) or None,
            )  # fmt: skip
    except (requests.RequestException, AuthenticationError, RuntimeError, TimeoutError) as error:
        raise _explained(url, error) from None


def _running(client: JobSubmissionClient, job: Job) -> str | None:
    """The unfinished job that works on the same folder."""
    for other in answer_of(ANSWER_S, client.list_jobs) if job.out else ():
        if other.status not in OVER and (other.metadata or {}).get("threestage.out") == job.out:
            if other.entrypoint != job.entrypoint:
                raise InputError(
                    f"--out {job.out}: {other.submission_id} already writes to it with other arguments "
                    f"({other.entrypoint}); wait for it, stop it (ray job stop --address "
                    f"{client.get_address()} {other.submission_id}), or give another --out",
                    "submit/other-arguments",
                )
            return str(other.submission_id)
    return None


def commands(url: str, job_id: str) -> str:
    """Ray's commands to follow the job, ask for its state and stop it."""
    lines = (f"ray job {verb} --address {url} {job_id}" for verb in ("logs --follow", "status", "stop"))
    return "\n".join(f"  {line}" for line in lines)


class JobEnd(NamedTuple):
    """`reason`: why it failed; `may_resume`: the same command may continue."""

    code: int
    reason: str = ""
    may_resume: bool = False


def submit_and_follow(
    client: JobSubmissionClient, job: Job, package: JobPackage, say: Say, retries: int, webhooks: Webhooks = Webhooks()
) -> int:
    """The exit code of the job, or of the last of those that were submitted again after it, at most `retries`. What cannot
    continue is not tried again. How it ended is posted to `webhooks`; what was detached has not ended."""
    report = {"command": job.command, "name": job.name, "out": job.out, "cluster": client.get_address(), "job": ""}
    try:
        ended = _submit_and_follow(client, job, package, say, retries, report)
    except CodedError as error:
        webhooks.post(2 if isinstance(error, InputError) else 1, report | {"reason": str(error)}, say)
        raise
    if ended.code != DETACHED:
        webhooks.post(ended.code, report | {"reason": ended.reason}, say)
    return ended.code


def _submit_and_follow(
    client: JobSubmissionClient, job: Job, package: JobPackage, say: Say, retries: int, report: dict[str, str]
) -> JobEnd:
    """report: gets the id of the last job."""
    for tries in range(retries + 1):
        job_id = report["job"] = submit(client, job, package, say)
        say(f"job {job_id} on {client.get_address()}")
        ended = follow(client, job_id, say)
        if not ended.may_resume or tries == retries:
            break
        pause = RETRY_PAUSES_S[min(tries, len(RETRY_PAUSES_S) - 1)]
        say(
            f"{job_id} can resume ({ended.reason}): submitting it again in {pause:.0f} s, retry {tries + 1} of {retries}"
        )
        time.sleep(pause)
        if job.command == "sweep" and "--resume" not in job.arguments:
            job = replace(job, arguments=(*job.arguments, "--resume"))
    return ended


def follow(client: JobSubmissionClient, job_id: str, say: Say) -> JobEnd:
    """Print the job's log until it ends; its exit code, or STOPPED, DETACHED after Ctrl-C, LOST when the cluster has not
    answered for PATIENCE_S. InputError when it does not take the token any more."""
    url, log = client.get_address(), _Log(client, job_id, say)
    try:
        ended = log.follow()
    except AuthenticationError as error:  # a cluster made anew has another token
        raise _explained(url, error) from None
    except KeyboardInterrupt:
        say(f"detached: {job_id} continues; repeat the command to follow it, or use\n{commands(url, job_id)}")
        return JobEnd(DETACHED)
    if ended is None:
        say(f"{url}: no answer for {PATIENCE_S / 60:.0f} minutes; {job_id} may still run:\n{commands(url, job_id)}")
        return JobEnd(LOST, f"the cluster has not answered for {PATIENCE_S / 60:.0f} minutes")
    return _job_end(ended, log.tail, say)


def _job_end(ended: JobDetails, tail: str, say: Say) -> JobEnd:
    """tail: of its log."""
    job, code = ended.submission_id, ended.driver_exit_code
    if ended.status == JobStatus.SUCCEEDED:
        return JobEnd(0)
    if ended.status == JobStatus.STOPPED:
        say(f"{job} was stopped; the same command resumes it (a sweep: with --resume)")
        return JobEnd(STOPPED, "it was stopped")
    if code is None:  # its supervisor or its node was lost
        reason = shown(ended.message)[:LONGEST_LINE]
        say(
            f"{job} failed: {reason}; the same command resumes it (a sweep: with --resume); --retries N does so by itself"
        )
        return JobEnd(1, reason, True)
    if code not in OWN:
        return JobEnd(1, f"its process was killed, exit code {code}", True)
    errors = ERROR_LINE.findall(tail)
    if not errors:
        return JobEnd(code)
    return JobEnd(code, errors[-1][0], code == 1 and errors[-1][1].startswith(MAY_PASS))


class _Log:
    """The log of a job. It is sent from its beginning whenever it is opened: `_printed` characters of it are left out."""

    def __init__(self, client: JobSubmissionClient, job_id: str, say: Say) -> None:
        self._client, self._id, self._say = client, job_id, say
        self._printed = 0
        self.tail = ""
        self._answered = time.monotonic()
        self._failures = 0

    def follow(self) -> JobDetails | None:
        """The job when it is over; None after PATIENCE_S without an answer. Raises StageFailure when the cluster does not know
        it."""
        while time.monotonic() - self._answered < PATIENCE_S:
            problem = self._print()
            try:
                details = answer_of(ANSWER_S, self._client.get_job_info, self._id)
            except NO_CONNECTION as error:
                _refuse_unknown(self._id, error)
                self._pause(error)
                continue
            self._answered = time.monotonic()
            if details.status in OVER:
                self._print_rest()
                return details
            if details.status == JobStatus.PENDING:
                self._say(f"{self._id} waits: {ray_reason(details.message)}")
            if problem is not None:
                self._pause(problem)
        return None

    def _print(self) -> Exception | None:
        """Until the log ends, or nothing comes for SILENCE_S, or the connection is lost: then, why."""
        seen = 0
        try:
            for text in _tail(self._client, self._id):
                new = text[max(0, self._printed - seen) :]
                seen += len(text)
                self._printed = max(self._printed, seen)
                self._heard()
                self._write(new)
        except TimeoutError:
            return None
        except NO_CONNECTION as error:
            return error
        return None

    def _print_rest(self) -> None:
        """What a connection that broke off has left out."""
        with contextlib.suppress(*NO_CONNECTION, AuthenticationError):
            self._write(answer_of(UPLOAD_S, self._client.get_job_logs, self._id)[self._printed :])

    def _write(self, log: str) -> None:
        shown_log = visible_log(log)
        self.tail = (self.tail + shown_log)[-LONGEST_TAIL:]
        sys.stdout.write(shown_log)
        sys.stdout.flush()

    def _heard(self) -> None:
        if self._failures:
            self._say("reconnected")
        self._answered, self._failures = time.monotonic(), 0

    def _pause(self, error: Exception) -> None:
        if self._failures == 0:
            self._say(f"connection lost, {self._id} continues; reconnecting ({ray_reason(error)})")
        pause = PAUSES_S[min(self._failures, len(PAUSES_S) - 1)]
        self._failures += 1
        time.sleep(pause)


def _tail(client: JobSubmissionClient, job_id: str) -> Iterator[str]:
    """The log as it grows. Raises TimeoutError when nothing comes for SILENCE_S."""
    with asyncio.Runner() as loop:
        log = client.tail_job_logs(job_id)
        try:
            while (text := loop.run(asyncio.wait_for(anext(log, None), SILENCE_S))) is not None:
                yield text
        finally:
            loop.run(log.aclose())


def _refuse_unknown(job_id: str, error: Exception) -> None:
    if "status code 404" in str(error):
        raise StageFailure(
            f"{job_id}: unknown to the cluster, whose head was replaced; the same command resumes the run (a sweep: with "
            "--resume)",
            "submit/unknown-job",
        ) from None
