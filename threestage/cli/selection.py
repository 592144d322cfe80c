"""The commands `next`, `suspects` and `forecast`: images to label next, suspect labels, the gain of more labels."""

import shlex
from typing import Annotated, Any

import typer

from threestage.cli.options import (
    AddressOption,
    GpusOption,
    JsonOption,
    PredictorsOption,
    StartTimeoutOption,
    Terminal,
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
    pool_report: Annotated[
        bool, typer.Option("--pool-report", help="also list near-copies and images unlike every labelled one")
    ] = False,
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

    given = {"count": count, "strategy": strategy, "seed": seed, "export": export, "pool_report": pool_report}
    settings = validated(NextSettings, given)
    cluster = cluster_of(address, workers, gpus_per_worker, start_timeout_s)
    with console.status("reading the run") as status:

        def progress(what: str, done: int, total: int) -> None:
            status.update(f"{what} {done:,}{f' of {total:,}' if total else ''} images")

        report = next_images(run, out, settings, predict_pool_with(cluster, local), progress)
    if report.not_exported:
        warn(f"{report.export}: lacks {', '.join(report.not_exported)}: a list of ids ends them at a comma or tab")
    print_json(report.model_dump(mode="json")) if as_json else _show(report)


def list_suspects(
    run: Annotated[str, typer.Argument(help="folder of a run whose labels are examined")],
    out: Annotated[
        str, typer.Option("--out", metavar="FOLDER", help="folder for the models, the list, the page and the export")
    ],
    count: Annotated[int, typer.Option(min=1, help="number of images")] = 20,
    folds: Annotated[
        int, typer.Option(min=2, help="number of models, each trained without the labels of its fold")
    ] = 4,
    steps: Annotated[int | None, typer.Option(min=1, help="steps of each model; by default those of stage 1")] = None,
    export: Annotated[
        str | None, typer.Option(help="also export the models' masks: coco, cvat, labelme, label-studio or masks")
    ] = None,
    local: WithoutRayOption = False,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """List labelled images whose masks are probably wrong, by models that did not learn them. Repeat it after a kill.

    Example: threestage suspects runs/streets --out suspects --export cvat
    """
    from threestage.config import validated
    from threestage.selection.suspects import SuspectsSettings, suspects

    given = {"count": count, "folds": folds, "steps": steps, "export": export}
    settings = validated(SuspectsSettings, given)
    with Terminal(stderr=True).status("reading the run") as status:

        def progress(what: str, done: int, total: int) -> None:
            status.update(f"{what} {done:,} of {total:,}")

        report = suspects(run, out, settings, local, address, progress, warn)
    if as_json:
        print_json(report.model_dump(mode="json"))
        return
    _show_images(report.images)
    places = f"{len(report.images)} of {report.examined:,} labelled images: {report.out}/suspects.csv"
    _show_lines([f"{places}   pictures: {report.out}/suspects.html", *_exported(report)])


def forecast_labels(
    run: Annotated[str, typer.Argument(help="folder of a run whose stage 1 is forecast")],
    out: Annotated[str, typer.Option("--out", metavar="FOLDER", help="folder for the models and the forecast")],
    labels: Annotated[
        list[int] | None,
        typer.Option(min=1, help="number of labels to forecast; repeat it for more; default: twice those of the run"),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="steps of each model; by default those of stage 1")] = None,
    local: WithoutRayOption = False,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Forecast the mean IoU with more labels, by models that learn a part of them. Repeat it after a kill.

    Example: threestage forecast runs/streets --out forecast --labels 92
    """
    from threestage.config import validated
    from threestage.selection.forecast import ForecastSettings, forecast

    settings = validated(ForecastSettings, {"labels": sorted(labels or []), "steps": steps})
    with Terminal(stderr=True).status("reading the run") as status:

        def progress(what: str, done: int, total: int) -> None:
            status.update(f"{what} {done:,} of {total:,}")

        report = forecast(run, out, settings, local, address, progress, warn)
    if as_json:
        print_json(report.model_dump(mode="json"))
        return
    _show_lines(
        [
            "mean IoU of stage 1, which learns the labels alone",
            *(f"{one.labels:6} labels: {one.mean_iou:.3f}" for one in report.measured),
            *(
                f"{report.labels} → {one.labels} labels: {report.measured[-1].mean_iou:.3f} to {one.mean_iou:.3f} "
                f"(80 %: {one.low:.3f}–{one.high:.3f})"
                for one in report.forecast
            ),
            f"hours of training: {report.hours:.2f} for this forecast, {report.run_hours:.2f} for the run",
        ]
    )


def _show(report: Any) -> None:
    _show_images(report.images)
    _show_lines(
        [
            f"{len(report.images)} of {report.pool:,} images: {report.out}/next.csv   pictures: {report.out}/next.html",
            *_exported(report),
            *_pool_report(report),
            "next:  label them, ingest the masks into the data set, and run again from this run's champion:",
            f"threestage run CONFIG --continue-from {shlex.quote(report.run)} --out NEW",
        ]
    )


def _show_images(images: Any) -> None:
    for number, image in enumerate(images, 1):
        console.print(
            f"{number:4}  {escape(image.image_id)}  [dim]{escape(image.why)}[/]", highlight=False, soft_wrap=True
        )


def _pool_report(report: Any) -> list[str]:
    found = report.pool_report
    if found is None:
        return []
    lists = f"{report.out}/near_copies.txt, {report.out}/unlike.txt (data.exclude)"
    return [f"{found.near_copies:,} near-copies, {found.unlike:,} images unlike every labelled one: {lists}"]


def _exported(report: Any) -> list[str]:
    return [] if report.export is None else [f"for the labelling tool: {report.export}"]


def _show_lines(lines: list[str]) -> None:
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
