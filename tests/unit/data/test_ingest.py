"""Why: everything downstream trusts that a data set holds what its manifest says, after errors and kills too."""

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from tests.refusals import refused
from threestage.data import storage
from threestage.data.ingest import IngestReport, IngestSettings, _listing_folder, ingest
from threestage.data.listing import Each, list_images
from threestage.data.outputs import DATA_SET_MARK, mark
from threestage.data.publish import (
    ExistingRecord,
    IngestJob,
    _bits,
    build_index,
    digest_of,
    few_at_once,
    look_up_ids,
    next_manifest,
)
from threestage.data.records import Bytes, Manifest, decode_mask, labelled_rows, load_manifest, pool_files
from threestage.data.rejects import read_rejects
from threestage.data.safe_walk import NOT_UTF8, WHY_NOT
from threestage.data.storage_errors import explain
from threestage.errors import InputError

CLASS_MAP = """
classes:
  - {name: ground, colour: [10, 10, 10], ids: [0]}
  - {name: thing, colour: [200, 0, 0], ids: [1, 2]}
ignore: {ids: [9]}
"""


def draw(folder: Path, name: str, seed: int, mask_value: int | None = None) -> None:
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), np.uint8)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(folder / "images" / f"{name}.png")
    if mask_value is not None:
        (folder / "masks").mkdir(parents=True, exist_ok=True)
        mask = np.zeros((6, 8), np.uint8)
        mask[0, 0] = mask_value
        Image.fromarray(mask).save(folder / "masks" / f"{name}.png")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "map.yaml").write_text(CLASS_MAP)
    for i in range(10):
        draw(tmp_path, f"{i:02d}", i, mask_value=2 if i < 4 else None)
    return tmp_path


def run(source: Path, each: Each = few_at_once, **settings: object) -> IngestReport:
    given = {"format": "folders", "masks": f"{source}/masks", "class_map": f"{source}/map.yaml", "rows_per_file": 4}
    return ingest(f"{source}/images", f"{source}/ds", IngestSettings.model_validate({**given, **settings}), each=each)


def rows_of(root: Path) -> dict[str, dict[str, object]]:
    manifest = load_manifest(str(root))
    rows = [row for file in pool_files(manifest) for row in storage.read_table(f"{root}/{file.path}").to_pylist()]
    assert len({row["image_id"] for row in rows}) == len(rows)
    return {row["image_id"]: row for row in rows}


def test_a_data_set_holds_the_files_and_says_so(source: Path) -> None:
    report = run(source)
    manifest = load_manifest(f"{source}/ds")
    assert report.manifest == manifest == load_manifest(f"{source}/ds", 1)
    assert (report.added_images, report.added_labels, report.skipped, report.rejected) == (10, 4, 0, ())
    assert (report.bad, report.rejects_uri) == (0, None)
    assert manifest.classes == ("ground", "thing") and manifest.colours == ((10, 10, 10), (200, 0, 0))
    assert (manifest.counts["train"].images, manifest.counts["train"].labelled) == (10, 4)
    assert (manifest.sizes.min_height, manifest.sizes.mean_width) == (6, 8.0)
    assert sorted(file.rows for file in manifest.files) == [2, 4, 4]
    rows = rows_of(source / "ds")
    for name, row in rows.items():
        assert row["image"] == (source / "images" / f"{name}.png").read_bytes()
        assert (row["height"], row["width"]) == (6, 8)
        assert (row["mask"] is not None) == (name < "04")
    mask = decode_mask(rows["00"]["mask"])  # type: ignore[arg-type]
    assert mask[0, 0] == 1 and mask.sum() == 1


def test_the_classes_are_counted_and_a_rerun_reads_no_image_for_it(source: Path, reads: list[str]) -> None:
    counts = run(source).class_counts
    assert len(reads) == 10
    assert [(one.name, one.pixels, one.images) for one in counts] == [("ground", 4 * 47, 4), ("thing", 4, 4)]
    reads.clear()
    run(source)  # writes the shards of images that are known by now
    reads.clear()
    again = run(source)
    assert again.class_counts == counts and again.labelled == 4 and not reads


def test_the_same_again_adds_nothing(source: Path) -> None:
    first = run(source)
    again = run(source)
    assert again.manifest == first.manifest and again.skipped == 10 and again.added_images == again.added_labels == 0


def test_later_images_and_masks_make_a_new_version(source: Path) -> None:
    first = run(source).manifest
    draw(source, "04", 4, mask_value=1)  # newly labelled
    draw(source, "00", 0, mask_value=9)  # mended
    draw(source, "10", 10, mask_value=1)
    draw(source, "11", 11)
    report = run(source)
    manifest = report.manifest
    assert (report.added_images, report.added_labels, report.skipped) == (2, 3, 8)
    assert manifest.version == 2 and manifest.files[:3] == first.files and manifest.digest != first.digest
    assert [(file.kind, file.rows, file.labelled_rows) for file in manifest.files[3:]] == [
        ("images", 2, 1),
        ("labels", 2, 2),
    ]
    assert (manifest.counts["train"].images, manifest.counts["train"].labelled) == (12, 6)
    masks = {row["image_id"]: row["mask"] for row in labelled_rows(f"{source}/ds", manifest, "train").to_pylist()}
    assert list(masks) == ["00", "01", "02", "03", "04", "10"] and decode_mask(masks["00"])[0, 0] == 255
    assert len(rows_of(source / "ds")) == 12
    assert load_manifest(f"{source}/ds", 1) == first
    assert run(source).skipped == 12


def test_the_colours_and_the_name_are_those_given_last(source: Path) -> None:
    first = run(source, name="one").manifest
    class_map = source / "map.yaml"
    class_map.write_text(class_map.read_text().replace("[200, 0, 0]", "[0, 200, 0]"))
    second = run(source, name="two").manifest
    assert (second.version, second.colours[1], second.name) == (2, (0, 200, 0), "two")
    assert (second.files, second.digest) == (first.files, first.digest)  # neither changes what a run learns
    assert run(source).manifest == second


def masks_of(root: Path) -> dict[str, Bytes]:
    """Image id → the class ids that training reads."""
    rows = labelled_rows(str(root), load_manifest(str(root)), "train").to_pylist()
    return {row["image_id"]: decode_mask(row["mask"]) for row in rows}


@pytest.mark.parametrize("kept_date", [False, True])
def test_labels_that_go_back_are_held(source: Path, kept_date: bool) -> None:
    """In one folder, with the date of the first masks or a new one; what was given last counts."""
    given = {}
    for number, value in enumerate((1, 9, 1, 9, 9, 1), 1):
        draw(source, "00", 0, mask_value=value)
        if kept_date:
            os.utime(source / "masks" / "00.png", ns=(value, value))
        report = run(source)
        assert masks_of(source / "ds")["00"][0, 0] == (255 if value == 9 else 1)
        given[number] = (report.added_labels, report.manifest.version)
    assert given == {1: (4, 1), 2: (1, 2), 3: (1, 3), 4: (1, 4), 5: (0, 4), 6: (1, 5)}
    assert load_manifest(f"{source}/ds").counts["train"].labelled == 4


def test_masks_of_two_folders_in_turn(source: Path) -> None:
    for name, value in (("A", 1), ("B", 9)):
        for i in range(3):
            draw(source, f"{i:02d}", i, mask_value=value)
        shutil.copytree(source / "masks", source / name)
    for name in "ABABBA":
        report = run(source, masks=f"{source}/{name}")
        held = masks_of(source / "ds")
        assert {int(held[f"{i:02d}"][0, 0]) for i in range(3)} == ({1} if name == "A" else {255})
    assert report.manifest.version == 5


def test_a_class_map_that_is_corrected_back(source: Path) -> None:
    maps = {
        "right": CLASS_MAP,
        "wrong": CLASS_MAP.replace("ids: [1, 2]", "ids: [5]").replace("ids: [0]", "ids: [2]").replace("[5]", "[0]"),
    }
    for name in ("right", "wrong", "right"):
        (source / "map.yaml").write_text(maps[name])
        assert run(source).added_labels == 4
        assert int(masks_of(source / "ds")["00"][1, 1]) == (0 if name == "right" else 1)


def test_a_killed_ingest_of_other_masks_changes_nothing(source: Path) -> None:
    run(source)
    shutil.copytree(source / "masks", source / "B")
    for i in range(3):
        draw(source, f"{i:02d}", i, mask_value=9)
    with killed_before_publishing(), pytest.raises(KeyboardInterrupt):
        run(source)
    assert run(source, masks=f"{source}/B").added_labels == 0
    assert run(source).added_labels == 3 and masks_of(source / "ds")["00"][0, 0] == 255


@contextlib.contextmanager
def killed_before_publishing() -> Iterator[None]:
    """Ingests are killed when all shards are done."""
    with mock.patch("threestage.data.ingest.publish", side_effect=KeyboardInterrupt):
        yield


def test_what_a_killed_ingest_was_writing_is_removed(source: Path) -> None:
    with killed_before_publishing(), pytest.raises(KeyboardInterrupt):
        run(source)
    left = source / "ds" / "images" / ".train-1.parquet.01234567.tmp"
    left.write_bytes(b"half")
    run(source)
    assert not left.exists()


def test_an_absent_bucket_is_named(bucket: str) -> None:
    for place in ("source", "masks", "out"):
        places = {name: f"{bucket}/{name}" for name in ("source", "masks", "out")} | {place: "s3://absent/x"}
        storage.write_bytes(f"{bucket}/source/a.png", b"")
        storage.write_bytes(f"{bucket}/masks/a.png", b"")
        storage.write_bytes(f"{bucket}/map.yaml", CLASS_MAP.encode())
        settings = IngestSettings(format="folders", masks=places["masks"], class_map=f"{bucket}/map.yaml")
        with pytest.raises(OSError) as error:
            ingest(places["source"], places["out"], settings)
        found = explain(None, error.value)
        assert found.code == "storage/no-bucket" and "absent" in found.message
    with refused("data/no-files", f"{bucket}/photos"):
        ingest(f"{bucket}/photos", f"{bucket}/ds", IngestSettings(format="images"))


def test_a_bad_image_that_was_deleted_is_not_reported_again(source: Path) -> None:
    (source / "images" / "05.png").write_bytes(b"")
    images: dict[str, Any] = {"format": "images", "masks": None, "class_map": None, "max_bad_fraction": 0.1}
    assert run(source, **images).bad == 1
    (source / "images" / "05.png").unlink()
    report = run(source, **images)
    assert (report.bad, report.rejects_uri, report.added_images, report.skipped) == (0, None, 0, 9)
    assert run(source, **images).bad == 0


def test_an_image_that_was_replaced_in_place_is_noticed(source: Path) -> None:
    images: dict[str, Any] = {"format": "images", "masks": None, "class_map": None, "max_bad_fraction": 0.1}
    file = source / "images" / "03.png"
    content = file.read_bytes()
    run(source, **images)
    os.utime(file, ns=(1, 1))
    report = run(source, **images)
    assert (report.skipped, report.bad, report.added_images) == (10, 0, 0), "the content decides"
    draw(source, "03", 99)
    for _ in range(2):
        report = run(source, **images)
        assert (report.skipped, report.bad) == (9, 1) and report.rejected[0].reason.endswith("[image/same-id]")
    with refused("data/bad-images", "1 of 10 images"):
        run(source, **{**images, "max_bad_fraction": 0})
    file.write_bytes(content)
    assert (run(source, **images).skipped, run(source, **images).bad) == (10, 0)
    assert len(rows_of(source / "ds")) == 10


def test_an_image_that_was_replaced_after_a_kill_is_stored_once(source: Path) -> None:
    images: dict[str, Any] = {"format": "images", "masks": None, "class_map": None}
    with killed_before_publishing(), pytest.raises(KeyboardInterrupt):
        run(source, **images)
    draw(source, "03", 99)
    assert run(source, **images).added_images == 10
    assert rows_of(source / "ds")["03"]["image"] == (source / "images" / "03.png").read_bytes()


def test_files_that_are_passed_over_are_counted(source: Path) -> None:
    images: dict[str, Any] = {"format": "images", "masks": None, "class_map": None}
    for name in ("a.HEIC", "b.heic", "c.jfif", ".hidden.gif", "no-suffix"):
        (source / "images" / name).write_bytes(b"")
    for _ in range(2):
        (note,) = run(source, **images).warnings
        assert "4 files passed over: 2 .heic" in note and "1 .jfif" in note and "1 without a suffix" in note
    (source / "images" / "d.gif").write_bytes(b"")
    assert "5 files passed over" in run(source, **images).warnings[0]


# Classes without pixels, and copies.


def test_a_class_without_a_labelled_pixel_is_named(source: Path) -> None:
    (source / "map.yaml").write_text(
        CLASS_MAP.replace("ids: [1, 2]}", "ids: [1, 2]}\n  - {name: x, colour: [1, 1, 1]}")
    )
    (warning,) = (text for text in run(source).warnings if "pixel" in text)
    assert "no labelled pixel of x in the 4 masks" in warning and "ids 0, 2" in warning
    assert any("pixel of x" in text for text in run(source).warnings), "a rerun says so too"


def test_masks_of_0_and_255_get_the_map_that_reads_them(source: Path) -> None:
    for i in range(4):
        draw(source, f"{i:02d}", i, mask_value=255)
    (source / "map.yaml").write_text(CLASS_MAP.replace("[9]", "[255]"))
    with refused("data/one-class") as error:
        run(source)
    assert not storage.exists(f"{source}/ds/manifest.json")
    (offered,) = re.findall(r"`(classes: .*)` without", str(error.value))
    (source / "map.yaml").write_text(offered)
    assert run(source).added_labels == 4 and masks_of(source / "ds")["00"][0, 0] == 1


def test_one_class_left_is_refused_unless_the_data_set_has_others(source: Path) -> None:
    run(source)
    draw(source, "20", 20, mask_value=0)
    for i in range(4):
        (source / "masks" / f"{i:02d}.png").unlink()
    assert any("thing in the 1 masks" in text for text in run(source).warnings) is False, "the others have it"
    for i in range(4):
        draw(source, f"{i:02d}", i, mask_value=0)
    with refused("data/one-class"):
        run(source)  # these replace all that it has


def copy(source: Path, old: str, new: str, mask: bool = False) -> None:
    for kind in ("images", "masks") if mask else ("images",):
        shutil.copy(source / kind / f"{old}.png", source / kind / f"{new}.png")


def test_images_of_the_same_bytes_with_other_masks_are_refused(source: Path) -> None:
    copy(source, "00", "twin", mask=True)
    (note,) = (text for text in run(source).warnings if "copies" in text)
    assert "1 images are copies of others: 00 (train) and twin (train)" in note or "twin (train) and 00" in note
    draw(source, "00", 0, mask_value=9)
    with refused("data/contradicting-masks", "twin (train)"):
        run(source)
    assert load_manifest(f"{source}/ds").version == 1
    draw(source, "twin", 0, mask_value=9)
    assert run(source).added_labels == 2


@pytest.mark.parametrize("entries", [1, 2**18])
def test_an_image_in_two_splits_is_named(source: Path, entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("threestage.data.publish.PART_ENTRIES", entries)
    run(source)
    (source / "images").rename(source / "before")
    shutil.rmtree(source / "masks")
    shutil.copytree(source / "before", source / "images")
    for name in ("05", "06"):
        (source / "images" / f"{name}.png").rename(source / "images" / f"other-{name}.png")
    for i in (*range(5), 7, 8, 9):
        (source / "images" / f"{i:02d}.png").unlink()
    draw(source, "new", 50)
    images: dict[str, Any] = {"format": "images", "masks": None, "class_map": None, "split": "val"}
    (note,) = (text for text in run(source, **images).warnings if "splits" in text)
    assert "2 images are in two splits" in note
    assert "05 (train) and other-05 (val)" in note and "06 (train) and other-06 (val)" in note
    assert not run(source, **images).warnings, "said once"


def test_images_first_and_labels_later(source: Path) -> None:
    images = run(source, format="images", masks=None, class_map=None)
    assert images.manifest.classes == () and images.added_labels == 0
    labelled = run(source)
    assert (labelled.added_images, labelled.added_labels, labelled.skipped) == (0, 4, 6)
    assert labelled.manifest.classes == ("ground", "thing")
    assert labelled.manifest.counts["train"].labelled == 4


def test_bad_files_are_listed_and_the_good_ones_kept(source: Path) -> None:
    draw(source, "01", 1, mask_value=37)
    (source / "images" / "05.png").write_bytes((source / "images" / "05.png").read_bytes()[:-30])
    report = run(source, max_bad_fraction=0.2)
    assert report.added_images == 8
    assert report.rejects_uri == f"{source}/ds/rejected/v0001.parquet" and report.bad == 2
    assert read_rejects(report.rejects_uri) == list(report.rejected)
    first, second = report.rejected
    assert first.source.endswith("images/01.png") and first.image_id == "01"
    assert "mask 01.png holds id 37 at (0, 0)" in first.reason and first.reason.endswith(" [mask/unknown-value]")
    assert second.source.endswith("images/05.png") and second.reason.endswith(" [image/undecodable]")


def test_all_unknown_values_are_listed_with_their_counts(source: Path) -> None:
    draw(source, "01", 1, mask_value=37)
    draw(source, "02", 2, mask_value=38)
    draw(source, "03", 3, mask_value=37)
    for _ in range(2):  # the second time the shard's report is read
        with refused("data/bad-images", "37 (2 pixels in 2 masks), 38 (1 pixels in 1 masks)"):
            run(source, max_bad_fraction=0.1)
    assert run(source, max_bad_fraction=0.5).bad == 3


def test_too_many_bad_files_fail_and_change_nothing(source: Path) -> None:
    (source / "images" / "05.png").write_bytes(b"")
    with refused("data/bad-images", "1 of 10 images", "10.0%", "2.0%", "05.png: is empty; ", "v0001.parquet"):
        run(source)
    assert not storage.exists(f"{source}/ds/manifest.json") and not storage.exists(f"{source}/ds/manifests")
    assert len(read_rejects(f"{source}/ds/rejected/v0001.parquet")) == 1


def test_another_image_under_a_known_id_and_another_split_are_refused(source: Path) -> None:
    run(source)
    draw(source, "07", 99)
    (reject,) = run(source, max_bad_fraction=0.1).rejected
    assert "id 07 (split train)" in reject.reason and "--format camvid" in reject.reason
    assert reject.reason.endswith(" [image/same-id]")
    with refused("data/bad-images", "split train", "in val"):
        run(source, split="val")


def test_other_classes_and_a_missing_map_are_refused(source: Path) -> None:
    run(source)
    (source / "map.yaml").write_text(CLASS_MAP.replace("thing", "object"))
    with refused("class-map/other-classes", "object in place of thing"):
        run(source)
    with refused("class-map/missing", "--class-map FILE"):
        run(source, class_map=None)


def test_a_killed_ingest_leaves_the_set_and_is_completed(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(source).manifest
    first_root = source / "ds"
    first_root.rename(source / "whole")
    write_table = storage.write_table
    written: list[str] = []

    def killed(uri: str, table: pa.Table) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(uri)
        write_table(uri, table)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_table", killed)
        with pytest.raises(KeyboardInterrupt):
            run(source)
    with refused("data/no-data-set", first_root):
        load_manifest(str(first_root))
    before = {uri: Path(uri).stat().st_mtime_ns for uri in written}
    assert run(source).manifest == whole
    assert {uri: Path(uri).stat().st_mtime_ns for uri in written} == before


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the image files that are read from here on, one for each time."""
    read_bytes, seen = storage.read_bytes, []

    def counted(uri: str) -> bytes:
        if "/images/" in uri and uri.endswith(".png"):
            seen.append(uri.rsplit("/", 1)[-1])
        return read_bytes(uri)

    monkeypatch.setattr(storage, "read_bytes", counted)
    return seen


def fail_after(shards: int) -> Each:
    """Shards one after the other, and a failure of the store after some."""

    def each(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        for done, item in enumerate(items):
            if done == shards:
                raise OSError("503 Slow Down")
            yield function(item)

    return each


@pytest.mark.parametrize("format", ["folders", "images"])
def test_what_is_finished_is_not_read_again(source: Path, format: str, reads: list[str]) -> None:
    given: dict[str, Any] = {} if format == "folders" else {"format": "images", "masks": None, "class_map": None}
    undisturbed = run(source, **given).manifest
    (source / "ds").rename(source / "whole")
    if format == "images":
        list_images(f"{source}/images", listing_of(source), 4)
    reads.clear()
    with pytest.raises(OSError, match="503"):
        run(source, each=fail_after(2), **given)
    finished = list(reads)
    assert len(finished) >= 6
    reads.clear()
    report = run(source, **given)
    assert report.manifest == undisturbed and report.added_images == 10
    assert sorted(reads + finished) == [f"{i:02d}.png" for i in range(10)]


def listing_of(source: Path) -> str:
    """Where an ingest lists the images, in a data set that is begun."""
    mark(f"{source}/ds", DATA_SET_MARK, "threestage ingest")
    job = IngestJob(f"{source}/ds", 4, None, "", None, None)
    return _listing_folder(job, f"{source}/images")


def test_a_shard_whose_image_or_mask_changed_is_done_again(source: Path, reads: list[str]) -> None:
    (source / "images" / "05.png").write_bytes(b"")
    with refused("data/bad-images", "1 of 10 images"):
        run(source)
    draw(source, "05", 5)
    draw(source, "00", 0, mask_value=9)
    reads.clear()
    assert run(source).added_images == 10
    assert 0 < len(reads) < 10 and {"00.png", "05.png"} <= set(reads)
    masks = {row["image_id"]: row["mask"] for row in rows_of(source / "ds").values()}
    assert decode_mask(masks["00"])[0, 0] == 255  # type: ignore[arg-type]


def test_a_higher_limit_reads_only_the_bad_again(source: Path, reads: list[str]) -> None:
    (source / "images" / "05.png").write_bytes(b"")
    images: dict[str, Any] = {"format": "images", "masks": None, "class_map": None}
    with refused("data/bad-images", "1 of 10 images"):
        run(source, **images)
    reads.clear()
    assert run(source, max_bad_fraction=0.1, **images).bad == 1
    assert reads == ["05.png"]


def test_bad_images_that_were_removed_are_no_longer_counted(source: Path) -> None:
    (source / "images" / "05.png").write_bytes(b"")
    images: dict[str, Any] = {"format": "images", "masks": None, "class_map": None}
    with refused("data/bad-images", "1 of 10 images"):
        run(source, **images)
    (source / "images" / "05.png").unlink()
    report = run(source, **images)
    assert (report.added_images, report.bad, report.rejects_uri) == (9, 0, None)
    assert not storage.exists(f"{source}/ds/rejected/v0001.parquet")


def test_a_grown_folder_of_images_is_read_where_it_grew(source: Path, reads: list[str]) -> None:
    images: dict[str, Any] = {"format": "images", "masks": None, "class_map": None}
    first = run(source, **images).manifest
    draw(source, "10", 10)
    (source / "images" / "03.png").unlink()  # the data set keeps it
    reads.clear()
    report = run(source, **images)
    assert reads == ["10.png"] and (report.added_images, report.skipped, report.bad) == (1, 10, 0)
    assert report.manifest.files[: len(first.files)] == first.files
    assert len(rows_of(source / "ds")) == 11


def test_a_mended_image_joins_the_set_later(source: Path) -> None:
    (source / "images" / "05.png").write_bytes(b"")
    images: dict[str, Any] = {"format": "images", "masks": None, "class_map": None, "max_bad_fraction": 0.1}
    assert run(source, **images).bad == 1
    draw(source, "05", 5)
    (source / "images" / "01.png").unlink()
    report = run(source, **images)
    assert (report.added_images, report.skipped, report.bad) == (1, 9, 0)
    assert len(rows_of(source / "ds")) == 10


def test_a_report_counts_only_for_the_set_it_was_compared_with(source: Path) -> None:
    with pytest.raises(OSError, match="503"):
        run(source, each=fail_after(1))
    ingest(f"{source}/images", f"{source}/ds", IngestSettings(format="images"))
    report = run(source)
    assert (report.added_images, report.added_labels) == (0, 4)
    assert len(rows_of(source / "ds")) == 10


def test_an_ingest_that_another_overtook_goes_on_where_it_was(source: Path, reads: list[str]) -> None:
    images: dict[str, Any] = {"format": "images", "masks": None, "class_map": None}
    (source / "few").mkdir()
    draw(source, "few", 7)
    (source / "images" / "few.png").rename(source / "few" / "few.png")
    list_images(f"{source}/images", listing_of(source), 4)
    with pytest.raises(OSError, match="503"):
        run(source, each=fail_after(2), **images)
    finished = list(reads)
    ingest(f"{source}/few", f"{source}/ds", IngestSettings(format="images"))
    reads.clear()
    report = run(source, **images)
    assert report.added_images == 10 and len(rows_of(source / "ds")) == 11
    assert len(finished) >= 6 and sorted(finished + reads) == [f"{i:02d}.png" for i in range(10)]


def test_an_ingest_whose_index_another_deleted_says_so(source: Path) -> None:
    run(source)
    _bits.cache_clear()
    with refused("data/concurrent-ingest", f"{source}/ds/index/gone"):
        look_up_ids(f"{source}/ds/index/gone", ["a"])


def test_two_files_of_one_id_and_an_absurdly_large_one(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (8, 6)).save(source / "images" / "03.jpg")
    (source / "images" / "04.png").write_bytes(bytes(5000))
    monkeypatch.setattr("threestage.data.publish.MAX_IMAGE_BYTES", 4999)
    for format in ("images", "folders"):
        root = f"{source}/of {format}"
        settings = IngestSettings(
            format=format,
            masks=f"{source}/masks" if format == "folders" else None,
            class_map=f"{source}/map.yaml",
            max_bad_fraction=0.2,
        )
        report = ingest(f"{source}/images", root, settings)
        assert report.added_images == 9
        assert [reject.reason.split(",")[0] for reject in report.rejected] == [
            "has the id 03",
            "has 5000 bytes",
        ]


@pytest.mark.parametrize(("bad", "passes"), [(5, True), (50, False)])
def test_a_share_of_corrupt_images(tmp_path: Path, bad: int, passes: bool) -> None:
    for i in range(100):
        draw(tmp_path, f"{i:03d}", i)
        if i < bad:
            file = tmp_path / "images" / f"{i:03d}.png"
            file.write_bytes(file.read_bytes()[: 20 + i])
    settings = IngestSettings(format="images", rows_per_file=16, max_bad_fraction=0.05)
    listed = f"{tmp_path}/ds/rejected/v0001.parquet"
    if passes:
        report = ingest(f"{tmp_path}/images", f"{tmp_path}/ds", settings)
        assert (report.bad, len(report.rejected), report.added_images) == (5, 5, 95)
    else:
        with refused("data/bad-images", "50 of 100 images", "50.0%", "000.png", listed):
            ingest(f"{tmp_path}/images", f"{tmp_path}/ds", settings)
    assert [reject.image_id for reject in read_rejects(listed)] == [f"{i:03d}" for i in range(bad)]


def test_the_report_holds_the_first_rejects_only(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("threestage.data.rejects.SHOWN", 2)
    monkeypatch.setattr("threestage.data.rejects.WRITTEN_AT_ONCE", 3)
    for i in range(8):
        (source / "images" / f"{i:02d}.png").write_bytes(b"")
    report = run(source, max_bad_fraction=0.8)
    assert report.bad == 8 and [reject.image_id for reject in report.rejected] == ["00", "01"]
    assert report.rejects_uri is not None
    assert sorted(reject.image_id for reject in read_rejects(report.rejects_uri)) == [f"{i:02d}" for i in range(8)]


def test_the_index_of_what_is_known(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(source)
    draw(source, "04", 4, mask_value=1)
    manifest = run(source).manifest
    monkeypatch.setattr("threestage.data.publish.PART_ENTRIES", 1)
    folder = build_index(f"{source}/ds", manifest)
    assert len(storage.list_files(folder)) == 16 + 1
    found = look_up_ids(folder, ["04", "nowhere", "09"])
    assert found == {
        "04": ExistingRecord("train", digest_of((source / "images" / "04.png").read_bytes()), found["04"].mask_digest),
        "09": ExistingRecord("train", digest_of((source / "images" / "09.png").read_bytes()), None),
    }
    assert found["04"].mask_digest is not None and look_up_ids(None, ["04"]) == {}


def test_an_ingest_that_another_overtook_is_refused(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overtaken(*arguments: Any) -> Manifest | None:
        monkeypatch.setattr("threestage.data.ingest.next_manifest", next_manifest)
        run(source)
        return next_manifest(*arguments)

    monkeypatch.setattr("threestage.data.ingest.next_manifest", overtaken)
    with refused("data/concurrent-ingest", f"{source}/ds"):
        run(source)
    assert load_manifest(f"{source}/ds").version == 1


@pytest.mark.parametrize("extends", [False, True])
def test_of_two_ingests_at_once_one_says_run_again_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extends: bool
) -> None:
    """Both have read the same manifest, and both have compared it, before either publishes."""
    barrier, write = Barrier(2), storage.write_if_unchanged
    root, settings = f"{tmp_path}/ds", IngestSettings(format="images")
    for number, name in enumerate(("first", "left", "right")):
        draw(tmp_path / name, name, number)
    if extends:
        ingest(f"{tmp_path}/first/images", root, settings)

    def together(*arguments: Any) -> bool:
        barrier.wait(timeout=60)
        return write(*arguments)

    def try_it(name: str) -> str | None:
        try:
            ingest(f"{tmp_path}/{name}/images", root, settings)
        except InputError as error:
            assert error.code == "data/concurrent-ingest"
            return name
        return None

    with monkeypatch.context() as patched, ThreadPoolExecutor(2) as threads:
        patched.setattr(storage, "write_if_unchanged", together)
        failed = [name for name in threads.map(try_it, ("left", "right")) if name]
    assert len(failed) == 1
    first = ["first"] if extends else []
    (published,) = {"left", "right"} - set(failed)
    assert sorted(rows_of(Path(root))) == sorted([published, *first])
    ingest(f"{tmp_path}/{failed[0]}/images", root, settings)
    assert sorted(rows_of(Path(root))) == sorted(["left", "right", *first])
    for version in range(1, load_manifest(root).version + 1):
        assert load_manifest(root, version).version == version


def test_of_two_ingests_at_once_each_keeps_its_list_of_bad_images(source: Path) -> None:
    """The slower one, which is refused, neither overwrites nor deletes what the other has listed."""
    (source / "images" / "05.png").write_bytes(b"")
    for bad in (False, True):
        other = source / f"other{bad}"
        draw(other, "good", 60)
        if bad:
            (other / "images" / "bad.png").write_bytes(b"bad")

        def overtaken(function: Any, items: Sequence[Any]) -> Any:
            run(source, max_bad_fraction=0.2)
            return few_at_once(function, items)

        settings = IngestSettings(format="images", max_bad_fraction=0.9)
        with refused("data/concurrent-ingest"):
            ingest(f"{other}/images", f"{source}/ds", settings, each=overtaken)
        assert [reject.image_id for reject in read_rejects(f"{source}/ds/rejected/v0001.parquet")] == ["05"]
        shutil.rmtree(source / "ds")


def test_a_name_that_is_not_utf8_costs_its_image_only(source: Path) -> None:
    good = (source / "images" / "05.png").read_bytes()
    (source / "images" / "caf\udce9.png").write_bytes(good)
    (source / "images" / "d\udce9").mkdir()
    (source / "images" / "d\udce9" / "a.png").write_bytes(good)
    as_images: dict[str, Any] = {"format": "images", "masks": None, "class_map": None}
    for settings in ({}, as_images):
        report = run(source, max_bad_fraction=0.2, **settings)
        assert {reject.reason for reject in report.rejected} == {f"{WHY_NOT[NOT_UTF8]} [image/place]"}
        assert [reject.image_id for reject in report.rejected] == [r"caf\xe9", r"d\xe9/a"]


def test_masks_of_one_size_and_date_are_told_apart(source: Path) -> None:
    """As BMP, and dated by a camera without a clock."""
    for number, value in enumerate((1, 9), 1):
        mask = np.zeros((6, 8), np.uint8)
        mask[0, 0] = value
        Image.fromarray(mask).save(source / "masks" / "06.bmp")
        os.utime(source / "masks" / "06.bmp", ns=(1, 1))
        assert run(source).manifest.version == number
        assert masks_of(source / "ds")["06"][0, 0] == (255 if value == 9 else 1)


def test_an_ingest_that_was_killed_before_it_kept_its_version(source: Path) -> None:
    run(source)
    version = source / "ds" / "manifests" / "v0001.json"
    version.unlink()
    assert load_manifest(f"{source}/ds", 1) == load_manifest(f"{source}/ds")
    run(source)
    assert version.exists()
    with refused("data/no-data-set", "v0002.json"):
        load_manifest(f"{source}/ds", 2)


def test_a_store_that_fails_is_no_bad_file(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(uri: str) -> bytes:
        raise OSError("503 Slow Down")

    (source / "other").mkdir()
    monkeypatch.setattr(storage, "read_bytes", broken)
    with pytest.raises(OSError, match="503"):
        ingest(f"{source}/images", f"{source}/other", IngestSettings(format="images"))


def test_progress_counts_every_item(source: Path) -> None:
    seen: list[tuple[int, int]] = []
    settings = IngestSettings(format="images", rows_per_file=4)
    ingest(f"{source}/images", f"{source}/ds", settings, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (10, 10) and seen == sorted(set(seen))


def test_camvid_as_it_is_shared(tmp_path: Path) -> None:
    camvid = Path(__file__).parents[3].parent / "shared" / "data" / "camvid"
    if not camvid.exists():
        pytest.skip("shared/data/camvid is absent")
    for split in ("train", "val", "test"):
        for kind in ("images", "masks"):
            (tmp_path / "camvid" / split / kind).mkdir(parents=True)
            for file in sorted((camvid / split / kind).iterdir())[:2]:
                (tmp_path / "camvid" / split / kind / file.name).write_bytes(file.read_bytes())
    manifest = ingest(f"{tmp_path}/camvid", f"{tmp_path}/ds", IngestSettings(format="camvid")).manifest
    assert {name: count.labelled for name, count in manifest.counts.items()} == {"train": 2, "val": 2, "test": 2}
    assert len(manifest.classes) == 11
    for row in labelled_rows(f"{tmp_path}/ds", manifest, "val").to_pylist():
        source = np.asarray(Image.open(row["source"].replace("/images/", "/masks/").replace(".jpg", ".png")))
        assert np.array_equal(decode_mask(row["mask"]), np.where(source == 11, 255, source))
