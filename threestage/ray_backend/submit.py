"""Submit a job to a cluster's job API, follow its log through lost connections, end as it ended."""

import asyncio
import contextlib
import logging
import os
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import aiohttp
import requests
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import _dir_travel, _get_excludes
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from threestage.errors import InputError, StageFailure
from threestage.plain_text import one_line as shown
from threestage.plain_text import visible_log
from threestage.ray_backend.connect import TOKEN
from threestage.ray_backend.job_package import LIMIT_BYTES, Job, mebibytes

CONNECT_S, ANSWER_S = 5.0, 30.0
SILENCE_S = 60.0  # without a word of the job: it is asked whether it lives, and its log is opened anew
PATIENCE_S = 600.0  # without an answer of the cluster
PAUSES_S = (1.0, 2.0, 5.0, 10.0, 30.0)
OVER = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)
STOPPED, DETACHED, LOST = (
    143,
    130,
    75,
)  # exit codes beside the job's own: as after SIGTERM, as after Ctrl-C, EX_TEMPFAIL
NOISY_LOGGERS = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.runtime_env")
NO_CONNECTION = (requests.RequestException, aiohttp.ClientError, OSError, RuntimeError)  # the last: an answer of 5xx

ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")

Say = Callable[[str], None]


class Client(JobSubmissionClient):
    """Ray's, whose requests wait for an answer for ever, with deadlines."""

    def _do_request(self, method: str, endpoint: str, **given: Any) -> Any:
        return super()._do_request(method, endpoint, **{"timeout": (CONNECT_S, ANSWER_S), **given})


def job_client(address: str | None) -> Client:
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
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        return Client(url)
    except (requests.RequestException, ConnectionError) as error:
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
        return InputError(f"{url}: wants a token, and none was found; {TOKEN}", "ray/no-token")
    if "404" in text or "ersion" in text:
        return InputError(
            f"{url}: answers, but not as Ray's job API ({ray_reason(error)}); correct the address", "ray/other-service"
        )
    return StageFailure(f"{url}: {ray_reason(error)}", "ray/job-api")


def ray_reason(text: object) -> str:
    """What Ray says, for the end of a line."""
    return shown(text)[:300]


# ---- What travels with a job


class WorkingFiles(NamedTuple):
    """What Ray would upload of a working directory: path below it → bytes; and the links in it that lead out of it, which
    are not followed."""

    sizes: dict[str, int]
    links: list[str]


def working_files(folder: str) -> dict[str, int]:
    """The files below the folder, and their bytes, of `what_travels`."""
    return what_travels(folder).sizes


def what_travels(folder: str) -> WorkingFiles:
    """The files and links below the folder. Ray's ignore files and defaults are honoured."""
    root, found = Path(folder).absolute(), WorkingFiles({}, [])
    real = root.resolve()

    def note(path: Path) -> None:
        if path.is_file():
            found.sizes[str(path.relative_to(root))] = path.stat().st_size

    def leads_out(path: Path) -> bool:
        if path == root or not path.is_symlink() or path.resolve().is_relative_to(real):
            return False
        if not any(excluded(path) for excluded in excludes if excluded is not leads_out):
            found.links.append(str(path.relative_to(root)))
        return True

    with_gitignore = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1"
    quiet = logging.getLogger("threestage.quiet")
    quiet.setLevel(logging.ERROR)
    excludes = [_get_excludes(root, get_runtime_env_default_excludes()), leads_out]
    _dir_travel(root, excludes, note, include_gitignore=with_gitignore, logger=quiet)
    return found


@contextlib.contextmanager
def unpacked_wheel(wheel: str) -> Iterator[str]:
    """A wheel's package as a folder. Ray would install the wheel with all that it depends on, torch and Ray itself, into a
    folder of the job's; this way these stay the image's.

    Raises InputError when it is no wheel of ours, or too much for Ray.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(wheel) as archive:
                _unpack(archive, wheel, folder)
        except (OSError, zipfile.BadZipFile) as error:
            raise InputError(
                f"--wheel {wheel}: {ray_reason(error)}; give a .whl file that `pip wheel` made", "submit/wheel"
            ) from None
        yield str(Path(folder, "threestage"))


def _unpack(archive: zipfile.ZipFile, wheel: str, folder: str) -> None:
    members = [info for info in archive.infolist() if info.filename.startswith("threestage/")]
    if not any(info.filename == "threestage/__main__.py" for info in members):
        raise InputError(
            f"--wheel {wheel}: it holds no threestage that can be submitted; build it again", "submit/wheel"
        )
    size = sum(info.file_size for info in members)
    if size > LIMIT_BYTES:
        raise InputError(f"--wheel {wheel}: {mebibytes(size)}, Ray takes {mebibytes(LIMIT_BYTES)}", "submit/too-large")
    archive.extractall(folder, members)


# ---- Submit a job and follow it


class JobPackage(NamedTuple):
    """What goes with a job: the working directory, a wheel, variables, and the resources, in Ray's names, that its driver
    takes (none: it runs on the head)."""

    folder: str
    wheel: str | None = None
    variables: Mapping[str, str] = MappingProxyType({})
    resources: Mapping[str, float] = MappingProxyType({})


def submit(client: Client, job: Job, shipment: JobPackage, say: Say) -> str:
    """The id of the job: that of a new one or, where the cluster works on the same run already, of that one.

    Raises InputError when it works on that run with other arguments.
    """
    url = client.get_address()
    try:
        running = _running(client, job)
        if running is not None:
            say(f"{running} works on {job.out} already: following it, nothing was submitted")
            return running
        environment: dict[str, Any] = {"working_dir": shipment.folder, "env_vars": dict(shipment.variables)}
        with contextlib.ExitStack() as stack:
            if shipment.wheel is not None:
                environment["py_modules"] = [stack.enter_context(unpacked_wheel(shipment.wheel))]
            return str(
                client.submit_job(
                    entrypoint=job.entrypoint,
                    submission_id=job.new_id(),
                    runtime_env=environment,
                    metadata=job.metadata,
                    entrypoint_resources=dict(shipment.resources) or None,
                )
            )
    except (requests.RequestException, AuthenticationError, RuntimeError) as error:
        raise _explained(url, error) from None


def _running(client: Client, job: Job) -> str | None:
    """The unfinished job that works on the same folder."""
    for other in client.list_jobs() if job.out else ():
        if other.status not in OVER and (other.metadata or {}).get("threestage.out") == job.out:
            if other.entrypoint != job.entrypoint:
                raise InputError(
                    f"--out {job.out}: {other.submission_id} works on it with other arguments ({other.entrypoint}); wait for it, "
                    f"stop it (ray job stop --address {client.get_address()} {other.submission_id}), or give another --out",
                    "submit/other-arguments",
                )
            return str(other.submission_id)
    return None


def commands(url: str, job_id: str) -> str:
    """How to go on without this process."""
    lines = (f"ray job {verb} --address {url} {job_id}" for verb in ("logs --follow", "status", "stop"))
    return "\n".join(f"  {line}" for line in lines)


def follow(client: Client, job_id: str, say: Say) -> int:
    """Print the job's log until it ends; its exit code, or STOPPED, DETACHED after Ctrl-C, LOST when the cluster has not
    answered for PATIENCE_S. InputError when it does not take the token any more."""
    url = client.get_address()
    try:
        ended = asyncio.run(_Log(client, job_id, say).follow())
    except AuthenticationError as error:  # a cluster made anew has another token
        raise _explained(url, error) from None
    except KeyboardInterrupt:
        say(f"detached: {job_id} goes on; the same command follows it again, and so does\n{commands(url, job_id)}")
        return DETACHED
    if ended is None:
        say(f"{url} has not answered for {PATIENCE_S / 60:.0f} minutes; {job_id} may go on:\n{commands(url, job_id)}")
        return LOST
    return _exit_code(ended, say)


def _exit_code(ended: JobDetails, say: Say) -> int:
    if ended.status == JobStatus.SUCCEEDED:
        return 0
    if ended.status == JobStatus.STOPPED:
        say(f"{ended.submission_id} was stopped; the same command goes on with it, a sweep with --resume")
        return STOPPED
    if ended.driver_exit_code is None:
        say(f"{ended.submission_id} failed: {ray_reason(ended.message)}")
    return ended.driver_exit_code if ended.driver_exit_code in (1, 2) else 1


class _Log:
    """The log of a job. It is sent from its beginning whenever it is opened: `_printed` characters of it are left out."""

    def __init__(self, client: Client, job_id: str, say: Say) -> None:
        self._client, self._id, self._say = client, job_id, say
        self._printed = 0
        self._answered = time.monotonic()
        self._failures = 0

    async def follow(self) -> JobDetails | None:
        """The job when it is over; None after PATIENCE_S without an answer. Raises StageFailure when the cluster does not know
        it."""
        while time.monotonic() - self._answered < PATIENCE_S:
            problem = await self._print()
            try:
                details = await asyncio.to_thread(self._client.get_job_info, self._id)
            except NO_CONNECTION as error:
                _refuse_unknown(self._id, error)
                await self._pause(error)
                continue
            self._answered = time.monotonic()
            if details.status in OVER:
                await self._print_rest()
                return details
            if details.status == JobStatus.PENDING:
                self._say(f"{self._id} waits: {ray_reason(details.message)}")
            if problem is not None:
                await self._pause(problem)
        return None

    async def _print(self) -> Exception | None:
        """Until the log ends, or nothing comes for SILENCE_S, or the connection is lost: then, why."""
        seen = 0
        log = self._client.tail_job_logs(self._id)
        try:
            while True:
                text = await asyncio.wait_for(anext(log), SILENCE_S)
                new = text[max(0, self._printed - seen) :]
                seen += len(text)
                self._printed = max(self._printed, seen)
                self._heard()
                sys.stdout.write(visible_log(new))
                sys.stdout.flush()
        except (StopAsyncIteration, TimeoutError):
            return None
        except NO_CONNECTION as error:
            return error
        finally:
            await log.aclose()

    async def _print_rest(self) -> None:
        """What a connection that broke off has left out."""
        with contextlib.suppress(*NO_CONNECTION, AuthenticationError):
            text = await asyncio.to_thread(self._client.get_job_logs, self._id)
            sys.stdout.write(visible_log(text[self._printed :]))
            sys.stdout.flush()

    def _heard(self) -> None:
        if self._failures:
            self._say("connected again")
        self._answered, self._failures = time.monotonic(), 0

    async def _pause(self, error: Exception) -> None:
        if self._failures == 0:
            self._say(f"the connection is lost, {self._id} goes on; connecting again ({ray_reason(error)})")
        pause = PAUSES_S[min(self._failures, len(PAUSES_S) - 1)]
        self._failures += 1
        await asyncio.sleep(pause)


def _refuse_unknown(job_id: str, error: Exception) -> None:
    if "status code 404" in str(error):
        raise StageFailure(
            f"{job_id}: the cluster does not know it any more, its head has been replaced; the same command continues the run, "
            "a sweep with --resume",
            "submit/unknown-job",
        ) from None
