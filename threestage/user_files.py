"""Text and YAML that users write: UTF-8 with or without a byte order mark, and YAML within limits of size and depth.
Every such file is read here; what is wrong is one line that begins with the file."""

from collections.abc import Iterator
from typing import Any

import yaml

from threestage.errors import InputError

# ---- Text

UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def text_of(content: bytes, where: str) -> str:
    """The text of a file's bytes.

    Raises InputError, which begins with `where` and names the first byte that is not UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        found = "it is UTF-16" if content.startswith(UTF_16_MARKS) else f"byte 0x{content[error.start]:02x} is not"
        raise InputError(
            f"{where}: not UTF-8 text: {found} (byte {error.start}, line {line}); save the file as UTF-8",
            "data/not-utf8",
        ) from None


def lines_of(content: bytes, where: str) -> list[str]:
    """The lines that are not empty, without the spaces around them. Raises InputError as `text_of`."""
    lines = (line.strip() for line in text_of(content, where).replace("\r", "\n").split("\n"))
    return [line for line in lines if line]


# ---- YAML

MAX_CHARACTERS = 2**20
MAX_VALUES = 200_000
MAX_DEPTH = 50
MERGE = "tag:yaml.org,2002:merge"


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
    """Raises InputError, which begins with `where`, for what is no YAML, too much of it, or holds a key twice."""
    if len(text) > MAX_CHARACTERS:
        raise InputError(
            f"{where}: has {len(text)} characters, more than {MAX_CHARACTERS}; give a smaller file", "config/too-large"
        )
    text = text if isinstance(text, str) else text_of(text, where)
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _refuse_bomb(node, where)
        _refuse_repeated_keys(node, where, set())
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none, a number of too many digits
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where}: not YAML: {_why(error)}; correct it there", "config/not-yaml") from None


def _why(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        return f"{error.problem} (line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1})"
    return " ".join(str(error).replace('in "<byte string>", ', "").split())


def _refuse_bomb(node: yaml.Node, where: str) -> None:
    if _written_out(node, {}) > MAX_VALUES:
        raise InputError(
            f"{where}: has more than {MAX_VALUES} values, or refers to itself; take the aliases (*name) out",
            "config/too-large",
        )


def _refuse_repeated_keys(node: yaml.Node, where: str, seen: set[int]) -> None:
    """YAML forbids a key that stands twice in a mapping; the loader would keep the last one without a word."""
    if id(node) in seen:
        return
    seen.add(id(node))
    lines: dict[tuple[str, str], int] = {}
    for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
        if not isinstance(key, yaml.ScalarNode) or key.tag == MERGE:
            continue
        line, name = key.start_mark.line + 1, (key.tag, key.value)
        if name in lines:
            raise InputError(
                f"{where}: key {key.value} stands twice, in line {lines[name]} and line {line}; keep one of them",
                "config/repeated-key",
            )
        lines[name] = line
    for child in _children(node):
        _refuse_repeated_keys(child, where, seen)


def _written_out(node: yaml.Node, known: dict[int, float]) -> float:
    """How many values a node has with every alias written out; infinite for one that holds itself."""
    if id(node) not in known:
        known[id(node)] = float("inf")
        known[id(node)] = 1 + sum(_written_out(child, known) for child in _children(node))
    return known[id(node)]


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    for value in node.value if isinstance(node, yaml.CollectionNode) else ():
        yield from value if isinstance(value, tuple) else (value,)
