"""A browser, and what is shared by the tests that register models."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import Browser, browser, found_browser


@pytest.fixture(scope="package", autouse=True)
def exported_once() -> Iterator[None]:
    """Exporting a program takes three seconds: a network is exported once for these tests, and in it, with the
    weights of its first model."""
    from threestage.mlflow_sync import packing
    from threestage.models.export import export_program

    programs: dict[str, bytes] = {}

    def remembered(folder: Path) -> None:
        card = json.loads((folder / "model.json").read_text())
        key = json.dumps([card["network"], len(card["classes"])])
        if key not in programs:
            programs[key] = export_program(str(folder))
        (folder / "program.pt2").write_bytes(programs[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "write_program", remembered)
        patch.setattr("threestage.checks.run_check.without_program", lambda *_: None)
        patch.setattr("threestage.checks.run_check.without_onnx", lambda *_: None)
        patch.setattr("threestage.run.run.without_program", lambda *_: None)
        yield


@pytest.fixture
def chromium(tmp_path: Path) -> Iterator[Browser]:
    path = found_browser()
    if path is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    profile = tmp_path / "profile"
    profile.mkdir()
    with browser(path, profile) as opened:
        yield opened
