"""Mean ± sample standard deviation over several seeds, of what their runs and `threestage evaluate` measured."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from threestage.data import storage
from threestage.errors import InputError
from threestage.models.export import BEST_MODEL
from threestage.prediction.tta import TTASettings
from threestage.run_folder.records import Results, SavedScores


class SeedScore(NamedTuple):
    """What a mean IoU is of. `images`: "validation" (a run's own), or the split of a data set that was evaluated."""

    stage: str
    model: str
    images: str
    protocol: str


class Figure(NamedTuple):
    """`source`: the seed of a run, or the model that was evaluated. `mean_iou`: in [0,1]."""

    measured: SeedScore
    source: str
    mean_iou: float


class SeedRow(NamedTuple):
    """`deviation`: of the sample, None of a single figure."""

    measured: SeedScore
    mean: float
    deviation: float | None
    seeds: int


def seeds_table(runs: Sequence[str], evaluated: Sequence[str] = ()) -> str:
    """The Markdown table of the folders of runs (results.json), one per seed, and of `threestage evaluate --out`
    (metrics.json). All are to be of one configuration and one data set: a table tells only what `Measured` says.

    Raises InputError where a seed, or a model under one protocol, is there twice.
    """
    figures = [figure for uri in runs for figure in figures_of_run(_json(uri, "results.json", Results))]
    figures += [figure for uri in evaluated for figure in figures_of_scores(_json(uri, "metrics.json", SavedScores))]
    return markdown_table(rows_over_seeds(figures))


def _json(folder: str, name: str, shape: Any) -> Any:
    uri = storage.join(storage.absolute(folder), name)
    if not storage.exists(uri):
        raise InputError(
            f"{uri}: is missing; give the --out of a finished run, or of an evaluation", "report/no-results"
        )
    return storage.read_json(uri, shape)


def figures_of_run(results: Mapping[str, Any]) -> list[Figure]:
    """From results.json: of every stage the shipped network at the last step and at its best evaluation, and the student;
    of an older version's run the first alone."""
    figures = []
    for stage, values in results["stages"].items():
        shipped = "network" if stage == "stage1" else "teacher"
        names = {"mean_iou": f"{shipped}, last step", "best_mean_iou": f"{shipped}, best evaluation"}
        names["student_mean_iou"] = "student, last step"
        for key, name in names.items():
            if key in values:
                measured = SeedScore(stage, name, "validation", TTASettings().describe())
                figures.append(Figure(measured, f"seed {results['seed']}", values[key]))
    return figures


def figures_of_scores(scores: Mapping[str, Any]) -> list[Figure]:
    """From what `threestage evaluate` says; none where no pixel had a class. A model that lies in `best_model` is named so."""
    shipped = "network" if scores["stage"] == "stage1" else "teacher"
    best = scores["model"].rstrip("/").rsplit("/", 1)[-1] == BEST_MODEL
    name = f"{shipped}, {'best evaluation' if best else 'last step'}"
    measured = SeedScore(scores["stage"], name, scores["split"], scores["protocol"])
    return [] if scores["mean_iou"] is None else [Figure(measured, scores["model"], scores["mean_iou"])]


def rows_over_seeds(figures: Iterable[Figure]) -> list[SeedRow]:
    """One row for all that was measured alike, in order of appearance. InputError where a source comes twice in one."""
    found: dict[SeedScore, dict[str, float]] = {}
    for measured, source, mean_iou in figures:
        values = found.setdefault(measured, {})
        if source in values:
            raise InputError(
                f"{source}: is given twice ({', '.join(measured)}); give each seed once", "report/same-seed"
            )
        values[source] = mean_iou
    return [
        SeedRow(measured, statistics.fmean(values.values()), deviation([*values.values()]), len(values))
        for measured, values in found.items()
    ]


def deviation(values: Sequence[float]) -> float | None:
    """Standard deviation of the sample (divided by n - 1), None of fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def plus_minus(mean: float, spread: float | None) -> str:
    return f"{mean:.3f}" if spread is None else f"{mean:.3f} ± {spread:.3f}"


def markdown_table(rows: Iterable[SeedRow]) -> str:
    """Lines of a Markdown table."""
    lines = ["| stage | model | images | protocol | mean IoU | seeds |", "|---|---|---|---|---|---|"]
    for measured, mean, spread, seeds in rows:
        lines.append(f"| {' | '.join(measured)} | {plus_minus(mean, spread)} | {seeds} |")
    return "\n".join(lines)
