"""Why: a forecast may cost a few short models, never the run's own again."""

import json
from pathlib import Path

from tests.refusals import refused
from tests.runs import copy_run
from threestage.data.split import saved_split
from threestage.selection.forecast import ForecastSettings, forecast


def test_models_of_parts_and_the_run_s_own(finished_run: Path, tmp_path: Path) -> None:
    split = saved_split(f"{finished_run}/split.json")[0]
    report = forecast(str(finished_run), f"{tmp_path}/out", ForecastSettings(), warn=lambda text: None)
    count = len(split.labelled)
    assert [one.labels for one in report.measured] == [count // 4] * 3 + [count // 2] * 2 + [count]
    assert report.measured[-1].mean_iou == json.loads((finished_run / "stage1/result.json").read_text())["mean_iou"]
    parts = [saved_split(f"{path}/split.json")[0] for path in sorted((tmp_path / "out/models").iterdir())]
    assert len(parts) == 5 and all(part.validation == split.validation for part in parts)
    quarters = [part.labelled for part in parts if len(part.labelled) == count // 4]
    assert len({image_id for quarter in quarters for image_id in quarter}) == 3 * (count // 4), "no label is in two"
    found = report.forecast[0]
    assert found.labels == 2 * count and found.low <= found.mean_iou <= found.high
    assert report.hours > 0 and report.run_hours > report.measured[-1].hours

    again = forecast(str(finished_run), f"{tmp_path}/out", ForecastSettings(labels=(16, 32)), warn=lambda text: None)
    assert again.measured == report.measured and [one.labels for one in again.forecast] == [16, 32]
    with refused("next/other-choice", "steps=None", "3"):
        forecast(str(finished_run), f"{tmp_path}/out", ForecastSettings(steps=3))


def test_too_few_labels(finished_run: Path, tmp_path: Path) -> None:
    run = copy_run(finished_run, tmp_path / "run")
    saved = json.loads((run / "split.json").read_text())
    saved["split"]["labelled"] = saved["split"]["labelled"][:7]
    (run / "split.json").write_text(json.dumps(saved))
    with refused("next/too-few-to-forecast", run, "7"):
        forecast(str(run), f"{tmp_path}/out", ForecastSettings())
