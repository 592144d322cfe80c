"""YAML as plain values. A few lines of it may stand for billions (aliases of aliases): what is larger written out is refused."""

from collections.abc import Iterator
from typing import Any

import yaml

from threestage.errors import InputError

MAX_CHARACTERS = 2**20
MAX_VALUES = 200_000
MAX_DEPTH = 50


class _Loader(yaml.SafeLoader):
    """Refuses what is nested deeply before Python's own recursion ends."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.YAMLError(f"is nested too deeply, more than {MAX_DEPTH} levels: write it flatter")
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


def read_yaml(text: str | bytes, where: str) -> Any:
    """Raises InputError, which begins with `where`, for what is no YAML, or too much of it."""
    if len(text) > MAX_CHARACTERS:
        raise InputError(f"{where}: has {len(text)} characters, more than {MAX_CHARACTERS}: give a smaller file")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _refuse_bomb(node, where)
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none, a number of too many digits
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where}: not YAML: {_why(error)}: mend it there") from None


def _why(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        return f"{error.problem} (line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1})"
    return " ".join(str(error).replace('in "<byte string>", ', "").split())


def _refuse_bomb(node: yaml.Node, where: str) -> None:
    if _written_out(node, {}) > MAX_VALUES:
        raise InputError(
            f"{where}: has more than {MAX_VALUES} values, or refers to itself: take the aliases (*name) out"
        )


def _written_out(node: yaml.Node, known: dict[int, float]) -> float:
    """How many values a node has with every alias written out; infinite for one that holds itself."""
    if id(node) not in known:
        known[id(node)] = float("inf")
        known[id(node)] = 1 + sum(_written_out(child, known) for child in _children(node))
    return known[id(node)]


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    for value in node.value if isinstance(node, yaml.CollectionNode) else ():
        yield from value if isinstance(value, tuple) else (value,)
