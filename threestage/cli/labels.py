"""Commands for labelling tools: export masks, list classes."""

from typing import Annotated

import typer
from rich.table import Table

from threestage.cli.options import (
    AddressOption,
    GpusOption,
    JsonOption,
    PredictorsOption,
    StartTimeoutOption,
    WithoutRayOption,
    cluster_of,
    console,
    escape,
    predict_pool_with,
    print_json,
    warn,
)
from threestage.errors import InputError

app = typer.Typer(help="Export masks to labelling tools.", no_args_is_help=True)


def list_classes(
    masks: Annotated[str, typer.Argument(help="folder of masks, or the export of a labelling tool")],
) -> None:
    """Print a class map of all values, colours or categories in masks or an export. Edit it and give it to ingest.

    Example: threestage classes masks
    """
    from threestage.labels.class_list import class_map_text

    print(class_map_text(masks), end="")


@app.command()
def export(
    masks: Annotated[str, typer.Argument(help="folder of a run (its pseudo-masks) or of predictions")],
    out: Annotated[str, typer.Argument(help="folder of the export")],
    to: Annotated[str, typer.Option(help="format: coco, cvat, labelme, label-studio or masks")],
    images: Annotated[
        str | None, typer.Option(metavar="LIST", help="text file of image ids to export, one a line")
    ] = None,
    below: Annotated[
        str | None, typer.Option(metavar="0.8=ignore", help="leave out pixels of lower confidence")
    ] = None,
    simplify: Annotated[
        float | None,
        typer.Option(min=0, metavar="PIXELS", help="write polygons instead of masks; maximum deviation in pixels"),
    ] = None,
    local: WithoutRayOption = False,
    address: AddressOption = None,
    workers: PredictorsOption = 1,
    gpus_per_worker: GpusOption = None,
    start_timeout_s: StartTimeoutOption = 300,
    as_json: JsonOption = False,
) -> None:
    """Write predictions, or those of a run's champion, for a labelling tool. Missing predictions are made first.

    Example: threestage labels export predictions tasks --to label-studio --below 0.8=ignore
    """
    from threestage.config import validated
    from threestage.labels.label_export import ExportSettings, export_labels

    settings = validated(
        ExportSettings, {"to": to, "images": images, "below": _confidence(below), "simplify": simplify}
    )
    cluster = cluster_of(address, workers, gpus_per_worker, start_timeout_s)
    with console.status("exporting") as status:

        def progress(what: str, done: int) -> None:
            status.update(f"{what} {done:,} images")

        report = export_labels(masks, out, settings, progress, predict_pool_with(cluster, local))
    if report.not_found:
        warn(f"{images}: images without a mask: {', '.join(report.not_found)}")
    if as_json:
        print_json(report.model_dump(mode="json"))
        return
    table = Table("images", "masks of", "polygons' IoU", title=escape(out))
    iou = "–" if report.iou is None else f"{report.iou:.4f}"
    table.add_row(str(report.images), escape(report.masks), iou)
    console.print(table)


def _confidence(text: str | None) -> float | None:
    if text is None:
        return None
    number, _, fate = text.partition("=")
    try:
        confidence = float(number)
    except ValueError:
        confidence = -1
    if fate != "ignore" or not 0 <= confidence <= 1:
        raise InputError(f"--below {text}: write a confidence from 0 to 1 and =ignore, e.g. 0.8=ignore", "config/usage")
    return confidence
