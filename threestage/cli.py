"""The command line: each command is a few lines over a function that a script could call."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from enum import StrEnum
from typing import Annotated, Any

import typer
import yaml
from rich.table import Table

from threestage.errors import InputError, StageFailure
from threestage.submit_command import submit_app
from threestage.terminal import Terminal

app = typer.Typer(
    help="A few labelled images and many unlabelled ones into a good segmentation model, in three stages.",
    epilog="Start with: threestage demo",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
console = Terminal()

ConfigArgument = Annotated[str, typer.Argument(help="A preset's name (threestage config lists them) or a YAML file.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="a.b=c", help="Change one setting; repeat it for more.")
]
OutOption = Annotated[
    str | None, typer.Option("--out", metavar="URI", help="Folder of the run; the same one continues it.")
]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Of networks, batches and augmentation.")]
LocalOption = Annotated[
    bool, typer.Option("--local", help="Run in this process, without Ray and MLflow; nothing is registered.")
]
ReuseOption = Annotated[
    str | None,
    typer.Option("--reuse", metavar="URI", help="Another run: its stages serve as far as the settings are the same."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
ModelArgument = Annotated[
    str, typer.Argument(help="models:/NAME@champion, or the folder of a run, a stage or a model.")
]
RegisteredArgument = Annotated[str, typer.Argument(help="models:/NAME@champion (or another alias), or models:/NAME/3.")]
TrackingOption = Annotated[
    str | None, typer.Option("--tracking-uri", help="Of MLflow; MLFLOW_TRACKING_URI if not set.")
]
WindowOption = Annotated[
    str | None, typer.Option("--window", metavar="H,W", help="Look through windows of this size, not at whole images.")
]
StrideOption = Annotated[
    str | None, typer.Option("--stride", metavar="H,W", help="Between windows; two thirds of them by default.")
]
FlipOption = Annotated[bool, typer.Option("--flip", help="Average with the mirrored image.")]
ScalesOption = Annotated[
    str | None, typer.Option("--scales", metavar="S,S,…", help="Average over these sizes, e.g. 0.75,1,1.25.")
]


class SplitChoice(StrEnum):
    train = "train"
    val = "val"
    test = "test"


def main() -> None:
    """Entry point: a user's mistake is one line and exit code 2, a stage that failed is one line and exit code 1."""
    try:
        app()
    except InputError as error:
        _fail(error, 2)
    except StageFailure as error:
        _fail(error, 1)
    except OSError as error:  # a path that cannot be read or written, a store or a cluster that does not answer
        from threestage.data.store_errors import explain

        _fail(explain(None, error), 2)


def _fail(error: Exception | str, code: int) -> None:
    Terminal(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {_escape(str(error))}", highlight=False)
    sys.exit(code)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(" ".join(text.split()))


@app.command()
def demo(
    out: OutOption = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the scenes, networks, batches and augmentation.")] = 0,
    local: LocalOption = False,
    overrides: SetOption = None,
) -> None:
    """Make synthetic scenes, few of them labelled, and run the three stages on them."""
    from threestage.runs import demo_config

    folder = out or f"runs/demo-{seed}"
    console.print(f"demo: scenes, models and results go to {_escape(folder)}", highlight=False)
    _run(demo_config(folder, seed, overrides or []), folder, local)


@app.command()
def init(folder: Annotated[str, typer.Argument(metavar="DIR", help="Made if it is not there.")]) -> None:
    """Write a new project into a folder: configuration, class map, sweep, job and cluster files. Overwrites nothing.

    Example: threestage init streets
    """
    from threestage.init import next_commands, summary, write_project

    for line in (*summary(write_project(folder)), "next:", *next_commands(folder)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


@app.command()
def run(
    config: ConfigArgument,
    out: OutOption = None,
    seed: SeedOption = None,
    local: LocalOption = False,
    overrides: SetOption = None,
    reuse: ReuseOption = None,
) -> None:
    """Run the three stages. What is finished is skipped and what is half done goes on: rerun the same command after a kill."""
    from threestage.config import load

    resolved = load(config, [*(overrides or []), *([] if seed is None else [f"seed={seed}"])])
    _run(resolved, out or f"runs/{resolved.name}", local, reuse)


def _run(config: Any, out: str, local: bool, reuse: str | None = None) -> None:
    from threestage import runs
    from threestage.progress import StageProgress
    from threestage.report import rich_table

    with StageProgress(config, console) as progress:
        results = runs.run(config, out, local, progress.show, progress.warn, progress.watch, reuse)
    console.print(rich_table(results))
    console.print(f"results: {out}/results.json   pictures: {out}/pictures.png   report: {out}/report.html",
                  highlight=False, markup=False, soft_wrap=True)  # fmt: skip
    for version in results.get("registered", []):
        _show_version(version)
    if results.get("registered"):
        name = results["registered"][-1]["name"]
        console.print(f"try it:  threestage predict models:/{name}@champion IMAGES OUT", highlight=False)


@app.command()
def sweep(
    space: Annotated[str, typer.Argument(help="A space that ships (thresholds, loss_weights, …) or a YAML file.")],
    config: ConfigArgument,
    out: OutOption = None,
    overrides: SetOption = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Instead of the space's.")] = None,
    at_once: Annotated[int | None, typer.Option(min=1, help="Trials at a time, instead of the space's.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the sweep that --out holds.")] = False,
    repeat: Annotated[
        int,
        typer.Option(min=0, help="Run the best three again with so many other seeds, and choose among them by that."),
    ] = 0,
    promote: Annotated[bool, typer.Option("--promote", help="Register the models of the best trial.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Search thresholds, loss weights and other settings on the validation images. The stages before are trained once.

    Example: threestage sweep thresholds_and_weights my.yaml --set cluster.workers=2 --out s3://bucket/sweep
    """
    from threestage.config import load
    from threestage.sweeps import sweep as sweeps
    from threestage.sweeps.plan import plan_json
    from threestage.sweeps.plan_table import rich_plan
    from threestage.sweeps.prepare import Sweep
    from threestage.sweeps.progress import SweepProgress
    from threestage.sweeps.space import load_space

    resolved, searched = load(config, overrides or []), load_space(space)
    given = {"trials": trials or searched.trials, "at_once": at_once or searched.at_once}
    asked = Sweep(
        searched.model_copy(update=given),
        resolved,
        out or f"runs/{resolved.name}-sweep",
        resume=resume,
        repeat=repeat,
        promote=promote,
    )
    if dry_run:
        plan = sweeps.plan(asked, lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True))
        print(json.dumps(plan_json(plan))) if as_json else console.print(rich_plan(plan))
        return
    shown = Terminal(stderr=True) if as_json else console
    with SweepProgress(resolved, shown) as progress:
        found = sweeps.run(asked, progress)
    if as_json:
        print(json.dumps(found))
        return
    console.print(found["summary"], highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"results: {asked.out}/results.json   next:  threestage run {asked.out}/best.yaml", markup=False, soft_wrap=True
    )


@app.command()
def check(
    config: ConfigArgument,
    out: OutOption = None,
    local: LocalOption = False,
    overrides: SetOption = None,
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            metavar="HOST:PORT|URL",
            help="Of a cluster; the URL of its dashboard has all of it tried there, by a job.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Try what a run needs before anything is spent: storage, MLflow, the data set, the cluster, a step of each stage.

    ✓ is well, ✗ is wrong, ! may be wrong or was not tried. Exit code 2 when something is wrong.

    Example: threestage check mine.yaml --out s3://bucket/run --address http://127.0.0.1:8265
    """
    from threestage.check import check as check_run
    from threestage.config import load

    resolved = load(config, overrides or [])
    lines = []
    with Terminal(stderr=True).status("trying what the run needs"):
        for line in check_run(resolved, out or f"runs/{resolved.name}", local, address):
            lines.append(line)
            if not as_json:
                _show_line(line)
    if as_json:
        print(json.dumps([line._asdict() for line in lines]))
    if any(line.problem for line in lines):
        raise typer.Exit(2)


def _show_line(line: Any) -> None:
    mark, text = "[green]✓[/]", line.value
    if line.problem or line.doubt:
        mark, text = ("[bold red]✗[/]", line.problem) if line.problem else ("[yellow]![/]", line.doubt)
    took = f"  [dim]{line.seconds:.1f} s[/]" if line.seconds else ""
    console.print(f"{mark} {line.name}  {_escape(text)}{took}", highlight=False, soft_wrap=True)


@app.command()
def ingest(
    source: Annotated[str, typer.Argument(help="Folder of the images, or of a data set as it is distributed.")],
    out: Annotated[str, typer.Argument(help="Where the data set goes; one that is there gets a new version.")],
    format: Annotated[str, typer.Option("--format", help="folders, images, camvid, voc or cityscapes.")] = "folders",
    masks: Annotated[
        str | None, typer.Option(help="Folder of the masks (format folders); same names as the images.")
    ] = None,
    class_map: Annotated[str | None, typer.Option(help="YAML: classes with their ids or colours.")] = None,
    split: Annotated[str, typer.Option(help="train, val or test (formats folders and images).")] = "train",
    labelled_only: Annotated[bool, typer.Option("--labelled-only", help="Leave images without a mask out.")] = False,
    max_bad_fraction: Annotated[
        float, typer.Option(help="Fail when more than this share of the images is bad.")
    ] = 0.02,
    rows_per_file: Annotated[int, typer.Option(help="Images per Parquet file.")] = 256,
    name: Annotated[str | None, typer.Option(help="Of the data set.")] = None,
    local: Annotated[bool, typer.Option("--local", help="Run in this process, without Ray.")] = False,
    address: Annotated[str | None, typer.Option(help="Of a running Ray cluster; none starts one here.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a data set: checks every file, writes the good ones as Parquet, lists the bad ones. Rerun it after a kill."""
    from threestage.config import validated
    from threestage.data.ingest import IngestSettings
    from threestage.data.ingest import ingest as ingest_here

    settings = validated(
        IngestSettings,
        {
            "format": format,
            "masks": masks,
            "class_map": class_map,
            "split": split,
            "labelled_only": labelled_only,
            "max_bad_fraction": max_bad_fraction,
            "rows_per_file": rows_per_file,
            "name": name,
        },
    )
    with console.status("listing files") as status:

        def progress(done: int, of: int) -> None:
            status.update(f"checked {done:,} of {of:,} images")

        if local:
            report = ingest_here(source, out, settings, progress)
        else:
            from threestage.on_ray.ingest import ingest_on_ray
            from threestage.on_ray.settings import ClusterSettings

            report = ingest_on_ray(source, out, settings, ClusterSettings(address=address), progress)
    if as_json:
        print(report.model_dump_json())
        return
    for reject in report.rejected:
        console.print(
            f"[yellow]left out[/] {_escape(reject.source)}: {_escape(reject.reason)}", highlight=False, soft_wrap=True
        )
    if report.bad:
        console.print(f"all {report.bad} left out: {report.rejects_uri}", highlight=False, markup=False, soft_wrap=True)
    table = Table("split", "images", "labelled", title=_escape(f"{out} version {report.manifest.version}"))
    for split_name, counts in report.manifest.counts.items():
        table.add_row(split_name, str(counts.images), str(counts.labelled))
    console.print(table)
    console.print(f"{report.added_images} images and {report.added_labels} labels added, {report.skipped} were there already, "
                  f"{report.bad} left out")  # fmt: skip


@app.command()
def config(
    preset: Annotated[
        str | None, typer.Argument(help="A preset or a YAML file; without it, the presets are listed.")
    ] = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print the whole resolved configuration, or the list of presets."""
    from threestage.config import load, preset_headers

    if preset is None:
        headers = preset_headers()
        if as_json:
            print(json.dumps(headers))
        else:
            for name, header in headers.items():
                console.print(f"[bold]{name}[/]\n{_indented(header)}", highlight=False, soft_wrap=True)
        return
    tree = load(preset, overrides or []).model_dump(mode="json")
    print(
        json.dumps(tree, indent=1) if as_json else yaml.safe_dump(tree, sort_keys=False),
        end="" if not as_json else "\n",
    )


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


@app.command()
def evaluate(
    model: ModelArgument,
    dataset: Annotated[str, typer.Argument(help="A data set made by `threestage ingest`.")],
    split: Annotated[SplitChoice, typer.Option(help="Which part of the data set.")] = SplitChoice.val,
    window: WindowOption = None,
    stride: StrideOption = None,
    flip: FlipOption = False,
    scales: ScalesOption = None,
    out: Annotated[
        str | None, typer.Option("--out", metavar="URI", help="Folder for metrics.json and reliability.png.")
    ] = None,
    tracking_uri: Annotated[str | None, typer.Option(help="Of MLflow, for models:/ names.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Score a model on a data set: IoU, boundaries, calibration. Whole images at one scale, unless you say otherwise."""
    from threestage.evaluation import evaluate_model
    from threestage.predict import open_model
    from threestage.registry import RegistrySettings
    from threestage.scores import score_tables, write_scores

    protocol = _protocol(window, stride, flip, scales)
    network, card = open_model(model, RegistrySettings(tracking_uri=tracking_uri))
    with console.status("evaluating") as status:
        show = _counter(status, "evaluated")
        scores = evaluate_model(network, card, dataset, split.value, protocol, show)
    result = {"model": model, "dataset": dataset, "split": split.value, **scores}
    if out is not None:
        write_scores(out, result)
    if as_json:
        print(json.dumps(result))
        return
    title = f"{model} on {dataset} ({split.value}, {result['images']} images): {result['protocol']}"
    console.print(_escape(title), highlight=False, soft_wrap=True)
    for table in score_tables(result):
        console.print(table)
    if out is not None:
        console.print(f"metrics.json and reliability.png: {_escape(out)}", highlight=False, soft_wrap=True)


@app.command()
def predict(
    model: ModelArgument,
    images: Annotated[
        str, typer.Argument(help="Folder or prefix of images, a data set, or Parquet with a column image.")
    ],
    out: Annotated[str, typer.Argument(help="Gets the predictions; the same one continues them.")],
    format: Annotated[str, typer.Option("--format", help="png: a mask and an overlay for each; or parquet.")] = "png",
    confidence: Annotated[bool, typer.Option("--confidence", help="Write each pixel's confidence too.")] = False,
    no_overlays: Annotated[bool, typer.Option("--no-overlays", help="Masks only (format png).")] = False,
    window: WindowOption = None,
    stride: StrideOption = None,
    flip: FlipOption = False,
    scales: ScalesOption = None,
    max_bad_fraction: Annotated[
        float, typer.Option(help="Fail when more than this share of the images is bad.")
    ] = 0.02,
    local: Annotated[bool, typer.Option("--local", help="Run in this process, without Ray.")] = False,
    address: Annotated[str | None, typer.Option(help="Of a running Ray cluster; none starts one here.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that predict, of one CPU each.")] = 1,
    gpus_per_worker: Annotated[float, typer.Option(help="GPUs that each of them takes.")] = 0,
    tracking_uri: Annotated[str | None, typer.Option(help="Of MLflow, for models:/ names.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Predict any number of images: a mask for each. Rerun it after a kill; what is done is kept."""
    from threestage.config import validated
    from threestage.predict import PredictSettings, predict_input, read_model
    from threestage.registry import RegistrySettings

    settings = validated(
        PredictSettings,
        {
            "protocol": _protocol(window, stride, flip, scales),
            "format": format,
            "overlays": not no_overlays,
            "confidence": confidence,
            "max_bad_fraction": max_bad_fraction,
        },
    )
    files = read_model(model, RegistrySettings(tracking_uri=tracking_uri))
    with console.status("looking for images") as status:
        show = _counter(status, "predicted")
        if local:
            report = predict_input(files, images, out, settings, show)
        else:
            from threestage.on_ray.predict_images import predict_on_ray
            from threestage.on_ray.settings import ClusterSettings

            cluster = validated(
                ClusterSettings, {"address": address, "workers": workers, "gpus_per_worker": gpus_per_worker}
            )
            report = predict_on_ray(files, images, out, settings, cluster, show, _warn)
    if as_json:
        print(report.model_dump_json())
        return
    for reject in report.rejected:
        console.print(
            f"[yellow]left out[/] {_escape(reject.source)}: {_escape(reject.reason)}", highlight=False, soft_wrap=True
        )
    kept = f" ({report.kept} of them before)" if report.kept else ""
    console.print(
        f"{report.images} images predicted{kept}, {report.bad} left out; all in {_escape(out)}",
        highlight=False,
        soft_wrap=True,
    )


def _warn(text: str) -> None:
    Terminal(stderr=True, soft_wrap=True).print(f"[yellow]warning:[/] {_escape(text)}", highlight=False)


def _counter(status: Any, done: str) -> Callable[[int, int], None]:
    """Shows how many images of how many are done."""
    return lambda number, total: status.update(f"{done} {number:,} of {total:,} images")


def _protocol(window: str | None, stride: str | None, flip: bool, scales: str | None) -> Any:
    """How images are given to the network, from the options' text."""
    from threestage.config import validated
    from threestage.inference import Protocol

    lists = {"window": window, "stride": stride, "scales": scales}
    given = {name: text.split(",") for name, text in lists.items() if text is not None}
    return validated(Protocol, {"flip": flip, **given})


@app.command()
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
    """Compare a run's stages on one HTML page: pictures, curves, calibration, pseudo-masks. Works for unfinished runs too."""
    from threestage.report_page import write_report
    from threestage.report_page.mirror import log_page

    with console.status("reading the run") as status:
        page = write_report(run, out, images, measure, data, _counter(status, "measured"))
    problem = log_page(run, page.uri, page.finished, tracking_uri)
    for text in (*page.missing, *([] if problem is None else [problem])):
        _warn(text)
    if as_json:
        print(json.dumps({"page": page.uri, "bytes": page.size, "missing": page.missing}))
        return
    console.print(f"report: {page.uri} ({page.size / 1e6:.1f} MB)", highlight=False, markup=False, soft_wrap=True)


@app.command()
def sync(
    run: Annotated[str, typer.Argument(help="The folder of a run, finished or not, of --local too.")],
    tracking_uri: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Send MLflow what a run's folder holds and MLflow does not: metrics, models, report. For a store that was away.

    Example: threestage sync runs/demo-0 --tracking-uri http://mlflow:5000
    """
    from threestage.mirror import sync as sync_run

    with console.status("sending"):
        versions = sync_run(run, tracking_uri, _warn)
    if as_json:
        print(json.dumps([asdict(version) for version in versions]))
        return
    for version in versions:
        _show_version(asdict(version))
    if not versions:
        console.print("no stage is finished yet; what its checkpoints hold is sent", highlight=False)


def _show_version(version: dict[str, Any]) -> None:
    text = f"registered: {version['name']} version {version['version']} ({version['alias']}), {version['champion']}"
    console.print(_escape(text), highlight=False, soft_wrap=True)


models = typer.Typer(help="Registered models: list, pull, promote, lineage.", no_args_is_help=True)
app.add_typer(models, name="models")


@models.command("list")
def list_models(tracking_uri: TrackingOption = None, as_json: JsonOption = False) -> None:
    """List the registered models: aliases, mean IoU, and what it was measured on.

    Example: threestage models list --json
    """
    from threestage.tracking import redact

    registered = _models(tracking_uri)
    found = registered.versions()
    if as_json:
        print(json.dumps(found))
        return
    table = Table(
        "model",
        "version",
        "aliases",
        "mean IoU",
        "on",
        "run",
        caption=_escape(redact(registered.uri)),
    )
    for row in found:
        table.add_row(*(_escape(text) for text in (f"{row['name']}", *_figures_of(row))))
    console.print(table)


@models.command()
def pull(
    model: RegisteredArgument,
    out: Annotated[str, typer.Argument(help="Folder on this machine.")],
    tracking_uri: TrackingOption = None,
) -> None:
    """Fetch a model as a folder that needs no MLflow: weights, exported program, lineage, model card.

    Example: threestage models pull models:/camvid@champion camvid-model
    """
    folder = _models(tracking_uri).pull(model, out)
    console.print(
        f"{_escape(model)}: {_escape(str(folder))}   try it:  threestage predict {_escape(str(folder))} IMAGES OUT",
        highlight=False,
        soft_wrap=True,
    )


@models.command()
def promote(model: RegisteredArgument, tracking_uri: TrackingOption = None, as_json: JsonOption = False) -> None:
    """Make a version the champion by hand, whatever it scores.

    Example: threestage models promote models:/camvid/7
    """
    row, before = _models(tracking_uri).promote(model)
    if as_json:
        print(json.dumps({"champion": row, "before": before}))
        return
    was = "there was none before" if before is None else f"before, it was {_in_words(before)}"
    console.print(_escape(f"the champion of {row['name']} is {_in_words(row)}; {was}"), highlight=False, soft_wrap=True)


@models.command()
def lineage(model: RegisteredArgument, tracking_uri: TrackingOption = None, as_json: JsonOption = False) -> None:
    """Show where a model comes from: data, pseudo-masks, teachers; and which models learnt from it.

    Example: threestage models lineage models:/camvid@champion
    """
    from threestage.lineage_tree import lineage_tree

    tree = _models(tracking_uri).lineage(model)
    print(json.dumps(tree)) if as_json else console.print(lineage_tree(tree), highlight=False)


def _models(tracking_uri: str | None) -> Any:
    from threestage.registry import RegistrySettings, open_models

    return open_models(RegistrySettings(tracking_uri=tracking_uri))


def _figures_of(row: dict[str, Any]) -> tuple[str, ...]:
    score = "–" if row["mean_iou"] is None else f"{row['mean_iou']:.3f}"
    return str(row["version"]), ", ".join(row["aliases"]), score, row["validation"] or "–", row["run"] or "–"


def _in_words(row: dict[str, Any]) -> str:
    version, _, score, where, _ = _figures_of(row)
    return f"version {version} ({row['stage']}, mean IoU {score} on {where})"


app.add_typer(submit_app, name="submit")


@app.command()
def clean(
    run: Annotated[str, typer.Argument(help="The folder of a run.")],
    everything: Annotated[
        bool, typer.Option("--all", help="All that the run wrote: models, results and pseudo-masks too.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask. Without it, --json only shows.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a run left, then remove what nothing reads any more: checkpoints and Ray Train's files of finished stages."""
    from threestage.clean import clean as clean_run
    from threestage.clean import what_is_left

    def agreed(left: Any) -> bool:
        if not as_json:
            _show_left(left)
        return yes or typer.confirm("Remove it?")

    if as_json and not yes:
        left, removed = what_is_left(run, everything), False
    else:
        left, removed = clean_run(run, everything, agreed, _warn)
    if as_json:
        kinds = [kind._asdict() for kind in left.kinds]
        print(json.dumps({"folder": left.folder, "kinds": kinds, "gone": left.gone, "removed": removed}))
    elif not left.gone:
        _show_left(left)
        console.print("nothing to remove", highlight=False)
    else:
        console.print("removed" if removed else "nothing was removed", highlight=False)


def _show_left(left: Any) -> None:
    table = Table("what", "files", "MB", "", title=_escape(left.folder))
    for kind in left.kinds:
        table.add_row(kind.name, f"{kind.files:,}", f"{kind.bytes / 1e6:,.1f}", "goes" if kind.goes else "stays")
    console.print(table)
