"""A sweep on a real cluster: stage 1 once, trials side by side, failures recorded, all of it in MLflow, nothing left behind."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import tiny_config
from tests.refusals import refused
from threestage.config import Config, changed, load
from threestage.data import storage
from threestage.mlflow_sync.client import open_registry
from threestage.sweeps import sweep
from threestage.sweeps.plan import SweepPlan
from threestage.sweeps.space import Space
from threestage.sweeps.trials import Trial, load_trials

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,  # four trials: minutes
    pytest.mark.timeout(420),
    pytest.mark.filterwarnings("default"),  # Ray's own
]

SPACE = {
    "stages": [2],
    "search": {
        "pseudo_mask.confidence_threshold": {"choice": [0.0, 0.5]},
        "optimiser.learning_rate": {"choice": [1e-3, 1e30]},
    },
    "searcher": "grid",
    "trials": None,
    "max_concurrent": 2,
}


class Silent:
    """A Show that remembers."""

    def __init__(self) -> None:
        self.plans: list[SweepPlan] = []
        self.phases: list[str] = []
        self.stages: list[str] = []
        self.warnings: list[str] = []
        self.trials: list[Trial] = []

    def plan(self, plan: SweepPlan) -> None:
        self.plans.append(plan)

    def phase(self, text: str) -> None:
        self.phases.append(text)

    def on_metrics(self, stage: str, row: Mapping[str, float]) -> None:
        self.stages.append(stage)

    def on_progress(self, what: str, done: int, total: int) -> None:
        pass

    def trial(self, trial: Trial) -> None:
        self.trials.append(trial)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def sweep_config(scenes: Path, tmp_path: Path) -> Config:
    return tiny_config(
        scenes,
        registry={"tracking_uri": f"sqlite:///{tmp_path}/mlflow.db"},
        training__evaluate_every=2,
        training__loss_limit=1e6,
    )


def test_a_sweep_from_its_start_to_best_yaml(ray_cluster: None, s3_root: str, scenes: Path, tmp_path: Path) -> None:
    import ray

    from tests.runs import run_on_ray

    config, out, show = sweep_config(scenes, tmp_path), f"{s3_root}/sweep", Silent()
    found = sweep.run(sweep.Sweep(Space.model_validate(SPACE), config, out), show)

    trials = load_trials(out)
    assert [trial.state for trial in trials] == ["finished", "failed", "finished", "failed"]
    assert all("above training.loss_limit" in str(trial.reason) for trial in trials[1::2])
    assert [step for step, _ in trials[0].curve] == [2, 4, 6]
    assert set(show.stages) == {"stage1"}, "stage 1 is trained once, before the trials"
    assert found["counters"]["stage1"] == {"trained": 1, "reused": 4}
    assert all("stage2" in trial.trained for trial in trials[::2])
    assert found["best"]["score"] == max(trial.score or 0.0 for trial in trials)

    runs_left = {uri.split("/runs/")[1][:4] for uri in storage.list_files(f"{out}/runs")}
    assert runs_left == {f"{found['best']['number']:04d}"}, "what has lost is deleted"
    best = tmp_path / "best.yaml"
    best.write_bytes(storage.read_bytes(f"{out}/best.yaml"))
    resolved = load(str(best))
    assert resolved.stage2.overrides == {"optimiser": {"learning_rate": 1e-3}} and resolved.stages == 3
    again = changed(resolved, {"stages": 2, "pseudo_mask.final_stage": False})
    results = run_on_ray(again, f"{s3_root}/best", lambda stage, row: None, reuse=f"{out}/shared/seed0")
    assert results["stages"]["stage2"]["mean_iou"] == found["best"]["score"], "to the last bit"
    assert {"best.yaml", "parallel_coordinates.png", "thresholds.png"} <= set(found["files"])
    assert_all_is_free(ray)
    assert_in_mlflow(config, trials)

    with refused("sweep/exists", "--resume"):
        sweep.run(sweep.Sweep(Space.model_validate(SPACE), config, out), Silent())
    resumed = Silent()
    promoted = sweep.Sweep(Space.model_validate(SPACE), config, out, resume=True, promote=True)
    assert sweep.run(promoted, resumed)["best"] == found["best"]
    assert sorted(model["stage"] for model in open_registry(config.registry).models.versions()) == ["stage1", "stage2"]
    assert resumed.stages == [] and resumed.plans == [] and load_trials(out) == trials, (
        "a finished sweep repeats nothing"
    )


def assert_all_is_free(ray: Any) -> None:
    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline, f"{ray.available_resources()} of {ray.cluster_resources()}"
        time.sleep(0.5)


def assert_in_mlflow(config: Config, trials: list[Trial]) -> None:
    """One parent, with the results, and a child for each trial, with what it tried and its curve."""
    from mlflow import MlflowClient

    client = MlflowClient(config.registry.tracking_uri)
    runs = client.search_runs(["1"], max_results=50)
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id]
    assert len(parents) == 1 and len(children) == len(trials)
    assert {file.path for file in client.list_artifacts(parents[0].info.run_id)} >= {"best.yaml", "thresholds.png"}
    assert sorted(run.info.status for run in children) == ["FAILED", "FAILED", "FINISHED", "FINISHED"]
    finished = next(run for run in children if run.info.status == "FINISHED")
    assert [point.step for point in client.get_metric_history(finished.info.run_id, "mean_iou")] == [2, 4, 6]
    assert finished.data.params["optimiser.learning_rate"] == "0.001"
