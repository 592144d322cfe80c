"""What a sweep says before it starts: its cost by hand, whether the cluster has room, and a step that is really measured."""

import io
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.conftest import tiny_config
from tests.refusals import refused
from threestage.checks.step_time import measure_step
from threestage.config import Config
from threestage.data.records import load_manifest
from threestage.models.network import build_network
from threestage.ray_backend.capacity import refuse_impossible
from threestage.run.stages import StageTask, build_state
from threestage.sweeps.plan import (
    PoolSize,
    SweepPlan,
    SweepState,
    judged_at,
    make_plan,
    mean_pixels,
    network_bytes,
    plan_json,
    rich_plan,
)
from threestage.sweeps.space import Space
from threestage.training.checkpoint import TrainState

CPU = torch.device("cpu")
STEP_SECONDS = {"stage1": 1.0, "stage2": 2.0, "stage3": 3.0}


def space(**changes: Any) -> Space:
    tree = {"stages": [2], "search": {"optimiser.learning_rate": {"loguniform": [1e-4, 1e-2]}}, "trials": 9}
    return Space.model_validate(tree | changes)


def planned(scenes: Path, the_space: Space, config: Config | None = None, **changes: Any) -> SweepPlan:
    given: dict[str, Any] = {
        "trials_left": 9,
        "shared_done": {},
        "step_seconds": STEP_SECONDS,
        "pool_images": 100,
        **changes,
    }
    state = SweepState(**{key: given[key] for key in SweepState._fields if key in given})
    pool = PoolSize(given["pool_images"], 64 * 64)
    manifest = load_manifest(str(scenes))
    return make_plan(the_space, config or long_config(scenes), manifest, state, given["step_seconds"], "a CPU", pool)


def long_config(scenes: Path, **changes: object) -> Config:
    return tiny_config(
        scenes, stage1__steps=360, stage2__steps=900, stage3__steps=900, training__evaluate_every=50, **changes
    )


# ---- Cost


def test_hours_of_trials_that_run_to_their_end(scenes: Path) -> None:
    plan = planned(scenes, space(max_concurrent=3), long_config(scenes, cluster__workers=2))
    # 9 trials × 900 steps × 2 s = 16 200 s = 4.5 h, on 2 workers each, 3 at once
    assert (plan.most_hours.device, plan.most_hours.wall) == pytest.approx((9.0, 1.5))
    assert plan.expected_hours is None
    assert (plan.shared_hours.device, plan.shared_hours.wall) == pytest.approx((0.2, 0.1))  # 360 s, once
    assert (plan.devices, plan.unit, plan.ends_with) == (2, "worker", "all 9 trials, after about 90.0 min")


def test_a_gpu_is_the_device_where_workers_have_them_and_what_is_finished_costs_nothing(scenes: Path) -> None:
    config = long_config(scenes, cluster__workers=4, cluster__gpus_per_worker=0.5)
    plan = planned(
        scenes, space(), config, shared_done={"stage1": True, "pseudo_masks1": True}, step_seconds={"stage2": 2}
    )
    assert (plan.devices, plan.unit) == (2, "GPU")
    assert plan.shared_hours.device == 0
    assert plan.reused[0] == "stage 1: once, shared by all trials (finished already)"


def test_hours_with_asha_are_those_of_the_share_that_passes_each_rung(scenes: Path) -> None:
    plan = planned(scenes, space(scheduler={"asha": {"grace_steps": 100, "reduction_factor": 3}}))
    assert plan.judged_at == (100, 300)  # the next, 900, is the end
    # of a trial: 100 + (300 − 100)/3 + (900 − 300)/9 = 233⅓ steps of 2 s
    assert plan.expected_hours is not None
    assert plan.expected_hours.device == pytest.approx(9 * 700 / 3 * 2 / 3600)


def test_stages_of_other_speeds_are_added_up_from_the_step_on_where_they_begin(scenes: Path) -> None:
    plan = planned(scenes, space(stages=[2, 3], scheduler={"asha": {"grace_steps": 600, "reduction_factor": 2}}))
    assert plan.judged_at == (600, 1200)
    # 600·2 s, then half of 300·2 + 300·3 s, then a quarter of 600·3 s
    assert plan.expected_hours is not None
    assert plan.expected_hours.device == pytest.approx(9 * (1200 + 1500 / 2 + 1800 / 4) / 3600)


def test_a_rung_is_judged_at_the_evaluation_that_follows_it() -> None:
    scheduler = space(scheduler={"asha": {"grace_steps": 30, "reduction_factor": 2}}).scheduler
    assert judged_at([100, 100], 40, scheduler) == (40, 80, 140)  # 30, 60, 120; stage 3 is evaluated at 140, 180, 200
    assert judged_at([100, 100], 100, scheduler) == (100,)  # 30 and 60 together; 120 at the end, where nothing is saved


@pytest.mark.parametrize(
    ("budget", "first"),
    [
        ({"hours": 2.0}, "all 9 trials, after about 90.0 min"),
        ({"hours": 1.0, "device_hours": 9.0}, "budget.hours=1, after about 60.0 min"),
        ({"device_hours": 4.5}, "budget.device_hours=4.5, after about 35.0 min"),
    ],
)
def test_the_limit_that_is_reached_first_is_named(scenes: Path, budget: dict[str, float], first: str) -> None:
    config = long_config(scenes, cluster__workers=2)
    plan = planned(scenes, space(max_concurrent=3, budget=budget), config, device_hours_spent=1.0)
    assert plan.ends_with == first


# ---- What is kept


@pytest.mark.parametrize("stage", ["stage1", "stage2", "stage3"])
def test_the_bytes_of_a_checkpoint_are_those_of_its_tensors(scenes: Path, tmp_path: Path, stage: Any) -> None:
    config = tiny_config(scenes)
    state = trained_one_step(config, stage, str(tmp_path))
    model = build_network(config.network, 4)
    assert network_bytes(config, stage, 4) == (tensor_bytes(state.snapshot()), tensor_bytes(model.main_state_dict()))


def trained_one_step(config: Config, stage: Any, folder: str) -> TrainState:
    split: Any = {"labelled": (), "validation": (), "validation_split": "carved"}
    task = StageTask(
        stage=stage, config=config.model_dump(mode="json"), manifest_version=1, split=split, folder=folder,
        pool=None, pseudo_masks=None, previous_model=None,
    )  # fmt: skip
    state = build_state(task, config, 4, CPU)
    for parameter in state.student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state.optimiser.step()
    state.keep_best(0.5)
    return state


def tensor_bytes(value: Any) -> int:
    """Of networks and moments; the optimiser's own count of steps, 4 bytes a parameter, is left out."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(tensor_bytes(part) for name, part in value.items() if name != "step")
    return 0


def test_storage_is_that_of_the_fullest_moment(scenes: Path) -> None:
    config = long_config(scenes, training__checkpoints_kept=2)
    plan = planned(scenes, space(stages=[2, 3], max_concurrent=4), config, kept=3)
    classes = len(load_manifest(str(scenes)).classes)
    (one, one_model), (two, two_model), (three, three_model) = (
        network_bytes(config, stage, classes) for stage in ("stage1", "stage2", "stage3")
    )
    masks = 2 * 100 * 64 * 64
    assert [part.bytes for part in plan.storage] == [
        3 * one + 2 * one_model,
        masks,
        (4 + 3) * (2 * two + 2 * two_model + 2 * three + 2 * three_model) + 4 * max(two, three),
        (4 + 3) * masks,
    ]
    assert plan.bytes == sum(part.bytes or 0 for part in plan.storage)


def test_a_pool_that_is_not_listed_yet_is_said_to_be(scenes: Path) -> None:
    plan = planned(scenes, space(), pool_images=None)
    assert plan.bytes is None
    assert "the pool is not listed yet" in shown(plan)


def shown(plan: SweepPlan) -> str:
    console = Console(width=200, file=io.StringIO())
    with console.capture() as captured:
        console.print(rich_plan(plan))
    return captured.get()


def test_the_table_says_what_is_reused_and_where_its_figures_come_from(scenes: Path) -> None:
    keys = {"stage3.warm_start": {"choice": [True, False]}, "pseudo_mask.confidence_threshold": {"uniform": [0.0, 0.9]}}
    plan = planned(scenes, space(stages=[2, 3], search=keys, scheduler={"asha": {"grace_steps": 100}}))
    assert [stage.keys for stage in plan.stages] == [(), ("pseudo_mask.confidence_threshold",), tuple(keys)]
    text = shown(plan)
    for part in (
        "stage 1: once, shared by all trials (to be trained)",
        "pseudo-masks 1: once (to be predicted); thresholds act on stored confidences: no new prediction",
        "from a step measured on a CPU, without waiting for data, evaluation and start-up",
        "each trial: 900 steps of 2 s; searched: pseudo_mask.confidence_threshold",
        "judged at steps 100, 300, 900; 1 of 3 passes each",
    ):
        assert part in text
    assert plan_json(plan)["bytes"] == plan.bytes


# ---- Room

NODE = {"CPU": 8.0, "memory": 1e10}
GPU_NODE = {"CPU": 8.0, "GPU": 4.0, "accelerator_type:A10G": 1.0}


@pytest.mark.parametrize(
    ("nodes", "cluster", "changes"),
    [
        # 4 × (1 + 1 + 0.1) = 8.4 CPUs are too many for one node, 3 × 2.1 are not
        ([NODE], {}, {"max_concurrent": 3}),
        ([NODE, NODE], {}, {"max_concurrent": 4}),
        # stage 1 reads no pool: 7 × 1.1 CPUs
        ([NODE], {}, {"max_concurrent": 7, "stages": [1]}),
        # elastic groups begin with the least
        ([NODE], {"workers": [2, 64]}, {"max_concurrent": 2}),
        ([GPU_NODE], {"workers": 2, "gpus_per_worker": 1, "accelerator": "A10G"}, {"max_concurrent": 2}),
        # two share a GPU; the third of 0.4 has no place there, so 8 have
        ([{**GPU_NODE, "CPU": 20.0}], {"workers": 4, "gpus_per_worker": 0.4}, {"max_concurrent": 2}),
        # GPUs' nodes have no CPU to spare: the others read
        ([{"CPU": 2.0, "GPU": 2.0}, {"CPU": 3.0}], {"workers": 2, "gpus_per_worker": 1}, {}),
        ([NODE, NODE], {"workers": 3, "cpus_per_worker": 2, "placement": "STRICT_PACK"}, {"max_concurrent": 2}),
        ([NODE, NODE, NODE], {"workers": 2, "cpus_per_worker": 4, "placement": "STRICT_SPREAD"}, {"max_concurrent": 2}),
        ([NODE], {"resources_per_worker": {"memory": 3e9}}, {"max_concurrent": 3}),
        ([NODE], {"predictors": 3}, {"max_concurrent": 2, "stages": [2, 3]}),
    ],
)
def test_plans_that_have_room_pass(
    scenes: Path, nodes: list[dict[str, float]], cluster: dict[str, Any], changes: dict[str, Any]
) -> None:
    refuse_impossible(space(**changes), tiny_config(scenes, cluster=cluster), nodes)


@pytest.mark.parametrize(
    ("nodes", "cluster", "changes", "told"),
    [
        ([NODE], {}, {"max_concurrent": 4}, "has CPU 8 on 1 node; set max_concurrent=3 in the space, or add nodes"),
        (
            [NODE],
            {"workers": 3},
            {"max_concurrent": 3},
            "set max_concurrent=1 in the space or cluster.workers=1, or add nodes",
        ),
        (
            [NODE],
            {"workers": 8},
            {"max_concurrent": 5},
            "set max_concurrent=1 in the space with cluster.workers=6, or add nodes",
        ),
        ([{"CPU": 2.0}], {}, {}, "ask for less with cluster.cpus_per_worker"),
        ([NODE, NODE], {"cpus_per_worker": 9}, {}, "has CPU 16 (one node at most CPU 8) on 2 nodes; ask for less"),
        ([NODE], {"gpus_per_worker": 1}, {}, "1 × (CPU 1, GPU 1) and CPU 1 to read the pool and CPU 0.1 to lead it"),
        ([GPU_NODE], {"gpus_per_worker": 1, "accelerator": "H100"}, {}, "accelerator_type:H100 0.001"),
        (
            [GPU_NODE],
            {"workers": 3, "gpus_per_worker": 0.6},
            {"max_concurrent": 2},
            "set max_concurrent=1 in the space or cluster.workers=2",
        ),
        ([NODE, NODE], {"workers": 9, "placement": "STRICT_PACK"}, {}, "placed STRICT_PACK"),
        ([NODE, NODE], {"workers": 3, "placement": "STRICT_SPREAD"}, {}, "set cluster.workers=2"),
        ([NODE], {"resources_per_worker": {"memory": 4e9}}, {"max_concurrent": 3}, "set max_concurrent=2"),
        (
            [NODE],
            {"predictors": 4},
            {"max_concurrent": 2, "stages": [2, 3]},
            "set max_concurrent=1 in the space or cluster.predictors=3",
        ),
    ],
)
def test_plans_without_room_are_refused_with_what_fits(
    scenes: Path, nodes: list[dict[str, float]], cluster: dict[str, Any], changes: dict[str, Any], told: str
) -> None:
    with refused("ray/too-small", told) as raised:
        refuse_impossible(space(**changes), tiny_config(scenes, cluster=cluster), nodes)
    assert "\n" not in str(raised.value)


def test_a_cluster_that_may_grow_is_no_reason_to_refuse(scenes: Path) -> None:
    warnings: list[str] = []
    refuse_impossible(space(max_concurrent=4), tiny_config(scenes), [NODE], may_grow=True, warn=warnings.append)
    assert "trials wait for them; should none come, set max_concurrent=3" in warnings[0]


# ---- A measured step


@pytest.mark.parametrize(
    ("stage", "batch", "images"), [("stage1", "per_worker", 2), ("stage2", "per_worker", 4), ("stage2", "global", 2)]
)
def test_a_step_is_measured_and_leaves_nothing(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: Any, batch: str, images: int
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("threestage.checks.step_time.MOST_STEPS", 3)
    config = tiny_config(
        scenes, training__batch_scope=batch, cluster__workers=2, network__weights="not/there.safetensors"
    )
    measured = measure_step(config, stage, load_manifest(str(scenes)), CPU)
    assert 0 < measured.seconds < 5
    assert (measured.memory_bytes, measured.images, measured.device) == (None, images, "a CPU with 1 thread")
    assert list(tmp_path.iterdir()) == []


def test_measuring_ends_when_its_time_is_over(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("threestage.checks.step_time.MOST_STEPS", 10**6)
    assert measure_step(tiny_config(scenes), "stage1", load_manifest(str(scenes)), CPU, limit_s=0.0).seconds > 0


def test_the_pixels_of_a_mean_image_are_those_that_are_trained_on(scenes: Path) -> None:
    assert mean_pixels(load_manifest(str(scenes)), 2) == 32 * 32
