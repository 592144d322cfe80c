"""What a run has left: report, sync, clean."""

import re
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Table

from threestage.cli.models import show_version
from threestage.cli.options import JsonOption, TrackingOption, console, counter, escape, print_json, warn
from threestage.errors import InputError


def report(
    run: Annotated[str, typer.Argument(help="The folder of a run, finished or not.")],
    images: Annotated[int, typer.Option("--images", min=1, help="How many validation images to show.")] = 9,
    out: Annotated[
        str | None, typer.Option("--out", metavar="FILE", help="The page; RUN/report.html if not set.")
    ] = None,
    measure: Annotated[
        int | None,
        typer.Option("--measure", min=1, help="Measure on so many validation images; all of them, but fewer on a CPU."),
    ] = None,
    data: Annotated[str | None, typer.Option("--data", metavar="URI", help="The data set, if it has moved.")] = None,
    tracking_uri: Annotated[str | None, typer.Option(help="Of MLflow; the run's if not set.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare a run's stages on one HTML page: pictures, curves, calibration, pseudo-masks. Works for unfinished runs too.

    Example: threestage report runs/demo-0 --images 12
    """
    from threestage.report.report import write_report
    from threestage.report.run_reader import log_page

    with console.status("reading the run") as status:
        page = write_report(run, out, images, measure, data, counter(status, "measured"))
    problem = log_page(run, page.uri, page.finished, tracking_uri)
    for text in (*page.missing, *([] if problem is None else [problem])):
        warn(text)
    if as_json:
        print_json({"page": page.uri, "bytes": page.size, "missing": page.missing})
        return
    console.print(f"report: {page.uri} ({page.size / 1e6:.1f} MB)", highlight=False, markup=False, soft_wrap=True)


def sync(
    run: Annotated[str, typer.Argument(help="The folder of a run, finished or not, of --local too.")],
    tracking_uri: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Send MLflow what a run's folder holds and MLflow does not: metrics, models, report. For a store that was away.

    Example: threestage sync runs/demo-0 --tracking-uri http://mlflow:5000
    """
    from threestage.mlflow_sync.run_sync import sync as sync_run

    with console.status("sending"):
        versions = sync_run(run, tracking_uri, warn)
    if as_json:
        print_json([asdict(version) for version in versions])
        return
    for version in versions:
        show_version(asdict(version))
    if not versions:
        console.print("no stage is finished yet; what its checkpoints hold is sent", highlight=False)


def clean(
    run: Annotated[str, typer.Argument(help="The folder of a run.")],
    everything: Annotated[
        bool, typer.Option("--all", help="All that the run wrote: models, results and pseudo-masks too.")
    ] = False,
    pseudo_masks: Annotated[
        bool, typer.Option("--pseudo-masks", help="The pseudo-masks too that no stage needs any more.")
    ] = False,
    older_than: Annotated[
        str | None,
        typer.Option(
            "--older-than", metavar="30d", help="Of all runs in the folder, those whose newest file is older."
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask. Without it, --json only shows.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a run left, then remove what nothing reads any more: checkpoints and Ray Train's files of finished stages.

    Example: threestage clean runs/demo-0
    """
    found = [_clean_one(one, everything, pseudo_masks, yes, as_json) for one in _older(run, older_than)]
    if as_json:
        print_json(found[0] if older_than is None else found)


def _older(folder: str, age: str | None) -> list[str]:
    """The run itself, or of the runs in the folder those that nothing was written to for so long."""
    from threestage.run.clean import unused_for
    from threestage.run.status import find_runs

    if age is None:
        return [folder]
    parsed = re.fullmatch(r"(\d+)([hd])", age)
    if parsed is None:
        raise InputError(f"--older-than {age}: not an age; write 12h or 30d", "clean/not-an-age")
    seconds = int(parsed[1]) * (86_400 if parsed[2] == "d" else 3600)
    return [run for run in find_runs(folder) if unused_for(run) > seconds]


def _clean_one(run: str, everything: bool, pseudo_masks: bool, yes: bool, as_json: bool) -> dict[str, Any]:
    from threestage.run.clean import clean as clean_run
    from threestage.run.clean import what_is_left

    def agreed(left: Any) -> bool:
        if not as_json:
            _show_left(left)
        return yes or typer.confirm("Remove it?")

    if as_json and not yes:
        left, removed = what_is_left(run, everything, pseudo_masks), False
    else:
        left, removed = clean_run(run, everything, agreed, warn, pseudo_masks)
    if not as_json:
        if not left.deleted:
            _show_left(left)
        text = "removed" if removed else "nothing was removed" if left.deleted else "nothing to remove"
        console.print(text, highlight=False)
    kinds = [{"name": k.name, "files": k.files, "bytes": k.bytes, "goes": k.will_delete} for k in left.kinds]
    return {"folder": left.folder, "kinds": kinds, "gone": left.deleted, "removed": removed}


def _show_left(left: Any) -> None:
    table = Table("what", "files", "MB", "", title=escape(left.folder))
    for kind in left.kinds:
        table.add_row(kind.name, f"{kind.files:,}", f"{kind.bytes / 1e6:,.1f}", "goes" if kind.will_delete else "stays")
    console.print(table)
