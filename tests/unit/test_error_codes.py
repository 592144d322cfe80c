"""Every error that a user meets has a stable code, which tests, programs and docs/troubleshooting.md name."""

import ast
import re
from collections.abc import Iterator

import pytest

from tests import package_source
from tests.package_source import PACKAGE, name_in_package, tree_of

FILES = [file for file in package_source.FILES if file.name != "errors.py"]
EXEMPT = {"data/records.py"}  # a manifest's own reader says what is wrong with the file
ERRORS = {"InputError", "StageFailure", "NoRoom", "Stopped", "UnwritablePlace"}
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
    "labels",
    "mask",
    "mlflow",
    "models",
    "network",
    "next",
    "predict",
    "ray",
    "report",
    "run",
    "serve",
    "stage",
    "storage",
    "submit",
    "sweep",
    "weights",
}


def assigned(name: str, tree: ast.AST) -> list[ast.expr]:
    """What a module, a function of it, or the module that it is imported from gives a name to."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and name in [ast.unparse(target) for target in node.targets]:
            found.append(node.value)
        elif isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            source = PACKAGE.parent.joinpath(*str(node.module).split(".")).with_suffix(".py")
            found += assigned(name, tree_of(source))
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


def test_every_error_has_a_code() -> None:
    without = [
        f"{name_in_package(file)}:{call.lineno}"
        for file in FILES
        for call in constructions(tree_of(file), ERRORS)
        if not is_code(code_of(call), tree_of(file))
    ]
    assert not without, "no code of the form area/what-is-wrong with a known area"


def test_validators_of_settings_raise_errors_with_codes() -> None:
    """`InputError` is a ValueError, which pydantic takes."""
    plain = [
        f"{name_in_package(file)}:{call.lineno}"
        for file in FILES
        if name_in_package(file) not in EXEMPT
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.FunctionDef)
        and any("validator" in ast.unparse(decorator) for decorator in node.decorator_list)
        for call in constructions(node, {"ValueError"})
    ]
    assert not plain, "ValueError; raise InputError with a code"


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
    trees = [tree_of(file) for file in FILES]
    calls = [(call, tree) for tree in trees for call in constructions(tree, ERRORS | REASONS)]
    raised = {code for call, tree in calls for code in codes_of(code_of(call), tree)}
    texts = {str(node.value) for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert sorted(raised - set(listed)) == [], "not listed"
    assert [code for code in listed if not any(code in text for text in texts)] == [], "no code of the package"
    assert len(listed) == len(set(listed))
