"""Runs and sweeps: demo, init, run, sweep, check, doctor, config."""

import shlex
from typing import Annotated, Any

import typer
import yaml

from threestage.cli.models import show_version
from threestage.cli.options import (
    AddressOption,
    BudgetOption,
    ConfigArgument,
    ContinueOption,
    JsonOption,
    LocalOption,
    OutOption,
    ReuseOption,
    SeedOption,
    SetOption,
    Terminal,
    TrackingOption,
    complete_preset,
    console,
    escape,
    print_json,
    warn,
)


def demo(
    out: OutOption = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="random seed, also of the scenes")] = 0,
    local: LocalOption = False,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make synthetic scenes, a few of them labelled, and run the three stages on them.

    Example: threestage demo --local --out runs/demo
    """
    from threestage.run.run import check_places, demo_config

    folder = f"runs/demo-{seed}" if out is None else out
    progress = Terminal(stderr=True) if as_json else console
    progress.print(f"demo: scenes, models and results go to {escape(folder)}", highlight=False)
    config = demo_config(folder, seed, overrides or [])
    check_places(config, folder, local)
    run_shown(config, folder, local, as_json)


def init(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="folder of the project; created if missing")],
    cluster: Annotated[
        bool,
        typer.Option("--cluster", help="add a search space, jobs and cluster files, also to an existing project"),
    ] = False,
) -> None:
    """Make a folder for a new project: configuration, class map and README. Overwrites nothing.

    Example: threestage init streets
    """
    from threestage.cli.init import next_commands, summary, write_project

    for line in (*summary(write_project(folder, cluster)), "next:", *next_commands(folder)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def run(
    config: ConfigArgument,
    out: OutOption = None,
    seed: SeedOption = None,
    local: LocalOption = False,
    overrides: SetOption = None,
    reuse: ReuseOption = None,
    continue_from: ContinueOption = None,
    budget: BudgetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run the stages of a configuration. Repeat the same command after a kill: it skips finished stages and resumes.

    Example: threestage run camvid --set data.root=data/camvid --set network.weights=MOBILENETV2_100.pth --out runs/camvid
    """
    from threestage.config import load
    from threestage.run.run import check_places

    resolved = load(config, [*(overrides or []), *([] if seed is None else [f"seed={seed}"])])
    folder = f"runs/{resolved.name}" if out is None else out
    check_places(resolved, folder, local)
    resolved = within_budget(budget, resolved, folder, local, overrides or [])
    run_shown(resolved, folder, local, as_json, reuse, continue_from)


def within_budget(budget: str | None, config: Any, out: str, local: bool, overrides: list[str]) -> Any:
    """The configuration with the steps that the budget buys, which are printed."""
    from threestage.run.budget import resolve

    with Terminal(stderr=True).status("measuring a step of each stage" if budget else "reading the run's folder"):
        resolved = resolve(config, out, budget, local, overrides)
    if resolved is None:
        return config
    Terminal(stderr=True, soft_wrap=True).print(resolved.describe(), highlight=False, markup=False)
    return resolved.applied(config)


def run_shown(
    config: Any, out: str, local: bool, as_json: bool, reuse: str | None = None, continue_from: str | None = None
) -> None:
    from threestage.cli.progress import StageProgress
    from threestage.report.scores import rich_table, rounds_table
    from threestage.run.backend import RunCallbacks
    from threestage.run.run import run_checked
    from threestage.verdict import verdict_text

    with StageProgress(config, Terminal(stderr=True) if as_json else console) as progress:
        on = RunCallbacks(progress.on_metrics, progress.warn, progress.on_progress)
        results = run_checked(config, out, local, on, reuse, continue_from)
    if as_json:
        print_json(results)
        return
    console.print(rich_table(results))
    if "rounds" in results:
        console.print(rounds_table(results["rounds"]))
    if (verdict := verdict_text(results)) is not None:
        console.print(verdict, highlight=False, markup=False)
    console.print(f"results: {out}/results.json   pictures: {out}/pictures.png   report: {out}/report.html",
                  highlight=False, markup=False, soft_wrap=True)  # fmt: skip
    registered = results.get("registered", [])
    for version in registered:
        show_version(version)
    model = f"models:/{registered[-1]['name']}@champion" if registered else out
    here = [] if registered else ["--local"]
    predict = shlex.join(["threestage", "predict", model, "IMAGES", "OUT", *here])
    console.print(f"next:  {predict}", highlight=False, markup=False, soft_wrap=True)


def sweep(
    space: Annotated[str, typer.Argument(help="built-in space (thresholds, loss_weights, …) or YAML file")],
    config: ConfigArgument,
    out: OutOption = None,
    overrides: SetOption = None,
    trials: Annotated[int | None, typer.Option(min=1, help="number of trials; default: that of the space")] = None,
    at_once: Annotated[int | None, typer.Option(min=1, help="concurrent trials; default: that of the space")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the plan and stop")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="resume the sweep in --out")] = False,
    repeat: Annotated[
        int,
        typer.Option(min=0, help="repeat the best three trials with so many other seeds, and choose among them"),
    ] = 0,
    promote: Annotated[bool, typer.Option("--promote", help="register the models of the best trial")] = False,
    as_json: JsonOption = False,
) -> None:
    """Search thresholds, loss weights and other settings on the validation images. Earlier stages are trained once.

    Example: threestage sweep thresholds_and_weights my.yaml --set cluster.workers=2 --out s3://bucket/sweep
    """
    from threestage.cli.progress import SweepProgress
    from threestage.config import load
    from threestage.sweeps import sweep as sweeps
    from threestage.sweeps.plan import plan_json, rich_plan
    from threestage.sweeps.space import load_space

    resolved, searched = load(config, overrides or []), load_space(space)
    given = {"trials": trials or searched.trials, "max_concurrent": at_once or searched.max_concurrent}
    requested = sweeps.Sweep(
        searched.model_copy(update=given),
        resolved,
        f"runs/{resolved.name}-sweep" if out is None else out,
        resume=resume,
        repeat=repeat,
        promote=promote,
    )
    if dry_run:
        plan = sweeps.plan(requested, warn)
        print_json(plan_json(plan)) if as_json else console.print(rich_plan(plan))
        return
    shown = Terminal(stderr=True) if as_json else console
    with SweepProgress(resolved, shown) as progress:
        found = sweeps.run(requested, progress)
    if as_json:
        print_json(found)
        return
    console.print(found["summary"], highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"results: {requested.out}/results.json   next:  threestage run {requested.out}/best.yaml",
        markup=False,
        soft_wrap=True,
    )


def check(
    config: ConfigArgument,
    out: OutOption = None,
    local: LocalOption = False,
    overrides: SetOption = None,
    budget: BudgetOption = None,
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            metavar="HOST:PORT|URL",
            help="address of a cluster; with the URL of its dashboard, a job runs all checks there",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check what a run needs: storage, MLflow, the data set, the cluster, a step of each stage.

    ✓ is right, ✗ is wrong, ! may be wrong or was not checked. The exit code is 2 if something is wrong.

    Example: threestage check mine.yaml --out s3://bucket/run --address http://127.0.0.1:8265
    """
    from threestage.checks.run_check import check as check_run
    from threestage.config import load

    resolved = load(config, overrides or [])
    folder = f"runs/{resolved.name}" if out is None else out
    lines = shown_checks(check_run(resolved, folder, local, address, budget), not as_json)
    if as_json:
        print_json([line.as_json() for line in lines])
    if any(line.problem for line in lines):
        raise typer.Exit(2)


def doctor(
    out: Annotated[
        str | None, typer.Option("--out", metavar="URI", help="folder to try to write into; default: runs")
    ] = None,
    address: AddressOption = None,
    tracking_uri: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what this machine has and reaches: versions, devices, memory, Ray, MLflow, a store, the hub of weights.

    ✓ is well, ✗ is wrong, ! may be wrong. Exit code 2 when something is wrong.

    Example: threestage doctor --out s3://bucket/runs
    """
    from threestage.checks.doctor import examine

    lines = shown_checks(examine(out, address, tracking_uri), not as_json)
    if as_json:
        print_json([line.as_json() for line in lines])
    if any(line.problem for line in lines):
        raise typer.Exit(2)


def shown_checks(results: Any, show: bool) -> list[Any]:
    """All results, each printed as it is there, above the spinner."""
    lines = []
    with (console if show else Terminal(stderr=True)).status("trying one thing after the other"):
        for line in results:
            lines.append(line)
            if show:
                _show_check(line)
    return lines


def _show_check(line: Any) -> None:
    mark, text = "[green]✓[/]", line.value
    if line.problem or line.warning:
        problem = f"{line.problem} [{line.code}]" if line.code else line.problem
        mark, text = ("[bold red]✗[/]", problem) if line.problem else ("[yellow]![/]", line.warning)
    took = f"  [dim]{line.seconds:.1f} s[/]" if line.seconds else ""
    console.print(f"{mark} {line.name}  {escape(text)}{took}", highlight=False, soft_wrap=True)


def config(
    preset: Annotated[
        str | None,
        typer.Argument(help="preset or YAML file; without it, list the presets", autocompletion=complete_preset),
    ] = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print a whole configuration, or the list of presets.

    Example: threestage config demo --set stage1.steps=1000
    """
    from threestage.config import load, preset_headers

    if preset is None:
        headers = preset_headers()
        if as_json:
            print_json(headers)
        else:
            for name, header in headers.items():
                console.print(f"[bold]{name}[/]\n{_indented(header)}", highlight=False, soft_wrap=True)
        return
    tree = load(preset, overrides or []).model_dump(mode="json")
    print_json(tree) if as_json else print(yaml.safe_dump(tree, sort_keys=False), end="")


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
