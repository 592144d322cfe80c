"""The job that a command's arguments ask for: read by the command's own parser, checked as the command itself would."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from threestage.config import Config, load, refuse_unconfirmed_hosts
from threestage.data import storage
from threestage.data.storage_errors import without_secrets
from threestage.errors import InputError
from threestage.ray_backend.job_package import (
    Job,
    is_shared_uri,
)
from threestage.redaction import may_be_secret
from threestage.run.budget import parse as parse_budget


def read_job(command: str, arguments: Sequence[str], folder: str, commands: Mapping[str, Any]) -> Job:
    """The job that a command's arguments ask for, as they will be read there: with `folder` as the working directory.

    Raises InputError on what the command would refuse, and on what a cluster cannot do: write into its copy of the folder,
    read a file that does not travel. A wrong option ends the process as it does for the command itself. `commands`: name of
    a command → its parser.
    """
    if not Path(folder).is_dir():
        raise InputError(f"--working-dir {folder}: no such folder", "storage/not-found")
    for argument in arguments:
        if without_secrets(argument) != argument or may_be_secret(argument.rpartition("=")[2]):
            raise InputError(
                f"{without_secrets(argument)}: is a credential, and Ray's dashboard shows the arguments of a job; leave it "
                "out, and set it in the cluster's environment",
                "submit/secret-setting",
            )
    with contextlib.chdir(folder):
        given = _parsed(command, arguments, commands)
        if given.get("local"):
            raise InputError("--local: a job runs on Ray; leave --local out", "config/usage")
        for option in INPUTS:
            is_shared_uri(given.get(option) or ".")
        return READERS[command](tuple(arguments), given)


def _parsed(command: str, arguments: Sequence[str], commands: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the command's parameters, by the command's own parser."""
    return dict(commands[command].make_context(f"threestage submit {command}", list(arguments)).params)


def _run(arguments: tuple[str, ...], given: Mapping[str, Any]) -> Job:
    seed = [] if given["seed"] is None else [f"seed={given['seed']}"]
    config = load(given["config"], [*(given["overrides"] or []), *seed])
    for option in ("reuse", "continue_from"):
        if given[option] is not None:
            _reachable(f"--{option.replace('_', '-')}", given[option])
    if given["budget"] is not None:
        parse_budget(given["budget"])
    out = _reachable("--out", given["out"])
    _refuse_what_travels(config)
    return Job("run", arguments, config.name, out, _yaml(given["config"]), config, not config.registry.tracking_uri)


def _sweep(arguments: tuple[str, ...], given: Mapping[str, Any]) -> Job:
    from threestage.sweeps.space import check_space, load_space

    config, space = load(given["config"], given["overrides"] or []), load_space(given["space"])
    check_space(space, config)
    _refuse_what_travels(config)
    out = "" if given["dry_run"] else _reachable("--out", given["out"])
    files = (*_yaml(given["config"]), *_yaml(given["space"]))
    return Job("sweep", arguments, f"{config.name}-sweep", out, files, config, not config.registry.tracking_uri)


def _ingest(arguments: tuple[str, ...], given: Mapping[str, Any]) -> Job:
    out, class_map = _reachable("OUT", given["out"]), given["class_map"]
    files = () if class_map is None or is_shared_uri(class_map) else (class_map,)
    return Job("ingest", arguments, f"ingest-{given['name'] or _last(out)}", out, files)


def _predict(arguments: tuple[str, ...], given: Mapping[str, Any]) -> Job:
    out = _reachable("OUT", given["out"])
    return Job("predict", arguments, f"predict-{_last(out)}", out, tracking=_needs_registry(given))


def _evaluate(arguments: tuple[str, ...], given: Mapping[str, Any]) -> Job:
    out = "" if given["out"] is None else _reachable("--out", given["out"])
    return Job("evaluate", arguments, f"evaluate-{_last(given['model'])}", out, tracking=_needs_registry(given))


INPUTS = ("source", "masks", "class_map", "images", "dataset", "reuse", "continue_from")
READERS: dict[str, Callable[[tuple[str, ...], Mapping[str, Any]], Job]] = {
    "run": _run,
    "sweep": _sweep,
    "ingest": _ingest,
    "predict": _predict,
    "evaluate": _evaluate,
}


def _needs_registry(given: Mapping[str, Any]) -> bool:
    return given["model"].startswith("models:/") and given["tracking_uri"] is None


def _last(uri: str) -> str:
    return uri.rstrip("/").rsplit("/", 1)[-1]


def _reachable(option: str, uri: str | None) -> str:
    """Where a job may write: a path below its own copy of the working directory is deleted with that."""
    if uri is None or not is_shared_uri(uri):
        what = (
            f"{option}: is not given"
            if uri is None
            else f"{option} {uri}: is in the job's copy of the working directory, which Ray deletes"
        )
        raise InputError(
            f"{what}; give s3://bucket/prefix, or an absolute path that all nodes share", "submit/unshared-place"
        )
    return storage.absolute(uri)


def _refuse_what_travels(config: Config) -> None:
    """A run remembers where its images and first weights lay, and each job has its copy of the working directory elsewhere.
    A host that only a file names would get the cluster's credentials."""
    refuse_unconfirmed_hosts(config, on_cluster=True)
    places = {"data.root": config.data.root, "data.unlabelled": config.data.unlabelled}
    for key, place in {**places, "network.weights": config.network.weights}.items():
        if place is not None and not is_shared_uri(place):
            raise InputError(
                f"{key}={place}: is in the job's copy of the working directory, so the next job could not resume the run; "
                "give s3://bucket/…, or an absolute path that all nodes share"
                + (", or network.pretrained=true" if key == "network.weights" else ""),
                "submit/unshared-place",
            )


def _yaml(source: str) -> tuple[str, ...]:
    """The file behind a preset's, a space's or a file's name, unless it ships."""
    return (source,) if Path(source).is_file() else ()
