"""Why: everything downstream trusts that a data set holds what its manifest says, after errors and kills too."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from threestage.data import storage
from threestage.data.ingest import IngestReport, IngestSettings, ingest
from threestage.data.publish import next_manifest
from threestage.data.records import Manifest, decode_mask, labelled_rows, load_manifest, pool_files
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


def run(source: Path, **settings: object) -> IngestReport:
    given = {"format": "folders", "masks": f"{source}/masks", "class_map": f"{source}/map.yaml", "rows_per_file": 4}
    return ingest(f"{source}/images", f"{source}/ds", IngestSettings.model_validate({**given, **settings}))


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
    assert manifest.classes == ("ground", "thing") and manifest.colours == ((10, 10, 10), (200, 0, 0))
    assert (manifest.counts["train"].images, manifest.counts["train"].labelled) == (10, 4)
    assert (manifest.sizes.min_height, manifest.sizes.mean_width) == (6, 8.0)
    assert [file.rows for file in manifest.files] == [4, 4, 2]
    rows = rows_of(source / "ds")
    for name, row in rows.items():
        assert row["image"] == (source / "images" / f"{name}.png").read_bytes()
        assert (row["height"], row["width"]) == (6, 8)
        assert (row["mask"] is not None) == (name < "04")
    mask = decode_mask(rows["00"]["mask"])  # type: ignore[arg-type]
    assert mask[0, 0] == 1 and mask.sum() == 1


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
    report = run(source, max_bad_share=0.2)
    assert report.added_images == 8
    listed = json.loads((source / "ds" / "rejected" / "v0001.json").read_text())
    assert [(entry["file"], entry["reason"]) for entry in listed] == list(report.rejected)
    (first, why), (second, why_second) = report.rejected
    assert first.endswith("images/01.png") and why.startswith("mask 01.png holds id 37 at (0, 0), not in class map")
    assert second.endswith("images/05.png") and "cannot be decoded" in why_second


def test_too_many_bad_files_fail_and_change_nothing(source: Path) -> None:
    (source / "images" / "05.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"1 of 10 files are bad \(10\.0%.* 2\.0%.*05\.png: is empty; .*v0001\.json"):
        run(source)
    assert storage.list_files(f"{source}/ds") == [f"{source}/ds/rejected/v0001.json"]


def test_another_image_under_a_known_id_and_another_split_are_refused(source: Path) -> None:
    run(source)
    draw(source, "07", 99)
    assert "another image under the id 07" in run(source, max_bad_share=0.1).rejected[0][1]
    with pytest.raises(InputError, match="has it in split train, and here it is in val"):
        run(source, split="val")


def test_other_classes_and_a_missing_map_are_refused(source: Path) -> None:
    run(source)
    (source / "map.yaml").write_text(CLASS_MAP.replace("thing", "object"))
    with pytest.raises(InputError, match="object in place of thing"):
        run(source)
    with pytest.raises(InputError, match="class_map is not given"):
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
    with pytest.raises(InputError, match="no data set there"):
        load_manifest(str(first_root))
    before = {uri: Path(uri).stat().st_mtime_ns for uri in written}
    assert run(source).manifest == whole
    assert {uri: Path(uri).stat().st_mtime_ns for uri in written} == before


def test_an_ingest_that_another_overtook_is_refused(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overtaken(*arguments: Any) -> Manifest | None:
        monkeypatch.setattr("threestage.data.ingest.next_manifest", next_manifest)
        run(source)
        return next_manifest(*arguments)

    monkeypatch.setattr("threestage.data.ingest.next_manifest", overtaken)
    with pytest.raises(InputError, match="another ingest has changed it"):
        run(source)
    assert load_manifest(f"{source}/ds").version == 1


def test_a_store_that_fails_is_no_bad_file(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(uri: str) -> bytes:
        raise OSError("503 Slow Down")

    (source / "other").mkdir()
    monkeypatch.setattr(storage, "read_bytes", broken)
    with pytest.raises(OSError, match="503"):
        ingest(f"{source}/images", f"{source}/other", IngestSettings(format="images"))


def test_progress_counts_every_item(source: Path) -> None:
    seen: list[tuple[int, int]] = []
    settings = IngestSettings(format="images")
    ingest(f"{source}/images", f"{source}/ds", settings, lambda done, total: seen.append((done, total)))
    assert seen == [(i, 10) for i in range(1, 11)]


def test_camvid_as_it_is_shared(tmp_path: Path) -> None:
    camvid = Path(__file__).parents[2].parent / "shared" / "data" / "camvid"
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
