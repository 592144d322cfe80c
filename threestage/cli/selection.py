"""The command `next`: images to label next."""

import shlex
from typing import Annotated, Any

import typer

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


def choose_next(
    run: Annotated[str, typer.Argument(help="folder of a run with at least one trained stage")],
    out: Annotated[str, typer.Option("--out", metavar="FOLDER", help="folder for the list, the page and the export")],
    count: Annotated[int, typer.Option(min=1, help="number of images")] = 20,
    strategy: Annotated[str, typer.Option(help="combined, entropy, margin, coreset or random")] = "combined",
    export: Annotated[
        str | None, typer.Option(help="also export the masks to correct: coco, cvat, labelme, label-studio or masks")
    ] = None,
    seed: Annotated[int, typer.Option(help="random seed of the strategy random, and of ties")] = 0,
    local: WithoutRayOption = False,
    address: AddressOption = None,
    workers: PredictorsOption = 1,
    gpus_per_worker: GpusOption = None,
    start_timeout_s: StartTimeoutOption = 300,
    as_json: JsonOption = False,
) -> None:
    """Choose images of a run's pool to label next: uncertain, different, with rare classes. Repeat it after a kill.

    Example: threestage next runs/streets --out rounds/2 --count 20 --export cvat
    """
    from threestage.config import validated
    from threestage.selection.next_images import NextSettings, next_images

    settings = validated(NextSettings, {"count": count, "strategy": strategy, "seed": seed, "export": export})
    cluster = cluster_of(address, workers, gpus_per_worker, start_timeout_s)
    with console.status("reading the run") as status:

        def progress(what: str, done: int, total: int) -> None:
            status.update(f"{what} {done:,}{f' of {total:,}' if total else ''} images")

        report = next_images(run, out, settings, predict_pool_with(cluster, local), progress)
    if report.not_exported:
        warn(f"{report.export}: lacks {', '.join(report.not_exported)}: a list of ids ends them at a comma or tab")
    print_json(report.model_dump(mode="json")) if as_json else _show(report)


def _show(report: Any) -> None:
    for number, image in enumerate(report.images, 1):
        console.print(
            f"{number:4}  {escape(image.image_id)}  [dim]{escape(image.why)}[/]", highlight=False, soft_wrap=True
        )
    lines = [
        f"{len(report.images)} of {report.pool:,} images: {report.out}/next.csv   pictures: {report.out}/next.html",
        *([] if report.export is None else [f"for the labelling tool: {report.export}"]),
        "next:  label them, ingest the masks into the data set, and run again from this run's champion:",
        f"threestage run CONFIG --continue-from {shlex.quote(report.run)} --out NEW",
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
