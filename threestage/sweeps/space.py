"""The search space of a sweep: read the YAML file, check it, and turn a trial's values into a configuration.

Its keys are the dotted keys of the configuration. Stages before the first searched one are computed once for all trials, so
a key that also counts for one of those is set for the searched stages and later ones alone (`stageN.overrides`).
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Field, FiniteFloat, field_serializer, field_validator, model_validator

import threestage
from threestage.config import RENAMED_KEYS, STAGES, Config, Section, StageName, changed, flatten, stage_keys, validated
from threestage.data import storage
from threestage.errors import InputError, did_you_mean
from threestage.hosts import CODE, CONFIRMING
from threestage.settings import Settings, current_key, warn_of_old_names, with_current_names
from threestage.user_files import read_yaml

# ---- One searched key: its range or choices

Number = int | FiniteFloat
INTERIOR = 0.3819660112501051  # of a range: a point that is whole by accident only
EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def _with_numbers(value: Any) -> Any:
    """YAML reads 1e-3 as text."""
    if isinstance(value, list | tuple):
        return [_with_numbers(part) for part in value]
    if not isinstance(value, str | int | float | dict | None):
        raise InputError(
            f"{value} is a {type(value).__name__}: give numbers, texts, true or false, null, or lists of them",
            "sweep/parameter",
        )
    return float(value) if isinstance(value, str) and EXPONENT.fullmatch(value) else value


Values = Annotated[tuple[Any, ...], BeforeValidator(_with_numbers)]


class Parameter(Settings):
    """Exactly one of `uniform`, `loguniform` and `choice`."""

    uniform: tuple[Number, Number] | None = Field(None, description="whole numbers where bounds and step all are")
    loguniform: tuple[FiniteFloat, FiniteFloat] | None = None
    choice: Values | None = None
    step: Number | None = Field(None, description="of uniform: only its first bound plus a multiple of this")
    when: dict[str, Values] = Field(
        {}, description="only in trials where each of these choices has one of these values"
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if sum(given is not None for given in (self.uniform, self.loguniform, self.choice)) != 1:
            raise InputError("give exactly one of uniform, loguniform and choice", "sweep/parameter")
        if self.choice is not None:
            labels = [label(value) for value in self.choice]
            if not labels:
                raise InputError("choice=[]: is empty; give values", "sweep/parameter")
            if twice := [one for one in labels if labels.count(one) > 1]:
                raise InputError(f"choice: has {twice[0]} twice; take one out", "sweep/parameter")
        else:
            self._check_range()
        if self.step is not None:
            self._check_step(self.step)
        return self

    def _check_range(self) -> None:
        low, high = self.bounds
        if low >= high:
            raise InputError(
                f"{self.kind}=[{low}, {high}]: is empty; the first bound must be below the second", "sweep/parameter"
            )
        if self.loguniform is not None and low <= 0:
            raise InputError(f"loguniform=[{low}, {high}]: both bounds must be above 0", "sweep/parameter")

    def _check_step(self, step: float) -> None:
        if self.uniform is None:
            raise InputError(f"step={step}: belongs to uniform, not to {self.kind}; take it out", "sweep/parameter")
        low, high = self.bounds
        if not 0 < step <= high - low:
            raise InputError(f"step={step}: must be above 0 and fit into uniform=[{low}, {high}]", "sweep/parameter")

    @property
    def kind(self) -> Literal["uniform", "loguniform", "choice"]:
        if self.choice is not None:
            return "choice"
        return "uniform" if self.uniform is not None else "loguniform"

    @property
    def bounds(self) -> tuple[float, float]:
        """As written, of a range."""
        found = self.uniform or self.loguniform
        assert found is not None
        return found

    @property
    def whole(self) -> bool:
        """Whether the values are whole numbers."""
        return self.uniform is not None and all(isinstance(part, int) for part in (*self.uniform, self.step or 0))

    @property
    def last(self) -> float:
        """The largest value of a range: with a step it may lie below the bound."""
        low, high = self.bounds
        return high if self.step is None else self._at(int((_decimal(high) - _decimal(low)) / _decimal(self.step)))

    def snapped(self, value: float) -> float:
        """The value of the range that is nearest to `value`, free of rounding noise."""
        if self.step is None:
            return int(value) if self.whole else float(value)
        return self._at(round((value - self.bounds[0]) / self.step))

    def values(self) -> Iterator[Any]:
        """Every value, in order; only for choices and ranges with a step."""
        if self.choice is not None:
            yield from self.choice
            return
        assert self.step is not None
        for k in range(round((self.last - self.bounds[0]) / self.step) + 1):
            yield self._at(k)

    def samples(self) -> list[Any]:
        """Values by which the others can be judged: all choices; the ends of a range, and one between."""
        if self.choice is not None:
            return list(self.choice)
        low, high = self.bounds
        between = low + INTERIOR * (high - low) if self.step is None else self._at(1)
        return [self.snapped(low), self.snapped(between), self.last]

    def _at(self, k: int) -> float:
        """The value k steps above the first bound."""
        assert self.step is not None
        exact = _decimal(self.bounds[0]) + k * _decimal(self.step)
        return int(exact) if self.whole else float(exact)


def label(value: Any) -> str:
    """A value as JSON text: equal texts are equal values."""
    return json.dumps(value, sort_keys=True)


def _decimal(value: float) -> Decimal:
    return Decimal(str(value))


# ---- The whole space


class SearchBudget(Settings):
    """Of running trials. A device is a GPU, or a worker where workers have none."""

    hours: float | None = Field(None, gt=0)
    device_hours: float | None = Field(None, gt=0)


class Asha(Settings):
    """Stops trials that score less than the best 1/`reduction_factor` had at the same step of the searched stages."""

    grace_steps: int = Field(ge=1, description="no trial is stopped before")
    reduction_factor: float = Field(3, gt=1)


RENAMED_SETTINGS = {"at_once": "max_concurrent"}


def with_current_keys(values: Any) -> Any:
    """Values by dotted key of the configuration, under its present name; what is no mapping is returned as it is."""
    if not isinstance(values, Mapping):
        return values
    return {current_key(key, RENAMED_KEYS) if isinstance(key, str) else key: value for key, value in values.items()}


class Space(Settings):
    """What is searched, how, and for how long."""

    stages: tuple[int, ...] = Field(description="that are searched, e.g. [2] or [2, 3]; those before are shared")
    search: dict[str, Parameter] = Field(description="by dotted key of the configuration")
    fixed: dict[str, Any] = Field({}, description="dotted keys that every trial has, the shared stages too")
    searcher: Literal["tpe", "random", "grid"] = "tpe"
    scheduler: Asha | None = Field(None, description="{asha: {grace_steps: …}} or none")
    trials: int | None = Field(None, ge=1, description="null: the whole grid")
    max_concurrent: int = Field(1, ge=1, description="trials at a time")
    budget: SearchBudget = SearchBudget()

    @model_validator(mode="before")
    @classmethod
    def _current_names(cls, tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        tree, _ = with_current_names(tree, RENAMED_SETTINGS)
        return tree | {
            part: with_current_keys(tree[part]) for part in ("search", "fixed") if isinstance(tree.get(part), dict)
        }

    @field_validator("scheduler", mode="before")
    @classmethod
    def _scheduler(cls, value: Any) -> Any:
        if value in (None, "none"):
            return None
        if isinstance(value, Asha):
            return value
        if not isinstance(value, dict) or list(value) != ["asha"]:
            raise InputError("give {asha: {grace_steps: 200}} or none", "config/invalid-value")
        return value["asha"]

    @field_serializer("scheduler")
    def _as_written(self, value: Asha | None) -> Any:
        return "none" if value is None else {"asha": value.model_dump()}

    @field_validator("stages", mode="before")
    @classmethod
    def _consecutive(cls, value: Any) -> Any:
        numbers = tuple(value) if isinstance(value, list | tuple) else ()
        if numbers not in [(1,), (2,), (3,), (1, 2), (2, 3), (1, 2, 3)]:
            raise InputError("give consecutive stages of 1, 2 and 3, e.g. [2] or [2, 3]", "config/invalid-value")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if not self.search:
            raise InputError("search={}: name at least one key and its range or choices", "sweep/parameter")
        if both := [key for key in self.search if key in self.fixed]:
            raise InputError(f"{both[0]}: is under search and under fixed; take it out of one", "sweep/key-twice")
        if self.trials is None and self.searcher != "grid":
            raise InputError(
                f"trials: is not set; only searcher: grid ends by itself, {self.searcher} does not",
                "config/missing-key",
            )
        before: dict[str, Parameter] = {}
        for key, parameter in self.search.items():
            _check_when(key, parameter, before)
            if self.searcher == "grid" and parameter.choice is None and parameter.step is None:
                raise InputError(
                    f"search.{key}: searcher: grid needs a choice, or uniform with a step", "sweep/parameter"
                )
            before[key] = parameter
        return self

    @property
    def first_stage(self) -> int:
        return self.stages[0]

    @property
    def last_stage(self) -> int:
        return self.stages[-1]

    @property
    def shared_stages(self) -> int:
        """How many stages are computed once, for all trials."""
        return self.stages[0] - 1


def _check_when(key: str, parameter: Parameter, before: Mapping[str, Parameter]) -> None:
    for other, wanted in parameter.when.items():
        choice = before[other].choice if other in before else None
        if choice is None:
            earlier = [name for name, searched in before.items() if searched.choice is not None]
            raise InputError(
                f"search.{key}.when: {other} is no choice that is searched above {key}"
                + (f"; those are {', '.join(earlier)}" if earlier else ""),
                "sweep/when",
            )
        labels = [label(value) for value in choice]
        if not wanted or (wrong := [label(value) for value in wanted if label(value) not in labels]):
            given = ", ".join(wrong) if wanted else "[]"
            raise InputError(
                f"search.{key}.when: {other} is never {given}; its choices are {', '.join(labels)}", "sweep/when"
            )


# ---- Read a space: a YAML file, or one of tune/


def load_space(source: str) -> Space:
    """A space from the name of a shipped one or a YAML file. Raises InputError with one line on anything that does not fit."""
    shipped = _shipped()
    file = shipped.get(source) or storage.path_here(source, "a space")
    if not file.is_file():
        hint = did_you_mean(source, shipped)
        raise InputError(
            f"{source}: neither a space that ships ({', '.join(shipped)}) nor a YAML file{hint}", "sweep/not-found"
        )
    tree = read_yaml(file.read_bytes(), source)
    if isinstance(tree, dict):
        _warn_of_old_names(tree)
    else:
        raise InputError(f"{source}: a space is a mapping with stages: and search:", "config/not-a-mapping")
    try:
        search = tree.get("search")
        for key, parameter in search.items() if isinstance(search, dict) else ():
            _check_parameter(key, parameter)
        return validated(Space, tree)
    except InputError as error:
        without = re.sub(r"; give it with --set [^\s;]+", "", error.message)  # that changes the configuration only
        raise InputError(f"{source}: {without}", error.code) from None


def _warn_of_old_names(tree: Mapping[str, Any]) -> None:
    given = [*tree, *(key for part in ("search", "fixed") if isinstance(tree.get(part), dict) for key in tree[part])]
    renamed = {key: current_key(key, RENAMED_KEYS | RENAMED_SETTINGS) for key in given if isinstance(key, str)}
    warn_of_old_names([key for key, now in renamed.items() if now != key], renamed)


def _check_parameter(key: Any, parameter: Any) -> None:
    """For complaints that name the searched key and what is valid there."""
    if not isinstance(parameter, dict):
        raise InputError(
            f"search.{key}={parameter!r}: give a range or choices, e.g. {{uniform: [0, 1]}}", "sweep/parameter"
        )
    try:
        validated(Parameter, parameter)
    except InputError as error:
        raise InputError(f"search.{key}: {error.message}", error.code) from None


def _shipped() -> dict[str, Path]:
    """The spaces of the wheel, or of a checkout, by name."""
    package = Path(threestage.__file__).resolve().parent
    folders = (package / "_shipped" / "tune", package.parent / "tune")
    folder = next((folder for folder in folders if folder.is_dir()), folders[0])
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


# ---- From a space and values to a configuration


def stage_name(number: int) -> StageName:
    return STAGES[number - 1]


def overrides(space: Space, config: Config, params: Mapping[str, Any]) -> dict[str, Any]:
    """What a trial changes of the configuration: value by dotted key."""
    end = {"stages": space.last_stage, "pseudo_mask.final_stage": False}
    return best_overrides(space, config, params) | end


def best_overrides(space: Space, config: Config, params: Mapping[str, Any]) -> dict[str, Any]:
    """The same for a run of as many stages as the configuration says."""
    base = changed(config, space.fixed)
    found = dict(space.fixed)
    for key, value in params.items():
        found |= {path: value for path in paths(space, base, key)}
    return found


def trial_config(space: Space, config: Config, params: Mapping[str, Any], seed: int) -> Config:
    return changed(config, overrides(space, config, params) | {"seed": seed})


def base_config(space: Space, config: Config, seed: int) -> Config:
    """Of the run whose stages all trials share; there must be such stages."""
    end = {"seed": seed, "stages": space.shared_stages, "pseudo_mask.final_stage": True}
    return changed(config, space.fixed | end)


def total_steps(space: Space, config: Config) -> int:
    """Steps of all searched stages together; the most that a trial can have."""
    return sum(most_steps(space, changed(config, space.fixed)))


def most_steps(space: Space, base: Config) -> list[int]:
    """Of each searched stage."""
    steps = []
    for name in map(stage_name, space.stages):
        parameter = space.search.get(f"{name}.steps")
        steps.append(max(map(int, parameter.samples())) if parameter else base.stage(name).steps)
    return steps


def paths(space: Space, base: Config, key: str) -> list[str]:
    """Where a searched key is set, so that no shared stage changes."""
    shared = [n for n in range(1, space.first_stage) if counts(space, base, key, [key], stage_name(n))]
    if not shared:
        return [key]
    if key.split(".")[0] not in get_args(Section):
        missing = " and ".join(str(n) for n in range(shared[0], space.first_stage))
        of = " and ".join(map(str, shared))
        raise InputError(
            f"search.{key}: counts for stage {of} too, which the trials share; "
            f"add {missing} to stages, or search another key",
            "sweep/shared-stage",
        )
    later, own = STAGES[space.first_stage - 1 :], with_own_value(base, key)
    return [f"{name}.overrides.{key}" for name in later if name not in own]


def with_own_value(base: Config, key: str) -> list[StageName]:
    """The stages whose `overrides` set the key."""
    changes: dict[StageName, Mapping[Any, Any]] = {name: base.stage(name).overrides for name in STAGES}
    return [name for name in STAGES if key in flatten(dict(changes[name]))]


def counts(space: Space, base: Config, key: str, paths: Sequence[str], stage: StageName) -> bool:
    """Whether a searched key, set at these dotted keys, changes what a stage computes."""
    there = changed(base, with_parents(space, key))
    before = stage_keys(there, stage)
    tried = (changed(there, dict.fromkeys(paths, value)) for value in space.search[key].samples())
    return any(stage_keys(config, stage) != before for config in tried)


def with_parents(space: Space, key: str) -> dict[str, Any]:
    """Values of other searched keys with which a conditional key is there."""
    found: dict[str, Any] = {}
    for other, wanted in space.search[key].when.items():
        found |= with_parents(space, other) | {other: wanted[0]}
    return found


# ---- Does the space fit the configuration?

SET_BY_THE_SWEEP = ("name", "seed", "stages", "pseudo_mask.final_stage")
NEVER_SEARCHED = ("name", "seed", "stages", "data", "cluster", "storage", "registry")
WEIGHTED_SECTIONS = ("consistency", "pseudo_mask")


def check_space(space: Space, config: Config) -> None:
    """Raises InputError with one line that names the key, the value and the fix."""
    known = set(_leaves(config, ""))
    for key in space.fixed:
        _check_known("fixed", key, known)
        if key in SET_BY_THE_SWEEP:
            raise InputError(f"fixed.{key}: the sweep sets it itself; take it out", "sweep/not-searchable")
        if key in CONFIRMING:
            raise InputError(f"fixed.{key}: a space names no host; give it with --set {key}=VALUE", CODE)
    base = changed(config, space.fixed)
    for key in space.search:
        _check_known("search", key, known)
        if key in NEVER_SEARCHED or key.split(".")[0] in NEVER_SEARCHED:
            raise InputError(
                f"search.{key}: may not be searched, it is no hyperparameter; set it with --set", "sweep/not-searchable"
            )
        _check_values(space, base, key)
        _check_counts(space, base, key)
        _check_weight(space, base, key)
        _check_whole(space, base, key)
    _check_stages(space, base)
    _check_places(space, base)
    if space.scheduler is not None:
        _check_asha(space, space.scheduler, base)


def _leaves(settings: Settings, prefix: str) -> list[str]:
    """The dotted keys of values, those of `stageN.overrides` too."""
    found: list[str] = []
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, Settings):
            found += _leaves(value, f"{prefix}{name}.")
        elif name != "overrides":
            found.append(prefix + name)
    if not prefix:
        sections = [key for key in found if key.split(".")[0] in get_args(Section)]
        found += [f"{name}.overrides.{key}" for name in STAGES[1:] for key in sections]
    return found


def _check_known(where: str, key: str, known: Collection[str]) -> None:
    if key in known:
        return
    if inside := sorted(other for other in known if other.startswith(f"{key}.")):
        raise InputError(f"{where}.{key}: is a section; name one of its keys, e.g. {inside[0]}", "config/unknown-key")
    hint = did_you_mean(key, known) or "; keys are written as for --set, e.g. consistency.weight"
    raise InputError(f"{where}.{key}: unknown key{hint}", "config/unknown-key")


def _check_values(space: Space, base: Config, key: str) -> None:
    there = changed(base, with_parents(space, key))
    for value in space.search[key].samples():
        try:
            changed(there, {key: value})
        except InputError as error:
            problem = error.message.removeprefix(f"{key}={value!r}: ")
            raise InputError(f"search.{key}={value!r}: {problem}", error.code) from None


def _check_counts(space: Space, base: Config, key: str) -> None:
    """A key that no searched stage depends on would only add noise."""
    stages = [n for n in range(1, len(STAGES) + 1) if counts(space, base, key, [key], stage_name(n))]
    if not set(space.stages).isdisjoint(stages):
        paths(space, base, key)
        return
    searched = " and ".join(map(str, space.stages))
    if own := [name for name in with_own_value(base, key) if name in map(stage_name, space.stages)]:
        mend = f"{own[0]}.overrides sets it there: search {own[0]}.overrides.{key}"
    elif stages:
        mend = f"it does for stage {' and '.join(map(str, stages))}: search that, or take it out"
    else:
        mend = "take it out"
    raise InputError(
        f"search.{key}: does not matter for stage {searched}, which is searched; {mend}", "sweep/no-effect"
    )


def _check_weight(space: Space, base: Config, key: str) -> None:
    """The settings of a loss term whose weight is 0 change nothing."""
    section, _, name = key.split(".overrides.")[-1].partition(".")
    weight = f"{section}.weight"
    if section not in WEIGHTED_SECTIONS or name == "weight":
        return
    there = changed(base, with_parents(space, key))
    searched = any(other == weight or other.endswith(f".overrides.{weight}") for other in space.search)
    if not searched and not any(_weight(there, section, n) for n in space.stages):
        raise InputError(
            f"search.{key}: does not matter while {weight} is 0; set or search {weight}, or take it out",
            "sweep/no-effect",
        )


def _check_whole(space: Space, base: Config, key: str) -> None:
    """[0, 1] for a key that takes fractions would be tried as 0 and 1 alone."""
    parameter, now = space.search[key], flatten(base.model_dump(mode="json")).get(key.split(".overrides.")[-1])
    if parameter.whole and parameter.step is None and isinstance(now, float):
        low, high = parameter.bounds
        raise InputError(
            f"search.{key}: uniform=[{low}, {high}] are whole numbers only; "
            f"write [{low}.0, {high}.0] for those between, or add step: 1",
            "sweep/parameter",
        )


def _weight(config: Config, section: str, stage: int) -> Any:
    return getattr(config.for_stage(stage_name(stage)), section).weight


def _check_stages(space: Space, base: Config) -> None:
    """Every trial trains the first searched stage: it must be another one in each."""
    first = stage_name(space.first_stage)
    if not any(counts(space, base, key, paths(space, base, key), first) for key in space.search):
        rest = [n for n in space.stages if n != space.first_stage]
        raise InputError(
            f"stages={list(space.stages)}: no searched key matters for stage {space.first_stage}, which every trial would "
            f"train alike; write stages: {rest}",
            "sweep/no-effect",
        )


def _check_places(space: Space, base: Config) -> None:
    """Two keys that set the same would each undo what the other tries."""
    taken: dict[str, str] = {}
    for key in space.search:
        for place in paths(space, base, key):
            for name in {place, *(f"{stage}.overrides.{place}" for stage in STAGES[1:])}:
                if (other := taken.setdefault(name, key)) != key:
                    raise InputError(f"search.{key}: sets what search.{other} sets; take one out", "sweep/key-twice")


def _check_asha(space: Space, asha: Asha, base: Config) -> None:
    """It decides by what is measured before the end."""
    every, steps = base.training.evaluate_every, most_steps(space, base)
    total, before = sum(steps), 0
    measured: list[int] = []
    for stage_steps in steps:
        measured += [before + step for step in (*range(every, stage_steps, every), stage_steps)]
        before += stage_steps
    if len(measured) < 3:
        raise InputError(
            f"scheduler.asha: training.evaluate_every={every} gives {len(measured) - 1} evaluations before the end at "
            f"step {total}, it needs 2; make evaluate_every {max(1, (steps[-1] - 1) // 2)} or less, or scheduler none",
            "sweep/asha",
        )
    if asha.grace_steps > measured[-2]:
        raise InputError(
            f"scheduler.asha.grace_steps={asha.grace_steps}: the last evaluation before the end at step {total} is at "
            f"step {measured[-2]}; give that or less, or scheduler none",
            "sweep/asha",
        )
