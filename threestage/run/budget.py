"""`--budget 60m`: a time in place of steps. Costs are measured once, steps are divided once, every rerun reads them again.

budget.json    in the run's folder: the budget, the steps of each stage, the costs that they were worked out from
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from threestage.checks.step_time import MeasuredStep, StepSpecification, measure_here
from threestage.config import Config, StageName, changed
from threestage.data import storage
from threestage.data.records import MANIFEST_NAME, Manifest, load_manifest, pool_files
from threestage.data.split import make_split
from threestage.errors import InputError
from threestage.format import duration
from threestage.settings import Settings
from threestage.training.worker import default_device

NAME = "budget.json"
PLANNED = 0.9
"""Share of the budget that is divided; the rest is for the start, waiting for data and checkpoints."""
SECONDS = {"m": 60, "h": 3600, "d": 86400, "device-hours": 3600}
LEAST_STEPS = 20


class TimeBudget(NamedTuple):
    """`seconds` of the run, or of all its devices together."""

    text: str
    seconds: float
    of_devices: bool

    def wall_seconds(self, config: Config) -> float:
        return self.seconds / config.cluster.devices if self.of_devices else self.seconds


class Costs(Settings):
    """Seconds: of a step of each stage, of all evaluations of one model, of one pass over the pool."""

    steps: dict[StageName, float]
    evaluation: float
    pool_pass: float


class Resolved(Settings):
    """What budget.json holds."""

    format: int = 1
    budget: str
    steps: dict[StageName, int]
    costs: Costs

    def applied(self, config: Config) -> Config:
        return changed(config, {f"{stage}.steps": steps for stage, steps in self.steps.items()})

    def describe(self) -> str:
        """One line for the user."""
        parts = [
            f"{stage} {steps:,} steps ({duration(steps * self.costs.steps[stage] / 3600)})"
            for stage, steps in self.steps.items()
        ]
        return f"budget {self.budget}: {', '.join(parts)}; a pass over the pool {duration(self.costs.pool_pass / 3600)}"


def parse(text: str) -> TimeBudget:
    """`90m`, `4h`, `2d` or `8device-hours`. Raises InputError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(m|h|d|device-hours)\s*", text)
    if found is None or float(found[1]) == 0:
        raise InputError(f"--budget {text}: not a time; write 90m, 4h, 2d or 8device-hours", "budget/not-a-time")
    return TimeBudget(text.strip(), float(found[1]) * SECONDS[found[2]], found[2] == "device-hours")


def resolve(
    config: Config, out: str, budget: str | None, local: bool, overrides: Sequence[str] = ()
) -> Resolved | None:
    """The steps that the budget buys: those in `out`, or measured now and written there; None for a run without a budget.

    Raises InputError where the run has begun with steps or with another budget, where steps are set too, or where the
    budget is too small.
    """
    uri = storage.join(storage.absolute(out), NAME)
    if storage.exists(uri):
        saved: Resolved = storage.read_json(uri, Resolved)
        if budget is not None and parse(budget) != parse(saved.budget):
            raise InputError(
                f"--budget {budget}: {uri} was made with {saved.budget}; leave --budget out, or give another --out",
                "budget/another-budget",
            )
        return saved
    if budget is None:
        return None
    _refuse_steps(budget, overrides)
    begun = storage.join(storage.absolute(out), "stage1", "inputs.json")
    if storage.exists(begun):
        raise InputError(
            f"--budget {budget}: {out} holds a run with fixed steps; leave --budget out, or give another --out",
            "budget/run-has-steps",
        )
    resolved = measure_and_divide(config, budget, local)
    storage.write_json(uri, resolved.model_dump(mode="json"))
    return resolved


def _refuse_steps(budget: str, overrides: Sequence[str]) -> None:
    for override in overrides:
        if re.match(r"stage\d\.steps=", override):
            raise InputError(
                f"--budget {budget}: --set {override} fixes steps; give one of the two", "budget/steps-are-set"
            )


def divide(config: Config, budget: TimeBudget, costs: Costs) -> Resolved:
    """Steps in the proportion that the configuration has, as many as the budget holds beside pool passes and evaluations.

    Raises InputError where not even LEAST_STEPS of each stage fit.
    """
    wanted = {stage: config.stage(stage).steps for stage in config.stage_names}
    every = config.training.evaluate_every
    passes = passes_over_pool(config)
    fixed = passes * costs.pool_pass + len(wanted) * costs.evaluation
    of_all = sum(steps * (costs.steps[stage] + costs.evaluation / every) for stage, steps in wanted.items())
    share = (PLANNED * budget.wall_seconds(config) - fixed) / of_all
    steps = {stage: int(share * count) for stage, count in wanted.items()}
    if min(steps.values()) < LEAST_STEPS:
        needed = (fixed + of_all * LEAST_STEPS / min(wanted.values())) / PLANNED
        raise InputError(
            f"--budget {budget.text}: too little for {len(wanted)} stages, {passes} passes over the pool "
            f"({duration(costs.pool_pass / 3600)} each) and evaluation; give {needed / 60:.0f}m at least",
            "budget/too-small",
        )
    return Resolved(budget=budget.text, steps=steps, costs=costs)


def passes_over_pool(config: Config) -> int:
    """How many times a run predicts the whole pool."""
    return len(config.stage_names) - (0 if config.pseudo_mask.final_stage else 1)


def measure_and_divide(config: Config, budget: str, local: bool) -> Resolved:
    """What the budget buys on a device that will train: of this machine, or of the cluster's."""
    parse(budget)
    config = config.with_absolute_paths()
    if not local:
        from threestage.ray_backend.connect import with_gpus

        config = with_gpus(config)
    manifest = load_manifest(config.data.root)
    return bought(budget, config, manifest, list(_measured(config, manifest, local)))


def bought(budget: str, config: Config, manifest: Manifest, measured: Sequence[MeasuredStep]) -> Resolved:
    """What the budget buys by measured steps. Raises InputError where one could not be measured, and as `divide` does."""
    for one in measured:
        if reason := one.problem or one.warning:
            raise InputError(f"--budget {budget}: {one.stage} was not measured: {reason}", "budget/not-measured")
    return divide(config, parse(budget), costs_of(config, manifest, measured))


def _measured(config: Config, manifest: Manifest, local: bool) -> Iterator[MeasuredStep]:
    use_gpu = default_device().type == "cuda" if local else config.cluster.gpus > 0
    specification = StepSpecification(config=config, manifest=manifest, use_gpu=use_gpu)
    if local:
        yield from measure_here(specification)
        return
    from threestage.ray_backend.connect import connected
    from threestage.ray_backend.node_checks import measure_there

    with connected(config.cluster):
        yield from measure_there(specification)


def costs_of(config: Config, manifest: Manifest, measured: Sequence[MeasuredStep]) -> Costs:
    image = max(one.image_seconds for one in measured)
    validated = len(make_split(config.data.root, manifest, config.data).validation)
    cluster = config.cluster
    return Costs(
        steps={one.stage: one.seconds for one in measured},
        evaluation=validated * image / cluster.most_workers,
        pool_pass=_pool_images(config, manifest) * image / cluster.number_of_predictors,
    )


def _pool_images(config: Config, manifest: Manifest) -> int:
    """Images that a pass predicts. Raises InputError for a prefix of image files, which only the run counts."""
    images = sum(file.rows for file in pool_files(manifest))
    if (more := config.data.unlabelled) is None:
        return images
    if not storage.exists(storage.join(more, MANIFEST_NAME)):
        raise InputError(
            f"--budget: the images of data.unlabelled={more} are not counted before the run; ingest them, or set steps",
            "budget/pool-not-counted",
        )
    return images + sum(file.rows for file in pool_files(load_manifest(more)))
