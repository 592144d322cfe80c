"""`threestage submit COMMAND …`: the command line of `ray_backend/submit.py`."""

import os
import sys
from typing import Annotated, Any

import typer

from threestage.errors import InputError
from threestage.plain_text import escape_control_chars

TEXT = """Run a command as a job on a cluster, and follow it.

`threestage submit run camvid --set … --out s3://bucket/run --address http://127.0.0.1:8265`: give the command's own arguments
(`threestage run --help`) and, anywhere after its name, the options below. Paths are relative to --working-dir.

Files: the working directory is uploaded, without what .gitignore and .rayignore list; 100 MiB at most. Links that lead out of
it are refused. So are files that look like credentials, unless you give --with-secrets. The code is that of the cluster's
image, or of --wheel.

Variables: none are sent. Storage and MLflow use the credentials of the nodes (a Secret, the node's role). --env NAME fails the
job if the cluster lacks NAME; --env NAME=VALUE sends a value. Send no secret: Ray's dashboard shows it. The cluster needs its own
S3 endpoint if one is set here, and MLFLOW_TRACKING_URI unless registry.tracking_uri is given. Missing credentials are a warning.

Token: RAY_AUTH_MODE=token with RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN.

Repeat the command to follow a running job or to resume the run. Ctrl-C detaches; the job continues. --retries N repeats the
command, after a pause, if the job was killed or the cluster or a store failed. It does not after wrong input, a stage that
diverged, or an --out that takes no writes.
--on-failure URL and --on-success URL post JSON about the job's end, without secrets. Keep the command running: it posts.

Exit code: 0 succeeded, 1, 2 or 3 as the command itself, 143 the job was stopped, 130 detached, 75 the cluster was lost.
"""

HELP = "\n\n".join(" ".join(paragraph.split()) for paragraph in TEXT.split("\n\n"))

app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode=None)

Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="URL",
        help="URL of the cluster's dashboard; default: RAY_API_SERVER_ADDRESS, or a URL in RAY_ADDRESS",
    ),
]
WorkingDir = Annotated[str, typer.Option("--working-dir", metavar="DIR", help="folder to upload with the job")]
Wheel = Annotated[
    str | None,
    typer.Option(
        "--wheel",
        metavar="FILE",
        help="wheel of threestage to use instead of the image's; its dependencies stay the image's",
    ),
]
Env = Annotated[
    list[str] | None,
    typer.Option(
        "--env", metavar="NAME[=VALUE]", help="variable that the cluster must have, or with a value: variable to send"
    ),
]
Resources = Annotated[
    str | None,
    typer.Option(
        "--entrypoint-resources", metavar="JSON", help='resources of the node for the driver, e.g. {"driver": 1}'
    ),
]
WithSecrets = Annotated[
    bool, typer.Option("--with-secrets", help="also upload files that look like credentials (.env, *.pem, token, …)")
]
Retries = Annotated[
    int,
    typer.Option(min=0, help="maximum number of times to resubmit a failed job that can resume"),
]
OnFailure = Annotated[
    str | None, typer.Option("--on-failure", metavar="URL", help="URL to post JSON to when the job has failed for good")
]
OnSuccess = Annotated[
    str | None, typer.Option("--on-success", metavar="URL", help="URL to post JSON to when the job has succeeded")
]
NoWait = Annotated[bool, typer.Option("--no-wait", help="print the job's id and exit")]


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
    on_failure: OnFailure = None,
    on_success: OnSuccess = None,
) -> None:
    watching = {"--retries": retries, "--on-failure": on_failure, "--on-success": on_success}
    if no_wait and (option := next((name for name, value in watching.items() if value), None)):
        raise InputError(f"{option}: cannot watch a job with --no-wait; leave --no-wait out", "config/usage")
    from threestage.cli.job_arguments import read_job
    from threestage.ray_backend import job_package
    from threestage.ray_backend.webhook import Webhooks

    webhooks = Webhooks(on_failure, on_success)
    webhooks.check()
    commands: Any = context.find_root().command
    job = read_job(str(context.info_name), context.args, working_dir, commands.commands)
    variables = job_package.job_environment(job, env or [], os.environ)
    resources = job_package.resources(entrypoint_resources)
    sizes, links = job_package.what_travels(working_dir)
    secret = job_package.check_secrecy(working_dir, sizes, links, with_secrets)
    job_package.check_package(working_dir, sizes, job.files)
    for path in secret:
        _say(f"warning: {path} looks like a credential and is uploaded with the job")
    from threestage.ray_backend import submit

    client = submit.job_client(address)
    _say(_what_travels(working_dir, sizes, wheel))
    package = job_package.JobPackage(working_dir, wheel, variables, resources, sizes)
    if not no_wait:
        sys.exit(submit.submit_and_follow(client, job, package, _say, retries, webhooks))
    job_id = submit.submit(client, job, package, _say)
    _say(f"job {job_id} on {client.get_address()}\nto follow it:\n{submit.commands(client.get_address(), job_id)}")
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
