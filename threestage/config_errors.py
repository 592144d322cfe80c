"""What is wrong with a configuration, key by key, as an error of one line."""

import re
import types
from collections.abc import Iterator, Sequence
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from threestage.errors import InputError, did_you_mean, joined
from threestage.settings import raised_by

LONGEST_SHOWN = 300  # characters of a wrong value


def explained(root: type[BaseModel], error: ValidationError) -> InputError:
    """What pydantic complains of: one text per key; where a key takes several types, each type's complaint."""
    by_key: dict[tuple[str | int, ...], list[dict[str, Any]]] = {}
    problems: list[dict[str, Any]] = [dict(problem) for problem in error.errors()]
    for problem in problems:
        location = tuple(part for part in problem["loc"] if isinstance(part, int) or not _is_union_tag(part))
        by_key.setdefault(location, []).append(problem)
    return joined([_explain(root, location, found) for location, found in by_key.items()], "config/invalid")


def _explain(root: type[BaseModel], location: tuple[str | int, ...], problems: Sequence[dict[str, Any]]) -> InputError:
    path, problem = ".".join(map(str, location)), problems[0]
    if problem["type"] == "extra_forbidden":
        section = _model_at(root, location[:-1])
        valid = sorted(section.model_fields) if section else []
        same = [key for key in _keys(root) if key.rpartition(".")[2] == location[-1]]
        hint = f"; did you mean {' or '.join(same)}?" if same else did_you_mean(location[-1], valid)
        text = f"{path}={_shown(problem['input'])}: unknown key{hint or ';'} valid here: {', '.join(valid)}"
        return InputError(text, "config/unknown-key")
    if problem["type"] == "missing":
        return InputError(f"{path}: is not set; give it with --set {path}=VALUE", "config/missing-key")
    own = raised_by(problem)
    message = " or ".join(dict.fromkeys(map(_in_words, problems)))
    text = message if not location else f"{path}={_shown(problem['input'])}: {message}"
    return InputError(text, "config/invalid-value" if own is None or own.code is None else own.code)


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted keys of all settings in a model."""
    for name in model.model_fields:
        section = _model_at(model, [name])
        if section is None:
            yield prefix + name
        else:
            yield from _keys(section, f"{prefix}{name}.")


def _in_words(problem: dict[str, Any]) -> str:
    """A complaint of pydantic's, which names its own types, in the words of a configuration."""
    if problem["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return "should be a section: keys with values"
    if problem["type"] == "tuple_type":
        return "should be a list, e.g. [1, 2]"
    own = raised_by(problem)
    message = str(problem["msg"]) if own is None else own.message
    if problem["type"] == "literal_error":
        message += did_you_mean(problem["input"], re.findall(r"'([^']*)'", problem["ctx"]["expected"]))
    for beginning in ("Value error, ", "Input ", "String ", "Tuple "):
        message = message.removeprefix(beginning)
    return message


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"


def _is_union_tag(part: str) -> bool:
    return part.startswith(("constrained-", "literal[", "function-", "tuple[", "[key]")) or part in {
        "int",
        "float",
        "str",
        "bool",
    }


def _model_at(root: type[BaseModel], location: Sequence[str | int]) -> type[BaseModel] | None:
    model: Any = root
    for part in location:
        field = model.model_fields.get(str(part)) if isinstance(model, type) and issubclass(model, BaseModel) else None
        if field is None:
            return None
        model = field.annotation
        if get_origin(model) in (Union, types.UnionType):
            model = next((a for a in get_args(model) if isinstance(a, type) and issubclass(a, BaseModel)), None)
    return model if isinstance(model, type) and issubclass(model, BaseModel) else None
