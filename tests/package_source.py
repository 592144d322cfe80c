"""The package's files as syntax trees, each parsed once in a process."""

import ast
from functools import cache
from pathlib import Path

import threestage

PACKAGE = Path(threestage.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def name_in_package(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()
