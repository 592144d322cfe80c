"""The command line: each command is a few lines over a function that a script could call."""

import json
import sys
from enum import StrEnum
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from threestage.errors import InputError, StageFailure

app = typer.Typer(
    help="A few labelled images and many unlabelled ones into a good segmentation model, in three stages.",
    epilog="Start with: threestage demo",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
console = Console()

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
    Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {_escape(str(error))}", highlight=False)
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
    console.print(f"demo: scenes, models and results go to {folder}", highlight=False)
    _run(demo_config(folder, seed, overrides or []), folder, local)


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
    console.print(f"results: {out}/results.json   pictures: {out}/pictures.png", highlight=False, soft_wrap=True)
    if not local:
        from threestage.tracking import model_name_of

        name = config.registry.model_name or model_name_of(config.name)
        console.print(
            f"try it:  threestage predict models:/{name}@{config.stage_names[-1]} IMAGES OUT", highlight=False
        )


@app.command()
def check(
    config: ConfigArgument,
    out: OutOption = None,
    local: LocalOption = False,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Try what a run needs before it takes a GPU: storage, MLflow and the data set. Exit code 2 when something fails."""
    from threestage.check import check as check_run
    from threestage.config import load

    resolved = load(config, overrides or [])
    outcomes = []
    for outcome in check_run(resolved, out or f"runs/{resolved.name}", local):
        outcomes.append(outcome)
        if not as_json:
            _show_outcome(outcome)
    if as_json:
        print(json.dumps([outcome._asdict() for outcome in outcomes]))
    if any(outcome.problem for outcome in outcomes):
        raise typer.Exit(2)


def _show_outcome(outcome: Any) -> None:
    mark, text = ("[green]✓[/]", outcome.value) if outcome.problem is None else ("[bold red]✗[/]", outcome.problem)
    line = f"{mark} {outcome.name}  {_escape(text)}  [dim]{outcome.seconds:.1f} s[/]"
    console.print(line, highlight=False, soft_wrap=True)


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
        console.print(f"all {report.bad} left out: {report.rejects_uri}", highlight=False, soft_wrap=True)
    table = Table("split", "images", "labelled", title=f"{out} version {report.manifest.version}")
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
    model: Annotated[str, typer.Argument(help="models:/NAME@stage3, or the folder of a run, a stage or a model.")],
    dataset: Annotated[str, typer.Argument(help="A data set made by `threestage ingest`.")],
    split: Annotated[SplitChoice, typer.Option(help="Which part of the data set.")] = SplitChoice.val,
    tracking_uri: Annotated[str | None, typer.Option(help="Of MLflow, for models:/ names.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Score a model on a data set: whole images, single scale."""
    from threestage.evaluation import evaluate_model
    from threestage.predict import open_model
    from threestage.registry import RegistrySettings

    network, card = open_model(model, RegistrySettings(tracking_uri=tracking_uri))
    result = evaluate_model(network, card, dataset, split.value)
    if as_json:
        print(json.dumps(result))
        return
    title = f"{model} on {dataset} ({split.value}, {result['images']} images, whole image, single scale)"
    console.print(title, highlight=False, soft_wrap=True)
    table = Table("class", "IoU")
    for name, iou in result["per_class_iou"].items():
        table.add_row(name, "–" if iou is None else f"{iou:.3f}")
    table.add_section()
    table.add_row("mean IoU", f"{result['mean_iou']:.3f}")
    table.add_row("pixel accuracy", f"{result['pixel_accuracy']:.3f}")
    console.print(table)


@app.command()
def predict(
    model: Annotated[str, typer.Argument(help="models:/NAME@stage3, or the folder of a run, a stage or a model.")],
    images: Annotated[str, typer.Argument(help="Folder of images.")],
    out: Annotated[str, typer.Argument(help="Gets masks/ (palette PNGs of class ids) and overlays/.")],
    tracking_uri: Annotated[str | None, typer.Option(help="Of MLflow, for models:/ names.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Predict a folder of images: a mask and an overlay for each."""
    from threestage.predict import open_model, predict_folder
    from threestage.registry import RegistrySettings

    network, card = open_model(model, RegistrySettings(tracking_uri=tracking_uri))
    with console.status("predicting") as status:
        done = predict_folder(network, card, images, out, lambda n, of: status.update(f"predicted {n} of {of} images"))
    if as_json:
        print(json.dumps({"images": done.images, "rejected": done.rejected}))
        return
    for file, reason in done.rejected:
        console.print(f"[yellow]left out[/] {_escape(file)}: {_escape(reason)}", highlight=False, soft_wrap=True)
    console.print(
        f"{done.images} images predicted, {len(done.rejected)} left out; masks and overlays in {out}", soft_wrap=True
    )


@app.command()
def models(
    tracking_uri: Annotated[str | None, typer.Option(help="Of MLflow.")] = None, as_json: JsonOption = False
) -> None:
    """List the registered models."""
    from threestage.registry import RegistrySettings, open_registry

    found = open_registry(RegistrySettings(tracking_uri=tracking_uri)).list_models()
    if as_json:
        print(json.dumps(found))
        return
    table = Table("model", "version", "aliases", "mean IoU")
    for entry in found:
        score = entry["mean_iou"]
        table.add_row(
            entry["name"], str(entry["version"]), ", ".join(entry["aliases"]), "–" if score is None else f"{score:.3f}"
        )
    console.print(table)
