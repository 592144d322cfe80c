"""What is wrong with a space for a configuration, before anything is trained."""

from collections.abc import Collection
from typing import Any, get_args

from threestage.config import STAGES, Config, Section, changed, flatten
from threestage.errors import InputError, did_you_mean
from threestage.hosts import CODE, CONFIRMING
from threestage.settings import Settings
from threestage.sweeps.space import Asha, Space, counts, most_steps, paths, stage_name, with_own_value, with_parents

SET_BY_THE_SWEEP = ("name", "seed", "stages", "pseudo_mask.of_last_stage")
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
    """The dotted keys of values, those of `stageN.changes` too."""
    found: list[str] = []
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, Settings):
            found += _leaves(value, f"{prefix}{name}.")
        elif name != "changes":
            found.append(prefix + name)
    if not prefix:
        sections = [key for key in found if key.split(".")[0] in get_args(Section)]
        found += [f"{name}.changes.{key}" for name in STAGES[1:] for key in sections]
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
        mend = f"{own[0]}.changes sets it there: search {own[0]}.changes.{key}"
    elif stages:
        mend = f"it does for stage {' and '.join(map(str, stages))}: search that, or take it out"
    else:
        mend = "take it out"
    raise InputError(
        f"search.{key}: does not matter for stage {searched}, which is searched; {mend}", "sweep/no-effect"
    )


def _check_weight(space: Space, base: Config, key: str) -> None:
    """The settings of a loss term whose weight is 0 change nothing."""
    section, _, name = key.split(".changes.")[-1].partition(".")
    weight = f"{section}.weight"
    if section not in WEIGHTED_SECTIONS or name == "weight":
        return
    there = changed(base, with_parents(space, key))
    searched = any(other == weight or other.endswith(f".changes.{weight}") for other in space.search)
    if not searched and not any(_weight(there, section, n) for n in space.stages):
        raise InputError(
            f"search.{key}: does not matter while {weight} is 0; set or search {weight}, or take it out",
            "sweep/no-effect",
        )


def _check_whole(space: Space, base: Config, key: str) -> None:
    """[0, 1] for a key that takes fractions would be tried as 0 and 1 alone."""
    parameter, now = space.search[key], flatten(base.model_dump(mode="json")).get(key.split(".changes.")[-1])
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
            for name in {place, *(f"{stage}.changes.{place}" for stage in STAGES[1:])}:
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
