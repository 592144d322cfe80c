"""The guard of speed: one low measurement is noise, three are a change for the worse."""

import json

import pytest

from tests.benchmarks import guard

RECORDED = json.loads(guard.RECORD.read_text())


@pytest.mark.parametrize(("low", "measurements", "code"), [(0, 1, 0), (1, 2, 0), (2, 3, 0), (3, 3, 1)])
@pytest.mark.parametrize("ratio", RECORDED)
def test_guard(
    ratio: str,
    low: int,
    measurements: int,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made: list[str] = []

    def ratios(data: str) -> dict[str, float]:
        made.append(data)
        return RECORDED | ({ratio: RECORDED[ratio] / 2} if len(made) <= low else {})

    monkeypatch.setattr(guard, "make_scenes", str)
    monkeypatch.setattr(guard, "ratios", ratios)
    monkeypatch.setattr("sys.argv", ["guard"])
    assert guard.main() == code
    assert len(made) == measurements
    assert (ratio in capsys.readouterr().err) == bool(code)


def test_slack() -> None:
    slightly_less = {name: value * 0.85 for name, value in RECORDED.items()}
    assert not guard.below(slightly_less, RECORDED)
