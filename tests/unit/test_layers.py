"""Imports go one way: a module may import its own layer and those above it in this list. Imports inside functions (what is loaded
only when it is used) and those for the type checker alone do not count."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import threestage

LAYERS = tuple(
    names.split()
    for names in (
        "threestage allocator background errors hosts lineage lineage_tree plain_text presets private_folder "
        "redaction run_files seeds settings terminal user_text yaml_text",
        "augment",
        "data",
        "models",
        "training forward_memory pseudo_masks inference pool_prediction prediction_parts",
        "registry tracking",
        "config on_ray.settings",
        "evaluation stages steps verdict",
        "init lease over_seeds pipeline predict prediction_output preflight progress report reused scores",
        "clean mirror report_page",
        "budget check checks local on_ray runs submission sweeps",
        "__main__ cli commands",
    )
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
ROOT = Path(threestage.__file__).parent


def name_of(file: Path) -> str:
    """Without the leading `threestage.`."""
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip(".")
    return name or "threestage"


MODULES = {name_of(file): file for file in ROOT.rglob("*.py")}


def rank(module: str) -> int:
    """Of the module, else of the package that holds it."""
    name = module
    while name not in RANK:
        name = name.rpartition(".")[0]
    return RANK[name]


def imported(file: Path) -> Iterator[str]:
    """Modules of threestage that the file loads when it is imported."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "threestage":
            package = (node.module or "").removeprefix("threestage.")
            for alias in node.names:
                full = f"{package}.{alias.name}".removeprefix("threestage.")
                yield full if full in MODULES else package


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_nothing_from_a_later_layer(module: str) -> None:
    later = {name for name in imported(MODULES[module]) if rank(name) > rank(module)}
    assert not later, f"threestage.{module} is before {sorted(later)} in LAYERS"


def test_every_top_level_name_has_a_layer() -> None:
    named = {name.split(".")[0] for name in RANK}
    assert {module.split(".")[0] for module in MODULES} == named
