"""Imports go one way and never in a circle. Imports inside functions count; those for the type checker alone do not."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.package_source import FILES, PACKAGE, tree_of

LAYERS = tuple(
    names.split()
    for names in (
        "threestage allocator errors format hosts plain_text presets private_folder ray_settings redaction "
        "seeds settings termination user_files",
        "augment",
        "data labels",
        "run_folder",
        "models",
        "training prediction",
        "calibration config config_errors evaluation verdict run.stages training.step_inputs run_folder.folder run_folder.reuse "
        "mlflow_sync.records report.mask_images",
        "mlflow_sync report.scores prediction.predict sweeps.trials sweeps.space",
        "prediction.champion prediction.image_model",
        "serving",
        "labels.label_export labels.predicted_masks run.continuation models.model_export",
        "checks run.context run.outcome run.backend run.pool_files run.pipeline run.local_backend mlflow_sync.run_sync run.clean",
        "ray_backend run.budget sweeps",
        "report run",
        "checks.run_check checks.doctor sweeps.sweep ray_backend.job_check ray_backend.sweep selection",
        "__main__ api cli local",
    )
)
"""A module may import its own layer and those above it. A package stands for its modules that are not listed themselves."""
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def name_of(file: Path) -> str:
    """Without the leading `threestage.`."""
    name = ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
    return name or "threestage"


MODULES = {name_of(file): file for file in FILES}


def rank(module: str) -> int:
    """Of the module, else of the package that holds it."""
    name = module
    while name not in RANK:
        name = name.rpartition(".")[0]
    return RANK[name]


def imported(tree: ast.AST) -> Iterator[str]:
    """Modules of threestage that a file loads, when it is imported or later."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "threestage":
            package = (node.module or "").removeprefix("threestage").removeprefix(".")
            for alias in node.names:
                full = f"{package}.{alias.name}".removeprefix(".")
                yield full if full in MODULES else package or "threestage"
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("threestage.") for a in node.names if a.name.startswith("threestage"))
        else:
            yield from imported(node)


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    return {name: set(imported(tree_of(file))) - {name} for name, file in MODULES.items()}


def test_a_module_imports_nothing_from_a_later_layer(imports: dict[str, set[str]]) -> None:
    later = {module: {name for name in imports[module] if rank(name) > rank(module)} for module in MODULES}
    assert not {module: names for module, names in later.items() if names}, "each is before these in LAYERS"


def test_no_circle(imports: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def test_imports_inside_functions_count() -> None:
    code = "def f():\n    from threestage.data import storage\nif TYPE_CHECKING:\n    from threestage.config import Config\n"
    assert set(imported(ast.parse(code))) == {"data.storage"}


def test_every_top_level_name_has_a_layer() -> None:
    named = {name.split(".")[0] for name in RANK}
    assert {module.split(".")[0] for module in MODULES} == named
