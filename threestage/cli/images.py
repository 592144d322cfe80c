"""Data sets and models on images: ingest, evaluate, predict."""

import shlex
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer
from rich.columns import Columns
from rich.table import Table
from rich.text import Text

from threestage.cli.options import (
    AddressOption,
    FlipOption,
    GpusOption,
    JsonOption,
    ModelArgument,
    OverlapOption,
    PredictorsOption,
    ScalesOption,
    StartTimeoutOption,
    StrideOption,
    TrackingOption,
    WindowOption,
    WithoutRayOption,
    cluster_of,
    console,
    counter,
    escape,
    print_json,
    protocol_of,
    warn,
)
from threestage.plain_text import escape_control_chars

if TYPE_CHECKING:
    from threestage.data.ingest import IngestReport, IngestSettings
    from threestage.data.rejects import Reject
    from threestage.prediction.estimates import Estimate
    from threestage.prediction.predict import PredictReport


class SplitChoice(StrEnum):
    train = "train"
    val = "val"
    test = "test"


class InputChoice(StrEnum):
    images = "images"
    data_set = "data-set"
    parquet = "parquet"
    scenes = "scenes"


def ingest(
    source: Annotated[str, typer.Argument(help="folder of images, or of a published data set")],
    out: Annotated[str, typer.Argument(help="folder of the data set; an existing one gets a new version")],
    format: Annotated[
        str,
        typer.Option(
            "--format",
            help="layout of SOURCE: folders, images, scenes, camvid, voc, cityscapes, ade20k, vistas, huggingface, coco, cvat, "
            "labelme, label-studio, supervisely, yolo or binary-masks",
        ),
    ] = "folders",
    masks: Annotated[
        str | None,
        typer.Option(help="folder of masks, CSV list of pairs (format folders), or the export of a labelling tool"),
    ] = None,
    mask_suffix: Annotated[str, typer.Option(help="suffix of mask names, e.g. _mask for a.jpg and a_mask.png")] = "",
    class_map: Annotated[
        str | None, typer.Option(help="YAML file of classes with their ids, colours or categories")
    ] = None,
    unlabelled_pixels: Annotated[
        str, typer.Option(help="class of pixels without a region or polygon in an export or a GeoJSON file, or ignore")
    ] = "ignore",
    split: Annotated[str, typer.Option(help="train, val or test, for formats without splits")] = "train",
    tile: Annotated[int | None, typer.Option(help="side of the tiles that scenes are cut into; default 512")] = None,
    tile_overlap: Annotated[
        int | None, typer.Option(help="pixels that neighbouring tiles share; default an eighth of the tile")
    ] = None,
    labelled_only: Annotated[bool, typer.Option("--labelled-only", help="skip images without a mask")] = False,
    bands: Annotated[
        int | None, typer.Option(help="bands of each image, of 8 or 16 bits or floats; without it, 8-bit RGB")
    ] = None,
    max_bad_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="share of bad images above which the command fails")
    ] = 0.02,
    rows_per_file: Annotated[int, typer.Option(min=1, help="images per Parquet file")] = 256,
    name: Annotated[str | None, typer.Option(help="name of the data set")] = None,
    local: WithoutRayOption = False,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a data set: check every file, write the good ones as Parquet, list the bad ones. Repeat it after a kill.

    Example: threestage ingest photos data/photos --masks masks --class-map classes.yaml
    """
    from threestage.config import validated
    from threestage.data.ingest import IngestSettings
    from threestage.report.data_set_preview import write_preview

    settings = validated(
        IngestSettings,
        {
            "format": format,
            "masks": masks,
            "mask_suffix": mask_suffix,
            "class_map": class_map,
            "unlabelled_pixels": unlabelled_pixels,
            "split": split,
            "tile": tile,
            "tile_overlap": tile_overlap,
            "labelled_only": labelled_only,
            "bands": bands,
            "max_bad_fraction": max_bad_fraction,
            "rows_per_file": rows_per_file,
            "name": name,
        },
    )
    report = ingest_shown(source, out, settings, local, address)
    preview = write_preview(out)

    def show() -> None:
        show_ingested([report], out, preview)
        console.print(f"next:  {_after_ingest(report, out, local)}", highlight=False, markup=False, soft_wrap=True)

    _end(report, as_json, show)


def _after_ingest(report: "IngestReport", out: str, local: bool) -> str:
    """The command that comes next."""
    from threestage.run.own_images import PRESET

    if not any(counts.labelled for counts in report.manifest.counts.values()):
        return shlex.join(["threestage", "ingest", "IMAGES", out, "--masks", "MASKS", "--class-map", "classes.yaml"])
    return shlex.join(["threestage", "check", PRESET, "--set", f"data.root={out}", *["--local"] * local])


def ingest_shown(source: str, out: str, settings: "IngestSettings", local: bool, address: str | None) -> "IngestReport":
    """Ingest in this process or on Ray, with a count of the images on the terminal."""
    from threestage.data.ingest import ingest as ingest_here

    with console.status("listing files") as status:

        def progress(done: int, of: int) -> None:
            status.update(f"checked {done:,} of {of:,} images")

        if local:
            return ingest_here(source, out, settings, progress)
        from threestage.ray_backend.tasks import ingest_on_ray
        from threestage.ray_settings import ClusterSettings

        return ingest_on_ray(source, out, settings, ClusterSettings(address=address), progress)


def _end(report: "IngestReport | PredictReport", as_json: bool, show: Callable[[], None]) -> None:
    """Print what the command has done: its warnings, then JSON for programs or what `show` prints."""
    for warning in report.warnings:
        warn(warning)
    if as_json:
        print_json(report.model_dump(mode="json"))
    else:
        show()


def show_ingested(reports: "Sequence[IngestReport]", out: str, preview: str | None) -> None:
    """What came of one source after the other; the data set as the last one left it, and where a picture of its labels is."""
    from threestage.data.rejects import csv_uri

    for report in reports:
        _show_left_out(report.rejected)
        if report.bad:
            text = f"all {report.bad} left out: {csv_uri(report.rejects_uri or '')}"
            console.print(text, highlight=False, markup=False, soft_wrap=True)
    manifest = reports[-1].manifest
    table = Table("split", "images", "labelled", title=escape(f"{out} version {manifest.version}"))
    for split_name, counts in manifest.counts.items():
        table.add_row(split_name, str(counts.images), str(counts.labelled))
    console.print(table)
    images, labels, skipped, bad = (
        sum(getattr(report, name) for report in reports)
        for name in ("added_images", "added_labels", "skipped", "bad")
    )  # fmt: skip
    console.print(f"{images} images and {labels} labels added, {skipped} were there already, {bad} left out")
    for report in reports:
        if report.class_counts:
            _show_classes(report)
    if preview is not None:
        console.print(f"look at the labels: {escape(preview)}", highlight=False, soft_wrap=True)


def _show_classes(report: "IngestReport") -> None:
    """The classes that an ingest was given, the commonest first, in as many columns as fit."""
    total = sum(one.pixels for one in report.class_counts) or 1
    width = max(len(one.name) for one in report.class_counts)
    colours = dict(zip(report.manifest.classes, report.manifest.colours, strict=True))
    lines = [
        Text.assemble(("■ ", "rgb({},{},{})".format(*colours[one.name])), escape_control_chars(one.name).ljust(width),
                      f" {one.pixels / total:6.1%} {one.images:4}")
        for one in sorted(report.class_counts, key=lambda one: -one.pixels)
    ]  # fmt: skip
    console.print(f"share of the labelled pixels, and images that show it, of {report.labelled} with a mask:")
    console.print(Columns(lines, padding=(0, 3), column_first=True))


def evaluate(
    model: ModelArgument,
    dataset: Annotated[str, typer.Argument(help="data set made by `threestage ingest`")],
    split: Annotated[SplitChoice, typer.Option(help="split to score")] = SplitChoice.val,
    window: WindowOption = None,
    stride: StrideOption = None,
    overlap: OverlapOption = "mean",
    flip: FlipOption = False,
    scales: ScalesOption = None,
    out: Annotated[
        str | None, typer.Option("--out", metavar="URI", help="folder for metrics.json and reliability.png")
    ] = None,
    tracking_uri: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score a model on a data set: IoU, boundaries, calibration. Default: whole images at one scale.

    Example: threestage evaluate runs/camvid data/camvid --split test --flip --scales 0.75,1,1.25
    """
    from threestage.data.outputs import SCORES, claim
    from threestage.evaluation import evaluate_model
    from threestage.mlflow_sync.records import RegistrySettings
    from threestage.prediction.predict import open_model
    from threestage.report.scores import score_tables, write_scores

    protocol = protocol_of(window, stride, flip, scales, overlap)
    if out is not None:
        claim(out, SCORES)  # before the work
    network, card = open_model(model, RegistrySettings(tracking_uri=tracking_uri))
    with console.status("evaluating") as status:
        show = counter(status, "evaluated")
        scores = evaluate_model(network, card, dataset, split.value, protocol, show)
    result = {"model": model, "dataset": dataset, "split": split.value, **scores}
    if out is not None:
        write_scores(out, result)
    if as_json:
        print_json(result)
        return
    title = f"{model} on {dataset} ({split.value}, {result['images']} images): {result['protocol']}"
    console.print(escape(title), highlight=False, soft_wrap=True)
    for table in score_tables(result):
        console.print(table)
    if out is not None:
        console.print(f"metrics.json and reliability.png: {escape(out)}", highlight=False, soft_wrap=True)


def predict(
    model: ModelArgument,
    images: Annotated[
        str, typer.Argument(help="folder or prefix of images, an image, a data set, or Parquet with a column image")
    ],
    out: Annotated[str, typer.Argument(help="folder of the predictions; the same folder continues them")],
    format: Annotated[
        str,
        typer.Option(
            "--format", help="png (a mask and an overlay for each image), parquet, or geotiff (of TIFF images)"
        ),
    ] = "png",
    input_format: Annotated[
        InputChoice | None, typer.Option("--input-format", help="kind of input, for a folder that holds several kinds")
    ] = None,
    confidence: Annotated[bool, typer.Option("--confidence", help="also write the confidence of each pixel")] = False,
    no_overlays: Annotated[bool, typer.Option("--no-overlays", help="write masks only (format png)")] = False,
    window: WindowOption = None,
    stride: StrideOption = None,
    overlap: OverlapOption = "mean",
    flip: FlipOption = False,
    scales: ScalesOption = None,
    max_bad_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="share of bad images above which the command fails")
    ] = 0.02,
    max_drift: Annotated[
        float | None,
        typer.Option("--max-drift", help="distance from the training images above which the command stops, e.g. 0.5"),
    ] = None,
    local: WithoutRayOption = False,
    address: AddressOption = None,
    workers: PredictorsOption = 1,
    gpus_per_worker: GpusOption = None,
    start_timeout_s: StartTimeoutOption = 300,
    tracking_uri: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Predict a mask for any number of images. Repeat it after a kill: finished images are kept.

    Example: threestage predict models:/camvid@champion photos predictions --local
    """
    from threestage.config import validated
    from threestage.mlflow_sync.records import RegistrySettings
    from threestage.prediction.predict import PredictSettings, predict_input, read_model

    settings = validated(
        PredictSettings,
        {
            "protocol": protocol_of(window, stride, flip, scales, overlap),
            "format": format,
            "input_format": None if input_format is None else input_format.replace("-", " "),
            "overlays": not no_overlays,
            "confidence": confidence,
            "max_bad_fraction": max_bad_fraction,
            "max_drift": max_drift,
        },
    )
    files = read_model(model, RegistrySettings(tracking_uri=tracking_uri))
    with console.status("looking for images") as status:
        show = counter(status, "predicted")
        if local:
            report = predict_input(files, images, out, settings, show)
        else:
            from threestage.ray_backend.predict import predict_on_ray

            cluster = cluster_of(address, workers, gpus_per_worker, start_timeout_s)
            report = predict_on_ray(files, images, out, settings, cluster, show, warn)
    _end(report, as_json, partial(_show_predictions, report, out))


def _show_predictions(report: "PredictReport", out: str) -> None:
    from threestage.data.rejects import csv_uri

    _show_left_out(report.rejected)
    if report.in_windows:
        console.print(f"{report.in_windows} images are too large for the memory and were predicted in windows")
    kept = f" ({report.kept} of them before)" if report.kept else ""
    text = f"{report.images} images predicted{kept}, {report.bad} left out; all in {escape(out)}"
    console.print(text, highlight=False, soft_wrap=True)
    if report.estimate is None:
        console.print("no estimate of their mean IoU: the model has no calibration")
    else:
        console.print(_estimate_text(report.estimate), highlight=False, soft_wrap=True)
    if report.bad:
        console.print(f"all that were left out: {escape(csv_uri(report.rejects_uri))}", highlight=False, soft_wrap=True)


def _estimate_text(estimate: "Estimate") -> str:
    score = "none of the known classes" if estimate.mean_iou is None else f"mean IoU {estimate.mean_iou:.3f}"
    return f"estimated without labels, of {estimate.images} images: {score}, drift {estimate.drift:.2f}"


def _show_left_out(rejected: Iterable["Reject"]) -> None:
    for reject in rejected:
        console.print(
            f"[yellow]left out[/] {escape(reject.source)}: {escape(reject.reason)}", highlight=False, soft_wrap=True
        )
