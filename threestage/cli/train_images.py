"""The command `train`: from folders of images and masks to a model."""

import re
from functools import partial
from typing import Annotated, Any

import typer

from threestage.cli.images import ingest_shown, show_ingested
from threestage.cli.init import project_name
from threestage.cli.options import (
    BudgetOption,
    JsonOption,
    LocalOption,
    OutOption,
    SeedOption,
    SetOption,
    Terminal,
    console,
    escape,
    warn,
)
from threestage.cli.runs import run_shown, shown_checks, within_budget
from threestage.errors import InputError


def train(
    images: Annotated[str, typer.Argument(metavar="IMAGES", help="folder of images, some or all with a mask")],
    masks: Annotated[str, typer.Option(help="folder of their masks, or the export of a labelling tool")],
    unlabelled: Annotated[
        str | None, typer.Option(metavar="IMAGES", help="folder of more images without masks")
    ] = None,
    classes: Annotated[
        str | None, typer.Option(metavar="YAML", help="class map; without it each value or colour becomes a class")
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(metavar="R,G,B", help="colour of unlabelled pixels in the masks; repeatable")
    ] = None,
    budget: BudgetOption = None,
    out: OutOption = None,
    seed: SeedOption = None,
    local: LocalOption = False,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train on your own images: ingest, check and run in one command. Repeat it after a kill.

    Example: threestage train photos --masks masks --unlabelled more_photos --budget 60m
    """
    from threestage.checks.run_check import check
    from threestage.checks.store import check_writable
    from threestage.report.data_set_preview import write_preview
    from threestage.run.own_images import OwnImages, described
    from threestage.run.run import check_places

    folder = f"runs/{project_name(images)}" if out is None else out
    own = OwnImages(images, masks, folder, unlabelled, classes, tuple(map(_colour, ignore or [])))
    given = [*(overrides or []), *([] if seed is None else [f"seed={seed}"])]
    config = own.config(project_name(folder), given)
    check_writable(config, folder)
    shown = Terminal(stderr=True, soft_wrap=True) if as_json else console
    shown.print(f"threestage train: the data set, the models and the report go to {escape(folder)}", highlight=False)
    reports = own.make_data_set(partial(ingest_shown, local=local, address=config.cluster.address))
    for warning in (text for report in reports for text in report.warnings):
        warn(warning)
    preview = write_preview(own.data)
    if not as_json:
        show_ingested(reports, own.data, preview)
    check_places(config, folder, local)
    for name, text in described(config, _device(config, local)):
        shown.print(f"  {name:8} {escape(text)}", highlight=False, soft_wrap=True)
    shown.print("the same in several commands:", highlight=False)
    for command in own.commands(config.name, given, local):
        shown.print(f"  {escape(command)}", highlight=False, soft_wrap=True)
    has_begun = own.has_begun
    config = within_budget(budget, config, folder, local, given)
    if budget is None and not has_begun:  # a budget has measured the steps itself
        lines = shown_checks(check(config, folder, local), not as_json)
        if any(line.problem for line in lines):
            raise typer.Exit(2)
    run_shown(config, folder, local, as_json)


def _colour(text: str) -> tuple[int, int, int]:
    parts = [int(part) for part in text.split(",")] if re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*){2}", text) else []
    if len(parts) != 3 or max(parts) > 255:
        raise InputError(f"--ignore {text}: not a colour; write red, green and blue, e.g. 255,255,255", "config/usage")
    return parts[0], parts[1], parts[2]


def _device(config: Any, local: bool) -> str:
    if local:
        import torch

        return "a GPU" if torch.cuda.is_available() else f"a CPU with {torch.get_num_threads()} threads"
    from threestage.ray_backend.connect import gpus_taken

    workers, gpus = config.cluster.most_workers, gpus_taken(config.cluster).gpus
    return f"{workers} Ray worker(s), " + (f"{gpus:g} GPU each" if gpus else "CPU only")
