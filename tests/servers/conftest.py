"""Shared by the tests that register models."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from threestage.mlflow_sync import packing
from threestage.models.export import export_program


@pytest.fixture(scope="session", autouse=True)
def exported_once() -> Iterator[None]:
    """Exporting a program takes three seconds: the same model is exported once for all tests of a process, and in it."""
    programs: dict[str, bytes] = {}

    def remembered(folder: Path) -> None:
        files = (Path(folder, name).read_bytes() for name in ("model.json", "model.safetensors"))
        key = hashlib.sha256(b"".join(files)).hexdigest()
        if key not in programs:
            programs[key] = export_program(str(folder))
        (folder / "program.pt2").write_bytes(programs[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "write_program", remembered)
        patch.setattr("threestage.checks.run_check.without_program", lambda network: None)
        patch.setattr("threestage.run.run.without_program", lambda network: None)
        yield
