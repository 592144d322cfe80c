"""`threestage submit COMMAND …`: the command line of `ray_backend/submit.py`."""

import os
import sys
from typing import Annotated, Any

import typer

from threestage.errors import InputError
from threestage.plain_text import escape_control_chars

TEXT = """Run a command as a job on a cluster, and follow it.

`threestage submit run camvid --set … --out s3://bucket/run --address http://127.0.0.1:8265`: the options below may stand
anywhere after the command; all else is the command's own (`threestage run --help`), read as in --working-dir.

The working directory travels (less what .gitignore and .rayignore name; 100 MiB at most). Links that lead out of it are
refused, and so are files that look like credentials, unless --with-secrets is given. The code is that of the
cluster's image, or --wheel. Of the environment nothing travels: storage and MLflow are reached there with what the nodes
have (a Secret, the node's role). --env NAME makes sure that NAME is set there, --env NAME=VALUE sends a value that is
no secret, such as an endpoint: Ray shows it in its dashboard. An S3 endpoint that is set here must be set there, and so
must MLFLOW_TRACKING_URI unless registry.tracking_uri is given; credentials are missed with a warning.

The token is Ray's: RAY_AUTH_MODE=token with RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN.

The same command, given again, follows the job that runs, or continues the run. Ctrl-C detaches; the job goes on.
--retries N gives it again by itself, after a pause, where the job was killed or the cluster or a store failed; not after
wrong input, a stage that diverged, or an --out that takes no writes.

Exit code: 0 succeeded, 1 or 2 as the command itself, 143 the job was stopped, 130 detached, 75 the cluster was lost.
"""

HELP = "\n\n".join(" ".join(paragraph.split()) for paragraph in TEXT.split("\n\n"))

app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode=None)

Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="URL",
        help="Of the cluster's dashboard; RAY_API_SERVER_ADDRESS, or a URL in RAY_ADDRESS, if not given.",
    ),
]
WorkingDir = Annotated[str, typer.Option("--working-dir", metavar="DIR", help="What travels with the job.")]
Wheel = Annotated[
    str | None,
    typer.Option(
        "--wheel", metavar="FILE", help="Of threestage, in place of the image's; what it needs is the image's."
    ),
]
Env = Annotated[
    list[str] | None, typer.Option("--env", metavar="NAME[=VALUE]", help="The cluster must have it, or: is sent.")
]
Resources = Annotated[
    str | None,
    typer.Option("--entrypoint-resources", metavar="JSON", help='Of the node for its driver, e.g. {"driver": 1}.'),
]
WithSecrets = Annotated[
    bool, typer.Option("--with-secrets", help="send files that look like credentials too (.env, *.pem, token, …)")
]
Retries = Annotated[
    int,
    typer.Option(min=0, help="Submit a job again that can continue, at most so many times."),
]
NoWait = Annotated[bool, typer.Option("--no-wait", help="Print the job's id and end.")]


def _submit(
    context: typer.Context,
    address: Address = None,
    working_dir: WorkingDir = ".",
    wheel: Wheel = None,
    env: Env = None,
    entrypoint_resources: Resources = None,
    with_secrets: WithSecrets = False,
    no_wait: NoWait = False,
    retries: Retries = 0,
) -> None:
    if no_wait and retries:
        raise InputError("--retries: somebody must see the job fail; leave --no-wait out", "config/usage")
    from threestage.cli.job_arguments import read_job
    from threestage.ray_backend import job_package

    commands: Any = context.find_root().command
    job = read_job(str(context.info_name), context.args, working_dir, commands.commands)
    variables = job_package.job_environment(job, env or [], os.environ)
    resources = job_package.resources(entrypoint_resources)
    sizes, links = job_package.what_travels(working_dir)
    secret = job_package.check_secrecy(working_dir, sizes, links, with_secrets)
    job_package.check_package(working_dir, sizes, job.files)
    for path in secret:
        _say(f"warning: {path} looks like a credential and travels with the job")
    from threestage.ray_backend import submit

    client = submit.job_client(address)
    _say(_what_travels(working_dir, sizes, wheel))
    package = job_package.JobPackage(working_dir, wheel, variables, resources, sizes)
    if not no_wait:
        sys.exit(submit.submit_and_follow(client, job, package, _say, retries))
    job_id = submit.submit(client, job, package, _say)
    _say(f"job {job_id} on {client.get_address()}\nto go on with it:\n{submit.commands(client.get_address(), job_id)}")
    print(job_id)


def _what_travels(folder: str, sizes: dict[str, int], wheel: str | None) -> str:
    from threestage.ray_backend.job_package import mebibytes

    files = "1 file" if len(sizes) == 1 else f"{len(sizes):,} files"
    code = f"wheel {wheel}" if wheel else "the image's threestage"
    own = "; threestage/ in it is the code that runs" if "threestage/__init__.py" in sizes else f"; code: {code}"
    return f"{folder}: {files}, {mebibytes(sum(sizes.values()))}{own}"


def _say(text: str) -> None:
    print(escape_control_chars(text), file=sys.stderr, flush=True)


PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
EXAMPLES = {
    "run": "run camvid --set data.root=s3://bucket/data --set network.weights=s3://bucket/mobilenetv2_100.pth --out s3://bucket/run",
    "sweep": "sweep thresholds mine.yaml --out s3://bucket/sweep",
    "ingest": "ingest s3://bucket/photos s3://bucket/data --format images",
    "predict": "predict models:/camvid@champion s3://bucket/photos s3://bucket/masks",
    "evaluate": "evaluate models:/camvid@champion s3://bucket/data --split test",
}
for _name, _example in EXAMPLES.items():
    _text = f"Submit `threestage {_name}`.\n\n{HELP}\n\nExample: threestage submit {_example}"
    app.command(_name, context_settings=PASSED_ON, help=_text)(_submit)
