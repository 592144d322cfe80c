"""What to try next: a function of the space, of the trials so far and of a seed, so that a killed sweep goes on alike."""

import itertools
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from threestage.config import Config, changed, flatten
from threestage.seeds import derive_seed
from threestage.sweeps.journal import Trial
from threestage.sweeps.space import Parameter, Space, label, stage_name

if TYPE_CHECKING:
    import optuna

TRIES = 200


def propose(space: Space, trials: Sequence[Trial], seed: int) -> dict[str, Any] | None:
    """The params of the next trial, which no search trial has had; None when (nearly) all have been."""
    searched = [trial for trial in trials if trial.kind == "search"]
    had = {_text(trial.params) for trial in searched}
    if space.searcher == "grid":
        return next((params for params in grid(space) if _text(params) not in had), None)
    with _quiet():
        study = _study(space, searched, derive_seed(seed, "sweep", len(searched)))
        for _ in range(TRIES):
            params = _suggested(space, study.ask())
            if _text(params) not in had:
                return params
    return None


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


def study_of(space: Space, trials: Sequence[Trial]) -> "optuna.Study":
    """The search trials as Optuna sees them. Choices are JSON texts there."""
    searched = [trial for trial in trials if trial.kind == "search"]
    with _quiet():
        return _study(space, searched, len(searched))


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


def _suggested(space: Space, requested: "optuna.Trial") -> dict[str, Any]:
    params: dict[str, Any] = {}
    for key, parameter in space.search.items():
        if _is_there(parameter, params):
            params[key] = _suggest(requested, key, parameter)
    return params


def _suggest(requested: "optuna.Trial", key: str, parameter: Parameter) -> Any:
    if parameter.choice is not None:
        labels = [label(value) for value in parameter.choice]
        return parameter.choice[labels.index(requested.suggest_categorical(key, labels))]
    low, high = parameter.bounds[0], parameter.last
    if parameter.whole:
        return parameter.snapped(requested.suggest_int(key, int(low), int(high), step=int(parameter.step or 1)))
    logarithmic = parameter.kind == "loguniform"
    return parameter.snapped(requested.suggest_float(key, low, high, step=parameter.step, log=logarithmic))


def _distribution(parameter: Parameter) -> "optuna.distributions.BaseDistribution":
    """What `_suggest` draws from."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if parameter.choice is not None:
        return CategoricalDistribution([label(value) for value in parameter.choice])
    low, high = parameter.bounds[0], parameter.last
    if parameter.whole:
        return IntDistribution(int(low), int(high), step=int(parameter.step or 1))
    return FloatDistribution(low, high, log=parameter.kind == "loguniform", step=parameter.step)


def _study(space: Space, trials: Sequence[Trial], seed: int) -> "optuna.Study":
    import optuna

    seed %= 2**32
    sampler: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler(seed)
    if space.searcher == "tpe":
        conditional = any(parameter.when for parameter in space.search.values())
        sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, group=conditional, constant_liar=True)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.add_trials([_record(space, trial) for trial in trials])
    return study


def _record(space: Space, trial: Trial) -> "optuna.trial.FrozenTrial":
    import optuna

    parameters = {key: space.search[key] for key in trial.params}
    return optuna.trial.create_trial(
        state=_state(trial),
        value=trial.score,
        params={
            key: label(value) if parameters[key].choice is not None else value for key, value in trial.params.items()
        },
        distributions={key: _distribution(parameter) for key, parameter in parameters.items()},
        intermediate_values=dict(trial.curve),
        user_attrs={"trial": trial.number},
    )


def _state(trial: Trial) -> "optuna.trial.TrialState":
    """What waits or runs counts as running: TPE then keeps away from it."""
    from optuna.trial import TrialState

    if trial.state == "finished":
        return TrialState.FAIL if trial.score is None else TrialState.COMPLETE
    return {"stopped": TrialState.PRUNED, "failed": TrialState.FAIL}.get(trial.state, TrialState.RUNNING)


def _text(params: Mapping[str, Any]) -> str:
    return json.dumps(params, sort_keys=True)


@contextmanager
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
