"""What a sweep has found, from its trials alone: the best five, a summary in words, best.yaml to run, results.json, plots.

Every mean IoU here is in [0,1] and was measured on validation images; the test set has no part in a sweep.
"""

import io
import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, get_args

import yaml

from threestage.config import STAGES, Config, changed, flatten
from threestage.data import storage
from threestage.data.records import DataSettings, load_manifest
from threestage.data.split import Split, make_split, saved_split
from threestage.errors import StageFailure
from threestage.mlflow_sync.connection import redact, redact_tree
from threestage.report.scores import ABSENT, deviation, plus_minus
from threestage.sweeps.plots import IMPORTANCES, LEAST_FOR_IMPORTANCES, weighed_keys, write_plots
from threestage.sweeps.space import Space, best_overrides
from threestage.sweeps.trials import State, Trial, ranked, shared_folder, study_of

if TYPE_CHECKING:
    from rich.table import Table

BEST, LAST_EVALUATIONS = 5, 3


def publish_results(space: Space, config: Config, out: str, trials: Sequence[Trial]) -> dict[str, Any]:
    """Write best.yaml, plots and results.json. Raises StageFailure where no trial has finished."""
    rows, keys = best_rows(trials), list(space.search)
    if not rows:
        reasons = "; ".join(f"trial {trial.number}: {trial.reason}" for trial in trials if trial.reason)
        raise StageFailure(
            f"no trial of {len(trials)} has finished: {reasons or 'all were stopped'}", "sweep/trials-failed"
        )
    saved = storage.join(shared_folder(out, config.seed), "split.json")  # which the trials share
    if storage.exists(saved):
        split = saved_split(saved)[0]
    else:
        split = make_split(config.data.root, load_manifest(config.data.root), config.data)
    validation = validation_text(split, config.data)
    text = best_yaml(config, best_overrides(space, config, rows[0].params), best_header(out, rows[0], validation))
    storage.write_bytes(storage.join(out, "best.yaml"), text.encode())
    plots = write_plots(study_of(space, trials), keys, out)
    found = results_json(trials, validation, ["best.yaml", "results.json", *plots])
    found |= {"counters": _counters(space, trials), "summary": text_summary(trials, keys, validation)}
    storage.write_json(storage.join(out, "results.json"), found)
    return found


def _counters(space: Space, trials: Sequence[Trial]) -> dict[str, dict[str, int]]:
    """How many times each stage was trained for the search, and how many trials took it as it was."""
    searched = _searched(trials)
    counters: dict[str, dict[str, int]] = {}
    for number, stage in enumerate(STAGES[: space.last_stage], 1):
        trained = sum(stage in trial.trained for trial in searched) + (number <= space.shared_stages)
        counters[stage] = {"trained": trained, "reused": sum(stage in trial.reused for trial in searched)}
    return counters


# ---- The best


@dataclass(frozen=True)
class BestTrial:
    """A finished trial of the search. `spread`: sample standard deviation of its last three evaluations, None of fewer
    than two. `repeat_mean`, `repeat_std` (sample): over its `repeats` finished reruns with other seeds, without itself; of
    seeds with which all reruns are over."""

    number: int
    params: dict[str, Any]
    score: float
    spread: float | None
    repeat_mean: float | None
    repeat_std: float | None
    repeats: int


def best_rows(trials: Sequence[Trial], count: int = BEST) -> list[BestTrial]:
    """The best finished trials of the search: those that were repeated first, by their repeats' mean (their own score
    is the luckiest of many); then the others by score."""
    rows = [_row(trial, trials) for trial in ranked(_searched(trials))]
    repeated = sorted((row for row in rows if row.repeats), key=lambda row: -(row.repeat_mean or 0.0))
    return [*repeated, *(row for row in rows if not row.repeats)][:count]


def _searched(trials: Sequence[Trial]) -> list[Trial]:
    return [trial for trial in trials if trial.kind == "search"]


def _row(trial: Trial, trials: Sequence[Trial]) -> BestTrial:
    repeats = [other for other in trials if other.kind == "repeat"]
    open_seeds = {other.seed for other in repeats if not other.over}
    scores = [other.score for other in repeats if other.repeats == trial.number and other.seed not in open_seeds]
    again = [score for score in scores if score is not None]
    assert trial.score is not None
    return BestTrial(
        number=trial.number,
        params=trial.params,
        score=trial.score,
        spread=deviation([value for _, value in trial.curve[-LAST_EVALUATIONS:]]),
        repeat_mean=statistics.fmean(again) if again else None,
        repeat_std=deviation(again),
        repeats=len(again),
    )


# ---- Words and tables


def validation_text(split: Split, data: DataSettings) -> str:
    """Which images selected, in words."""
    images = f"{len(split.validation)} images"
    if split.validation_split == "carved":
        return f"{images} carved from the labelled train split (data.validation={data.validation})"
    return f"the val split of {redact(data.root)} ({images})"


def rich_best_table(rows: Sequence[BestTrial], keys: Sequence[str]) -> "Table":
    """One row per trial, its settings in the order of `keys` on a line each; keys that a trial lacks are left out, and so
    is the column of repeats where there are none."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_lines=True)
    repeated = any(row.repeats for row in rows)
    for title in ("trial", "mean IoU", "spread", *(["repeats"] if repeated else [])):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("settings", overflow="fold")
    for row in rows:
        settings = [f"{key}={_printed(row.params[key])}" for key in keys if key in row.params]
        cells = [str(row.number), _number(row.score), _number(row.spread), *([_repeats(row)] if repeated else [])]
        table.add_row(*cells, Text("\n".join(settings)))
    return table


def _repeats(row: BestTrial) -> str:
    if row.repeat_mean is None:
        return ABSENT
    return f"{plus_minus(row.repeat_mean, row.repeat_std)} ({row.repeats})"


def _number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.3f}"


def _printed(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return redact(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def text_summary(trials: Sequence[Trial], keys: Sequence[str], validation: str) -> str:
    """What became of the trials, the best five, and what they were selected on (see `validation_text`)."""
    rows = best_rows(trials)
    lines = [_counts("trials", _searched(trials))]
    if repeats := [trial for trial in trials if trial.kind == "repeat"]:
        lines.append(_counts("repeats with other seeds", repeats))
    lines += [
        f"  trial {trial.number} failed: {redact(_first_line(trial.reason))}"
        for trial in trials
        if trial.state == "failed"
    ]
    if not rows:
        return "\n".join([*lines, "no trial has finished"])
    lines += [
        "",
        *_best_lines(rows, keys),
        *_own_lines(trials),
        f"validation: {validation}",
        "the test set was not touched",
    ]
    if not weighed_keys([(trial.params, trial.score or 0.0) for trial in ranked(_searched(trials))], keys):
        lines.append(
            f"{IMPORTANCES} is left out: it needs {LEAST_FOR_IMPORTANCES} finished trials with differing mean IoU "
            "and with a setting that all of them have and that differs"
        )
    return "\n".join(lines)


def _own_lines(trials: Sequence[Trial]) -> list[str]:
    """What the configuration scores as it is, which the best is to be compared with."""
    own = [trial for trial in _searched(trials) if trial.own]
    if not own:
        return ["the configuration as it is does not lie in the space: it was not tried"]
    if own[0].score is None:
        return [f"the configuration as it is (trial {own[0].number}): {own[0].state}"]
    row = _row(own[0], trials)
    again = f", with other seeds {_repeats(row)}" if row.repeats else ""
    return [f"the configuration as it is (trial {row.number}): {row.score:.3f} mean IoU in the search{again}"]


def _counts(what: str, trials: Sequence[Trial]) -> str:
    found = Counter(trial.state for trial in trials)
    always = ("finished", "stopped", "failed")
    states = [*always, *(state for state in get_args(State) if state not in always and found[state])]
    return f"{len(trials)} {what}: {', '.join(f'{found[state]} {state}' for state in states)}"


def _first_line(text: str | None) -> str:
    return next((line.strip() for line in (text or "").splitlines() if line.strip()), "no reason was given")


def _best_lines(rows: Sequence[BestTrial], keys: Sequence[str]) -> list[str]:
    from rich.console import Console

    stream = io.StringIO()
    Console(file=stream, width=100, color_system=None).print(rich_best_table(rows, keys))
    scores = [row.score for row in rows]
    what = f"the best {len(rows)}" if len(rows) > 1 else "the best one"
    span = f"{what}: {min(scores):.3f} to {max(scores):.3f} mean IoU in the search, a range of {max(scores) - min(scores):.3f}"
    noise = (
        "spread: standard deviation of a trial's last three evaluations, all with one seed; --repeat tries other seeds"
    )
    again = ["repeats: mean ± standard deviation over other seeds (how many)"] if any(r.repeats for r in rows) else []
    return [*(line.rstrip() for line in stream.getvalue().splitlines()), span, noise, *again]


def results_json(trials: Sequence[Trial], validation: str, files: Sequence[str]) -> dict[str, Any]:
    """The same for machines, without secrets; `best` is the trial of best.yaml, null where none has finished."""
    rows = [asdict(row) for row in best_rows(trials)]
    scores = [row["score"] for row in rows]
    return redact_tree(
        {
            "format": 1,
            "best": rows[0] if rows else None,
            "best_five": rows,
            "range_of_best_five": max(scores) - min(scores) if scores else None,
            "validation": validation,
            "test_set_used": False,
            "trials": [{**trial.model_dump(mode="json"), "score": trial.score} for trial in trials],
            "files": list(files),
        }
    )


# ---- The configuration


def best_header(sweep: str, row: BestTrial, validation: str) -> list[str]:
    """The lines that best.yaml opens with; `sweep` is the sweep's folder."""
    noise = "" if row.spread is None else f", spread {row.spread:.4f} over its last evaluations"
    lines = [
        f"Found by the sweep {redact(sweep)}, trial {row.number}.",
        f"Mean IoU {row.score:.4f}{noise}, on validation: {validation}; the test set was not touched.",
    ]
    return lines if row.repeat_mean is None else [*lines, f"Repeated with other seeds: {_repeats(row)}."]


def best_yaml(config: Config, overrides: Mapping[str, Any], header: Sequence[str]) -> str:
    """`changed(config, overrides)` as YAML that `load` takes: the keys without their default, under comment lines.

    Credentials inside URIs are left out, and a comment names the keys that had some. Raises InputError like `changed`.
    """
    tree = changed(config, overrides).model_dump(mode="json", exclude_defaults=True)
    clean = redact_tree(tree)
    before, after = flatten(tree), flatten(clean)
    bare = [key for key, value in before.items() if value != after[key]]
    lines = [*header, *([f"Credentials were left out of {', '.join(bare)}."] if bare else [])]
    comments = "".join(f"# {line}\n" for text in lines for line in text.splitlines())
    return comments + yaml.safe_dump(clean, sort_keys=False, allow_unicode=True)
