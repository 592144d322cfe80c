"""Inputs that would send credentials away, or show them."""

import os
from pathlib import Path
from unittest import mock

from tests.bad_inputs import BadInput, refused, threestage

ENVIRONMENT = {
    "MLFLOW_TRACKING_PASSWORD": "x",
    "MLFLOW_TRACKING_URI": "",
    "THREESTAGE_TRUSTED_HOSTS": "",
    "AWS_ENDPOINT_URL": "",
}


def _run(folder: Path, settings: str) -> str:
    file = folder / "other.yaml"
    file.write_text(f"base: own_images\ndata: {{root: {folder}/data}}\n{settings}\n")
    with mock.patch.dict(os.environ, ENVIRONMENT):
        return refused(threestage("run", file, "--out", folder / "run"))


def _mlflow_of_a_configuration(folder: Path) -> str:
    return _run(folder, 'registry: {tracking_uri: "http://127.0.0.1:9"}')


def _store_of_a_configuration(folder: Path) -> str:
    return _run(folder, 'storage: {endpoint: "http://127.0.0.1:9"}')


def _cluster_of_a_configuration(folder: Path) -> str:
    return _run(folder, 'cluster: {address: "127.0.0.1:9"}')


def _mlflow_of_a_run_folder(folder: Path) -> str:
    (folder / "split.json").write_text('{"split": {}}')
    (folder / "config.json").write_text('{"name": "x", "registry": {"tracking_uri": "http://127.0.0.1:9"}}')
    with mock.patch.dict(os.environ, ENVIRONMENT):
        return refused(threestage("sync", folder))


def _submit(folder: Path, *options: str) -> str:
    run = ("run", "demo", "--set", "data.root=s3://bucket/data", "--out", "s3://bucket/run", "--working-dir", folder)
    return refused(threestage("submit", *run, *options))


def _link_out_of_the_working_directory(folder: Path) -> str:
    (folder / "link").symlink_to(Path.home())
    return _submit(folder)


def _key_in_the_working_directory(folder: Path) -> str:
    (folder / "server.pem").write_text("x")
    return _submit(folder)


def _token_as_a_variable(folder: Path) -> str:
    return _submit(folder, "--env", "MY_SETTING=ghp_0123456789abcdef")


NOT_CONFIRMED = "refused [hosts/not-confirmed]"
BAD_INPUTS = [
    BadInput("a configuration that names an MLflow server", NOT_CONFIRMED, _mlflow_of_a_configuration),
    BadInput("a configuration that names an S3 endpoint", NOT_CONFIRMED, _store_of_a_configuration),
    BadInput("a configuration that names a Ray cluster", NOT_CONFIRMED, _cluster_of_a_configuration),
    BadInput("`sync` of a run folder that names an MLflow server", NOT_CONFIRMED, _mlflow_of_a_run_folder),
    BadInput(
        "`submit` of a folder with a link out of it",
        "refused [submit/link-outside]",
        _link_out_of_the_working_directory,
    ),
    BadInput("`submit` of a folder with a private key", "refused [submit/secret-file]", _key_in_the_working_directory),
    BadInput("`submit --env` with a token as value", "refused [submit/secret-variable]", _token_as_a_variable),
]
