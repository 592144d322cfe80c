"""The model behind docs/scaling.md: its page is current, its figures are sane, its counts are those of our networks."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks import scaling_model as model
from tests.benchmarks.scaling_model import GPUS, WORKLOADS, Constants, Coordination, Workload, row
from threestage.models.network import Network
from threestage.models.settings import NetworkSettings

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
MEASURED = Coordination([1, 2, 4, 8], [1.0, 2.0, 3.0, 4.0], 50, "2026-01-01", "many cores", 8)
C = Constants()
each_workload = pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)


def test_the_page_holds_what_the_script_computes() -> None:
    page = PAGE.read_text()
    assert page.count(model.BEGIN) == page.count(model.END) == 1
    assert model.rewritten(page) == page, "run python -m tests.benchmarks.scaling_model --write docs/scaling.md"
    assert len(model.rewritten(page, MEASURED).splitlines()) <= 195


def test_a_measurement_stays_in_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, measured = tmp_path / "page.md", tmp_path / "measured.json"
    page.write_text(f"before\n{model.BEGIN}\n{model.END}\nafter\n")
    fields = {name: getattr(MEASURED, name) for name in MEASURED.__dataclass_fields__}
    measured.write_text(json.dumps(fields | {"more": 1}))
    monkeypatch.setattr("sys.argv", ["scaling_model", "--coordination", str(measured), "--write", str(page)])
    model.main()
    first = page.read_text()
    monkeypatch.setattr("sys.argv", ["scaling_model", "--write", str(page)])
    model.main()
    assert page.read_text() == first
    assert first.startswith("before\n") and first.endswith("\nafter\n") and "many cores" in first


def test_without_a_measurement_the_page_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["scaling_model"])
    model.main()
    assert "not measured yet, taken as 0" in capsys.readouterr().out


@each_workload
@pytest.mark.parametrize("coordination", [None, MEASURED], ids=["no coordination", "coordination"])
def test_efficiency_falls_from_one(workload: Workload, coordination: Coordination | None) -> None:
    rows = [row(C, workload, gpus, coordination) for gpus in GPUS]
    assert rows[0].efficiency == 1
    assert all(0 < r.efficiency <= 1 and 0 <= r.lost < 0.1 for r in rows)
    assert all(more.efficiency <= fewer.efficiency and more.images >= fewer.images for fewer, more in pairwise(rows))
    assert all(more.allreduce > fewer.allreduce for fewer, more in pairwise(rows))


@each_workload
def test_one_gpu_speaks_to_nobody(workload: Workload) -> None:
    alone = row(C, workload, 1)
    assert alone.allreduce == alone.exposed == model.scalar_s(C, 1) == 0
    an_image, launches = model.busy_s(C, workload)
    assert alone.step == pytest.approx(max((workload.labelled + workload.unlabelled) * an_image, launches))


@each_workload
@pytest.mark.parametrize("gpus", GPUS)
def test_bandwidth_is_images_times_bytes(workload: Workload, gpus: int) -> None:
    found = row(C, workload, gpus)
    size, core_s = model.image_cost(C, workload)
    assert size == workload.image_bytes + C.map_bytes_per_pixel * workload.pool_pixels
    assert found.store_bytes == pytest.approx(found.images * size)
    assert found.object_store_bytes * C.nodes(gpus) == pytest.approx(found.images * workload.canvas_bytes)
    assert found.cores == pytest.approx(found.images * core_s)
    assert found.images * found.step == pytest.approx(gpus * workload.unlabelled)
    assert found.images <= min(model.stream_limits(C, workload, gpus).values()) * (1 + 1e-9)
    assert found.exposed <= found.allreduce


def test_all_reduce_by_hand() -> None:
    plain = replace(C, nvlink=1e9, node_network=1e8, nvlink_latency_s=0, network_latency_s=0, collective_s=0)
    assert model.allreduce_s(plain, 1e9, 2) == pytest.approx(1.0)  # 2 · 1/2 · 1 s
    assert model.allreduce_s(plain, 1e9, 8) == pytest.approx(1.75)  # 2 · 7/8 · 1 s
    assert model.allreduce_s(plain, 1e9, 16) == pytest.approx(1.75 + 10)  # and 2 · 1/2 · 10 s


def test_a_slow_stream_is_named() -> None:
    found = row(replace(C, blocks_per_s=1), WORKLOADS[0], 8)
    assert (found.limit, found.images) == ("handing out blocks", 30)


def test_by_reference_needs_more_requests() -> None:
    packed, loose = (
        model.stream_limits(C, WORKLOADS[0], 8, by_reference)["requests"] for by_reference in (False, True)
    )
    assert packed > 10 * loose and loose < C.gets_per_prefix / 2


@each_workload
@pytest.mark.parametrize("gpus", [8, 64, 512])
def test_no_interval_loses_less_than_the_best(workload: Workload, gpus: int) -> None:
    best = model.best_interval_s(C, workload, gpus)
    least = model.lost_share(C, workload, gpus, best)
    assert all(least <= model.lost_share(C, workload, gpus, best * factor) * 1.001 for factor in (0.2, 0.5, 2, 5))


def test_coordination_is_a_line_in_log2_of_the_workers() -> None:
    assert [MEASURED.seconds(n) for n in (1, 8, 512)] == pytest.approx([0, 0.003, 0.009], abs=1e-9)
    assert replace(MEASURED, overhead_ms_per_step=[4.0, 3.0, 2.0, 1.0]).seconds(512) == 0
    assert replace(MEASURED, workers=[4], overhead_ms_per_step=[2.0]).seconds(64) == 0


def test_workers_that_take_turns_on_few_cores_are_no_coordination() -> None:
    turns = replace(MEASURED, overhead_ms_per_step=[2.0, 2.0, 4.0, 9.0], cores=2)
    assert turns.coordination_ms() == [0, 0, 0, 1]
    with pytest.raises(ValueError, match="no table"):
        Coordination.of({**MEASURED.__dict__, "workers": [1]})


@pytest.mark.parametrize(
    "workload",
    [pytest.param(one, marks=pytest.mark.slow if "ResNet-101" in one.name else ()) for one in WORKLOADS],
    ids=lambda workload: workload.name,
)
def test_operations_and_parameters_are_those_of_the_network(workload: Workload) -> None:
    settings = NetworkSettings(encoder=workload.encoder, dilations=(6, 12), output_stride=workload.output_stride)
    with torch.device("meta"), torch.no_grad():
        network = Network(settings, workload.num_classes, "branch").eval()
        counted = []
        for with_auxiliary in (True, False):
            with FlopCounterMode(display=False) as counter:
                network(torch.empty(1, 3, *workload.crop), with_auxiliary=with_auxiliary)
            counted.append(counter.get_total_flops())
    trainable = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    assert [workload.student_flops, workload.teacher_flops] == pytest.approx(counted, rel=1e-3)
    assert workload.parameters == pytest.approx(trainable, rel=1e-3)
