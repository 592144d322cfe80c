"""Commands on the state of runs: list, show, compare, cost."""

import time
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.table import Table

from threestage.cli.options import JsonOption, console, escape, print_json
from threestage.format import duration

app = typer.Typer(help="Show the state of runs: list, show, compare, cost.", no_args_is_help=True)
REFRESH_S = 10.0
COLOURS = {"running": "green", "waiting": "yellow", "failed": "red", "dead": "red", "damaged": "red"}
LAST_EVENTS = 20

PrefixArgument = Annotated[str, typer.Argument(metavar="PREFIX", help="folder of a run, or folder that holds runs")]
WatchOption = Annotated[bool, typer.Option("--watch", help="refresh every 10 s, until Ctrl-C")]


@app.command("list")
def list_runs(prefix: PrefixArgument = "runs", watch: WatchOption = False, as_json: JsonOption = False) -> None:
    """List runs with their state, stage, step, rate, time left, last checkpoint, mean IoU and device-hours.

    Example: threestage runs list s3://bucket/runs
    """
    from threestage.run import status

    def show(observer: Any, wait: bool) -> None:
        found = status.read_statuses(status.find_runs(prefix), observer, wait)
        print_json([one.as_json() for one in found]) if as_json else console.print(_table(found))

    _repeated(show, watch)


@app.command()
def show(prefix: PrefixArgument, watch: WatchOption = False, as_json: JsonOption = False) -> None:
    """Show one run: its state and last events (warnings, lost workers, restarts, outages).

    Example: threestage runs show s3://bucket/runs/streets --watch
    """
    from threestage.run import status
    from threestage.run_folder.events import read_events

    def show_run(observer: Any, wait: bool) -> None:
        found = status.read_statuses(status.find_runs(prefix), observer, wait)
        events = {one.uri: read_events(one.uri)[-LAST_EVENTS:] for one in found}
        if as_json:
            print_json([one.as_json() | {"events": events[one.uri]} for one in found])
            return
        for one in found:
            _show_one(one, events[one.uri])

    _repeated(show_run, watch)


@app.command()
def compare(
    prefixes: Annotated[list[str], typer.Argument(metavar="PREFIX…", help="runs, or folders that hold runs")],
    as_json: JsonOption = False,
) -> None:
    """Compare runs: settings that differ, mean IoU and device-hours.

    Example: threestage runs compare runs/demo-0 runs/demo-1
    """
    from threestage.run import status
    from threestage.run_folder.lease import LeaseObserver

    runs = [run for prefix in prefixes for run in status.find_runs(prefix)]
    found, settings = status.read_statuses(runs, LeaseObserver(), wait=False), status.different_settings(runs)
    if as_json:
        print_json({"runs": [one.as_json() for one in found], "settings": settings})
        return
    table = Table("", *(escape(one.uri.rsplit("/", 1)[-1]) for one in found))
    table.add_row("state", *(one.state for one in found))
    for stage in sorted({stage for one in found for stage in one.mean_iou}):
        table.add_row(f"mean IoU, {stage}", *(_score(one.mean_iou.get(stage)) for one in found))
    table.add_row("device-hours", *(f"{one.device_hours:.2f}" for one in found))
    for key, values in settings.items():
        table.add_row(key, *(escape(str(value)) for value in values))
    console.print(table)


@app.command()
def cost(
    prefix: PrefixArgument,
    price: Annotated[float, typer.Option("--price-per-hour", min=0, help="price of a device-hour, in any currency")],
    as_json: JsonOption = False,
) -> None:
    """Sum up the cost of runs: device-hours times a price.

    Example: threestage runs cost s3://bucket/runs --price-per-hour 2.5
    """
    from threestage.run import status
    from threestage.run_folder.lease import LeaseObserver

    found = status.read_statuses(status.find_runs(prefix), LeaseObserver(), wait=False)
    total = sum(one.device_hours for one in found)
    if as_json:
        rows = [{"uri": one.uri, "device_hours": one.device_hours, "cost": one.device_hours * price} for one in found]
        print_json({"runs": rows, "device_hours": total, "cost": total * price})
        return
    table = Table("run", "state", "device-hours", "cost")
    for one in found:
        table.add_row(escape(one.uri), one.state, f"{one.device_hours:.2f}", f"{one.device_hours * price:.2f}")
    table.add_row("all", "", f"{total:.2f}", f"{total * price:.2f}", style="bold")
    console.print(table)


def _repeated(show: Callable[[Any, bool], None], watch: bool) -> None:
    from threestage.run_folder.lease import LeaseObserver

    observer = LeaseObserver()
    if not watch:
        show(observer, True)
        return
    while True:
        console.clear()
        show(observer, False)
        time.sleep(REFRESH_S)


def _table(found: Any) -> Table:
    table = Table("run", "state", "where", "rate", "left", "checkpoint", "mean IoU", "device-hours")
    for one in found:
        table.add_row(
            escape(one.uri.rsplit("/", 1)[-1]),
            _state(one),
            _where(one),
            "" if one.per_second is None else f"{one.per_second:.1f}/s",
            "" if one.seconds_left is None else duration(one.seconds_left / 3600),
            _checkpoint(one),
            " ".join(map(_score, one.mean_iou.values())),
            f"{one.device_hours:.2f}",
        )
    return table


def _show_one(one: Any, events: Any) -> None:
    facts = {
        "state": _state(one),
        "why": escape(one.why or ""),
        "where": _where(one),
        "rate": "" if one.per_second is None else f"{one.per_second:.2f} per second",
        "time left in the stage": "" if one.seconds_left is None else duration(one.seconds_left / 3600),
        "last checkpoint": _checkpoint(one),
        "mean IoU": ", ".join(f"{stage} {_score(value)}" for stage, value in one.mean_iou.items()),
        "device-hours": f"{one.device_hours:.2f}",
        "driver": escape(one.driver or ""),
    }
    console.print(f"[bold]{escape(one.uri)}[/]", highlight=False, soft_wrap=True)
    for name, text in facts.items():
        if text:
            console.print(f"  {name}: {text}", highlight=False, soft_wrap=True)
    for event in events:
        console.print(f"  {escape(event['time'])}  {escape(event['kind'])}: {escape(event['text'])}",
                      highlight=False, soft_wrap=True)  # fmt: skip


def _state(one: Any) -> str:
    colour = COLOURS.get(one.state)
    return f"[{colour}]{one.state}[/]" if colour else str(one.state)


def _where(one: Any) -> str:
    if one.stage is None:
        return ""
    return (
        f"{escape(one.stage)} {one.step:,}/{one.steps:,}" if one.steps and one.step is not None else escape(one.stage)
    )


def _checkpoint(one: Any) -> str:
    if one.checkpoint_step is None:
        return ""
    age = "" if one.checkpoint_age_s is None else f", {duration(one.checkpoint_age_s / 3600)} ago"
    return f"step {one.checkpoint_step:,}{age}"


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
