"""What a run has left: report, sync, clean."""

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Table

from threestage.cli.models import show_version
from threestage.cli.options import JsonOption, TrackingOption, console, counter, escape, print_json, warn


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
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask. Without it, --json only shows.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a run left, then remove what nothing reads any more: checkpoints and Ray Train's files of finished stages.

    Example: threestage clean runs/demo-0
    """
    from threestage.run.clean import clean as clean_run
    from threestage.run.clean import what_is_left

    def agreed(left: Any) -> bool:
        if not as_json:
            _show_left(left)
        return yes or typer.confirm("Remove it?")

    if as_json and not yes:
        left, removed = what_is_left(run, everything), False
    else:
        left, removed = clean_run(run, everything, agreed, warn)
    if as_json:
        kinds = [{"name": k.name, "files": k.files, "bytes": k.bytes, "goes": k.will_delete} for k in left.kinds]
        print_json({"folder": left.folder, "kinds": kinds, "gone": left.deleted, "removed": removed})
    elif not left.deleted:
        _show_left(left)
        console.print("nothing to remove", highlight=False)
    else:
        console.print("removed" if removed else "nothing was removed", highlight=False)


def _show_left(left: Any) -> None:
    table = Table("what", "files", "MB", "", title=escape(left.folder))
    for kind in left.kinds:
        table.add_row(kind.name, f"{kind.files:,}", f"{kind.bytes / 1e6:,.1f}", "goes" if kind.will_delete else "stays")
    console.print(table)
