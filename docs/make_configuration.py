"""docs/configuration.md from the settings' own models: `python docs/make_configuration.py` writes it, a test compares."""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator, Sequence
from functools import cache, reduce
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from threestage.config import Config, load
from threestage.settings import Settings

PAGE = Path(__file__).parent / "configuration.md"
LINE_WIDTH = 100
INTRODUCTION = """# Every setting

- **One setting**: `--set a.b=c`.
- **Your own file**: YAML with nested keys. `base: PRESET` gives the keys that the file leaves out.
- **All values**: `threestage config PRESET` prints a whole configuration.

A default is that of the preset `own_images`. Where a configuration without a preset has another,
that follows in brackets.

Unknown keys and wrong values are errors that name the valid ones. "Paper: 0" is the value of the
published runs ([the method](method.md)).

`python docs/make_configuration.py` writes this page from the models that check a configuration. Do
not edit it by hand.
"""
NAMES = {int: "whole number", float: "number", str: "text", bool: "`true`, `false`", NoneType: "`null`"}
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def page() -> str:
    """The whole page: a section for each section of the configuration, the keys of the top first."""
    top = {name: field for name, field in Config.model_fields.items() if _section(field) is None}
    parts = [INTRODUCTION, "## Run\n", _table(_rows(top, Config, ""))]
    for name, field in Config.model_fields.items():
        if (model := _section(field)) is not None:
            parts += [f"## {name}\n", *_purpose(model), _table(_keys(model, f"{name}."))]
    return "\n".join(parts)


def _section(field: FieldInfo) -> type[Settings] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Settings) else None


def _purpose(model: type[Settings]) -> list[str]:
    """The first paragraph of a model's docstring, if it has one of its own."""
    text = " ".join((model.__doc__ or "").split("\n\n")[0].split())
    return [textwrap.fill(text, LINE_WIDTH, break_long_words=False, break_on_hyphens=False) + "\n"] if text else []


def _keys(model: type[Settings], prefix: str) -> Iterator[tuple[str, ...]]:
    plain = {name: field for name, field in model.model_fields.items() if _section(field) is None}
    yield from _rows(plain, model, prefix)
    for name, field in model.model_fields.items():
        if (inner := _section(field)) is not None:
            yield from _keys(inner, f"{prefix}{name}.")


def _rows(fields: dict[str, FieldInfo], model: type[Settings], prefix: str) -> Iterator[tuple[str, ...]]:
    told = _docstrings(model)
    for name, field in fields.items():
        text = field.description or told.get(name, "")
        yield f"`{prefix}{name}`", _values(field), _default(field, f"{prefix}{name}"), text


def _table(rows: Iterator[tuple[str, ...]]) -> str:
    lines = ["| key | values | default | meaning |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _values(field: FieldInfo) -> str:
    kinds = [_type(kind) for kind in _alternatives(field.annotation)]
    return " or ".join([_bounded(kinds[0], field.metadata), *kinds[1:]])


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _bounded(text: str, metadata: Sequence[Any]) -> str:
    bounds = [
        f"{sign} {getattr(item, name)}" for item in metadata for name, sign in BOUNDS.items() if hasattr(item, name)
    ]
    return f"{text} {', '.join(bounds)}".rstrip()


def _type(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind in NAMES:
        return NAMES[kind]
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is Annotated:
        first, *rest = arguments
        return _bounded(_type(first), [part for item in rest for part in getattr(item, "metadata", [item])])
    if origin is tuple:
        return f"list of {_type(arguments[0])}" if arguments[-1] is ... else f"[{', '.join(map(_type, arguments))}]"
    return "mapping"


def _default(field: FieldInfo, key: str) -> str:
    if field.default is PydanticUndefined:
        return "none: must be given"
    used = reduce(getattr, key.split("."), _preset())
    return f"`{_yaml(used)}`" + (f" (`{_yaml(field.default)}`)" if used != field.default else "")


@cache
def _preset() -> Config:
    return load("own_images", ["data.root=none"])


def _yaml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_yaml(inner)}' for key, inner in value.items())}}}"
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return str(value)


def _docstrings(model: type[Settings]) -> dict[str, str]:
    """The descriptions of keys that have no `description`: the string below a key, or "`key`: …" in the model's docstring."""
    told = {}
    for key, text in re.findall(r"`(\w+)`: (.+?)(?=\s+`\w+`: |\Z)", model.__doc__ or "", re.DOTALL):
        told[key] = " ".join(text.split()).rstrip(".")
    body = ast.parse(textwrap.dedent(inspect.getsource(model))).body[0]
    assert isinstance(body, ast.ClassDef)
    for before, after in zip(body.body, body.body[1:], strict=False):
        text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else None
        if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name) and isinstance(text, str):
            told[before.target.id] = " ".join(text.split()).rstrip(".")
    return {key: text[0].lower() + text[1:] for key, text in told.items()}


if __name__ == "__main__":
    PAGE.write_text(page())
