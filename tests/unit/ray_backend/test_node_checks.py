"""Why: a node with other code, or without the run's places, is found out in seconds, not by a run that fails there."""

import os
from pathlib import Path

import pytest
import ray

from tests.conftest import tiny_config
from tests.refusals import refused
from threestage.config import Config
from threestage.ray_backend import node_checks


@pytest.fixture
def config(scenes: Path, tmp_path: Path) -> Config:
    return tiny_config(scenes, registry={"tracking_uri": f"sqlite:///{tmp_path}/mlflow.db"})


def test_a_node_with_another_folder_of_that_name(config: Config, tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    with node_checks._marked(out) as marker:
        assert node_checks._look(config.model_dump(mode="json"), out, marker)["problems"] == []
    (found,) = node_checks._look(config.model_dump(mode="json"), out, marker)["problems"]
    assert found.startswith(f"--out {out} is another folder there: give s3://bucket/prefix") and not os.listdir(
        tmp_path
    )


def test_nodes_that_lack_something(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    alive = [{"NodeID": name, "NodeManagerAddress": name, "Alive": True} for name in ("one", "two", "three")]
    old = node_checks.NodeView(
        versions=node_checks.versions() | {"threestage": "0.0.1"}, problems=("data.root: not there",)
    )
    fine = node_checks.NodeView(versions=node_checks.versions())
    monkeypatch.setattr(ray, "nodes", lambda: alive)
    monkeypatch.setattr(node_checks, "_views", lambda *given: {"one": old, "two": old, "three": fine})
    nodes = "node one and 1 more: "
    with refused("check/nodes", f"{nodes}it has threestage 0.0.1", f"{nodes}data.root: not there"):
        node_checks.nodes_reach(config, "s3://bucket/run")


def test_a_database_in_a_file(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [{"Alive": True}]
    monkeypatch.setattr(ray, "nodes", lambda: alone)
    assert node_checks.own_file(config) is None
    monkeypatch.setattr(ray, "nodes", lambda: alone * 2)
    line = node_checks.own_file(config)
    assert line is not None and "no other node reads it" in str(line.warning)
    monkeypatch.setenv(node_checks.JOB, "{}")
    line = node_checks.own_file(config)
    assert line is not None and "set registry.tracking_uri" in str(line.problem) and line.code == "mlflow/local-file"
