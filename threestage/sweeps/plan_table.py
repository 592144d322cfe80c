"""The plan of a sweep as a table."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from threestage.sweeps.plan import Hours, Plan, StagePlan, duration

if TYPE_CHECKING:
    from rich.table import Table


def rich_plan(plan: Plan) -> "Table":
    """The plan as a table for a rich console."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="Plan of the sweep", show_header=False)
    for name, text in _rows(plan):
        table.add_row(name, escape(text))
    return table


def _rows(plan: Plan) -> Iterator[tuple[str, str]]:
    yield "Trials", f"{plan.trials}, {plan.at_once} at once, each on {plan.devices:g} × {plan.unit}"
    for stage in plan.stages:
        yield stage.stage, _stage_row(stage)
    yield "Reused", "\n".join(plan.reused) or "nothing: the search begins with stage 1"
    yield f"{plan.unit}-hours", "\n".join(_hour_rows(plan))
    total = "the pool is not listed yet" if plan.bytes is None else _size(plan.bytes)
    parts = [f"{part.what}: {'?' if part.bytes is None else _size(part.bytes)}" for part in plan.storage]
    yield "Storage, at most", "\n".join([total, *parts])
    yield "Ends with", plan.ends_with


def _stage_row(stage: StagePlan) -> str:
    if stage.finished:
        return "finished already"
    speed = "" if stage.step_seconds is None else f" of {stage.step_seconds:.3g} s"
    keys = f"; searched: {', '.join(stage.keys)}" if stage.keys else ""
    return f"{'once' if stage.shared else 'each trial'}: {stage.steps} steps{speed}{keys}"


def _hour_rows(plan: Plan) -> Iterator[str]:
    if plan.shared_hours.device:
        yield f"shared stages: {_hours(plan.shared_hours)}"
    yield f"every trial to its end: {_hours(plan.most_hours)}"
    if plan.expected_hours is not None:
        steps = ", ".join(map(str, plan.judged_at))
        yield f"expected with ASHA: {_hours(plan.expected_hours)}"
        yield f"  judged at steps {steps}; 1 of {plan.reduction_factor:g} passes each"
    yield f"from a step measured on {plan.measured_on}, without waiting for data, evaluation and start-up"


def _hours(hours: Hours) -> str:
    return f"{hours.device:.3g} ({duration(hours.wall)})"


def _size(number: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:.3g} TiB"
