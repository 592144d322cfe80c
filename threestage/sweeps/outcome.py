"""What comes of a sweep: best.yaml, which `threestage run` takes, results.json, plots, and registered models."""

from collections.abc import Sequence
from typing import Any

from threestage.config import STAGES
from threestage.data import storage
from threestage.data.records import load_manifest
from threestage.data.split import Split, make_split, saved_split
from threestage.errors import InputError, StageFailure
from threestage.run.backend import RunCallbacks
from threestage.run.run import run
from threestage.sweeps import results
from threestage.sweeps.journal import Trial, run_folder, shared_folder
from threestage.sweeps.plots import write_plots
from threestage.sweeps.prepare import Sweep
from threestage.sweeps.proposals import study_of
from threestage.sweeps.space import best_overrides, trial_config


def publish_results(requested: Sweep, trials: Sequence[Trial]) -> dict[str, Any]:
    """best.yaml, plots and results.json. Raises StageFailure where no trial has finished."""
    space, config, out = requested.space, requested.config, requested.out
    rows = results.best_rows(trials)
    if not rows:
        reasons = "; ".join(f"trial {trial.number}: {trial.reason}" for trial in trials if trial.reason)
        raise StageFailure(
            f"no trial of {len(trials)} has finished: {reasons or 'all were stopped'}", "sweep/trials-failed"
        )
    validation = results.validation_text(_split(requested), config.data)
    header = results.best_header(out, rows[0], validation)
    text = results.best_yaml(config, best_overrides(space, config, rows[0].params), header)
    storage.write_bytes(storage.join(out, "best.yaml"), text.encode())
    plots = write_plots(study_of(space, trials), list(space.search), out)
    found = results.results_json(trials, validation, ["best.yaml", "results.json", *plots])
    found["counters"] = _counters(requested, trials)
    found["summary"] = results.text_summary(trials, list(space.search), validation)
    storage.write_json(storage.join(out, "results.json"), found)
    return found


def _counters(requested: Sweep, trials: Sequence[Trial]) -> dict[str, dict[str, int]]:
    """How many times each stage was trained for the search, and how many trials took it as it was."""
    searched = [trial for trial in trials if trial.kind == "search"]
    counters: dict[str, dict[str, int]] = {}
    for number, stage in enumerate(STAGES[: requested.space.stages[-1]], 1):
        shared = number <= requested.space.shared_stages
        trained = sum(stage in trial.trained for trial in searched) + shared
        counters[stage] = {"trained": trained, "reused": sum(stage in trial.reused for trial in searched)}
    return counters


def _split(requested: Sweep) -> Split:
    """The one that the trials share."""
    config, saved = requested.config, storage.join(shared_folder(requested.out, requested.config.seed), "split.json")
    if storage.exists(saved):
        return saved_split(saved)[0]
    return make_split(config.data.root, load_manifest(config.data.root), config.data)


def promote(requested: Sweep, best: Trial, on: RunCallbacks) -> None:
    """Register the best trial's models: its run is finished, so running it again only records it.

    Raises InputError where its run was deleted, because another trial was the best before.
    """
    folder = run_folder(requested.out, best.number)
    if not storage.exists(storage.join(folder, f"stage{requested.space.last_stage}", "done.json")):
        raise InputError(
            f"--promote: the models of trial {best.number} were deleted when others were better; train them again with "
            f"threestage run {storage.join(requested.out, 'best.yaml')}",
            "sweep/models-deleted",
        )
    config = trial_config(requested.space, requested.config, best.params, best.seed)
    shared = shared_folder(requested.out, best.seed) if requested.space.shared_stages else None
    run(config, folder, False, on, shared)
