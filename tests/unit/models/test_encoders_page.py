"""docs/encoders.md says what works of popular encoders: the slow tests find it out, and go on where they were stopped.

`pytest -m slow tests/unit/models/test_encoders_page.py`: a row that is recorded with the code of today is skipped.
"""

from pathlib import Path

import pytest

from tests.encoders_page import ENCODERS, HEADS, PAGE, code, main_head, measured, page, record, recorded, settings_of
from threestage.models.export import CARD, PROGRAM, ModelCard
from threestage.models.onnx_model import ONNX, shortest_side
from threestage.models.program import least_side, write_program


def test_the_page_is_that_of_the_records() -> None:
    assert page(recorded()) == PAGE.read_text()
    assert recorded().keys() <= set(ENCODERS)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_what_works(encoder: str) -> None:
    before = recorded().get(encoder, {})
    if before.get("code") == code():
        pytest.skip("recorded")
    found = measured(encoder)
    record(encoder, found)
    lost = [head for head, _ in HEADS if before.get("heads", {}).get(head) == "works" != found["heads"][head]]
    assert not lost, found["heads"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_what_is_exported(encoder: str, tmp_path: Path) -> None:
    before = recorded().get(encoder)
    if before is None or (head := main_head(before)) is None:
        pytest.skip("nothing works with it yet")
    if before.get("exported") == code():
        pytest.skip("recorded")
    card = ModelCard(
        network=settings_of(encoder, *head),
        classes=("a", "b"),
        colours=((0, 0, 0), (9, 9, 9)),
        downscale=1,
        stage="stage1",
    )
    (tmp_path / CARD).write_text(card.model_dump_json())
    program, onnx = (write_program(tmp_path, 400, name) for name in (PROGRAM, ONNX))
    found = {
        "program": program or least_side(tmp_path / PROGRAM),
        "onnx": onnx or shortest_side((tmp_path / ONNX).read_bytes()),
        "exported": code(),
    }
    record(encoder, found)
    lost = [form for form in ("program", "onnx") if isinstance(before.get(form), int) and isinstance(found[form], str)]
    assert not lost, found
