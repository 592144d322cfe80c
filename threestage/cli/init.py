"""A new project as a folder: a configuration and a class map; for a cluster also a search space, jobs and cluster files."""

import os
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import threestage
from threestage.data import storage
from threestage.errors import InputError

TEMPLATES = {  # in threestage/project/
    "README.md": "README.md",
    "config.yaml": "config.yaml",
    "classes.yaml": "classes.yaml",
    "gitignore": ".gitignore",
}
OF_CLUSTERS = {"rayignore": ".rayignore"}
COPIES = {
    "tune/thresholds_and_weights.yaml": "sweep.yaml",
    "constraints.txt": "constraints.txt",
    ".dockerignore": ".dockerignore",
}
FOLDERS = ("jobs", "cluster")


def write_project(folder: str, cluster: bool = False) -> list[str]:
    """Write a new project into a folder, which is made if it is not there; returns the paths of the new files below it.

    cluster: also what a cluster needs; the files of a project that is there already stay then.
    Raises InputError, before anything is written, when one of the files exists.
    """
    root = storage.path_here(folder, "a project")
    files = dict(_templates(TEMPLATES, project_name(folder)))
    if cluster:
        files = {path: content for path, content in files.items() if not os.path.lexists(root / path)}
        files |= dict(_templates(OF_CLUSTERS, project_name(folder))) | dict(_shipped())
    _refuse_taken(root, files)
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        with (root / path).open("xb") as file:
            file.write(content)
    return list(files)


def project_name(folder: str) -> str:
    """A name for runs and models from that of the folder."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(folder).resolve().name)
    return name.strip("-_.") or "mine"


def summary(paths: Iterable[str]) -> list[str]:
    """A line per file; a folder is one."""
    counts = Counter(path.split("/")[0] + "/" * ("/" in path) for path in paths)
    return [f"{name} ({count} files)" if name.endswith("/") else name for name, count in counts.items()]


def next_commands(folder: str) -> list[str]:
    """The first commands of the project's README."""
    return [
        f"  cd {shlex.quote(folder)}   # edit classes.yaml and config.yaml",
        f"  threestage ingest images data/{project_name(folder)} --masks masks --class-map classes.yaml",
        "  threestage check config.yaml",
        "  threestage run config.yaml   # README.md has the next steps",
    ]


def _templates(templates: Mapping[str, str], name: str) -> Iterator[tuple[str, bytes]]:
    """Path below the project and content."""
    folder = Path(threestage.__file__).resolve().parent / "project"
    for source, path in templates.items():
        yield path, (folder / source).read_bytes().replace(b"PROJECT", name.encode())


def _shipped() -> Iterator[tuple[str, bytes]]:
    """The same of the files that are copied as they are."""
    shipped = shipped_folder()
    for source, path in COPIES.items():
        yield path, (shipped / source).read_bytes()
    for folder in FOLDERS:
        for file in sorted((shipped / folder).rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                yield file.relative_to(shipped).as_posix(), file.read_bytes()


def shipped_folder() -> Path:
    """Where jobs/, tune/ and cluster/ lie: in the wheel, or in a checkout beside the package."""
    package = Path(threestage.__file__).resolve().parent
    folders = (package / "_shipped", package.parent)
    for folder in folders:
        if all((folder / source).is_file() for source in COPIES):
            return folder
    raise InputError(
        f"{folders[0]}: lacks the files of a project; install threestage from its wheel again",
        "init/incomplete-install",
    )


def _refuse_taken(root: Path, paths: Iterable[str]) -> None:
    """For the files, and for what stands where one of their folders would be."""
    for path in paths:
        file = root / path
        blocked = (above for above in file.parents if os.path.lexists(above) and not above.is_dir())
        if taken := file if os.path.lexists(file) else next(blocked, None):
            raise InputError(
                f"{taken}: exists already and would be overwritten; move it, or give another folder", "init/exists"
            )
