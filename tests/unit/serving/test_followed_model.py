"""Why: a new champion must take over while requests are answered, and a bad one must not."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from tests.refusals import refused
from tests.unit.prediction.test_predict import make_model
from threestage.errors import InputError
from threestage.mlflow_sync.records import RegistrySettings
from threestage.models.export import WEIGHTS
from threestage.prediction.predict import ModelFiles
from threestage.serving import followed_model as module
from threestage.serving.followed_model import FollowedModel, current_version, model_uri

IMAGE = np.random.default_rng(0).integers(0, 255, (40, 56, 3), np.uint8)
ALIAS = "models:/shapes@champion"


class Store:
    """Stands for a registry: versions, and what the alias names, which may be an error."""

    def __init__(self, folder: Path) -> None:
        self.models = {f"models:/shapes/{seed}": make_model(folder / str(seed), seed) for seed in (1, 2)}
        self.champion: str | InputError = "models:/shapes/1"
        self.reads = 0

    def current_version(self, model: str, registry: RegistrySettings) -> str:
        if isinstance(self.champion, InputError):
            raise self.champion
        return self.champion

    def read_model(self, version: str, registry: RegistrySettings) -> ModelFiles:
        self.reads += 1
        return self.models[version]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    store = Store(tmp_path)
    monkeypatch.setattr(module, "current_version", store.current_version)
    monkeypatch.setattr(module, "read_model", store.read_model)
    monkeypatch.setattr(module, "EXAMPLE_SIZE", (32, 48, 3))
    return store


def broken(files: ModelFiles) -> ModelFiles:
    """Weights that make every probability NaN."""
    state = safetensors.torch.load(files[WEIGHTS])
    return {**files, WEIGHTS: safetensors.torch.save({name: torch.full_like(t, torch.nan) if t.is_floating_point() else t
                                                      for name, t in state.items()})}  # fmt: skip


def test_a_new_version_takes_over_and_a_bad_one_does_not(store: Store) -> None:
    warnings: list[str] = []
    followed = FollowedModel(ALIAS, RegistrySettings(), "models:/shapes/1", warnings.append)
    ((version, before),) = followed.predict_batch([IMAGE])
    assert version == "models:/shapes/1"
    followed.check()
    assert store.reads == 1 and warnings == []

    store.champion = "models:/shapes/2"
    followed.check()
    ((version, after),) = followed.predict_batch([IMAGE])
    assert (version, warnings) == ("models:/shapes/2", ["models:/shapes/2 answers from now on"])
    assert not np.array_equal(before.confidence, after.confidence)

    store.models["models:/shapes/3"] = broken(store.models["models:/shapes/1"])
    store.champion = "models:/shapes/3"
    followed.check()
    followed.check()
    assert (followed.version, store.reads, len(warnings)) == ("models:/shapes/2", 3, 2), "not tried again"
    assert "smoke test" in warnings[1] and np.array_equal(
        followed.predict_batch([IMAGE])[0][1].class_ids, after.class_ids
    )

    store.champion = "models:/shapes/1"
    followed.check()
    assert followed.version == "models:/shapes/1"


def test_a_store_that_is_away_is_asked_again_and_reported_once(store: Store) -> None:
    warnings: list[str] = []
    followed = FollowedModel(ALIAS, RegistrySettings(), "models:/shapes/1", warnings.append)
    store.champion = InputError("tracking store: away", "mlflow/unavailable")
    followed.check()
    followed.check()
    assert len(warnings) == 1 and "models:/shapes/1 keeps answering" in warnings[0]
    store.champion = "models:/shapes/2"
    followed.check()
    assert followed.version == "models:/shapes/2"


def test_a_server_does_not_start_with_a_broken_model(store: Store) -> None:
    store.models["models:/shapes/1"] = broken(store.models["models:/shapes/1"])
    with refused("serve/smoke-test", "models:/shapes/1", "nan"):
        FollowedModel(ALIAS, RegistrySettings(), "models:/shapes/1", pytest.fail)


def test_how_a_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert model_uri("shapes@champion") == ALIAS and model_uri("runs/a@b") == "runs/a@b"
    Path("odd@name").mkdir()
    for name in ("odd@name", ALIAS, "models:/shapes/3", "s3://bucket/run"):
        assert model_uri(name) == name
    assert current_version("models:/shapes/3", RegistrySettings()) == "models:/shapes/3"
