"""`make results`: every method is a configuration that loads, the control has as many steps, nothing is trained twice, and the
record holds what a table needs."""

import argparse
import json
from pathlib import Path

import pytest

from tests.benchmarks import accuracy
from tests.benchmarks.accuracy import METHODS, SETS, Method, configuration, measure, read_record, table
from tests.benchmarks.paired import bootstrap_interval, describe, t_interval

TINY = (
    "data.labelled=8", "data.downscale=1", "network.encoder=test_resnet", "network.head=deeplabv2", "network.batch_norm=live",
    "network.dilations=[1, 2]", "augment.crop_size=[32, 32]", "stage1.steps=2", "stage1.labelled_batch=2", "stage2.steps=2",
    "stage2.labelled_batch=2", "stage2.unlabelled_batch=2", "stages=2", "training.evaluate_every=1",
)  # fmt: skip


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_loads_on_every_set(name: str, method: str) -> None:
    config = configuration(METHODS[method], name, 7)
    assert config.seed == config.data.split_seed == 7 and config.network.encoder == "mobilenetv2_100"
    assert config.data.downscale == (4 if name == "camvid" else 1), (
        "the set, not the preset, says how large its images are"
    )
    steps = sum(config.stage(stage).steps for stage in config.stage_names)
    assert steps == accuracy.EQUAL_STEPS, "every method has the control's steps"


def options(scenes: Path, out: Path) -> argparse.Namespace:
    return argparse.Namespace(sets={"camvid": str(scenes)}, weights=None, set=list(TINY), test=True, out=out)


def test_the_line_of_a_run(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.set_float32_matmul_precision", lambda precision: None)  # would stay so for other tests
    methods = {
        "two": Method("own_images"),
        "other": Method("own_images", ("stage2.steps=4", "supervised.strong_view=true")),
    }
    record = tmp_path / "record.jsonl"
    for name in methods:
        job = accuracy._job(options(scenes, tmp_path / "out"), methods, name, "camvid", 3)
        line = measure(job)
        with record.open("a") as file:
            file.write(json.dumps(line) + "\n")
        assert [step for step, _ in line["curve"]] == [1, 2, 3, 4] and line["steps"] == 4 and 0 <= line["test"] <= 1
        assert line["curve"][-1][1] == pytest.approx(line["mean_iou"], abs=1e-4)
        rows = (Path(job.folder) / "rows.jsonl").read_text()
        assert measure(job) == line and (Path(job.folder) / "rows.jsonl").read_text() == rows, (
            "nothing is trained twice"
        )
        assert (job.key, job.digest) in read_record(record)
    assert not (tmp_path / "out" / "camvid" / "other" / "3" / "stage1").exists(), "the first stage is shared"
    assert len(list((tmp_path / "out" / "camvid").glob("stage1-*"))) == 1


def test_settings_make_the_digest_and_places_do_not(tmp_path: Path, scenes: Path) -> None:
    def digest(method: Method, weights: str | None = None) -> str:
        given = options(scenes, tmp_path)
        given.weights = weights
        return accuracy._job(given, {"m": method}, "m", "camvid", 1).digest

    plain = digest(Method("own_images"))
    assert plain == digest(Method("own_images"), "/elsewhere/weights.pth")
    assert plain != digest(Method("own_images", ("supervised.strong_view=true",)))


def test_paired_differences_by_hand() -> None:
    """mean 2, deviation 1, n 3: half width 4.303 / √3."""
    low, high = t_interval([0.01, 0.02, 0.03])
    assert [low, high] == pytest.approx([0.02 - 0.04303 / 3**0.5, 0.02 + 0.04303 / 3**0.5], abs=1e-6)
    low, high = bootstrap_interval([0.01, 0.02, 0.03])
    assert 0.01 <= low < 0.02 < high <= 0.03
    assert describe([0.01, -0.02]).startswith("+1.0, -2.0; mean -0.5 points (95 %: t ")
    assert describe([0.013]) == "+1.3 points"


def test_the_table_pairs_by_draw() -> None:
    def line(method: str, draw: int, value: float) -> dict[str, object]:
        return {"method": method, "draw": draw, "mean_iou": value, "steps": 1600, "test": value - 0.1}

    lines = [line("control", 1, 0.5), line("control", 2, 0.6), line("ours", 2, 0.62), line("ours", 1, 0.53)]
    text = table(lines).splitlines()
    assert text[2] == "| control | 1600 | 2 | 0.550 ± 0.071 | 0.450 ± 0.071 | 0.500, 0.600 |"
    assert text[-1].startswith("ours minus control: +2.0, +3.0; mean +2.5 points")
