"""Every bad input has the outcome that docs/reliability.md promises."""

from pathlib import Path

import pytest

from tests.bad_inputs import BadInput, all_bad_inputs
from tests.bad_inputs.__main__ import PAGE, documented

EVERY = [(area, bad) for area, found in all_bad_inputs().items() for bad in found]


@pytest.mark.parametrize(("area", "bad"), EVERY, ids=[f"{area}: {bad.what}" for area, bad in EVERY])
def test_bad_input(area: str, bad: BadInput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert bad.try_it(tmp_path) == bad.expected


def test_the_table_lists_every_bad_input() -> None:
    assert documented(PAGE.read_text()) == [(area, bad.what, bad.expected) for area, bad in EVERY]
