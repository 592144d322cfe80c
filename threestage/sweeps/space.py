"""The space that a sweep searches: a YAML file whose keys are the dotted keys of the configuration.

Stages before the first searched one are computed once and shared by all trials. A key that counts for one of those too,
such as a learning rate, is set for the searched stages and those after them alone (`stageN.changes`).
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import Field, field_serializer, field_validator, model_validator

import threestage
from threestage.config import STAGES, Config, Section, StageName, changed, flatten, stage_keys, validated
from threestage.data import storage
from threestage.errors import InputError, did_you_mean
from threestage.settings import Settings
from threestage.sweeps.parameters import Parameter, label
from threestage.yaml_text import read_yaml


class Budget(Settings):
    """Of running trials. A device is a GPU, or a worker where workers have none."""

    hours: float | None = Field(None, gt=0)
    device_hours: float | None = Field(None, gt=0)


class Asha(Settings):
    """Stops trials that score less than the best 1/`reduction_factor` had at the same step of the searched stages."""

    grace_steps: int = Field(ge=1, description="no trial is stopped before")
    reduction_factor: float = Field(3, gt=1)


class Space(Settings):
    """What is searched, how, and for how long."""

    stages: tuple[int, ...] = Field(description="that are searched, e.g. [2] or [2, 3]; those before are shared")
    search: dict[str, Parameter] = Field(description="by dotted key of the configuration")
    fixed: dict[str, Any] = Field({}, description="dotted keys that every trial has, the shared stages too")
    searcher: Literal["tpe", "random", "grid"] = "tpe"
    scheduler: Asha | None = Field(None, description="{asha: {grace_steps: …}} or none")
    trials: int | None = Field(None, ge=1, description="null: the whole grid")
    at_once: int = Field(1, ge=1)
    budget: Budget = Budget()

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
    if not isinstance(tree, dict):
        raise InputError(f"{source}: a space is a mapping with stages: and search:", "config/not-a-mapping")
    try:
        search = tree.get("search")
        for key, parameter in search.items() if isinstance(search, dict) else ():
            _check_parameter(key, parameter)
        return validated(Space, tree)
    except InputError as error:
        without = re.sub(r"; give it with --set [^\s;]+", "", error.message)  # that changes the configuration only
        raise InputError(f"{source}: {without}", error.code) from None


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


def stage_name(number: int) -> StageName:
    return STAGES[number - 1]


def overrides(space: Space, config: Config, params: Mapping[str, Any]) -> dict[str, Any]:
    """What a trial changes of the configuration: value by dotted key."""
    end = {"stages": space.last_stage, "pseudo_mask.of_last_stage": False}
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
    end = {"seed": seed, "stages": space.shared_stages, "pseudo_mask.of_last_stage": True}
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
    return [f"{name}.changes.{key}" for name in later if name not in own]


def with_own_value(base: Config, key: str) -> list[StageName]:
    """The stages whose `changes` set the key."""
    changes: dict[StageName, Mapping[Any, Any]] = {name: base.stage(name).changes for name in STAGES}
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
