"""The trials of a sweep: the record of what was tried, and what to try next.

The record is an Optuna study in one file of the sweep's folder, which `optuna-dashboard` opens. Every change is published
before anything follows from it, so a killed sweep continues with `--resume`. Optuna's samplers propose from a copy of the
study in memory: a proposal that was tried before must leave no trace in the record.
"""

import contextlib
import itertools
import json
import math
import shutil
import tempfile
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator

from threestage.config import STAGES, Config, StageName, changed, flatten
from threestage.data import storage
from threestage.data.outages import tries
from threestage.data.storage_errors import refuse_unwritable
from threestage.errors import InputError, Warn
from threestage.run_folder.records import StageResult
from threestage.seeds import derive_seed
from threestage.settings import Settings
from threestage.sweeps.space import Parameter, Space, label, stage_name, with_current_keys

if TYPE_CHECKING:
    import optuna

State = Literal["waiting", "running", "finished", "stopped", "failed"]
STATES: dict[State, str] = {
    "waiting": "WAITING", "running": "RUNNING", "finished": "COMPLETE", "stopped": "PRUNED", "failed": "FAIL"
}  # fmt: skip
"""Ours, and Optuna's."""
JOURNAL, STUDY, RUNS = "optuna_journal.log", "sweep", "runs"
RECORDS_BEFORE = "trials"  # of the version before: a JSON file for each trial
SETTLE_SECONDS = 60.0
TRIES = 200


# ---- One trial, its folder, its curve


class Trial(Settings):
    """`params`: value of each searched key that the trial has. `curve`: (step over all searched stages, mean IoU on the
    validation images), rising steps. `seconds`: of all its tries together.

    waiting: not begun, or begun and interrupted. stopped: given up by the scheduler. failed: `reason` says why.
    """

    number: int
    params: Annotated[dict[str, Any], BeforeValidator(with_current_keys)]
    seed: int
    state: State = "waiting"
    curve: tuple[tuple[int, float], ...] = ()
    seconds: float = 0.0
    reason: str | None = None
    trained: tuple[str, ...] = ()  # stages
    reused: tuple[str, ...] = ()  # parts that lie in the shared run
    own: bool = False  # it changes nothing of the configuration
    kind: Literal["search", "repeat"] = "search"
    repeats: int | None = None  # number of the trial that it repeats with another seed

    @property
    def over(self) -> bool:
        return self.state in ("finished", "stopped", "failed")

    @property
    def score(self) -> float | None:
        """The mean IoU that counts: at the end of the last searched stage."""
        score = self.curve[-1][1] if self.state == "finished" and self.curve else math.nan
        return score if math.isfinite(score) else None


ATTRIBUTES = tuple(name for name in Trial.model_fields if name not in ("number", "params", "state", "curve"))
"""What Optuna has no place of its own for."""


def run_folder(out: str, number: int) -> str:
    return storage.join(out, RUNS, f"{number:04d}")


def shared_folder(out: str, seed: int) -> str:
    """The run of the stages that all trials with this seed begin with."""
    return storage.join(out, "shared", f"seed{seed}")


def steps_before(config: Config, stages: Sequence[int], stage: str | None = None) -> int:
    """Steps of the searched stages that come before one of them; without one, of all."""
    return sum(config.stage(name).steps for name in _names(stages) if stage is None or name < stage)


def curve_of(run: str, stages: Sequence[int], config: Config) -> list[tuple[int, float]]:
    """The curve of a finished run's searched stages, from its own files."""
    curve = []
    for name in _names(stages):
        history = storage.read_json(storage.join(run, name, "result.json"), StageResult)["history"]
        before = steps_before(config, stages, name)
        curve += [(before + int(row["step"]), float(row["mean_iou"])) for row in history if "mean_iou" in row]
    return curve


def _names(stages: Sequence[int]) -> list[StageName]:
    return [name for number, name in enumerate(STAGES, 1) if number in stages]


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """The finished trials, best first; of equals the one that came first."""
    finished = [trial for trial in trials if trial.score is not None]
    return sorted(finished, key=lambda trial: (-(trial.score or 0.0), trial.number))


# ---- The study


def load_trials(out: str) -> list[Trial]:
    """All trials of a sweep, by number. Raises InputError for a damaged record."""
    return _Journal(out).trials() if storage.exists(storage.join(out, JOURNAL)) else _trials_before(out)


def _trials_before(out: str) -> list[Trial]:
    """As the version before wrote them."""
    records = storage.list_files(storage.join(out, RECORDS_BEFORE), recursive=False)
    return sorted((storage.read_json(uri, Trial) for uri in records), key=lambda trial: trial.number)


def _whole_lines(uri: str) -> bytes:
    """The content of a journal: Optuna would pass over a last line that was cut off, and append to it."""
    content = storage.read_small(uri, storage.MAX_JSON_BYTES)
    if not content.endswith(b"\n"):
        raise InputError(
            f"{uri}: is damaged, its last line is cut off; bring it back from a copy", "storage/damaged-json"
        )
    return content


@contextlib.contextmanager
def _refused(uri: str) -> Iterator[None]:
    """Whatever Optuna makes of a file that it did not write, as one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(
            f"{uri}: is damaged, or another version wrote it ({reason}); bring it back from a copy",
            "storage/damaged-json",
        ) from None


class _Journal:
    """An Optuna study in one file. Optuna appends to a copy on this machine, which `publish` puts into the sweep's folder:
    the file there is whole at any moment, on S3 too, and nobody waits for a lock that a killed driver held."""

    def __init__(self, out: str) -> None:
        from optuna import create_study, load_study
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        self._uri = storage.join(out, JOURNAL)
        folder = tempfile.mkdtemp(prefix="threestage-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._copy = Path(folder, JOURNAL)
        self.is_new = not storage.exists(self._uri)
        if not self.is_new:
            self._copy.write_bytes(_whole_lines(self._uri))
        with _quiet(), _refused(self._uri):
            self._storage = JournalStorage(JournalFileBackend(str(self._copy)))
            if self.is_new:
                self._study = create_study(storage=self._storage, study_name=STUDY, direction="maximize")
            else:
                self._study = load_study(storage=self._storage, study_name=STUDY)

    def trials(self) -> list[Trial]:
        """Trials that are not ours, which have no seed, are left out."""
        with _refused(self._uri):
            found = self._study.get_trials(deepcopy=False)
            return [_of_record(record, self._uri) for record in found if "seed" in record.user_attrs]

    def add(self, records: Sequence["optuna.trial.FrozenTrial"]) -> None:
        self._study.add_trials(records)

    def change(self, before: Trial, now: Trial) -> None:
        """The state is written last: Optuna changes nothing of a trial that is over."""
        import optuna

        study = self._storage.get_study_id_from_name(STUDY)
        number = self._storage.get_trial_id_from_study_id_trial_number(study, now.number)
        for step, score in now.curve:
            if step not in dict(before.curve):
                self._storage.set_trial_intermediate_value(number, step, score)
        for name in ATTRIBUTES:
            if (value := getattr(now, name)) != getattr(before, name):
                self._storage.set_trial_user_attr(number, name, value)
        if now.state != before.state:
            values = None if now.score is None else [now.score]
            self._storage.set_trial_state_values(number, optuna.trial.TrialState[STATES[now.state]], values)

    def publish(self, warn: Warn) -> None:
        """An outage is waited out: nothing follows from a change before it is published. Raises UnwritablePlace."""
        for attempt in tries("the sweep's record", warn):
            with attempt, refuse_unwritable(self._uri.removesuffix(f"/{JOURNAL}")):
                storage.write_bytes(self._uri, self._copy.read_bytes())


def _record(space: Space, trial: Trial) -> "optuna.trial.FrozenTrial":
    """A trial as Optuna holds it. Choices are JSON texts there."""
    import optuna

    state = STATES["failed" if trial.state == "finished" and trial.score is None else trial.state]
    params = {key: value if space.search[key].choice is None else label(value) for key, value in trial.params.items()}
    fixed = optuna.trial.FixedTrial(params)
    _suggested(space, fixed)  # it learns what the values were drawn from
    return optuna.trial.create_trial(
        state=optuna.trial.TrialState[state],
        value=trial.score,
        params=params,
        distributions=fixed.distributions,
        intermediate_values=dict(trial.curve),
        user_attrs=trial.model_dump(mode="json", include=set(ATTRIBUTES)),
    )


def _of_record(record: "optuna.trial.FrozenTrial", uri: str) -> Trial:
    from optuna.distributions import CategoricalDistribution

    params = {
        key: json.loads(value) if isinstance(record.distributions[key], CategoricalDistribution) else value
        for key, value in record.params.items()
    }
    found = {
        "number": record.number,
        "params": params,
        "state": next(state for state, name in STATES.items() if name == record.state.name),
        "curve": sorted(record.intermediate_values.items()),
        **{name: value for name, value in record.user_attrs.items() if name in ATTRIBUTES},
    }
    return storage.shaped(found, Trial, uri)


def _records_of(space: Space, trials: Sequence[Trial]) -> list["optuna.trial.FrozenTrial"]:
    """By number; where a number is missing, a trial that is nobody's keeps the place."""
    from optuna.trial import TrialState, create_trial

    found = {trial.number: trial for trial in trials}
    numbers = range(max(found, default=-1) + 1)
    return [_record(space, found[n]) if n in found else create_trial(state=TrialState.FAIL) for n in numbers]


class TrialStore:
    """The trials of a sweep by number; those of the version before are taken over when it has no journal yet.

    kept: the runs of so many of the best are kept, and that of the trial that changes nothing where it is more than one.
    on_change: is called with a trial after every change.
    """

    def __init__(
        self, out: str, space: Space, kept: int, on_change: Callable[[Trial], None], warn: Warn = print
    ) -> None:
        self._out, self._space, self._kept, self._on_change = out, space, kept, on_change
        self._warn = warn
        self._journal = _Journal(out)
        if self._journal.is_new and (before := _trials_before(out)):
            with _refused(storage.join(out, RECORDS_BEFORE)):
                self._journal.add(_records_of(space, before))
            self._journal.publish(self._warn)
        self._trials = {trial.number: trial for trial in self._journal.trials()}
        self._since: dict[int, tuple[float, float]] = {}  # when its present try began, and the seconds before
        self._ended: dict[int, float] = {}
        self._in_vain = 0
        self._deleted: set[int] = set()
        self._taken: set[int] = set()
        for trial in self.trials:
            if trial.state == "running":  # when the sweep was killed
                self._write(trial, state="waiting")

    @property
    def trials(self) -> list[Trial]:
        return [self._trials[number] for number in sorted(self._trials)]

    def of(self, kind: str) -> list[Trial]:
        return [trial for trial in self.trials if trial.kind == kind]

    def trial(self, number: int) -> Trial:
        return self._trials[number]

    def take(self, kind: str, seed: int) -> Trial | None:
        """A trial that waits and that this start has not had yet."""
        for trial in self.of(kind):
            if trial.state == "waiting" and trial.seed == seed and trial.number not in self._taken:
                self._taken.add(trial.number)
                return trial
        return None

    def add(self, params: dict[str, Any], seed: int, own: bool = False, repeats: int | None = None) -> None:
        kind: Literal["search", "repeat"] = "search" if repeats is None else "repeat"
        waiting = Trial(number=-1, params=params, seed=seed, own=own, kind=kind, repeats=repeats)
        self._journal.add([_record(self._space, waiting)])
        self._keep(self._journal.trials()[-1])

    def begin(self, number: int) -> None:
        """Also of a trial whose process was lost and is started again."""
        trial = self._trials[number]
        if not trial.over:
            seconds = self._until_now(trial)
            self._since[number] = (time.monotonic(), seconds)
            self._write(trial, state="running", seconds=seconds)

    def score(self, number: int, step: int, mean_iou: float) -> None:
        """A step that the trial has reported before changes nothing."""
        trial = self._trials[number]
        if step not in dict(trial.curve):
            curve = tuple(sorted([*trial.curve, (step, mean_iou)]))
            self._write(trial, curve=curve, seconds=self._until_now(trial))

    def note(self, number: int, trained: Sequence[str], reused: Sequence[str]) -> None:
        """What a trial has computed and what it has not."""
        trial = self._trials[number]
        self._write(trial, trained=tuple(sorted({*trial.trained, *trained})), reused=tuple(reused))

    def end(self, number: int, state: State, reason: str | None = None) -> None:
        """`waiting` is a trial that was interrupted and will continue. A finished one without a finite score has failed."""
        trial = self._trials[number]
        seconds = self._until_now(trial)
        if state == "finished" and not (trial.curve and math.isfinite(trial.curve[-1][1])):
            state, reason = "failed", "its last mean IoU is not a number"
        self._since.pop(number, None)
        self._ended[number] = time.monotonic()
        self._in_vain = self._in_vain + 1 if reason is not None and not trial.curve else 0
        self._write(trial, state=state, reason=reason, seconds=seconds)

    def interrupt(self) -> None:
        """What runs will continue with --resume."""
        for trial in self.trials:
            if trial.state == "running":
                self.end(trial.number, "waiting")

    @property
    def in_vain(self) -> int:
        """How many of the last trials, one after the other, have ended with an error before their first evaluation."""
        return self._in_vain

    def delete_losing_runs(self, settle_s: float = SETTLE_SECONDS, keep: Trial | None = None) -> None:
        """Delete the runs of trials that ended `settle_s` ago or earlier: their processes, which might still write there,
        are gone by then. The best of the search are kept, or only `keep`. What cannot be deleted is tried again."""
        searched = self.of("search")
        own = [trial for trial in searched if trial.own and self._kept > 1]
        kept = [*ranked(searched)[: self._kept], *own] if keep is None else [keep]
        for trial in self.trials:
            settled = time.monotonic() - self._ended.get(trial.number, 0.0) >= settle_s
            if trial.over and settled and trial not in kept and trial.number not in self._deleted:
                with contextlib.suppress(OSError):
                    storage.delete(run_folder(self._out, trial.number), self._out)
                    self._deleted.add(trial.number)

    def seconds(self) -> float:
        """Of all trials together, until now."""
        return sum(self._until_now(trial) for trial in self.trials)

    def _until_now(self, trial: Trial) -> float:
        """Seconds of a trial's earlier tries, and of the present one."""
        started, before = self._since.get(trial.number, (None, trial.seconds))
        return before if started is None else before + time.monotonic() - started

    def _write(self, trial: Trial, **changes: Any) -> None:
        """Nothing of a trial that is over, and nothing without a change."""
        changed = Trial.model_validate({**trial.model_dump(), **changes})
        if changed != trial and not trial.over:
            self._journal.change(trial, changed)
            self._keep(changed)

    def _keep(self, trial: Trial) -> None:
        self._trials[trial.number] = trial
        self._journal.publish(self._warn)
        self._on_change(trial)


# ---- What to try next: a function of the space, of the trials so far and of a seed, so that a killed sweep goes on alike


def propose(space: Space, trials: Sequence[Trial], seed: int) -> dict[str, Any] | None:
    """The params of the next trial, which no search trial has had; None when (nearly) all have been."""
    searched = [trial for trial in trials if trial.kind == "search"]
    had = {label(trial.params) for trial in searched}
    if space.searcher == "grid":
        return next((params for params in grid(space) if label(params) not in had), None)
    with _quiet():
        study = study_of(space, searched, derive_seed(seed, "sweep", len(searched)))
        for _ in range(TRIES):
            params = _suggested(space, study.ask())
            if label(params) not in had:
                return params
    return None


def study_of(space: Space, trials: Sequence[Trial], seed: int = 0) -> "optuna.Study":
    """The search trials as Optuna's sampler sees them: one that waits counts as running, so that TPE keeps away from it."""
    import optuna

    seed %= 2**32
    sampler: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler(seed)
    with _quiet():
        if space.searcher == "tpe":
            conditional = any(parameter.when for parameter in space.search.values())
            sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, group=conditional, constant_liar=True)
        study = optuna.create_study(direction="maximize", sampler=sampler)
    for trial in trials:
        if trial.kind == "search":
            running = trial.model_copy(update={"state": "running"})
            study.add_trial(_record(space, running if trial.state == "waiting" else trial))
    return study


def own_params(space: Space, config: Config) -> dict[str, Any] | None:
    """The params of a trial that changes nothing of the configuration; None where its values do not lie in the space."""
    values = flatten(changed(config, space.fixed).for_stage(stage_name(space.first_stage)).model_dump(mode="json"))
    params: dict[str, Any] = {}
    for key, parameter in space.search.items():
        if _is_there(parameter, params):
            if key not in values or not _holds(parameter, values[key]):
                return None
            params[key] = values[key]
    return params


def _holds(parameter: Parameter, value: Any) -> bool:
    """Whether a value is one that the parameter can have."""
    if parameter.choice is not None:
        return label(value) in map(label, parameter.choice)
    low, high = parameter.bounds
    return isinstance(value, int | float) and low <= value <= high and math.isclose(parameter.snapped(value), value)


def grid(space: Space) -> Iterator[dict[str, Any]]:
    """Every point once; the last key changes fastest."""
    yield from _grid(list(space.search.items()), {})


def number_of_trials(space: Space) -> int:
    """The most that the space allows."""
    if space.trials is not None and space.searcher != "grid":
        return space.trials
    return sum(1 for _ in itertools.islice(grid(space), space.trials))


def _grid(rest: Sequence[tuple[str, Parameter]], params: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if not rest:
        yield params
        return
    (key, parameter), *rest = rest
    if not _is_there(parameter, params):
        yield from _grid(rest, params)
        return
    for value in parameter.values():
        yield from _grid(rest, params | {key: value})


def _is_there(parameter: Parameter, params: Mapping[str, Any]) -> bool:
    return all(
        other in params and label(params[other]) in map(label, wanted) for other, wanted in parameter.when.items()
    )


def _suggested(space: Space, requested: "optuna.trial.BaseTrial") -> dict[str, Any]:
    params: dict[str, Any] = {}
    for key, parameter in space.search.items():
        if _is_there(parameter, params):
            params[key] = _suggest(requested, key, parameter)
    return params


def _suggest(requested: "optuna.trial.BaseTrial", key: str, parameter: Parameter) -> Any:
    if parameter.choice is not None:
        return json.loads(requested.suggest_categorical(key, [label(value) for value in parameter.choice]))
    low, high = parameter.bounds[0], parameter.last
    if parameter.whole:
        return parameter.snapped(requested.suggest_int(key, int(low), int(high), step=int(parameter.step or 1)))
    logarithmic = parameter.kind == "loguniform"
    return parameter.snapped(requested.suggest_float(key, low, high, step=parameter.step, log=logarithmic))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's log lines, and its warnings that some of this is experimental."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
