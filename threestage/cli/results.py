"""Commands on the folder of a run: report, sync, clean."""

import re
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Table

from threestage.cli.models import show_version
from threestage.cli.options import JsonOption, TrackingOption, console, counter, escape, print_json, warn
from threestage.errors import InputError


def report(
    run: Annotated[str, typer.Argument(help="folder of a run, finished or not")],
    images: Annotated[int, typer.Option("--images", min=1, help="number of validation images to show")] = 9,
    out: Annotated[
        str | None, typer.Option("--out", metavar="FILE", help="file of the page; default: RUN/report.html")
    ] = None,
    measure: Annotated[
        int | None,
        typer.Option("--measure", min=1, help="number of validation images to measure; default: all, fewer on a CPU"),
    ] = None,
    data: Annotated[str | None, typer.Option("--data", metavar="URI", help="data set, if it was moved")] = None,
    tracking_uri: Annotated[str | None, typer.Option(help="address of MLflow; default: that of the run")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write an HTML page that compares the stages of a run: pictures, curves, calibration, pseudo-masks.

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
    run: Annotated[str, typer.Argument(help="folder of a run, finished or not, also of --local")],
    tracking_uri: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Send MLflow what it lacks of a run: metrics, models, report. Use this after MLflow was unreachable.

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
        console.print("no stage is finished yet; the rows of its checkpoints are sent", highlight=False)


def clean(
    run: Annotated[str, typer.Argument(help="folder of a run")],
    everything: Annotated[
        bool, typer.Option("--all", help="delete everything that the run wrote, also models, results and pseudo-masks")
    ] = False,
    pseudo_masks: Annotated[
        bool, typer.Option("--pseudo-masks", help="also delete pseudo-masks that no stage needs")
    ] = False,
    older_than: Annotated[
        str | None,
        typer.Option("--older-than", metavar="30d", help="clean all runs in the folder whose newest file is older"),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask; without it, --json only lists")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the files of a run, then delete those that nothing needs: checkpoints and Ray Train's files of finished stages.

    Example: threestage clean runs/demo-0
    """
    if older_than is None:
        found: Any = _clean_one(run, everything, pseudo_masks, yes, as_json)
    else:
        found = []
        for one in _older(run, older_than):
            try:
                found.append(_clean_one(one, everything, pseudo_masks, yes, as_json))
            except InputError as error:  # a driver works on it, or it is a sweep: the other runs are cleaned
                warn(str(error))
    if as_json:
        print_json(found)


def _older(folder: str, age: str) -> list[str]:
    """Of the runs in the folder those that nothing was written to for so long."""
    from threestage.run.clean import unused_for
    from threestage.run.status import find_runs

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
        return yes or typer.confirm("Delete these files?")

    if as_json and not yes:
        left, removed = what_is_left(run, everything, pseudo_masks), False
    else:
        left, removed = clean_run(run, everything, agreed, warn, pseudo_masks)
    if not as_json:
        if not left.deleted:
            _show_left(left)
        text = "deleted" if removed else "nothing deleted" if left.deleted else "nothing to delete"
        console.print(text, highlight=False)
    kinds = [{"name": k.name, "files": k.files, "bytes": k.bytes, "goes": k.will_delete} for k in left.kinds]
    return {"folder": left.folder, "kinds": kinds, "gone": left.deleted, "removed": removed}


def _show_left(left: Any) -> None:
    table = Table("files of", "number", "MB", "action", title=escape(left.folder))
    for kind in left.kinds:
        table.add_row(
            kind.name, f"{kind.files:,}", f"{kind.bytes / 1e6:,.1f}", "delete" if kind.will_delete else "keep"
        )
    console.print(table)
