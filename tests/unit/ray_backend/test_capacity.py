"""Why: a cluster that is too small is found out in seconds, not by a run that waits for it."""

import os
from pathlib import Path

import pytest
import ray
import torch

from tests.conftest import tiny_config
from tests.refusals import refused
from threestage.checks.result import CheckOutcome
from threestage.config import Config, changed
from threestage.ray_backend import capacity, ray_internals
from threestage.ray_backend.capacity import free_nodes, more_may_come, warn_of_folders


@pytest.fixture
def config(scenes: Path) -> Config:
    return tiny_config(scenes)


def with_cluster(config: Config, **values: object) -> Config:
    return changed(config, {f"cluster.{key}": value for key, value in values.items()})


# ---- Room for a run


def room(config: Config, *nodes: dict[str, float], may_grow: bool = False, **cluster: object) -> CheckOutcome:
    return capacity._room(with_cluster(config, **cluster), nodes, may_grow, "there", "add nodes")


def test_room_for_workers_and_the_reader(config: Config) -> None:
    asked = "the run asks for 3 × (CPU 1) and CPU 1 to read the pool; there"
    assert room(config, {"CPU": 4.0}, workers=3) == CheckOutcome(asked)
    with refused("ray/too-small", f"{asked}; set cluster.workers=2, or add nodes"):
        room(config, {"CPU": 3.0}, workers=3)
    with refused("ray/too-small", "cluster.cpus_per_worker"):
        room(config, {"CPU": 8.0}, cpus_per_worker=9)
    with refused("ray/too-small", "(CPU 1, GPU 1)"):
        room(config, {"CPU": 8.0}, gpus_per_worker=1)
    with refused("ray/too-small", "placed STRICT_SPREAD"):
        room(config, {"CPU": 8.0}, workers=2, placement="STRICT_SPREAD")


def test_an_elastic_group_begins_with_what_fits(config: Config) -> None:
    assert room(config, {"CPU": 4.0}, workers=[2, 8]).value.endswith("there; it would begin with 3 workers")


def test_an_elastic_group_that_would_leave_no_cpu_to_the_reader(config: Config) -> None:
    """Stage 2 would stand still for ever."""
    found = room(config, {"CPU": 4.0}, workers=[2, 8])
    assert str(found.warning).endswith(
        "Ray begins with 4, which leaves no CPU to read the pool: set cluster.workers=[2,3]"
    )
    assert room(config, {"CPU": 9.0}, workers=[2, 8]).warning is None
    assert room(config, {"CPU": 5.0, "GPU": 4.0}, workers=[2, 8], gpus_per_worker=1).warning is None


def test_a_cluster_that_may_grow_is_no_reason_to_refuse(config: Config) -> None:
    small = room(config, {"CPU": 1.0}, may_grow=True, gpus_per_worker=1)
    assert "an autoscaler may add nodes: should none come, ask for less" in str(small.warning)


def test_gpus_that_nobody_uses(config: Config) -> None:
    assert "set cluster.gpus_per_worker=1" in str(room(config, {"CPU": 8.0, "GPU": 2.0}).warning)


def test_this_machine(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "share them" in str(capacity.room_here(with_cluster(config, workers=4, gpus_per_worker=0.25)).warning)
    with refused("ray/too-small", "name a cluster that has more"):
        capacity.room_here(with_cluster(config, workers=2, gpus_per_worker=1))


# ---- The nodes


def put_nodes(monkeypatch: pytest.MonkeyPatch, *nodes: dict[str, object]) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {}, **node} for node in nodes])


def test_folders_of_several_nodes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    put_nodes(monkeypatch, {"NodeID": "a"}, {"NodeID": "b", "Alive": False})
    warn_of_folders(["runs/mine", "data"], said.append)
    assert said == []
    put_nodes(monkeypatch, {"NodeID": "a"}, {"NodeID": "b"})
    warn_of_folders(["s3://bucket/run", "data"], said.append)
    assert said == ["the cluster has 2 nodes, which must share data, or give s3://bucket/prefix"]


def test_nodes_of_a_group_may_have_an_autoscaler(monkeypatch: pytest.MonkeyPatch) -> None:
    put_nodes(monkeypatch, {"NodeID": "a"}, {"NodeID": "b", "Labels": {"ray.io/node-id": "b"}})
    assert not more_may_come()
    put_nodes(monkeypatch, {"NodeID": "a"}, {"NodeID": "b", "Labels": {"ray.io/node-group": "gpu"}})
    assert more_may_come()


def test_what_is_free_on_each_node(monkeypatch: pytest.MonkeyPatch) -> None:
    put_nodes(monkeypatch, {"NodeID": "a"}, {"NodeID": "full"})
    monkeypatch.setattr(ray_internals, "free_resources", lambda: {"a": {"CPU": 2.0}, "gone": {"CPU": 9.0}})
    assert sorted(free_nodes(), key=len) == [{}, {"CPU": 2.0}]
