"""The package speaks the field's words: no module, class, function or attribute has one of the private names of before."""

import ast
from collections.abc import Iterator

from tests.package_source import FILES, PACKAGE, name_in_package, tree_of

MODULES = """
entrance pulse pace patience causes room check_room sweep_room attempts beside_driver own_cluster words lines figures of_run
of_images of_pool of_certainty known sets fixed_void on_ray registry report_page commands inference pseudo_mask_parts tracking
mirror over_seeds reused pictures background submission store_check store_errors window
"""
NAMES = """
admitted lets_in Unhurried Pulse Sign News noticing_silence _name_the_hung Patience told ours placed counted beside_driver
closed_to_others Line Found tried Known most_of Share Order Timed _claim _begun _beside_last living Left goes Feed as_seen
laid_out rate_factor agree _on_its_way hold_gradients share_buffers pieces how_to_go_on Outlived Product Compared settle
certainty Journal VAIN_TRIALS following talking_to _pupils Shipment anywhere visible keep_freed_memory LATER_KEYS OF_THE_RUN
_noting _keeping guard of_last_stage doubt
"""


def definitions(tree: ast.AST) -> Iterator[str]:
    """Classes, functions and attributes, at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        body = node.body if isinstance(node, ast.Module | ast.ClassDef) else []
        for statement in body:
            targets = statement.targets if isinstance(statement, ast.Assign) else []
            targets = [statement.target] if isinstance(statement, ast.AnnAssign) else targets
            yield from (target.id for target in targets if isinstance(target, ast.Name))


def test_no_definition_has_a_private_word() -> None:
    modules = {name_in_package(file): set(file.relative_to(PACKAGE).with_suffix("").parts) for file in FILES}
    assert {name for name, parts in modules.items() if parts & set(MODULES.split())} == set()
    found = {name_in_package(file): set(definitions(tree_of(file))) & set(NAMES.split()) for file in FILES}
    assert {name: words for name, words in found.items() if words} == {}


def test_definitions_are_found() -> None:
    code = "class A:\n    b: int\n    def c(self):\n        self.d = 1\ne = 2\n"
    assert set(definitions(ast.parse(code))) == {"A", "b", "c", "d", "e"}


SAME_NAME = {
    # a command and what it calls
    "check", "clean", "evaluate", "ingest", "predict", "promote", "run", "sync", "train",
    # of the Python interface, and of a configuration
    "load",
    # commands of two groups
    "export",
    # the start of a program
    "main",
    # one meaning for tensors and for Pillow, or for points and for levels
    "Move", "color", "compose", "sharpness",
}  # fmt: skip


def test_no_two_public_classes_or_functions_share_a_name() -> None:
    where: dict[str, list[str]] = {}
    for file in FILES:
        for node in tree_of(file).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                where.setdefault(node.name, []).append(name_in_package(file))
    assert {name: files for name, files in where.items() if len(files) > 1 and name not in SAME_NAME} == {}


SAME_FILE = {
    "predict", "submit", "sweep", "worker",  # of the core, and of Ray or the command line
    "outcome", "records", "results", "settings",  # of a run, a sweep, MLflow, a network: each in its package
}  # fmt: skip


def test_no_two_files_share_a_name() -> None:
    where: dict[str, list[str]] = {}
    for file in FILES:
        where.setdefault(file.stem, []).append(name_in_package(file))
    twice = {name: files for name, files in where.items() if len(files) > 1 and name not in {*SAME_FILE, "__init__"}}
    assert twice == {}
