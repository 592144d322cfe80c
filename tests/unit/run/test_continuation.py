"""Why: a round of labelling is worth what the next run makes of it. It must start from the champion, be scored on the same
images, and tell what the annotators changed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import local_config
from tests.refusals import refused
from tests.runs import copy_run, run_local
from threestage.data import storage
from threestage.data.split import saved_split
from threestage.models.export import read_weights
from threestage.prediction.champion import champion_of
from threestage.report.report import write_report
from threestage.report.scores import rounds_table
from threestage.run.continuation import _corrections
from threestage.run.outcome import StageOutcome

ROUND = {"stages": 1, "stage1__steps": 1, "training__evaluate_every": 1, "pseudo_mask__final_stage": False}


@pytest.fixture(scope="module")
def continued(
    scenes: Path, finished_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], list[StageOutcome]]:
    """A run of one step with four more labels, with what it recorded."""
    out, outcomes = tmp_path_factory.mktemp("continued") / "run", list[StageOutcome]()
    config = local_config(
        scenes, data__labelled=12, optimiser__learning_rate=1e-9, optimiser__encoder_learning_rate=1e-9, **ROUND
    )
    storage.write_json(f"{out}/config.json", config.model_dump(mode="json"))  # as a command leaves it
    results = run_local(config, out, record=outcomes.append, continue_from=str(finished_run))
    return out, results, outcomes


def test_it_starts_from_the_champion(continued: tuple[Path, dict[str, Any], Any], finished_run: Path) -> None:
    """One step of a tiny learning rate leaves its weights as they are, but for the statistics of batch norm."""
    before, after = read_weights(champion_of(str(finished_run)).model), read_weights(f"{continued[0]}/stage1/model")
    assert all(
        torch.allclose(after[name], before[name], atol=1e-6)
        for name in before
        if "running" not in name and "num_" not in name
    )


def test_the_rounds_and_the_lineage_are_told(
    continued: tuple[Path, dict[str, Any], list[StageOutcome]], finished_run: Path
) -> None:
    out, results, outcomes = continued
    champion = champion_of(str(finished_run))
    first, second = results["rounds"]
    assert (
        (first["labelled"], second["labelled"]) == (8, 12)
        and first["run"] == str(finished_run)
        and second["run"] == str(out)
    )
    assert (
        first["mean_iou"]
        == json.loads((finished_run / "results.json").read_text())["stages"][champion.stage]["mean_iou"]
    )
    assert first["corrected"] is None and second["corrected"]["images"] == 4
    assert 0 < second["corrected"]["pixels_changed"] < 1
    assert results["continued_from"]["run"] == str(finished_run)
    (outcome,) = outcomes
    assert outcome.lineage.continued_from is not None and outcome.lineage.continued_from.stage == champion.stage
    assert outcome.tags["round"] == "2" and outcome.tags["continued_from"] == str(finished_run)
    assert json.loads((out / "results.json").read_text()) == results
    assert rounds_table(results["rounds"]).row_count == 2
    write_report(str(out))
    assert "Rounds of labelling" in (out / "report.html").read_text()


def test_the_share_that_was_corrected_is_of_the_labels_that_came(
    continued: tuple[Path, dict[str, Any], Any], finished_run: Path, scenes: Path
) -> None:
    """Against the champion's own confusion on these four images."""
    old, new = (set(saved_split(f"{run}/split.json")[0].labelled) for run in (finished_run, continued[0]))
    assert old < new and len(new - old) == 4
    counts = np.array([[6, 2, 0], [1, 3, 0], [0, 0, 0]])
    found = _corrections(counts, 4, ("a", "b", "c"))
    assert found.pixels_changed == pytest.approx(3 / 12)
    assert found.of_class == {"a": pytest.approx(0.25), "b": pytest.approx(0.25), "c": None}


def test_a_rerun_continues_and_another_round_follows(
    continued: tuple[Path, dict[str, Any], Any], finished_run: Path, scenes: Path, tmp_path: Path
) -> None:
    out, results, _ = continued
    config = local_config(
        scenes, data__labelled=12, optimiser__learning_rate=1e-9, optimiser__encoder_learning_rate=1e-9, **ROUND
    )
    seen: list[str] = []
    assert run_local(config, out, lambda stage, row: seen.append(stage)) == results and not seen
    with refused("run/continues-another", tmp_path, finished_run):
        run_local(config, out, continue_from=f"{tmp_path}/other")
    third = run_local(local_config(scenes, data__labelled=14, **ROUND), tmp_path / "third", continue_from=str(out))
    assert [one["labelled"] for one in third["rounds"]] == [8, 12, 14]
    assert third["rounds"][1] == results["rounds"][1]
    with refused("run/nothing-to-reuse", out):
        run_local(local_config(scenes, data__labelled=12, **ROUND), tmp_path / "cold", reuse=str(out))


def test_what_does_not_fit_is_refused(scenes: Path, finished_run: Path, tmp_path: Path) -> None:
    begun = copy_run(finished_run, tmp_path / "begun")
    with refused("run/continue-too-late", finished_run, begun):
        run_local(local_config(scenes), begun, continue_from=str(finished_run))
    with refused("run/continue-other-model", "network.dilations=[1, 2]", "[1, 3]"):
        run_local(local_config(scenes, network__dilations=[1, 3]), tmp_path / "a", continue_from=str(finished_run))
    with refused("config/usage", "--continue-from", "--reuse"):
        run_local(local_config(scenes), tmp_path / "b", reuse=str(finished_run), continue_from=str(finished_run))
    (begun / "results.json").unlink()
    with refused("run/not-finished", begun):
        run_local(local_config(scenes), tmp_path / "c", continue_from=str(begun))
    assert [path.name for path in tmp_path.iterdir()] == ["begun"]
