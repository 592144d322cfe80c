"""Shared by all tests: a tiny data set of synthetic scenes, a configuration that trains on it in seconds.

Nothing is imported here that takes long: the process that hands the tests to its workers runs none.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.made_once import made_once
from tests.s3 import empty, s3_server, variables
from tests.small_disk import mounted

if TYPE_CHECKING:
    from threestage.config import Config


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set root: 40 train, 6 validation, 4 test scenes of 64×64, 16 rows a file."""

    def make(folder: Path) -> None:
        from threestage.data.ingest import IngestSettings, ingest
        from threestage.data.synthetic import write_scenes

        source = folder / "source"
        write_scenes(str(source), {"train": 40, "val": 6, "test": 4}, seed=7)
        settings = IngestSettings(format="camvid", class_map=str(source / "class_map.yaml"), rows_per_file=16)
        ingest(str(source), str(folder / "data"), settings)

    return made_once(tmp_path_factory, "scenes", make) / "data"


@pytest.fixture(scope="session")
def finished_run(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `local_config(scenes)` as `run --local` leaves it; `copy_run` makes one that may be changed."""

    def make(folder: Path) -> None:
        from threestage.run.backend import RunCallbacks
        from threestage.run.run import run

        warnings: list[str] = []
        run(local_config(scenes), str(folder / "run"), True, RunCallbacks(on_warning=warnings.append))
        assert warnings == []

    return made_once(tmp_path_factory, "run", make) / "run"


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database: a fresh one costs seconds of waiting for the disk, so tests take copies."""

    def make(folder: Path) -> None:
        from threestage.mlflow_sync.client import open_registry
        from threestage.mlflow_sync.records import RegistrySettings

        open_registry(RegistrySettings(tracking_uri=f"sqlite:///{folder}/mlflow.db", experiment="other"))

    return made_once(tmp_path_factory, "store", make) / "mlflow.db"


@pytest.fixture(scope="session", autouse=True)
def quick() -> Iterator[None]:
    """One thread. Files need not be on the disk: no test outlives the power. What a pixel takes is measured with small images."""
    import torch

    from threestage.data import parallel
    from threestage.prediction import memory

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "ASK_STORES", ())  # a command in this process must not end it: see end_process
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr(memory, "PROBE_SIDES", (32, 64))
        yield


@pytest.fixture(autouse=True)
def unchanged_environment() -> Iterator[None]:
    """A test that configures the storage does so for itself only."""
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]
    changed = {name: value for name, value in before.items() if os.environ.get(name) != value}
    os.environ.update(changed)  # no more than that: see mlflow_sync.connection.reserve_variables


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB; skipped where none can be mounted."""
    with mounted(tmp_path / "small") as folder:
        yield folder


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """Of a real S3 server, which takes seconds to start."""
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder in an empty bucket, whose endpoint this process's environment names."""
    empty(s3_endpoint)
    for name, value in variables(s3_endpoint).items():
        monkeypatch.setenv(name, value)
    return "s3://bucket/some/folder"


def copy_to(root: str, data: Path) -> None:
    """The files of a data set below another root."""
    from threestage.data import storage

    for uri in storage.list_files(str(data)):
        storage.write_bytes(uri.replace(storage.absolute(str(data)), root), storage.read_bytes(uri))


def write_photos(folder: Path, count: int) -> None:
    """Noise of 48×40 pixels with masks of two classes, in images/ and masks/."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for i in range(count):
        Image.fromarray(random.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(folder / f"images/{i}.jpg")
        Image.fromarray(random.integers(0, 2, (40, 48), dtype=np.uint8)).save(folder / f"masks/{i}.png")


def tiny_config(root: Path, **changes: object) -> "Config":
    """Three stages of a few steps on a tiny network; `changes` are whole sections or dotted keys with "__" for dots."""
    from threestage.config import Config

    tree: dict[str, object] = {
        "name": "tiny",
        "data": {"root": str(root), "labelled": 8},
        "network": {"encoder": "test_resnet", "batch_norm": "live", "dilations": [1, 2]},
        "augment": {"crop_size": [32, 32], "strong": {"cutout_size": 8}},
        "optimiser": {"learning_rate": 1e-3, "encoder_learning_rate": 1e-3},
        "pseudo_mask": {"on_collapse": "ignore"},
        "stage1": {"steps": 6, "labelled_batch": 2},
        "stage2": {"steps": 6, "labelled_batch": 2, "unlabelled_batch": 2},
        "stage3": {"steps": 6, "labelled_batch": 2, "unlabelled_batch": 2},
        "training": {"log_every": 2, "checkpoint_every": 2, "evaluate_every": 6},
    }
    for name, value in changes.items():
        *parents, leaf = name.split("__")
        section = tree
        for parent in parents:
            section = section.setdefault(parent, {})  # type: ignore[assignment]
        section[leaf] = value
    return Config.model_validate(tree)


def local_config(root: Path, **changes: object) -> "Config":
    """`tiny_config` with an encoder that this process alone knows, of a hundredth of the weights."""
    from tests.narrow_resnet import NAME  # timm takes seconds to import

    return tiny_config(root, **{"network__encoder": NAME, **changes})
