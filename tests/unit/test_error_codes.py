"""Every error that a user meets has a stable code, which tests, programs and docs/troubleshooting.md name."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "threestage"
FILES = sorted(file for file in PACKAGE.rglob("*.py") if file.name != "errors.py")
EXEMPT = {"data/records.py"}  # a manifest's own reader says what is wrong with the file
ERRORS = {"InputError", "StageFailure", "NoRoom"}
REASONS = {"BadImage", "BadFile"}  # of one image, for the list of rejects
CODE = re.compile(r"(?P<area>[a-z]+(-[a-z]+)*)/[a-z0-9]+(-[a-z0-9]+)*")
AREAS = {
    "budget",
    "check",
    "class-map",
    "clean",
    "config",
    "data",
    "demo",
    "evaluate",
    "hosts",
    "image",
    "init",
    "mask",
    "mlflow",
    "models",
    "network",
    "predict",
    "ray",
    "report",
    "run",
    "stage",
    "storage",
    "submit",
    "sweep",
    "weights",
}
TREES = {file: ast.parse(file.read_text()) for file in FILES}


def assigned(name: str, tree: ast.AST) -> list[ast.expr]:
    """What a module, a function of it, or the module that it is imported from gives a name to."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and name in [ast.unparse(target) for target in node.targets]:
            found.append(node.value)
        elif isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            source = PACKAGE.parent.joinpath(*str(node.module).split(".")).with_suffix(".py")
            found += assigned(name, TREES[source])
    return found


def is_code(node: ast.expr | None, tree: ast.AST) -> bool:
    """A code as text or by a name, or one that another error brings along."""
    if isinstance(node, ast.Constant):
        found = CODE.fullmatch(str(node.value))
        return found is not None and found["area"] in AREAS
    if isinstance(node, ast.Name):
        values = assigned(node.id, tree)
        return bool(values) and all(is_code(value, tree) for value in values)
    if isinstance(node, ast.BoolOp):  # the first of several that there is
        return all(is_code(value, tree) for value in node.values)
    if isinstance(node, ast.IfExp):
        return is_code(node.body, tree) and is_code(node.orelse, tree)
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "code_of"
    return isinstance(node, ast.Attribute) and node.attr == "code"


def constructions(tree: ast.AST, names: set[str]) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
            yield node


def code_of(call: ast.Call) -> ast.expr | None:
    named = [keyword.value for keyword in call.keywords if keyword.arg == "code"]
    return named[0] if named else next(iter(call.args[1:]), None)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_every_error_has_a_code(file: Path) -> None:
    without = [call.lineno for call in constructions(TREES[file], ERRORS) if not is_code(code_of(call), TREES[file])]
    assert not without, f"{file}: no code of the form area/what-is-wrong with a known area in lines {without}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_validators_of_settings_raise_errors_with_codes(file: Path) -> None:
    """`InputError` is a ValueError, which pydantic takes."""
    validators = [
        node
        for node in ast.walk(TREES[file])
        if isinstance(node, ast.FunctionDef)
        and any("validator" in ast.unparse(decorator) for decorator in node.decorator_list)
    ]
    plain = str(file.relative_to(PACKAGE)) not in EXEMPT and [
        call.lineno for node in validators for call in constructions(node, {"ValueError"})
    ]
    assert not plain, f"{file}: ValueError in lines {plain}; raise InputError with a code"


@pytest.mark.parametrize("code", ["data/no-files", "models/no-program", "class-map/repeated-id"])
def test_a_code(code: str) -> None:
    assert is_code(ast.Constant(code), ast.Module([], []))


@pytest.mark.parametrize(
    "code", ["", "no-files", "Data/no-files", "data/no files", "data/", "tests/no-area", "data/a/b"]
)
def test_no_code(code: str) -> None:
    assert not is_code(ast.Constant(code), ast.Module([], []))


def codes_of(node: ast.expr | None, tree: ast.AST) -> Iterator[str]:
    """The codes that an expression may stand for."""
    if isinstance(node, ast.Constant) and CODE.fullmatch(str(node.value)):
        yield str(node.value)
    elif isinstance(node, ast.Name):
        for value in assigned(node.id, tree):
            yield from codes_of(value, tree)
    elif isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from codes_of(value, tree)
    elif isinstance(node, ast.IfExp):
        yield from codes_of(node.body, tree)
        yield from codes_of(node.orelse, tree)


def test_the_page_lists_every_code_and_no_other() -> None:
    text = (PACKAGE.parent / "docs" / "troubleshooting.md").read_text()
    listed = re.findall(r"^\| `([a-z-]+/[a-z0-9-]+)` \|", text, re.MULTILINE)
    calls = [(call, tree) for tree in TREES.values() for call in constructions(tree, ERRORS | REASONS)]
    raised = {code for call, tree in calls for code in codes_of(code_of(call), tree)}
    texts = {str(node.value) for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert sorted(raised - set(listed)) == [], "not listed"
    assert [code for code in listed if not any(code in text for text in texts)] == [], "no code of the package"
    assert len(listed) == len(set(listed))
