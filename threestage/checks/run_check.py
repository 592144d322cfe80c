"""Everything that can be found out about a run before it is started: `threestage check`, and a run's start."""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from functools import partial
from pathlib import Path

from threestage.checks.preflight import classes_fit, images_of, input_fits, sides_differ
from threestage.checks.result import CheckOutcome, CheckResult, merged, not_tried, run_check, try_all
from threestage.checks.step_time import MeasuredStep, StepSpecification, measure_here
from threestage.checks.store import places, tracking
from threestage.config import Config, StageName, changed, refuse_unconfirmed_hosts
from threestage.data import storage
from threestage.data.records import Manifest, load_manifest
from threestage.errors import CodedError, InputError, reason_of
from threestage.format import duration, gibibytes
from threestage.models.onnx_model import missing_packages
from threestage.models.program import EXPORT_S, unfinished, without_onnx, without_program
from threestage.models.settings import NetworkSettings
from threestage.redaction import redact
from threestage.run.budget import bought, costs_of, passes_over_pool
from threestage.run_folder import lease
from threestage.training.worker import default_device

STAGE_SECONDS = 6.0  # of measuring; a budget takes longer, and is more exact
EXPORT_SECONDS = 15.0  # of each export


def check(
    config: Config, out: str, local: bool, address: str | None = None, budget: str | None = None
) -> Iterator[CheckResult]:
    """Whether the places can be used, the input fits the settings, the cluster has room and its nodes reach the places; what
    memory and time a step of each stage takes. Changes nothing.

    What fails hides nothing that can be tried without it. `local`: without MLflow and a cluster. `address`: of the cluster,
    in place of `cluster.address`; the URL of a dashboard has all of this done there, by a job. `budget`: what it buys is said.
    """
    if local and address is not None:
        raise InputError(
            f"--address {address}: not with --local, which uses no cluster; leave one of them out",
            "check/local-address",
        )
    if address is not None and address.startswith(("http://", "https://")):
        if budget is not None:
            raise InputError(f"--budget {budget}: not with the URL of a dashboard; leave it out", "budget/not-by-job")
        from threestage.ray_backend.job_check import check_by_job

        refuse_unconfirmed_hosts(config, on_cluster=True)
        yield from check_by_job(config, out, address)
        return
    if address is not None:
        config = changed(config, {"cluster.address": address})
    storage.configure(config.storage)
    config, out = config.with_absolute_paths(), storage.absolute(out)
    results = try_all([*places(config, out), *([] if local else [tracking(config.registry)])])
    yield from [*merged(results), *_proxy(results)]
    wrong = {result.name for result in results if result.problem}
    if "--out" not in wrong and storage.exists(storage.join(out, lease.NAME)):
        yield run_check("driver", out, lambda: CheckOutcome(lease.refuse_driven(out)))
    yield from _check_input(config, out, wrong)
    manifest = None if "data.root" in wrong else _manifest(config)
    yield from _check_here(config, manifest, budget) if local else _check_cluster(config, out, manifest, budget)
    yield from _exports(config, local, sorted(wrong))  # last, since they take longest


def _exports(config: Config, local: bool, wrong: list[str]) -> Iterator[CheckResult]:
    """Whether the models can be registered with their exported program and, with the extra `onnx`, exported to ONNX."""
    names = [*([] if local else ["program"]), *([] if missing_packages() else ["onnx"])]
    if wrong:
        yield from [not_tried(names, wrong)] if names else []
        return
    fails = False
    if "program" in names:
        line = run_check(
            "program", config.network.encoder, lambda: _exportable(config, "for mlflow.pyfunc", without_program)
        )
        fails = line.warning is not None
        yield line
    if "onnx" in names:
        onnx = partial(run_check, "onnx", config.network.encoder, lambda: _exportable(config, "to ONNX", without_onnx))
        yield not_tried(["onnx"], ["program"]) if fails else onnx()  # it begins with the program


def _proxy(places: Sequence[CheckResult]) -> Iterator[CheckResult]:
    if (proxy := storage.proxy()) is not None and any(storage.is_s3(place.value) for place in places):
        yield CheckResult("proxy", f"s3:// goes through {redact(proxy)} (HTTP_PROXY, HTTPS_PROXY, NO_PROXY)")


def _exportable(config: Config, where: str, without: Callable[[NetworkSettings, float], str | None]) -> CheckOutcome:
    try:
        manifest = _manifest(config)
        seen = config if manifest is None else config.for_manifest(manifest)
        warning = without(seen.network, EXPORT_SECONDS)
        if warning is not None and warning.endswith(unfinished(EXPORT_SECONDS)):
            warning = f"not known: {unfinished(EXPORT_SECONDS)}; a run and an export give it {EXPORT_S:.0f} s"
        return CheckOutcome(f"{config.network.encoder} is exported {where}", warning)
    except InputError:  # the line of the input says why
        return CheckOutcome("", "not tried: needs input")


def _manifest(config: Config) -> Manifest | None:
    """None where it cannot be used, which the line of the input says."""
    try:
        return load_manifest(config.data.root)
    except (InputError, OSError):
        return None


def _check_input(config: Config, out: str, wrong: Set[str]) -> Iterator[CheckResult]:
    """wrong: the places that cannot be used."""
    run, missing = None if "--out" in wrong else out, wrong & {"data.root", "data.unlabelled"}
    input_line = partial(run_check, "input", config.data.root, lambda: input_fits(config, run))
    fits = not_tried(["input"], sorted(missing)) if missing else input_line()
    yield fits
    if "data.root" in wrong:
        yield not_tried(["classes", "split"], ["data.root"])
        return
    for name, find in (("classes", classes_fit), ("split", sides_differ)):
        line = run_check(name, config.data.root, partial(find, config, run))
        same = line.problem is not None and line.problem == fits.problem
        yield not_tried([name], ["input"]) if same else line


def _check_cluster(config: Config, out: str, manifest: Manifest | None, budget: str | None) -> Iterator[CheckResult]:
    from threestage.ray_backend import capacity, connect, node_checks

    config = connect.with_gpus(config)
    address = connect.address_of(config.cluster)
    if address is None:
        room = run_check("cluster", "", lambda: capacity.room_here(config))
        yield room
        yield from _check_here(config, manifest, budget, room.problem is None)
        return
    with contextlib.ExitStack() as connection:
        entry = run_check(*address, lambda: node_checks.connect_to_check(address[0], config.cluster, connection))
        yield entry
        if entry.problem is None:
            yield from _check_connected(config, out, manifest, budget)
        else:
            yield not_tried(["cluster", "nodes", *config.stage_names, "duration"], [address[0]])


def _check_connected(config: Config, out: str, manifest: Manifest | None, budget: str | None) -> Iterator[CheckResult]:
    from threestage.ray_backend.capacity import room_there
    from threestage.ray_backend.node_checks import measure_there, nodes_reach, own_file

    yield run_check("cluster", "", lambda: room_there(config))
    yield run_check("nodes", "", lambda: nodes_reach(config, out))
    if (line := own_file(config)) is not None:
        yield line
    if manifest is None:
        yield not_tried([*config.stage_names, "duration"], ["data.root"])
        return
    found = _specification(config, manifest, config.cluster.gpus > 0)
    yield from _steps(found, measure_there(found), 1, budget)


def _check_here(
    config: Config, manifest: Manifest | None, budget: str | None, room: bool | None = None
) -> Iterator[CheckResult]:
    """`room`: whether this machine has room for the workers; None without Ray, when the stages train in one process on what
    there is."""
    alone = room is None
    if manifest is None or room is False:
        yield not_tried([*config.stage_names, "duration"], ["data.root" if manifest is None else "cluster"])
        return
    use_gpu = default_device().type == "cuda" if alone else config.cluster.gpus > 0
    workers = 1 if alone else config.cluster.most_workers
    found = _specification(config, manifest, use_gpu)
    yield from _steps(found, measure_here(found), workers, budget)


def _specification(config: Config, manifest: Manifest, use_gpu: bool) -> StepSpecification:
    return StepSpecification(config=config, manifest=manifest, use_gpu=use_gpu, stage_seconds=STAGE_SECONDS)


def _steps(
    found: StepSpecification, stages: Iterator[MeasuredStep], workers: int, budget: str | None
) -> Iterator[CheckResult]:
    """`workers`: those that share the machine on which the stages are measured. `budget`: a time, whose steps are shown."""
    config, measured, start = found.config, [], time.monotonic()
    for one in stages:
        yield step_line(config, one, workers, time.monotonic() - start)
        measured.append(one)
        start = time.monotonic()
    yield duration_line(found, measured)
    if budget is not None:
        yield run_check(
            "budget", budget, lambda: CheckOutcome(bought(budget, config, found.manifest, measured).describe())
        )


# ---- The lines of the steps

LESS = (
    "ask for less memory: training.accumulate=2, a smaller {stage}.labelled_batch{or_unlabelled} or augment.crop_size"
)
LEFT_OUT = "besides: waiting for data, averaging gradients over workers, start-up"


def step_line(config: Config, measured: MeasuredStep, workers: int, seconds: float) -> CheckResult:
    """`workers`: those that share the machine on which it was measured."""
    line = CheckResult(measured.stage, "", seconds, warning=measured.warning)
    if measured.problem is not None:
        if measured.on_gpu or "memory" in measured.problem:
            return line._replace(problem=f"{measured.problem}; {_less(measured)}", code="check/memory")
        return line._replace(problem=measured.problem, code="check/no-step")
    if measured.warning is not None:
        return line
    what = "torch's tensors" if measured.on_gpu else "the process's resident memory, libraries included"
    value = (
        f"{measured.images} images a step: {duration_of(measured.seconds)} on {measured.device}, at most "
        f"{gibibytes(measured.memory_bytes)} of {gibibytes(measured.device_bytes)} ({what})"
    )
    too_much = _too_much(config, measured, workers)
    return line._replace(value=value, problem=too_much, code=too_much and "check/memory")


def _too_much(config: Config, measured: MeasuredStep, workers: int) -> str | None:
    """Of several workers on one device."""
    sharing = max(1, int(1 / config.cluster.gpus)) if 0 < config.cluster.gpus < 1 else 1
    together = measured.memory_bytes * (sharing if measured.on_gpu else workers)
    if together <= measured.device_bytes:
        return None
    many = sharing if measured.on_gpu else workers
    whose = f"a GPU (cluster.gpus_per_worker={config.cluster.gpus:g})" if measured.on_gpu else "this machine"
    return (
        f"{many} workers on {whose} need {gibibytes(together)} and there are {gibibytes(measured.device_bytes)}: "
        f"fewer cluster.workers, or {_less(measured)}"
    )


def _less(measured: MeasuredStep) -> str:
    unlabelled = "" if measured.stage == "stage1" else f" or {measured.stage}.unlabelled_batch"
    return LESS.format(stage=measured.stage, or_unlabelled=unlabelled)


def duration_line(found: StepSpecification, measured: Sequence[MeasuredStep]) -> CheckResult:
    """Of all stages, the passes over the pool and the evaluations. A stage whose step was not measured takes as long for an
    image as the one before it."""
    config = found.config
    known = {one.stage: one.seconds for one in measured if one.seconds}
    if not known:
        return CheckResult("duration", "", warning="not estimated: no step was measured")
    each = {stage: config.stage(stage).steps * seconds for stage, seconds in _step_seconds(config, known).items()}
    parts = [f"{stage} {config.stage(stage).steps:,} steps {duration_of(seconds)}" for stage, seconds in each.items()]
    predicting, problem = _predicting(found, measured)
    for name, seconds in predicting.items():
        parts.append(f"{name} {duration_of(seconds)}")
    total = duration_of(sum(each.values()) + sum(predicting.values()))
    doubts = [*problem, *(f"{one.stage} {one.warning}" for one in measured if one.seconds and one.warning)]
    if missing := [stage for stage in config.stage_names if stage not in known]:
        doubts.append(f"{' and '.join(missing)} not measured: by the images of a step")
    more = "more than " * any(one.seconds and one.warning for one in measured)
    value = f"{more}{total} = {' + '.join(parts)}; {LEFT_OUT}"
    return CheckResult("duration", value, warning=f"{value}; {'; '.join(doubts)}" if doubts else None)


def _step_seconds(config: Config, known: Mapping[StageName, float]) -> dict[StageName, float]:
    """Of all stages, from those of some."""
    last, found = next(iter(known)), dict[StageName, float]()
    for stage in config.stage_names:
        if stage in known:
            last = stage
        found[stage] = known[last] * _step_images(config, stage) / _step_images(config, last)
    return found


def _step_images(config: Config, stage: StageName) -> int:
    return images_of(config.for_stage(stage), stage, config.cluster.most_workers - 1)


def _predicting(found: StepSpecification, measured: Sequence[MeasuredStep]) -> tuple[dict[str, float], list[str]]:
    """Seconds of all passes over the pool and of all evaluations; what is not known."""
    if not any(one.image_seconds for one in measured):
        return {}, ["without the pool and the evaluations, whose images were not measured"]
    try:
        costs = costs_of(found.config, found.manifest, measured)
    except InputError:  # a prefix of image files
        return {}, ["without the pool, which the run counts, and the evaluations"]
    config, passes = found.config, passes_over_pool(found.config)
    evaluations = sum(1 + config.stage(stage).steps // config.training.evaluate_every for stage in config.stage_names)
    return {
        f"{passes} pass{'es' * (passes != 1)} over the pool": passes * costs.pool_pass,
        "evaluations": evaluations * costs.evaluation,
    }, []


def duration_of(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else duration(seconds / 3600)


# ---- As a job of a cluster, see ray_backend/job_check.py


def main(file: str) -> None:
    """Print each result as a line of JSON."""
    from threestage.ray_backend import job_check

    def say(line: CheckResult) -> None:
        print(job_check.MARK + json.dumps(line.as_json()), flush=True)

    found = job_check.JobSpecification.model_validate_json(Path(file).read_text())
    say(run_check("versions", "", lambda: job_check.image_code(found.versions)))
    try:
        for line in check(found.config, found.out, local=False):
            say(line)
    except Exception as error:
        code = error.code if isinstance(error, CodedError) else job_check.CODE
        say(CheckResult("the job", "", problem=reason_of(error), code=code))


if __name__ == "__main__":
    main(sys.argv[1])
