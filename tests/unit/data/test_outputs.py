"""A command writes into, and deletes below, only what threestage has made; locally and on S3 alike."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_photos
from tests.refusals import refused
from threestage.data import storage
from threestage.data.ingest import IngestSettings, ingest
from threestage.data.listing import list_images
from threestage.data.outputs import (
    DATA_SET,
    OUTPUTS,
    PREDICTIONS,
    RUN,
    SWEEP,
    Output,
    claim,
)
from threestage.data.records import load_manifest
from threestage.mlflow_sync.model_registry import PULLED, Models
from threestage.mlflow_sync.run_sync import Sender
from threestage.report.report import write_report
from threestage.run.run import demo_config

IMAGES = IngestSettings(format="images", rows_per_file=2)


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "root") if request.param == "local" else str(request.getfixturevalue("bucket"))


def refusal(call: Callable[[], Any]) -> str:
    with refused("data/foreign-folder") as raised:
        call()
    return str(raised.value)


@pytest.mark.parametrize("output", OUTPUTS, ids=lambda output: output.name)
def test_who_may_write_where(tmp_path: Path, output: Output) -> None:
    assert_only_its_own(str(tmp_path / "root"), output)


def test_who_may_write_where_on_s3(bucket: str) -> None:
    assert_only_its_own(bucket, PREDICTIONS)


def assert_only_its_own(root: str, output: Output) -> None:
    claim(root, output)
    storage.write_bytes(f"{root}/.manifest.json.1a2b.tmp", b"of a killed write")
    storage.write_bytes(f"{root}/lost+found/1", b"of the file system")
    claim(root, output)
    storage.write_bytes(f"{root}/thesis.txt", b"mine")
    junk = "split.json" if output is DATA_SET else "manifest.json"
    storage.write_bytes(f"{root}/{junk}", b"no JSON")
    with refused("data/foreign-folder", root, "thesis.txt"):
        claim(root, output)
    for name, key in output.marks.items():
        for foreign in ({}, {"other": 1}, [key]):
            storage.write_json(f"{root}/{name}", foreign)
            assert "thesis.txt" in refusal(lambda: claim(root, output))
        storage.write_json(f"{root}/{name}", {key: 1})
        claim(root, output)
        for other in OUTPUTS:
            if other is not output and junk not in other.marks:
                assert f"holds {output.name};" in refusal(lambda other=other: claim(root, other))  # type: ignore[misc]
        storage.delete(f"{root}/{name}", root)


def test_a_lease_is_the_first_that_a_run_or_a_sweep_writes(tmp_path: Path) -> None:
    (tmp_path / "lease.json").write_text('{"id": "a", "beat": 3}')
    for output in (RUN, SWEEP):
        claim(str(tmp_path), output)
    refusal(lambda: claim(str(tmp_path), DATA_SET))
    (tmp_path / "sweep.json").write_text('{"sweep_key": "a"}')
    assert "holds a sweep" in refusal(lambda: claim(str(tmp_path), RUN))


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    for path in ("out", "out/below"):
        refusal(lambda path=path: claim(str(tmp_path / path), PREDICTIONS))  # type: ignore[misc]


@pytest.mark.parametrize("theirs", ["index/thesis.txt", "rejected/v0001.parquet", "notes.txt"])
def test_an_ingest_leaves_others_alone(tmp_path: Path, theirs: str) -> None:
    assert_left_alone(str(tmp_path / "root"), tmp_path, theirs)


def test_an_ingest_leaves_others_on_s3_alone(bucket: str, tmp_path: Path) -> None:
    assert_left_alone(bucket, tmp_path, "index/thesis.txt")


def assert_left_alone(root: str, tmp_path: Path, theirs: str) -> None:
    write_photos(tmp_path, 3)
    storage.write_bytes(f"{root}/{theirs}", b"mine")
    assert theirs.split("/")[0] in refusal(lambda: ingest(f"{tmp_path}/images", root, IMAGES))
    assert storage.list_files(root) == [f"{root}/{theirs}"] and storage.read_bytes(f"{root}/{theirs}") == b"mine"
    assert ingest(f"{tmp_path}/images", f"{root}/new", IMAGES).added_images == 3


def test_a_data_set_of_an_earlier_version_is_extended(root: str, tmp_path: Path) -> None:
    write_photos(tmp_path, 3)
    ingest(f"{tmp_path}/images", root, IMAGES)
    storage.delete(f"{root}/ingest.json", root)
    (tmp_path / "images/0.jpg").rename(tmp_path / "images/new.jpg")
    assert ingest(f"{tmp_path}/images", root, IMAGES).manifest.version == 2
    assert load_manifest(root).counts["train"].images == 4


def test_a_listing_leaves_others_alone(tmp_path: Path) -> None:
    write_photos(tmp_path, 3)
    ranges = tmp_path / "listing" / "ranges"
    ranges.mkdir(parents=True)
    (ranges / "0.json").write_text("mine")
    for source in ("images", "masks", "listing"):  # the last has no image
        refusal(lambda source=source: list_images(f"{tmp_path}/{source}", str(ranges.parent), 2))  # type: ignore[misc]
    assert (ranges / "0.json").read_text() == "mine"


def test_a_demo_continues_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*arguments: Any) -> None:
        storage.write_bytes(f"{tmp_path}/demo/scenes/train/images/train_00000.jpg", b"")
        raise KeyboardInterrupt

    monkeypatch.setattr("threestage.run.run.write_scenes", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            demo_config(f"{tmp_path}/demo", 0, [])


def test_a_model_is_not_pulled_over_another(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "model.safetensors").write_text("mine")
    assert "README.md" in refusal(lambda: Models("none", None, "x").pull("models:/a@champion", tmp_path))
    assert PULLED[0] == "lineage.json", "what marks the folder is the first that a pull writes"


def test_a_report_replaces_no_other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Found:
        uri, stages, missing, name, finished, verdict = str(tmp_path), (), (), "x", True, None

    monkeypatch.setattr("threestage.report.report.read_run", lambda run: Found)
    monkeypatch.setattr("threestage.report.sections.all_sections", lambda *arguments: {})
    for name in ("thesis.html", "report.html"):
        (tmp_path / name).write_text("<title>mine</title>")
    for out in (f"{tmp_path}/thesis.html", None):
        with refused("data/foreign-file", tmp_path):
            write_report("run", out)
    for _ in range(2):
        write_report("run", f"{tmp_path}/page.html")


@pytest.mark.parametrize("sent", ["pictures.png", "pseudo_masks1/rejects.parquet"])
def test_nothing_behind_a_link_is_sent_to_mlflow(tmp_path: Path, sent: str) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / Path(sent).name).write_text("secret")
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text('{"run_key": "a"}')
    first = sent.split("/")[0]
    (run / first).symlink_to(tmp_path / "secret" / first if first == sent else tmp_path / "secret")

    class Store:
        def close_run(self, *arguments: object) -> None:
            raise AssertionError(f"sent {arguments}")

    with refused("data/link", run / sent):
        Sender(Store(), str(run), {"name": "x"}).finish("FINISHED")  # type: ignore[arg-type]
