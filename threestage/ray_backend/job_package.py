"""What a job is before it is submitted: its name, the variables that it expects of the cluster, the files that travel with it.
Needs no Ray and no cluster.
"""

import contextlib
import json
import os
import re
import secrets
import shlex
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from threestage.config import Config, confirmed_hosts
from threestage.data import storage
from threestage.data.storage_errors import without_secrets
from threestage.errors import InputError
from threestage.hosts import TRUSTED
from threestage.plain_text import one_line
from threestage.redaction import may_be_secret

LIMIT_BYTES = 100 * 2**20  # Ray's own, of an upload
SHOWN_FILES = 5
NEVER_TRAVEL = ".git,.venv,venv,__pycache__"  # Ray's own default
EXPECTED = "THREESTAGE_EXPECTED_ENVIRONMENT"
ENDPOINT = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
TRACKING = "MLFLOW_TRACKING_URI"
OF_STORAGE_AND_MLFLOW = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "MLFLOW_S3_ENDPOINT_URL",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "THREESTAGE_S3_ADDRESSING_STYLE",
    "THREESTAGE_S3_ANONYMOUS",
)
SECRET_NAME = re.compile(
    r"KEY|SECRET|TOKEN(?!IZE)|PASSW|PASSPHRASE|PASS(?![A-Z])|PWD|CRED|COOKIE"
    r"|(?<![A-Z])(?:O?AUTH|PAT|PRIV|PW|SAS|SIG|JWT)(?![A-Z])",
    re.IGNORECASE,
)
SECRET_FILES = re.compile(
    r"(?i)(?:^|/)(?:\.env(?:rc|\..+)?|.+\.env|env\.sh|\.?netrc|_netrc|\.pgpass|\.my\.cnf|\.htpasswd|\.git-credentials"
    r"|\.npmrc|\.pypirc|\.boto|\.s3cfg|\.?rclone\.conf|\.databrickscfg|\.dockercfg|\.passwd-s3fs|kaggle\.json|terraform\.tfvars"
    r"|\.(?:ssh|aws|azure|gcloud|kube|docker|gnupg|mlflow|huggingface)/.+|\.config/(?:gcloud|gh|rclone)/.+"
    r"|id_(?:rsa|dsa|ecdsa|ed25519)(?:_sk)?|kubeconfig(?:\..+)?"
    r"|.*(?:client_secret|service[_-]?account).*\.json|private[._-]?key(?:\.(?:json|txt))?"
    r"|(?:.*[._-])?(?:credentials?|secrets?|tokens?|passwords?)(?:\.(?:json|txt|ini|toml|csv|env))?"
    r"|(?:.*[._-])?(?:credentials?|tokens?|passwords?)\.ya?ml"  # secrets.yaml: mostly a manifest without values
    r"|.*\.(?:pem|key|p12|pfx|p8|jks|keystore|kdbx|ppk|tfstate(?:\.backup)?))$"
)
"""Names of files that usually hold credentials: paths below the working directory."""


@dataclass(frozen=True)
class Job:
    """`out`: where it writes, "" if it writes nothing; `files`: of its arguments, those that must travel with it; `config`:
    of a run or a sweep; `tracking`: it needs MLflow and its arguments do not say where that is."""

    command: str
    arguments: tuple[str, ...]
    name: str
    out: str
    files: tuple[str, ...] = ()
    config: Config | None = None
    tracking: bool = False

    @property
    def entrypoint(self) -> str:
        return shlex.join(["python", "-m", "threestage", self.command, *self.arguments])

    @property
    def metadata(self) -> dict[str, str]:
        """What the cluster keeps with the job: by `out`, the same run is known again."""
        return {"threestage.command": self.command, "threestage.name": self.name, "threestage.out": self.out}

    @property
    def needs_endpoint(self) -> bool:
        """It uses S3, and its configuration does not say where that is."""
        settings = "" if self.config is None else self.config.model_dump_json()
        return storage.S3_SCHEME in self.entrypoint + settings and not (self.config and self.config.storage.endpoint)

    def new_id(self) -> str:
        """The job's name in Ray: that of the run, and an ending that no other submission has."""
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", self.name).strip("-.")[:60]
        return f"{name or self.command}-{secrets.token_hex(3)}"


def is_shared_uri(uri: str) -> bool:
    """Whether it is the same place for every machine that shares its folders. Raises InputError for gs:// and the like."""
    storage.absolute(uri)
    return storage.is_s3(uri) or uri.startswith("/")


def job_environment(job: Job, asked: Sequence[str], here: Mapping[str, str]) -> dict[str, str]:
    """The variables of the job: the values that `asked` (NAME or NAME=VALUE) gives, and the names that the cluster must have.

    Ray shows them all, so none is a secret: raises InputError for a value that may be one. Of this process's own variables
    (`here`) only the names count: an endpoint that is set here must be set there, the others are missed with a warning.
    """
    sent, required = {}, []
    for text in asked:
        name, given, value = text.partition("=")
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise InputError(f"--env {name}: write NAME, a variable of the cluster, or NAME=VALUE", "config/usage")
        if given:
            sent[name] = _harmless(name, value)
        else:
            required.append(name)
    if job.tracking and TRACKING not in sent:
        required.append(TRACKING)
    if any(name in here for name in ENDPOINT) and job.needs_endpoint and sent.keys().isdisjoint(ENDPOINT):
        required.append("|".join(ENDPOINT))
    if job.config is not None and TRUSTED not in sent:
        sent |= _trusted(job.config)
    missed = [f"{name}?" for name in OF_STORAGE_AND_MLFLOW if name in here and name not in (*sent, *required)]
    names = list(dict.fromkeys([*required, *missed]))
    return sent | ({EXPECTED: ",".join(names)} if names else {})


def _trusted(config: Config) -> dict[str, str]:
    """The hosts that the job's file names and that are confirmed here: there, the job reads the same file."""
    hosts = confirmed_hosts(config)
    return {TRUSTED: ",".join(hosts)} if hosts else {}


def resources(text: str | None) -> dict[str, float]:
    """What a job's driver takes, from JSON such as {"driver": 1}. Raises InputError."""
    try:
        found = json.loads(text or "{}")
        return {str(name): float(amount) for name, amount in found.items()}
    except (ValueError, TypeError, AttributeError):
        fix = 'write {"NAME": AMOUNT} with a resource of the nodes for the driver'
        raise InputError(f"--entrypoint-resources {text}: {fix}", "config/usage") from None


def _harmless(name: str, value: str) -> str:
    is_digest = re.search(r"(?i)commit|sha|digest|hash|revision", name) and re.fullmatch(r"[0-9a-f]+", value)
    if SECRET_NAME.search(name) or without_secrets(value) != value or (may_be_secret(value) and not is_digest):
        raise InputError(
            f"--env {name}=…: looks like a credential, and Ray shows a job's variables in its dashboard and its logs; set "
            f"{name} in the cluster's environment (a Secret, the node's role) and give --env {name}",
            "submit/secret-variable",
        )
    return value


def check_environment(here: Mapping[str, str], warn: Callable[[str], None]) -> None:
    """On the cluster: raises InputError when a variable that the submission named is not set; warns of lesser ones."""
    for name in filter(None, here.get(EXPECTED, "").split(",")):
        names = name.rstrip("?").split("|")
        if any(one in here for one in names):
            continue
        if name.endswith("?"):
            warn(f"{names[0]} is set where this job was submitted, but not on the cluster")
            continue
        also = "" if SECRET_NAME.search(names[0]) else f", or submit with --env {names[0]}=VALUE"
        raise InputError(
            f"{' or '.join(names)}: is not set on the cluster; set it in the environment of its nodes (a Secret, the pod, the "
            f"machine){also}",
            "submit/missing-variable",
        )


# ---- The files that travel


class WorkingFiles(NamedTuple):
    """Of a working directory: path below it → bytes; and the links in it that lead out of it, which are not followed."""

    sizes: dict[str, int]
    links: list[str]


def what_travels(folder: str) -> WorkingFiles:
    """The files and links below the folder that no .gitignore or .rayignore names, read as Ray reads them."""
    from pathspec import GitIgnoreSpec

    root, found = Path(folder).absolute(), WorkingFiles({}, [])
    names = [".rayignore"]
    if os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1":
        names.append(".gitignore")

    def walk(place: Path, ignored: list[tuple[Path, GitIgnoreSpec]]) -> None:
        files = [place / name for name in names if (place / name).is_file()]
        ignored = [*ignored, *((place, GitIgnoreSpec.from_lines(file.read_text().splitlines())) for file in files)]
        for path in place.iterdir():
            if any(spec.match_file(path.relative_to(base)) for base, spec in ignored):
                continue
            name = str(path.relative_to(root))
            if path.is_symlink() and not path.resolve().is_relative_to(root.resolve()):
                found.links.append(name)
            elif path.is_dir():
                walk(path, ignored)
            elif path.is_file():
                found.sizes[name] = path.stat().st_size

    always = os.environ.get("RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES", NEVER_TRAVEL)
    walk(root, [(root, GitIgnoreSpec.from_lines(always.split(",")))])
    return found


def _code_that_travels(folder: str, sizes: Mapping[str, int]) -> list[str]:
    """The modules of a checkout, which replaces the image's threestage."""
    if "threestage/__init__.py" not in sizes:
        return []
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder, "threestage").rglob("*.py"))


def check_package(folder: str, sizes: Mapping[str, int], files: Sequence[str]) -> None:
    """Raises InputError when what would travel (path below the folder → bytes) is too much for Ray, or lacks a file that
    the job reads, or a part of the code where that travels."""
    for file in (*files, *_code_that_travels(folder, sizes)):
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise InputError(
                f"{file}: is outside the working directory {folder}, the only folder that is uploaded; copy it there and give "
                "its relative path, or give another --working-dir",
                "submit/file-outside",
            )
        if str(Path(file)) not in sizes:
            raise InputError(
                f"{file}: is excluded by a .gitignore or .rayignore in {folder}; remove the pattern (one that begins with / "
                "applies to its own folder only)",
                "submit/file-ignored",
            )
    total = sum(sizes.values())
    if total > LIMIT_BYTES:
        largest = sorted(sizes, key=lambda path: -sizes[path])[:SHOWN_FILES]
        shown = ", ".join(f"{path} ({mebibytes(sizes[path])})" for path in largest)
        raise InputError(
            f"--working-dir {folder}: {mebibytes(total)} in {len(sizes):,} files would be uploaded, Ray accepts "
            f"{mebibytes(LIMIT_BYTES)}, the largest: {shown}; list what the job does not need in {folder}/.rayignore, or "
            "give a smaller --working-dir",
            "submit/too-large",
        )


def check_secrecy(folder: str, paths: Collection[str], links: Collection[str], with_secrets: bool) -> list[str]:
    """The files (paths below the folder) that look like credentials and travel all the same, `with_secrets`.

    Raises InputError for links that lead out of the folder, and for such files.
    """
    if links:
        raise InputError(
            f"--working-dir {folder}: {_some(links)} would upload files from outside the folder; remove the link, or "
            f"list it in {folder}/.rayignore",
            "submit/link-outside",
        )
    found = sorted(path for path in paths if SECRET_FILES.search(path))
    if found and not with_secrets:
        raise InputError(
            f"--working-dir {folder}: {_some(found)} would be uploaded for everybody who can see the cluster's jobs; list "
            f"it in {folder}/.rayignore, or give --with-secrets",
            "submit/secret-file",
        )
    return found


def _some(paths: Collection[str]) -> str:
    more = f" and {len(paths) - SHOWN_FILES} more" if len(paths) > SHOWN_FILES else ""
    return ", ".join(sorted(paths)[:SHOWN_FILES]) + more


def mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


# ---- What goes with a job


class JobPackage(NamedTuple):
    """The working directory and the files of it that travel, a wheel, variables, and the resources, in Ray's names, that the
    job's driver takes (none: it runs on the head)."""

    folder: str
    wheel: str | None = None
    variables: Mapping[str, str] = MappingProxyType({})
    resources: Mapping[str, float] = MappingProxyType({})
    files: Collection[str] = ()


@contextlib.contextmanager
def copied_files(folder: str, files: Collection[str]) -> Iterator[str]:
    """A folder that holds these files of another and nothing else: what travels is what was checked."""
    with tempfile.TemporaryDirectory() as copy:
        for file in files:
            target = Path(copy, file)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(Path(folder, file), target)
        yield copy


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
                f"--wheel {wheel}: {one_line(error)[:300]}; give a .whl file that `pip wheel` made", "submit/wheel"
            ) from None
        yield str(Path(folder, "threestage"))


def _unpack(archive: zipfile.ZipFile, wheel: str, folder: str) -> None:
    members = [info for info in archive.infolist() if info.filename.startswith("threestage/")]
    if not any(info.filename == "threestage/__main__.py" for info in members):
        raise InputError(
            f"--wheel {wheel}: contains no threestage that can be submitted; build it again", "submit/wheel"
        )
    size = sum(info.file_size for info in members)
    if size > LIMIT_BYTES:
        raise InputError(
            f"--wheel {wheel}: {mebibytes(size)}, Ray accepts {mebibytes(LIMIT_BYTES)}", "submit/too-large"
        )
    archive.extractall(folder, members)
