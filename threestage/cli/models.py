"""Commands on trained models: list, pull, promote, rollback, lineage, export."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.tree import Tree

from threestage.cli.options import (
    JsonOption,
    ModelArgument,
    RegisteredArgument,
    TrackingOption,
    console,
    counter,
    escape,
    print_json,
    warn,
)
from threestage.run_folder.lineage import short_digest

MOST_LOST = 0.005
"""Loss of mean IoU by eight bits above which a warning appears."""

app = typer.Typer(
    help="List, pull, promote, roll back and export trained models; show their lineage.", no_args_is_help=True
)


@app.command("list")
def list_models(tracking_uri: TrackingOption = None, as_json: JsonOption = False) -> None:
    """List registered models with aliases, mean IoU and the data of the mean IoU.

    Example: threestage models list --json
    """
    from threestage.mlflow_sync.connection import redact

    registered = _models(tracking_uri)
    found = registered.versions()
    if as_json:
        print_json(found)
        return
    table = Table(
        "model",
        "version",
        "aliases",
        "mean IoU",
        "on",
        "run",
        caption=escape(redact(registered.uri)),
    )
    for row in found:
        table.add_row(*(escape(text) for text in (f"{row['name']}", *_figures_of(row))))
    console.print(table)


@app.command()
def pull(
    model: RegisteredArgument,
    out: Annotated[str, typer.Argument(help="folder on this machine")],
    program: Annotated[bool, typer.Option("--program", help="also fetch the exported program, which is code")] = False,
    tracking_uri: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Download a model as a folder that needs no MLflow: weights, lineage, model card. Every file is checked.

    Example: threestage models pull models:/camvid@champion camvid-model
    """
    folder = _models(tracking_uri).pull(model, out, warn, program)
    if as_json:
        print_json({"model": model, "folder": str(folder)})
        return
    console.print(
        f"{escape(model)}: {escape(str(folder))}   try it:  threestage predict {escape(str(folder))} IMAGES OUT",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def export(
    model: ModelArgument,
    out: Annotated[str, typer.Argument(help="file to write, e.g. camvid.onnx")],
    to: Annotated[
        str, typer.Option(help="format: onnx, onnx-int8 (eight-bit integers) or program (torch.export)")
    ] = "onnx",
    class_ids: Annotated[
        bool, typer.Option("--class-ids", help="output the class of each pixel instead of logits")
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(metavar="DATA_SET", help="data set for onnx-int8: its pool gives the ranges, its masks the loss"),
    ] = None,
    tracking_uri: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a model as one file that runs without this package. Its logits are compared with the network's.

    Example: threestage models export runs/camvid camvid.onnx --to onnx
    """
    from threestage.config import validated
    from threestage.mlflow_sync.records import RegistrySettings
    from threestage.models.model_export import ModelExportSettings, export_model
    from threestage.prediction.predict import read_model

    settings = validated(ModelExportSettings, {"to": to, "class_ids": class_ids, "data": data})
    files = read_model(model, RegistrySettings(tracking_uri=tracking_uri))
    with console.status(f"exporting {escape(model)}") as status:
        report = export_model(files, out, settings, counter(status, "scored"))
    if report.int8 is not None and report.int8.lost > MOST_LOST:
        warn(
            f"{out}: eight bits lose {100 * report.int8.lost:.1f} points of mean IoU; use --to onnx where that is too much"
        )
    if as_json:
        print_json({"model": model, **report.model_dump(mode="json")})
        return
    for line in report.lines():
        console.print(escape(line), highlight=False, soft_wrap=True)


@app.command()
def promote(
    model: RegisteredArgument,
    approve: Annotated[
        bool, typer.Option("--approve", help="confirm as a person; required after registry.approve_champion=true")
    ] = False,
    tracking_uri: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a version the champion, whatever it scores.

    Example: threestage models promote models:/camvid/7
    """
    row, before = _models(tracking_uri).promote(model, approve)
    _show_champion(row, before, as_json)


@app.command()
def rollback(model: RegisteredArgument, tracking_uri: TrackingOption = None, as_json: JsonOption = False) -> None:
    """Make the previous champion the champion again. Repeat it to go further back.

    Example: threestage models rollback models:/camvid@champion
    """
    row, before = _models(tracking_uri).roll_back(model)
    _show_champion(row, before, as_json)


def _show_champion(row: dict[str, Any], before: dict[str, Any] | None, as_json: bool) -> None:
    if as_json:
        print_json({"champion": row, "before": before})
        return
    was = "there was none before" if before is None else f"before, it was {_in_words(before)}"
    console.print(escape(f"the champion of {row['name']} is {_in_words(row)}; {was}"), highlight=False, soft_wrap=True)


@app.command()
def lineage(model: RegisteredArgument, tracking_uri: TrackingOption = None, as_json: JsonOption = False) -> None:
    """Show the origin of a model: data, pseudo-masks, teachers; and the models that learnt from it.

    Example: threestage models lineage models:/camvid@champion
    """
    tree = _models(tracking_uri).lineage(model)
    print_json(tree) if as_json else console.print(lineage_tree(tree), highlight=False)


def _models(tracking_uri: str | None) -> Any:
    from threestage.mlflow_sync.client import open_models
    from threestage.mlflow_sync.records import RegistrySettings

    return open_models(RegistrySettings(tracking_uri=tracking_uri))


def _figures_of(row: dict[str, Any]) -> tuple[str, ...]:
    score = "–" if row["mean_iou"] is None else f"{row['mean_iou']:.3f}"
    return str(row["version"]), ", ".join(row["aliases"]), score, row["validation"] or "–", row["run"] or "–"


def _in_words(row: dict[str, Any]) -> str:
    version, _, score, where, _ = _figures_of(row)
    return f"version {version} ({row['stage']}, mean IoU {score} on {where})"


def show_version(version: dict[str, Any]) -> None:
    text = f"registered: {version['name']} version {version['version']} ({version['alias']}), {version['champion']}"
    if version.get("no_program"):
        text += f"; without its exported program: {version['no_program']}"
    console.print(escape(text), highlight=False, soft_wrap=True)


# ---- A model's lineage as a tree


def lineage_tree(node: Mapping[str, Any]) -> Tree:
    """What the model learnt from below it, down to the data; then what learnt from it. `node`: what `Models.lineage` returns."""
    tree = Tree(_title(node))
    _add_origin(tree, node)
    if node["pupils"]:
        branch = tree.add("[bold]learnt from its pseudo-masks[/]")
        for pupil in node["pupils"]:
            _add_pupil(branch, pupil)
    return tree


def _title(node: Mapping[str, Any]) -> str:
    if "version" not in node:
        return f"{node['stage']}, model {short_digest(node['model_digest'])}, not registered here ({escape(node['model'])})"
    aliases = f" @{', @'.join(node['aliases'])}" if node["aliases"] else ""
    score = "" if node["mean_iou"] is None else f", mean IoU {node['mean_iou']:.3f} on {node['validation']}"
    return f"[bold]{escape(node['name'])} version {node['version']}[/]{aliases} ({node['stage']}{escape(score)})"


def _add_origin(tree: Tree, node: Mapping[str, Any]) -> None:
    """The stage's run, its data, and the pseudo-masks with the teacher that made them, which has an origin of its own."""
    found = node.get("lineage")
    if not found:
        return
    data, labelled, validation = found["data"], found["labelled"], found["validation"]
    tree.add(
        f"run [bold]{escape(str(node['run']))}[/] {node['run_id']}, threestage {found['code_version']}, {escape(found['run'])}"
    )
    tree.add(
        f"data set {escape(data['name'])} version {data['version']}, {short_digest(data['digest'])}, {escape(data['root'])}"
    )
    tree.add(
        f"labelled {labelled['images']} images, {short_digest(labelled['digest'])}, split seed {found['split_seed']}"
    )
    tree.add(
        f"validated on {validation['images']} images of {escape(validation['name'])}, {short_digest(validation['digest'])}"
    )
    if (before := found.get("continued_from")) is not None:
        tree.add(f"continues {escape(before['run'])}: {before['stage']}, model {short_digest(before['model_digest'])}")
    masks, teacher = found["learnt_from"], node.get("teacher")
    if masks is not None:
        branch = tree.add(f"pseudo-masks {_masks(masks)}, kept from confidence {found['confidence_threshold']:g}")
        if teacher is not None:
            _add_origin(branch.add(f"made by {_title(teacher)}"), teacher)


def _masks(masks: Mapping[str, Any]) -> str:
    confidence = masks["statistics"].get("mean_confidence")
    sure = "" if confidence is None else f", mean confidence {confidence:.3f}"
    left_out = f" ({masks['rejected']} left out)" if masks["rejected"] else ""
    return f"{short_digest(masks['digest'])}: {masks['images']} images{left_out}{sure}, {escape(masks['uri'])}"


def _add_pupil(tree: Tree, pupil: Mapping[str, Any]) -> None:
    branch = tree.add(_title(pupil))
    for next_one in pupil["pupils"]:
        _add_pupil(branch, next_one)
