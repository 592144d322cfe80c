"""What measured steps say about a run: whether they fit the devices, and how long the stages take."""

from collections.abc import Sequence

from threestage.checks.lines import Line, gibibytes
from threestage.checks.steps import Measured
from threestage.config import Config
from threestage.sweeps.plan import duration

LESS = (
    "ask for less memory: training.accumulate=2, a smaller {stage}.labelled_batch{or_unlabelled} or augment.crop_size"
)
LEFT_OUT = "besides: the pseudo-masks, waiting for data, evaluation, averaging gradients over workers, start-up"


def step_line(config: Config, measured: Measured, workers: int, seconds: float) -> Line:
    """`workers`: those that share the machine on which it was measured."""
    line = Line(measured.stage, "", seconds, doubt=measured.doubt)
    if measured.problem is not None:
        if measured.on_gpu or "memory" in measured.problem:
            return line._replace(problem=f"{measured.problem}; {_less(measured)}", code="check/memory")
        return line._replace(problem=measured.problem, code="check/no-step")
    if measured.doubt is not None:
        return line
    what = "torch's tensors" if measured.on_gpu else "the process's resident memory, libraries included"
    value = (
        f"{measured.images} images a step: {duration_of(measured.seconds)} on {measured.device}, at most "
        f"{gibibytes(measured.memory_bytes)} of {gibibytes(measured.device_bytes)} ({what})"
    )
    too_much = _too_much(config, measured, workers)
    return line._replace(value=value, problem=too_much, code=too_much and "check/memory")


def _too_much(config: Config, measured: Measured, workers: int) -> str | None:
    """Of several workers on one device."""
    sharing = max(1, int(1 / config.cluster.gpus_per_worker)) if 0 < config.cluster.gpus_per_worker < 1 else 1
    together = measured.memory_bytes * (sharing if measured.on_gpu else workers)
    if together <= measured.device_bytes:
        return None
    many = sharing if measured.on_gpu else workers
    whose = f"a GPU (cluster.gpus_per_worker={config.cluster.gpus_per_worker:g})" if measured.on_gpu else "this machine"
    return (
        f"{many} workers on {whose} need {gibibytes(together)} and there are {gibibytes(measured.device_bytes)}: "
        f"fewer cluster.workers, or {_less(measured)}"
    )


def _less(measured: Measured) -> str:
    unlabelled = "" if measured.stage == "stage1" else f" or {measured.stage}.unlabelled_batch"
    return LESS.format(stage=measured.stage, or_unlabelled=unlabelled)


def duration_line(config: Config, measured: Sequence[Measured]) -> Line:
    """Of all stages whose step was measured, one after the other."""
    known = {one.stage: one.seconds for one in measured if one.seconds}
    missing = [stage for stage in config.stage_names if stage not in known]
    if not known:
        return Line("duration", "", doubt="not estimated: no step was measured")
    each = {stage: config.stage(stage).steps * seconds for stage, seconds in known.items()}
    parts = " + ".join(
        f"{stage} {config.stage(stage).steps:,} steps {duration_of(seconds)}" for stage, seconds in each.items()
    )
    total = f" = {duration_of(sum(each.values()))}" if len(each) > 1 else ""
    value = f"{parts}{total}; {LEFT_OUT}"
    if missing:
        return Line("duration", value, doubt=f"{value}; {' and '.join(missing)} could not be measured")
    return Line("duration", value)


def duration_of(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else duration(seconds / 3600)
