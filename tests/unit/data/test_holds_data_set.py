"""Every place that a command is given: a missing bucket is named, gs:// is refused, settings of storage hold from the start."""

import contextlib
import os
import shlex
import shutil
from pathlib import Path

import pytest

from tests.bad_inputs import threestage
from tests.conftest import write_photos
from threestage.data import storage
from threestage.models.export import ModelCard, save_model
from threestage.models.network import build_network
from threestage.models.settings import NetworkSettings

TINY = NetworkSettings(encoder="test_resnet", batch_norm="live", dilations=(1, 2))
CONFIG = """
base: demo
name: mine
data: {root: data, labelled: 8}
registry: {tracking_uri: "sqlite:///none.db"}
"""
CLASSES = "classes: [{name: a, colour: [0, 0, 0], ids: [0]}, {name: b, colour: [255, 0, 0], ids: [1]}]"
COMMANDS = """
ingest PLACE out --format images --local
ingest images PLACE --format images --local
ingest images out --masks PLACE --class-map classes.yaml --local
ingest images out --masks masks --class-map PLACE --local
predict PLACE images out --local
predict model PLACE out --local
predict model images PLACE --local
evaluate PLACE data
evaluate model PLACE
report PLACE
sync PLACE --tracking-uri sqlite:///none.db
clean PLACE
run mine.yaml --local --out PLACE
run mine.yaml --local --out out --set data.root=PLACE
run mine.yaml --local --out out --set data.unlabelled=PLACE
run mine.yaml --local --out out --set data.labelled=PLACE
run mine.yaml --local --out out --set network.weights=PLACE
run mine.yaml --local --out out --reuse PLACE
check mine.yaml --local --out out --set data.root=PLACE
sweep thresholds mine.yaml --out PLACE
demo --local --out PLACE
"""
LOCAL = """
run PLACE --local --out out
config PLACE
sweep PLACE mine.yaml --out out
init PLACE
submit run mine.yaml --out PLACE
submit predict s3://bucket/model PLACE s3://bucket/out
"""


@pytest.fixture(scope="module")
def project(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(scenes, folder / "data")
    write_photos(folder, 2)
    (folder / "mine.yaml").write_text(CONFIG)
    (folder / "classes.yaml").write_text(CLASSES)
    card = ModelCard(network=TINY, classes=("a", "b"), colours=((0, 0, 0), (9, 9, 9)), downscale=1, stage="stage1")
    save_model(str(folder / "model"), build_network(TINY, 2, seed=0), card)
    return folder


@pytest.fixture
def here(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(project, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")


def lines(commands: str) -> list[str]:
    return commands.strip().splitlines()


@pytest.mark.parametrize("command", lines(COMMANDS))
def test_a_missing_bucket_is_named(here: None, bucket: str, command: str) -> None:
    ended = threestage(*shlex.split(command.replace("PLACE", "s3://nobucket/some/thing")))
    assert ended.code == 2
    assert "s3://nobucket: endpoint" in ended.text and "has no bucket nobucket" in ended.text


@pytest.mark.parametrize("command", lines(COMMANDS) + lines(LOCAL))
def test_other_stores_are_refused_with_what_is_supported(here: None, command: str) -> None:
    before = sorted(os.listdir())
    ended = threestage(*shlex.split(command.replace("PLACE", "gs://bucket/some/thing")))
    assert (ended.code, ended.error_code) == (2, "storage/scheme")
    assert "gs://bucket/some/thing" in ended.err
    assert set(os.listdir()) - set(before) <= {"out"}, "no folder gs: is made"


@pytest.mark.parametrize(
    "command",
    [
        "demo --local --out s3://bucket/out",
        "run mine.yaml --local --out s3://bucket/out",
        "check mine.yaml --local --out s3://bucket/out",
        "sweep thresholds mine.yaml --out s3://bucket/out",
    ],
)
def test_settings_of_storage_hold_from_the_first_access(
    here: None, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    asked: list[str | None] = []

    def first(chosen: storage._S3, *given: object) -> None:
        asked.append(chosen.endpoint)
        raise OSError("this is enough")

    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.setattr(storage, "s3_filesystem", first)
    with contextlib.suppress(OSError):
        threestage(*shlex.split(command), "--set", "storage.endpoint=http://127.0.0.1:9")
    assert asked[:1] == ["http://127.0.0.1:9"]
