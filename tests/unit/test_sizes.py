"""Nothing is so long that it cannot be read at once: functions, classes, parameter lists, and the pipeline."""

import ast
from pathlib import Path

from tests.package_source import FILES, PACKAGE, name_in_package, tree_of

FUNCTION_LINES, CLASS_LINES, PARAMETERS, PIPELINE_LINES = 40, 150, 8, 330


def body_lines(function: ast.FunctionDef) -> int:
    """Without the signature: that of a command holds its options and their help."""
    statements = function.body[1:] if ast.get_docstring(function) else function.body
    return (function.end_lineno or 0) - statements[0].lineno + 1


def too_large(file: Path) -> list[str]:
    commands = file.parent.name == "cli"
    wrong = []
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.ClassDef) and (node.end_lineno or 0) - node.lineno >= CLASS_LINES:
            wrong.append(node.name)
        if isinstance(node, ast.FunctionDef):
            arguments = node.args
            names = [a.arg for a in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]]
            lines = body_lines(node) if commands else (node.end_lineno or 0) - node.lineno + 1
            parameters = 0 if commands else len([name for name in names if name not in ("self", "cls")])
            if lines > FUNCTION_LINES or parameters > PARAMETERS:
                wrong.append(node.name)
    return wrong


def test_sizes() -> None:
    assert {name_in_package(file): wrong for file in FILES if (wrong := too_large(file))} == {}


def test_the_pipeline_is_short() -> None:
    assert len((PACKAGE / "run" / "pipeline.py").read_text().splitlines()) <= PIPELINE_LINES
