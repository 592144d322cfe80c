import pytest
import ray

from threestage.ray_backend.nodes import alive_ids, warn_of_folders


def test_nodes_that_are_gone_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": "a", "Alive": True}, {"NodeID": "b", "Alive": False}])
    said: list[str] = []
    warn_of_folders(["runs/mine", "data"], said.append)
    assert alive_ids() == {"a"} and said == []


def test_folders_of_several_nodes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": name, "Alive": True} for name in "ab"])
    said: list[str] = []
    warn_of_folders(["s3://bucket/run", "data"], said.append)
    assert said == ["the cluster has 2 nodes, which must share data, or give s3://bucket/prefix"]
