"""Why: the default of `threestage next` is what this bench finds best; its rounds must be paired, resumable and counted right."""

import argparse
from pathlib import Path

import pytest

from tests.benchmarks import labelling
from tests.benchmarks.labelling import labels_needed, measure_rounds, rounds_text
from tests.unit.test_accuracy import TINY
from threestage.data.split import saved_split
from threestage.selection.choice import StrategyName


def test_labels_that_random_choice_needs() -> None:
    means = {12: 0.3, 24: 0.4, 36: 0.45, 48: 0.5}
    assert labels_needed(means, 0.475) == pytest.approx(42)
    assert labels_needed(means, 0.2) == 12 and labels_needed(means, 0.6) is None


def test_the_table_pairs_by_start() -> None:
    def line(strategy: str, start: int, number: int, value: float) -> dict[str, object]:
        return {"strategy": strategy, "start": start, "round": number, "labels": 12 * number, "mean_iou": value}

    lines = [line("random", start, n, 0.3 + n / 20 + start / 100) for start in (1, 2) for n in (1, 2, 3, 4)]
    lines += [
        line("combined", start, n, 0.3 + n / 20 + start / 100 + 0.025 * (n > 1)) for start in (1, 2) for n in (1, 2, 3)
    ]
    text = rounds_text(lines)
    assert "| random | 0.365 ± 0.007 | 0.415 ± 0.007 | 0.465 ± 0.007 | 0.515 ± 0.007 |" in text
    assert "combined minus random at 36 labels: +2.5, +2.5; mean +2.5 points" in text
    assert text.endswith("random needs 1.17 times the labels")


@pytest.mark.slow
def test_the_rounds_of_a_start(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.set_float32_matmul_precision", lambda precision: None)
    monkeypatch.setitem(labelling.FIRST_LABELS, "camvid", 4)
    monkeypatch.setattr(labelling, "ROUNDS", 2)
    settings = [*TINY, "training.evaluate_every=2"]
    options = argparse.Namespace(sets={"camvid": str(scenes)}, weights=None, set=settings, test=True, out=tmp_path)

    def rounds(strategy: StrategyName) -> list[dict[str, object]]:
        return measure_rounds(labelling._job(options, "camvid", strategy, 1))

    combined, random = rounds("combined"), rounds("random")
    assert [line["labels"] for line in combined] == [4, 8] and [line["labels"] for line in random] == [4, 8, 12]
    assert combined[0]["mean_iou"] == random[0]["mean_iou"], "the first round is shared"
    splits = [set(saved_split(f"{tmp_path}/camvid/{where}/1/round{n}/split.json")[0].labelled)
              for where, n in (("first", 1), ("random", 2), ("random", 3))]  # fmt: skip
    assert splits[0] < splits[1] < splits[2]
    assert rounds("combined") == combined
