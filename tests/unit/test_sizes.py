"""Nothing is so long that it cannot be read at once: functions, classes, parameter lists, and the pipeline."""

import ast
from pathlib import Path

import pytest

import threestage

ROOT = Path(threestage.__file__).parent
FUNCTION_LINES, CLASS_LINES, PARAMETERS, PIPELINE_LINES = 40, 150, 8, 330


def body_lines(function: ast.FunctionDef) -> int:
    """Without the signature: that of a command holds its options and their help."""
    statements = function.body[1:] if ast.get_docstring(function) else function.body
    return (function.end_lineno or 0) - statements[0].lineno + 1


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda file: str(file.relative_to(ROOT)))
def test_sizes(file: Path) -> None:
    commands = file.parent.name == "cli"
    wrong = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ClassDef) and (node.end_lineno or 0) - node.lineno >= CLASS_LINES:
            wrong.append(node.name)
        if isinstance(node, ast.FunctionDef):
            arguments = node.args
            names = [a.arg for a in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]]
            lines = body_lines(node) if commands else (node.end_lineno or 0) - node.lineno + 1
            parameters = 0 if commands else len([name for name in names if name not in ("self", "cls")])
            if lines > FUNCTION_LINES or parameters > PARAMETERS:
                wrong.append(node.name)
    assert not wrong


def test_the_pipeline_is_short() -> None:
    assert len((ROOT / "run" / "pipeline.py").read_text().splitlines()) <= PIPELINE_LINES
