"""What `make unit` and `make integration` leave out by its folder is marked so: no test is forgotten by both."""

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parents[1]
NOT_OF_UNIT = ("integration", "faults", "fresh", "benchmarks")  # as in the Makefile


def marked_tests(folder: Path) -> Iterator[tuple[str, str]]:
    """The tests below a folder, each with the source of its marks and of its module's."""
    for file in folder.rglob("test_*.py"):
        body = ast.parse(file.read_text()).body
        of_module = [ast.unparse(node) for node in body if isinstance(node, ast.Assign)]
        for node in body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                marks = [ast.unparse(mark) for mark in node.decorator_list] + of_module
                yield f"{file.relative_to(TESTS)}::{node.name}", " ".join(marks)


def test_what_make_unit_leaves_out_needs_ray_or_is_slow() -> None:
    found = [one for folder in NOT_OF_UNIT for one in marked_tests(TESTS / folder)]
    assert found and [name for name, marks in found if "integration" not in marks and "mark.slow" not in marks] == []


def test_what_make_integration_runs_lies_in_its_folder() -> None:
    found = [one for one in marked_tests(TESTS) if not one[0].startswith("integration/")]
    assert [name for name, marks in found if "mark.integration" in marks and "mark.slow" not in marks] == []
