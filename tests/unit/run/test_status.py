"""The state of a run is what its folder says, and the lease decides: neither MLflow nor a clock elsewhere is asked."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.refusals import refused
from threestage.cli import app
from threestage.data import storage
from threestage.run.status import different_settings, find_runs, read_statuses
from threestage.run_folder import lease
from threestage.run_folder.lease import LeaseObserver

RESULT = {
    "mean_iou": 0.5,
    "pixel_accuracy": 0.9,
    "per_class_iou": {"a": 0.5},
    "steps": 20,
    "seconds": 7.0,
    "model_digest": "d",
}
HISTORY = [
    {"step": 10, "step_seconds": 180.0, "workers": 2.0},
    {"step": 20, "step_seconds": 180.0, "workers": 2.0, "mean_iou": 0.5},
]
MARKER = {"code_version": "1", "keys": {}, "finished": 0.0, "model_digest": "d"}


def write_run(out: str, done: int = 1, **settings: Any) -> str:
    """A run of two stages, of which so many are done; the next has a checkpoint of step 10."""
    tree = {"name": "one", "seed": 0, "stages": 2, "stage1": {"steps": 20}, "stage2": {"steps": 30}, **settings}
    storage.write_json(f"{out}/config.json", tree)
    storage.write_json(f"{out}/split.json", {"split": {}})
    for stage in ("stage1", "stage2")[:done]:
        storage.write_json(f"{out}/{stage}/result.json", {**RESULT, "history": HISTORY})
        storage.write_json(f"{out}/{stage}/done.json", MARKER)
    if done == 2:
        stages = {stage: {"mean_iou": 0.5} for stage in ("stage1", "stage2")}
        storage.write_json(f"{out}/results.json", {"seed": 0, "stages": stages})
    else:
        folder = f"{out}/stage{done + 1}/checkpoints"
        storage.write_json(f"{folder}/latest.json", {"step": 10, "unlabelled_images": 0})
        rows = [{"step": 10, "steps_per_second": 4.0, "mean_iou": 0.25, "step_seconds": 0.25}]
        storage.write_json(f"{folder}/rows.json", rows)
    return out


def hold(out: str, here: bool = True, **progress: float | str) -> None:
    holder = lease._this_process(0.05).model_copy(update={"progress": progress})
    if not here:
        holder = holder.model_copy(update={"machine": "another"})
    storage.write_json(f"{out}/lease.json", holder.model_dump())


def note(out: str, kind: str, text: str, **figures: float) -> None:
    event = {"time": "2026-01-01T00:00:00+00:00", "kind": kind, "text": text, **figures}
    storage.write_bytes(f"{out}/events.jsonl", (json.dumps(event) + "\n").encode())


def status(out: str) -> Any:
    return read_statuses(find_runs(out), LeaseObserver())[0]


def test_a_run_that_trains(tmp_path: Path) -> None:
    out = write_run(str(tmp_path))
    hold(
        out,
        stage="stage2",
        step=14,
        steps=30,
        per_second=2.0,
        seconds=1800.0,
        devices=2,
        checkpoint_step=12,
        checkpoint_age_s=3.0,
    )
    found = status(out)
    assert (found.state, found.stage, found.step, found.steps, found.per_second) == ("running", "stage2", 14, 30, 2.0)
    assert (found.seconds_left, found.checkpoint_step, found.checkpoint_age_s, found.device_hours) == (
        8.0,
        12,
        3.0,
        1.0,
    )
    assert found.mean_iou == {"stage1": 0.5, "stage2": 0.25} and found.why is None


@pytest.mark.parametrize(
    ("quiet_s", "gap_s", "state"), [(59, 1, "running"), (61, 1, "waiting"), (61, 30, "running"), (91, 30, "waiting")]
)
def test_one_without_progress_is_waiting(tmp_path: Path, quiet_s: float, gap_s: float, state: str) -> None:
    out = write_run(str(tmp_path))
    note(out, "warning", "the store is away")
    hold(out, stage="stage2", step=14, steps=30, per_second=2.0, quiet_s=quiet_s, usual_gap_s=gap_s)
    assert (status(out).state, status(out).why) == (state, "the store is away" if state == "waiting" else None)


def test_one_whose_driver_was_killed_is_dead(tmp_path: Path) -> None:
    """Here at once; elsewhere once its lease has stood still; one elsewhere that beats lives."""
    out = write_run(str(tmp_path))
    hold(out)
    dead = storage.read_json(f"{out}/lease.json") | {"process": "1"}
    storage.write_json(f"{out}/lease.json", dead)
    assert status(out).state == "dead"
    hold(out, here=False)
    observer = LeaseObserver()
    assert read_statuses([out], observer, wait=False)[0].state == "looking"
    hold(out, here=False, step=1)
    assert [read_statuses([out], observer, wait=False)[0].state for _ in range(2)] == ["running", "running"]
    assert status(out).state == "dead"


def test_how_runs_ended(tmp_path: Path) -> None:
    finished, failed, lost = (write_run(str(tmp_path / name), done) for name, done in (("a", 2), ("b", 1), ("c", 0)))
    note(failed, "failed", "stage2: NaN in step 12", seconds=3600, devices=4)
    (tmp_path / "notes").mkdir()
    found = read_statuses(find_runs(str(tmp_path)), LeaseObserver())
    assert [(one.uri, one.state) for one in found] == [(finished, "finished"), (failed, "failed"), (lost, "dead")]
    assert found[1].why == "stage2: NaN in step 12" and found[1].device_hours == 4
    assert found[0].device_hours == 4, "of an older run: 2 stages × 20 steps × 180 s × 2 workers"
    assert (found[1].stage, found[1].step, found[1].checkpoint_step) == ("stage2", 10, 10)


@pytest.mark.parametrize("name", ["config.json", "stage1/result.json", "stage2/checkpoints/latest.json"])
def test_a_damaged_run_hides_no_other(tmp_path: Path, name: str) -> None:
    for run in ("a", "b"):
        write_run(str(tmp_path / run))
    (tmp_path / "a" / name).write_text('{"seed": ')
    damaged, other = read_statuses(find_runs(str(tmp_path)), LeaseObserver())
    assert (damaged.uri, damaged.state) == (str(tmp_path / "a"), "damaged") and name in str(damaged.why)
    assert other.state == "dead" and other.mean_iou == {"stage1": 0.5, "stage2": 0.25}
    listed = CliRunner().invoke(app.app, ["runs", "list", str(tmp_path)], env={"COLUMNS": "200"})
    assert listed.exit_code == 0 and "damaged" in listed.stdout


def test_on_s3(bucket: str) -> None:
    out = write_run(f"{bucket}/runs/a")
    note(out, "failed", "no room")
    hold(write_run(f"{bucket}/runs/b"), stage="stage2", step=14, steps=30)
    assert [(one.uri, one.state) for one in read_statuses(find_runs(f"{bucket}/runs"), LeaseObserver())] == [
        (f"{bucket}/runs/a", "failed"), (f"{bucket}/runs/b", "running")
    ]  # fmt: skip


def test_a_folder_without_runs(tmp_path: Path) -> None:
    with refused("run/no-run", tmp_path):
        find_runs(str(tmp_path))


def test_settings_that_differ(tmp_path: Path) -> None:
    runs = [write_run(str(tmp_path / name), 2, name=name, seed=seed) for name, seed in (("a", 0), ("b", 1))]
    assert different_settings(runs) == {"seed": [0, 1]}


def test_the_commands(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        note(
            write_run(str(tmp_path / name), 2, name=name, seed=seed),
            "finished",
            "all stages are done",
            seconds=3600,
            devices=2,
        )

    def threestage(*arguments: object) -> str:
        done = CliRunner().invoke(app.app, ["runs", *map(str, arguments)], env={"COLUMNS": "200"})
        assert done.exit_code == 0, done.output
        return done.stdout

    assert [one["state"] for one in json.loads(threestage("list", tmp_path, "--json"))] == ["finished", "finished"]
    assert threestage("list", tmp_path).count("finished") == 2
    assert "all stages are done" in threestage("show", tmp_path / "a")
    compared = threestage("compare", tmp_path)
    assert "seed" in compared and "mean IoU, stage2" in compared and "0.500" in compared
    assert json.loads(threestage("compare", tmp_path, "--json"))["settings"] == {"seed": [0, 1]}
    assert json.loads(threestage("cost", tmp_path, "--price-per-hour", 2.5, "--json"))["cost"] == 10
    assert "10.00" in threestage("cost", tmp_path, "--price-per-hour", 2.5)
