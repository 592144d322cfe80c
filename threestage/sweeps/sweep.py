"""A sweep from its start to best.yaml: what is shared is computed once, then the trials, then the best with other seeds.

Beside what trials.py describes, its folder gets best.yaml, which `threestage run` takes, results.json and plots.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from threestage import runs
from threestage.config import STAGES, flatten
from threestage.data import storage
from threestage.data.records import load_manifest
from threestage.data.split import make_split
from threestage.errors import StageFailure
from threestage.registry import Status, open_registry
from threestage.sweeps import prepare, results
from threestage.sweeps.journal import Journal
from threestage.sweeps.mirror import Mirror
from threestage.sweeps.plan import Plan
from threestage.sweeps.plots import write_plots
from threestage.sweeps.prepare import REPEATED, Sweep
from threestage.sweeps.proposals import number_of_trials, own_params, propose, study_of
from threestage.sweeps.space import base_config, best_overrides, trial_config
from threestage.sweeps.trials import Trial, load_trials, ranked, run_folder, shared_folder

NO_LIMIT = 1_000_000


class Show(Protocol):
    """Where a sweep's progress goes."""

    def plan(self, plan: Plan) -> None: ...
    def phase(self, text: str) -> None: ...
    def stage(self, stage: str, row: Mapping[str, float]) -> None: ...
    def watch(self, what: str, done: int, total: int) -> None: ...
    def trial(self, trial: Trial) -> None: ...
    def warn(self, text: str) -> None: ...


def plan(asked: Sweep, warn: Callable[[str], None]) -> Plan:
    """What the sweep would do. Trains nothing, changes nothing."""
    from threestage.on_ray.train import connected

    asked = prepare.checked(asked)
    with connected(asked.config.cluster, asked.space.at_once):
        return prepare.plan(asked, load_trials(asked.out), warn)


def run(asked: Sweep, show: Show) -> dict[str, Any]:
    """Run the sweep or go on with it; returns what results.json holds.

    Raises InputError before anything is trained when the space, the configuration or the cluster does not allow it, and
    StageFailure when no trial has finished.
    """
    from threestage.on_ray.train import connected

    asked = prepare.checked(asked)
    key = prepare.known(asked)
    registry = open_registry(asked.config.registry)
    with connected(asked.config.cluster, asked.space.at_once):
        show.plan(prepare.plan(asked, load_trials(asked.out), show.warn))
        key = key or prepare.begin(asked)
        mirror = Mirror(registry, key, asked.config.name, flatten(asked.space.model_dump(mode="json")), show.warn)
        found: dict[str, Any] = {"files": []}
        status: Status = "KILLED"
        try:
            found = _run(asked, show, mirror)
            status = "FINISHED"
        except Exception:
            status = "FAILED"
            raise
        finally:
            summary = {"mean_iou": found["best"]["score"]} if found.get("best") else {}
            mirror.close(status, summary, {name: storage.join(asked.out, name) for name in found["files"]})
    return found


def _run(asked: Sweep, show: Show, mirror: Mirror) -> dict[str, Any]:
    def changed(trial: Trial) -> None:
        show.trial(trial)
        mirror.update(trial, {"space": ",".join(asked.space.search)})

    kept = REPEATED if asked.repeat else 1
    journal = Journal(asked.out, load_trials(asked.out), asked.config.seed, kept, changed)
    for trial in journal.trials:
        changed(trial)
    _search(asked, journal, show)
    _repeat(asked, journal, show)
    found = _publish(asked, journal.trials)
    best = journal.trials[found["best"]["number"]]
    journal.forget(0.0, keep=best)
    if asked.promote:
        _promote(asked, best, show)
    return found


# ---- Running


def _share(asked: Sweep, seed: int, show: Show) -> None:
    """Compute, unless that is done, what all trials with a seed begin with."""
    from threestage.on_ray.train import run_on_ray

    if asked.space.shared_stages:
        show.phase(f"shared by all trials with seed {seed}: the stages before stage {asked.space.stages[0]}")
        config = base_config(asked.space, asked.config, seed)
        run_on_ray(config, shared_folder(asked.out, seed), show.stage, show.warn, watch=show.watch)


def _search(asked: Sweep, journal: Journal, show: Show) -> None:
    space = asked.space
    most = number_of_trials(space)

    def following() -> Trial | None:
        if (waiting := journal.take("search")) is not None:
            return waiting
        known = journal.of("search")
        params = None
        if not known and space.searcher != "grid":
            params = own_params(space, asked.config)  # what there is to beat
        if params is None and len(known) < most:
            params = propose(space, known, asked.config.seed)
        if params is None:
            return None
        journal.add(params)
        return journal.take("search")

    over = sum(trial.over for trial in journal.of("search"))
    if over < most:
        _share(asked, asked.config.seed, show)
        show.phase("trials")
        _trials(asked, journal, following, most - over, show)


def _repeat(asked: Sweep, journal: Journal, show: Show) -> None:
    """Run the best trials, and the one that changes nothing, with other seeds; each seed has its own shared stages."""
    for seed in range(asked.config.seed + 1, asked.config.seed + 1 + asked.repeat):
        there = {trial.repeats for trial in journal.of("repeat") if trial.seed == seed}
        own = [trial for trial in journal.of("search") if trial.params == own_params(asked.space, asked.config)]
        best = ranked(journal.of("search"))[:REPEATED]
        for trial in [*best, *(trial for trial in own if trial not in best)]:
            if trial.number not in there:
                journal.add(trial.params, seed, repeats=trial.number)
        waiting = [trial for trial in journal.of("repeat") if trial.seed == seed and not trial.over]
        if waiting:
            _share(asked, seed, show)
            show.phase(f"the best trials with seed {seed}")
            without = replace(asked, space=asked.space.model_copy(update={"scheduler": None}))
            _trials(without, journal, lambda: journal.take("repeat"), len(waiting), show)
        if asked.space.shared_stages:
            storage.delete(shared_folder(asked.out, seed))


def _trials(asked: Sweep, journal: Journal, following: Any, count: int, show: Show) -> None:
    from threestage.on_ray.sweep import run_trials

    budget, begun = asked.space.budget, time.monotonic()
    devices = trial_config(asked.space, asked.config, {}, asked.config.seed).cluster.devices

    def spent() -> bool:
        hours, device_hours = (time.monotonic() - begun) / 3600, journal.seconds() * devices / 3600
        return hours > (budget.hours or NO_LIMIT) or device_hours > (budget.device_hours or NO_LIMIT)

    run_trials(asked.space, asked.config, asked.out, journal, following, count, spent, show.warn)
    journal.forget(0.0)
    waiting = sum(not trial.over for trial in journal.trials)
    if spent():
        show.warn(f"the budget is spent; {waiting} trials wait: raise it in the space and give --resume to go on")


# ---- What comes of it


def _publish(asked: Sweep, trials: list[Trial]) -> dict[str, Any]:
    """best.yaml, plots and results.json. Raises StageFailure where no trial has finished."""
    space, config, out = asked.space, asked.config, asked.out
    rows = results.best_rows(trials)
    if not rows:
        reasons = "; ".join(f"trial {trial.number}: {trial.reason}" for trial in trials if trial.reason)
        raise StageFailure(f"no trial of {len(trials)} has finished: {reasons or 'all were stopped'}")
    split = make_split(config.data.root, load_manifest(config.data.root), config.data)
    validation = results.validation_text(split, config.data)
    header = results.best_header(out, rows[0], validation)
    text = results.best_yaml(config, best_overrides(space, config, rows[0].params), header)
    storage.write_bytes(storage.join(out, "best.yaml"), text.encode())
    plots = write_plots(study_of(space, trials), list(space.search), out)
    found = results.results_json(trials, validation, ["best.yaml", "results.json", *plots])
    found["counters"] = _counters(asked, trials)
    found["summary"] = results.text_summary(trials, list(space.search), validation)
    storage.write_json(storage.join(out, "results.json"), found)
    return found


def _counters(asked: Sweep, trials: list[Trial]) -> dict[str, dict[str, int]]:
    """How many times each stage was trained for the search, and how many trials took it as it was."""
    searched = [trial for trial in trials if trial.kind == "search"]
    counters: dict[str, dict[str, int]] = {}
    for number, stage in enumerate(STAGES[: asked.space.stages[-1]], 1):
        shared = number <= asked.space.shared_stages
        trained = sum(stage in trial.trained for trial in searched) + shared
        counters[stage] = {"trained": trained, "reused": sum(stage in trial.reused for trial in searched)}
    return counters


def _promote(asked: Sweep, best: Trial, show: Show) -> None:
    """Register the best trial's models: its run is finished, so running it again only records it."""
    show.phase(f"registering the models of trial {best.number}")
    config = trial_config(asked.space, asked.config, best.params, best.seed)
    shared = shared_folder(asked.out, best.seed) if asked.space.shared_stages else None
    runs.run(config, run_folder(asked.out, best.number), False, show.stage, show.warn, show.watch, shared)
