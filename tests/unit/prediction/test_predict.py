"""A prediction of any input: every image is there once, under a name that stays in its folder, and done only once."""

import io
import json
import os
import re
import shutil
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tests.refusals import refused
from tests.unit.prediction.test_estimates import calibration
from threestage.data import parquet, storage
from threestage.data.palette import palette_png
from threestage.data.parquet import ForeignParquet
from threestage.data.pool import PoolRow
from threestage.data.publish import id_hash
from threestage.data.records import decode_image, downscale_image
from threestage.data.rejects import read_rejects
from threestage.errors import StageFailure
from threestage.mlflow_sync.records import RegistrySettings
from threestage.models.export import ModelCard, save_model
from threestage.models.network import build_network
from threestage.models.settings import NetworkSettings
from threestage.prediction.estimates import CALIBRATION
from threestage.prediction.input_parts import (
    Part,
    crowded_names,
    kind_of,
    output_name,
    plan_parts,
    read_part,
    safe_name,
)
from threestage.prediction.predict import (
    ModelFiles,
    PredictionTask,
    PredictReport,
    PredictSettings,
    network_of,
    predict_here,
    predict_input,
    read_model,
)
from threestage.prediction.pseudo_masks import FileReport, predict_images
from threestage.prediction.tta import TTASettings
from threestage.report.mask_images import overlay

COLOURS = ((0, 0, 0), (200, 30, 30), (30, 200, 30))
SIZES = [(40, 50), (40, 50), (33, 61), (50, 40)]


def make_model(folder: Path, seed: int = 0, downscale: int = 1) -> ModelFiles:
    settings = NetworkSettings(encoder="test_resnet", batch_norm="live", dilations=(1, 2))
    card = ModelCard(
        network=settings, classes=("a", "b", "c"), colours=COLOURS, downscale=downscale, stage="stage1"
    )  # fmt: skip
    save_model(str(folder), build_network(settings, 3, seed=seed), card)
    return read_model(str(folder), RegistrySettings())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return make_model(tmp_path_factory.mktemp("model"))


def photo(seed: int, kind: str = "JPEG") -> bytes:
    height, width = SIZES[seed % len(SIZES)]
    coarse = np.random.default_rng(seed).integers(0, 255, (5, 5, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(stream, kind)
    return stream.getvalue()


def photos(folder: Path, number: int = 10) -> Path:
    for i in range(number):
        path = folder / ("deep/er" if i % 2 else "") / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(i))
    return folder


class Counting:
    """Predicts here, and notes the parts; gives up before the part number `dies_at`."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.parts: list[Part] = []
        self._dies_at = dies_at

    def __call__(self, files: ModelFiles, task: PredictionTask, parts: Sequence[Part]) -> Generator[FileReport]:
        for part in parts:
            if len(self.parts) == self._dies_at:
                raise KeyboardInterrupt
            self.parts.append(part)
            yield from predict_here(files, task, [part])


def run(model: ModelFiles, source: Path, out: Path, run: Any = predict_here, **settings: Any) -> PredictReport:
    return predict_input(model, str(source), str(out), PredictSettings(**settings), run=run)


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def parts_below(out: Path) -> list[dict[str, Any]]:
    return [row for path in sorted((out / "parts").iterdir()) for row in pq.read_table(path).to_pylist()]


def by_hand(model: ModelFiles, image: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One image: its pixels, its mask with each value where its block of pixels is, its confidence."""
    network, card = network_of(model)
    pixels = decode_image(image)
    small = downscale_image(pixels, card.downscale)
    ((_, class_ids, confidence, _),) = predict_images(network, [small], 1, torch.device("cpu"))
    rows, columns = (
        np.minimum(np.arange(long) // card.downscale, short - 1)
        for long, short in zip(pixels.shape[:2], class_ids.shape, strict=True)
    )
    return pixels, class_ids.numpy()[rows][:, columns], confidence.numpy()


@pytest.mark.parametrize("downscale", [1, 2, 3])
def test_masks_and_overlays_are_those_of_the_images_one_by_one(tmp_path: Path, downscale: int) -> None:
    model = make_model(tmp_path / "model", downscale=downscale)
    source, out = photos(tmp_path / "in"), tmp_path / "out"
    report = run(model, source, out, rows_per_part=4)
    assert (report.images, report.kept, report.bad) == (10, 0, 0)
    written = files_below(out)
    names = [f"deep/er/{i}" if i % 2 else f"{i}" for i in range(10)]
    assert {name for name in written if name.startswith("masks/")} == {f"masks/{name}.png" for name in names}
    assert {name for name in written if name.startswith("overlays/")} == {f"overlays/{name}.jpg" for name in names}
    for i, name in enumerate(names):
        pixels, mask, _ = by_hand(model, photo(i))
        assert mask.shape == pixels.shape[:2] and len(np.unique(mask)) > 1
        assert written[f"masks/{name}.png"] == palette_png(mask, COLOURS)
        stream = io.BytesIO()
        Image.fromarray(overlay(pixels, mask, COLOURS)).save(stream, format="JPEG", quality=90)
        assert written[f"overlays/{name}.jpg"] == stream.getvalue()
    assert {row["image_id"]: row["file"] for row in parts_below(out)} == {name: f"masks/{name}.png" for name in names}


def test_masks_alone_and_confidences(model: ModelFiles, tmp_path: Path) -> None:
    source, out = photos(tmp_path / "in", 3), tmp_path / "out"
    run(model, source, out, overlays=False, confidence=True)
    assert {path.name for path in out.iterdir()} == {
        "masks", "confidence", "parts", "listing", "prediction.json", "classes.json", "rejects.parquet"
    }  # fmt: skip
    _, _, confidence = by_hand(model, photo(0))
    with Image.open(out / "confidence/0.png") as grey:
        assert grey.mode == "L"
        assert np.abs(np.asarray(grey).astype(float) - 255 * confidence).max() <= 1


@pytest.mark.parametrize("confidence", [False, True])
def test_parquet_out(model: ModelFiles, tmp_path: Path, confidence: bool) -> None:
    source, out = photos(tmp_path / "in", 6), tmp_path / "out"
    run(model, source, out, format="parquet", confidence=confidence, rows_per_part=2)
    assert not (out / "masks").exists() and not (out / "overlays").exists()
    rows = parts_below(out)
    assert len(rows) == 6 and len(list((out / "parts").iterdir())) == 3
    for row in rows:
        _, mask, sure = by_hand(model, photo(int(row["image_id"].rsplit("/")[-1])))
        with Image.open(io.BytesIO(row["mask"])) as stored:
            assert np.array_equal(np.asarray(stored), mask)
        if confidence:
            values = np.frombuffer(row["confidence"], np.uint8).reshape(mask.shape)
            assert np.abs(values.astype(float) - 255 * sure).max() <= 1
        else:
            assert row["confidence"] is None


def test_the_protocol_is_followed(model: ModelFiles, tmp_path: Path) -> None:
    source = photos(tmp_path / "in", 4)
    run(model, source, tmp_path / "plain", format="parquet", confidence=True)
    protocol = TTASettings(window=(40, 40), flip=True, scales=(0.5, 1))
    run(model, source, tmp_path / "other", format="parquet", confidence=True, protocol=protocol)
    plain, other = ({row["image_id"]: row for row in parts_below(tmp_path / name)} for name in ("plain", "other"))
    assert plain.keys() == other.keys()
    assert all(plain[name]["confidence"] != other[name]["confidence"] for name in plain)
    record = json.loads((tmp_path / "other/prediction.json").read_text())
    assert record["protocol_in_words"] == protocol.describe()


# Again


def test_after_a_kill_only_what_is_missing_is_predicted(model: ModelFiles, tmp_path: Path) -> None:
    source, out = photos(tmp_path / "in"), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(model, source, out, Counting(dies_at=2), rows_per_part=3)
    before = {name: (out / name).stat().st_mtime_ns for name in files_below(out)}
    counting = Counting()
    report = run(model, source, out, counting, rows_per_part=3)
    assert len(counting.parts) == 2 and report.kept in (4, 6), "of three parts of 3 images and one of 1"
    assert report.images == 10 and report.kept + sum(part.rows for part in counting.parts) == 10
    done = [name for name in before if name.split("/")[0] in ("masks", "overlays", "parts")]
    assert done and all((out / name).stat().st_mtime_ns == before[name] for name in done)
    again = Counting()
    assert run(model, source, out, again, rows_per_part=3) == report.model_copy(update={"kept": 10})
    assert again.parts == []


def test_new_images_are_predicted_by_the_same_command(model: ModelFiles, tmp_path: Path) -> None:
    source, out = photos(tmp_path / "in", 4), tmp_path / "out"
    run(model, source, out)
    (source / "new.png").write_bytes(photo(7, "PNG"))
    counting = Counting()
    report = run(model, source, out, counting)
    assert (report.images, report.kept) == (5, 4) and [part.rows for part in counting.parts] == [1]
    assert (out / "masks/new.png").is_file()


def test_another_model_input_or_setting_in_the_folder_is_refused(model: ModelFiles, tmp_path: Path) -> None:
    source, out = photos(tmp_path / "in", 2), tmp_path / "out"
    run(model, source, out)
    before = files_below(out)
    other = photos(tmp_path / "other", 2)
    for files, images, settings, named in (
        (make_model(tmp_path / "model", seed=1), source, {}, ["model="]),
        (make_model(tmp_path / "half", downscale=2), source, {}, ["model="]),
        (model, other, {}, ["input=", other]),
        (model, source, {"protocol": TTASettings(flip=True)}, ["protocol=whole image, single scale", "flipped"]),
        (model, source, {"format": "parquet"}, ["format=png", "parquet"]),
        (model, source, {"confidence": True}, ["confidence=False", "True"]),
    ):
        with refused("predict/other-settings", f"{out}:", *named) as raised:
            run(files, images, out, **settings)
        assert "\n" not in str(raised.value)
    assert files_below(out) == before


def test_an_image_replaced_in_place_is_predicted_anew_and_the_rest_is_kept(model: ModelFiles, tmp_path: Path) -> None:
    """Of another size; of the same number of bytes at another time; a bad one that was mended."""
    for form in ("png", "parquet"):
        source, out = photos(tmp_path / form / "in", 6), tmp_path / form / "out"
        (source / "bad.jpg").write_bytes(b"no image")
        settings: dict[str, Any] = {"format": form, "max_bad_fraction": 0.5, "rows_per_part": 4}
        run(model, source, out, **settings)
        (source / "bad.jpg").write_bytes(photo(2))
        (source / "0.jpg").write_bytes(photo(3))
        same = source / "deep/er/1.jpg"
        os.utime(same, ns=(1, 1))
        before = {path: path.stat().st_mtime_ns for path in (out / "masks").rglob("*.png")}
        counting = Counting()
        report = run(model, source, out, counting, **settings)
        assert (report.images, report.kept, report.bad) == (7, 4, 0)
        assert sum(part.rows for part in counting.parts) == 3
        rows = {
            row["image_id"]: row for row in parts_below(out) if row[("file", "mask")[form == "parquet"]] is not None
        }
        assert len(rows) == 7, "each image is there once"
        if form == "png":
            assert (out / "masks/0.png").read_bytes() == palette_png(by_hand(model, photo(3))[1], COLOURS)
            changed = {path.name for path, time in before.items() if path.stat().st_mtime_ns != time}
            assert changed == {"0.png", "1.png"} and (out / "masks/bad.png").is_file()
        else:
            with Image.open(io.BytesIO(rows["0"]["mask"])) as stored:
                assert np.array_equal(np.asarray(stored), by_hand(model, photo(3))[1])
        assert run(model, source, out, **settings) == report.model_copy(update={"kept": 7})


# Bad images


def calibrated(model: ModelFiles, **changes: float) -> ModelFiles:
    stored = calibration().model_copy(update=changes)
    return {**model, CALIBRATION: stored.model_dump_json().encode()}


@pytest.mark.parametrize("format", ["png", "parquet"])
def test_estimates_without_labels_are_reported_of_each_image_and_of_all(
    model: ModelFiles, tmp_path: Path, format: str
) -> None:
    source, out = photos(tmp_path / "in"), tmp_path / "out"
    report = run(calibrated(model), source, out, rows_per_part=4, format=format, protocol=TTASettings(flip=True))
    rows = parts_below(out)
    assert report.estimate is not None and report.estimate.images == len(rows) == 10
    assert report.estimate.drift == pytest.approx(np.mean([row["drift"] for row in rows]), abs=1e-4)
    assert all(0 < row["mean_iou"] < 1 for row in rows) and 0 < (report.estimate.mean_iou or 0) < 1
    (source / "new.jpg").write_bytes(photo(11))
    again = run(calibrated(model), source, out, rows_per_part=4, format=format, protocol=TTASettings(flip=True))
    assert again.estimate is not None and (again.kept, again.estimate.images) == (10, 11)
    plain = run(model, source, tmp_path / "plain", format=format)
    assert plain.estimate is None and {"mean_iou", "drift"}.isdisjoint(parts_below(tmp_path / "plain")[0])


def test_a_job_that_drifts_is_warned_of_or_ends(model: ModelFiles, tmp_path: Path) -> None:
    source, far, near = (
        photos(tmp_path / "in"),
        calibrated(model, near=0.0, far=0.001),
        calibrated(model, near=3.0, far=4.0),
    )
    (warning,) = run(far, source, tmp_path / "out").warnings
    assert warning.startswith("drift ") and not run(near, source, tmp_path / "near").warnings
    with refused("predict/no-calibration", "--max-drift=0.5"):
        run(model, source, tmp_path / "none", max_drift=0.5)
    counting = Counting()
    for parts in (1, 1):  # again: nothing more is predicted
        with refused("predict/drift", "--max-drift=0.5", error=StageFailure):
            run(far, source, tmp_path / "stopped", counting, max_drift=0.5, rows_per_part=4)
        assert len(counting.parts) == parts
    assert run(far, source, tmp_path / "stopped", max_drift=1e9, rows_per_part=4).kept in (2, 4)


def test_bad_images_are_listed_and_too_many_of_them_fail_at_the_end(model: ModelFiles, tmp_path: Path) -> None:
    source, out = photos(tmp_path / "in", 9), tmp_path / "out"
    (source / "bad.jpg").write_bytes(photo(0)[:200])
    with refused("data/bad-images", "1 of 10 images", "bad.jpg", "--max-bad-fraction", error=StageFailure):
        run(model, source, out)
    assert len(list((out / "masks").rglob("*.png"))) == 9, "the others are predicted first"
    report = run(model, source, out, max_bad_fraction=0.1)
    assert (report.images, report.kept, report.bad) == (9, 9, 1)
    (reject,) = read_rejects(report.rejects_uri)
    assert reject.source == f"{source}/bad.jpg" and "cannot be decoded" in reject.reason
    assert [row["file"] for row in parts_below(out) if row["image_id"] == "bad"] == [None]


def test_a_store_that_fails_is_an_error(model: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = photos(tmp_path / "in", 3), tmp_path / "out"
    write = storage.write_bytes

    def full(uri: str, data: bytes) -> None:
        if uri.endswith("/0.png"):
            raise OSError("no space left on device")
        write(uri, data)

    monkeypatch.setattr(storage, "write_bytes", full)
    with pytest.raises(OSError, match="no space left"):
        run(model, source, out)
    assert not (out / "parts").exists(), "a part is done when all of its files are there"


# Inputs


def test_a_data_set(model: ModelFiles, scenes: Path, tmp_path: Path) -> None:
    report = run(model, scenes, tmp_path / "out", overlays=False)
    assert report.images == 50 and len(list((tmp_path / "out/masks").rglob("*.png"))) == 50


def test_parquet_of_others(model: ModelFiles, tmp_path: Path) -> None:
    """Row groups make parts; ids that repeat, are missing, are numbers or would leave the folder."""
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    ids = ["a", "../../a", "/etc/passwd", "a", None, "x/y"]
    images = [photo(i) for i in range(6)]
    pq.write_table(pa.table({"image_id": ids, "image": images}), source / "one.parquet", row_group_size=2)
    pq.write_table(pa.table({"image": [*images[:2], None]}), source / "two.parquet", row_group_size=2)
    (source / "_delta").mkdir()
    (source / "_delta/checkpoint.parquet").write_bytes(b"of another kind")
    counting = Counting()
    report = run(model, source, out, counting, rows_per_part=3, max_bad_fraction=0.2)
    assert [part.rows for part in counting.parts] == [4, 2, 3]
    assert (report.images, report.bad) == (8, 1)
    (reject,) = report.rejected
    assert (reject.source, reject.reason) == (f"{source}/two.parquet#2", "is null [image/undecodable]")
    masks = {path.relative_to(out / "masks").as_posix() for path in (out / "masks").rglob("*.png")}
    assert len(masks) == 8 and {"x/y.png", "two/00000001.png", "one/00000004.png"} <= masks
    assert sum(name.startswith("a-") for name in masks) == 3 and sum(name.startswith("etc/passwd-") for name in masks)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}
    by_id = {row["image_id"]: row["file"] for row in parts_below(out)}
    _, mask, _ = by_hand(model, images[1])
    assert (out / by_id["../../a"]).read_bytes() == palette_png(mask, COLOURS)


def test_one_parquet_file(model: ModelFiles, tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [photo(0)]}), tmp_path / "one.parquet")
    run(model, tmp_path / "one.parquet", tmp_path / "out")
    assert (tmp_path / "out/masks/one/00000000.png").is_file()


def test_two_images_whose_names_differ_in_the_ending(model: ModelFiles, tmp_path: Path) -> None:
    source, out = photos(tmp_path / "in", 1), tmp_path / "out"
    (source / "0.png").write_bytes(photo(1, "PNG"))
    (source / "other.png").write_bytes(photo(1, "PNG"))
    run(model, source, out)
    assert {path.name for path in (out / "masks").iterdir()} == {"0.jpg.png", "0.png.png", "other.png"}


def masks_below(out: Path) -> set[str]:
    return {path.relative_to(out / "masks").as_posix() for path in (out / "masks").rglob("*") if path.is_file()}


def test_every_image_has_a_mask_of_its_own_whatever_the_others_are_called(model: ModelFiles, tmp_path: Path) -> None:
    """Three names that would share a file; an id that is a folder of others; and the same when some are done before."""
    names = ["a.jpg", "a.png", "a.png.jpg", "b.jpg", "b.png/c.jpg", "c.png/d.jpg", "c.jpg/e.jpg", "c.tif"]
    for number, name in enumerate(names):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(photo(number))
    report = run(model, tmp_path / "in", tmp_path / "out")
    assert (report.images, report.bad) == (8, 0) and len(masks_below(tmp_path / "out")) == 8
    files = {row["image_id"]: row["file"] for row in parts_below(tmp_path / "out")}
    assert (
        files["b"] == "masks/b.jpg.png" and files["b.png/c"] == "masks/b.png/c.png" and files["c"] == "masks/c.tif.png"
    )
    (tmp_path / "later").mkdir()
    for number, name in enumerate(["a.png.jpg", "a.jpg", "a.png"]):
        (tmp_path / "later" / name).write_bytes(photo(number))
        run(model, tmp_path / "later", tmp_path / "out2")
        assert len(masks_below(tmp_path / "out2")) == number + 1
    rows = parts_below(tmp_path / "out2")
    assert {row["file"].removeprefix("masks/") for row in rows} == masks_below(tmp_path / "out2")
    assert next(row["file"] for row in rows if row["image_id"] == "a.png") == "masks/a.png.png"


def test_two_images_that_cannot_have_two_names_are_refused_before_anything_is_predicted(tmp_path: Path) -> None:
    ids = ["x", "x", "x"]
    pq.write_table(pa.table({"image_id": ids, "image": [b"", b"", b""]}), tmp_path / "a.parquet", row_group_size=1)
    source = str(tmp_path / "a.parquet")
    parts = plan_parts(source, "parquet", "", 1, one_by_one)
    assert crowded_names(parts, source, "parquet") == {id_hash("x")}
    with refused("predict/same-name", source, "masks/x.png"):
        crowded_names(parts, source, "parquet", lambda: {part.name: ["x"] for part in parts[:2]})


def test_a_part_of_others_that_is_damaged_costs_itself(model: ModelFiles, tmp_path: Path) -> None:
    """A row, a row group, a file: all others are predicted, and what is lost is counted and listed."""
    source = tmp_path / "in"
    source.mkdir()
    images = [photo(i) for i in range(4)]
    pq.write_table(pa.table({"image": images}), source / "good.parquet", row_group_size=2)
    pq.write_table(
        pa.table({"image": images}), source / "page.parquet", row_group_size=2, compression="zstd", use_dictionary=False
    )
    place = pq.read_metadata(source / "page.parquet").row_group(0).column(0).data_page_offset
    content = bytearray((source / "page.parquet").read_bytes())
    content[place : place + 40] = b"\xff" * 40
    (source / "page.parquet").write_bytes(content)
    (source / "footer.parquet").write_bytes((source / "good.parquet").read_bytes()[:-20])
    pq.write_table(pa.table({"picture": images}), source / "other.parquet")
    twice = pa.Table.from_arrays([pa.array(images), pa.array(images)], ["image", "image"])
    pq.write_table(twice, source / "twice.parquet")
    names = pa.StringArray.from_buffers(4, pa.array([0, 1, 2, 3, 4], pa.int32()).buffers()[1], pa.py_buffer(b"ab\xffd"))
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3, 4], pa.int32()), names)
    pq.write_table(pa.table({"image_id": lists, "image": images}), source / "lists.parquet")
    pq.write_table(
        pa.Table.from_arrays(
            [pa.array(["a"] * 4), pa.array(["b"] * 4), pa.array(images)], ["image_id", "image_id", "image"]
        ),
        source / "ids.parquet",
    )
    far = pa.array([2**62, 1, None, 2], pa.timestamp("us"))
    pq.write_table(pa.table({"image_id": far, "image": images}), source / "time.parquet")
    long = pa.table({"image_id": ["x" * 5000, "y", "z", "w"], "image": [*images[:3], None]})
    pq.write_table(long, source / "long.parquet")
    report = run(model, source, tmp_path / "out", max_bad_fraction=0.9)
    reasons = {reject.source.removeprefix(f"{source}/"): reject.reason for reject in read_rejects(report.rejects_uri)}
    assert report.images == 4 + 2 + 3 + 2 + 3 and report.bad == len(reasons) == 2 + 4 + 1 + 2 + 1
    for place, why in {
        "page.parquet#0": "row group 0 cannot be read",
        "page.parquet#1": "row group 0 cannot be read",
        "footer.parquet": "not a Parquet file",
        "other.parquet": "one column image of bytes",
        "twice.parquet": "one column image of bytes",
        "ids.parquet": "one column image_id",
        "lists.parquet#2": "its image_id cannot be read as list",
        "time.parquet#0": r"its image_id cannot be read as timestamp\[us\]",
        "long.parquet#0": "its image_id has 5000 letters",
        "long.parquet#3": "is null",
    }.items():
        assert re.search(why, reasons[place]), reasons
    assert run(model, source, tmp_path / "out", max_bad_fraction=0.9).kept == report.images


def test_a_store_that_fails_while_a_table_is_read_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"image": [b"x"] * 4}), tmp_path / "a.parquet")
    ((part,), source) = plan_parts(str(tmp_path), "parquet", "", 9, one_by_one), str(tmp_path)

    def fail(self: Any, size: int = -1) -> bytes:
        self.failure = OSError("the store is down")
        raise self.failure

    with ForeignParquet(part.uri) as opened:
        monkeypatch.setattr(parquet._Source, "read", fail)
        with pytest.raises(OSError, match="the store is down"):
            list(opened.groups([0], ["image"], 0))
    with pytest.raises(OSError, match="the store is down"):
        list(read_part(source, part))


def test_one_image_that_cannot_be_written_costs_itself(
    model: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose side is too long for a JPEG, one whose name is taken by a folder, one that no encoder takes."""
    source, out = photos(tmp_path / "in", 4), tmp_path / "out"
    Image.new("RGB", (65_501, 1)).save(source / "wide.png")
    encode = palette_png

    def fails_at_one(mask: np.ndarray, colours: Any) -> bytes:
        (out / "masks/0.png").mkdir(parents=True, exist_ok=True)  # before the first is written
        if mask.shape == SIZES[2]:
            raise ValueError("not today")
        return encode(mask, colours)

    monkeypatch.setattr("threestage.prediction.predict.palette_png", fails_at_one)
    report = run(model, source, out, max_bad_fraction=0.5)
    assert (report.images, report.bad) == (3, 2)
    assert {Path(reject.source).name: reject.reason for reject in report.rejected} == {
        "0.jpg": "masks/0.png cannot be written: Is a directory [predict/not-written]",
        "2.jpg": "its masks cannot be encoded: not today [predict/not-written]",
    }
    with Image.open(out / "masks/wide.png") as mask, Image.open(out / "overlays/wide.jpg") as picture:
        assert mask.size == (65_501, 1) and picture.size == (32_751, 1)
    assert {row["image_id"] for row in parts_below(out) if row["file"] is None} == {"0", "2"}


def test_one_image_is_an_input(model: ModelFiles, tmp_path: Path, bucket: str) -> None:
    source = photos(tmp_path / "in", 3)
    storage.write_bytes(f"{bucket}/in/0.jpg", photo(0))
    storage.write_bytes(f"{bucket}/in/0.jpg.png", photo(1, "PNG"))
    for place, out in ((f"{source}/0.jpg", tmp_path / "out"), (f"{bucket}/in/0.jpg", tmp_path / "of_s3")):
        report = predict_input(model, place, str(out), PredictSettings())
        assert report.images == 1 and masks_below(out) == {"0.png"}
    (tmp_path / "notes.txt").write_text("hello")
    with refused("predict/no-images", tmp_path / "notes.txt"):
        run(model, tmp_path / "notes.txt", tmp_path / "out2")


def test_a_manifest_beside_images(model: ModelFiles, scenes: Path, tmp_path: Path) -> None:
    """Of somebody else: it does not make the folder a data set. Of ours: the user says which is meant."""
    source = photos(tmp_path / "in", 3)
    for number, content in enumerate(('{"name": "a web page"}', "[" * 100_000, "no JSON")):
        (source / "manifest.json").write_text(content)
        assert run(model, source, tmp_path / f"out{number}").images == 3
    (source / "manifest.json").unlink()
    os.mkfifo(source / "manifest.json")
    assert run(model, source, tmp_path / "pipe").images == 3
    (source / "manifest.json").unlink()
    shutil.copytree(scenes, source, dirs_exist_ok=True)
    with refused("predict/two-inputs", source, "--input-format data-set or images"):
        run(model, source, tmp_path / "both")
    assert not (tmp_path / "both").exists()
    assert run(model, source, tmp_path / "a", input_format="images").images == 3
    assert run(model, source, tmp_path / "b", input_format="data set", overlays=False).images == 50


def test_inputs_that_hold_nothing(model: ModelFiles, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    pq.write_table(pa.table({"picture": ["a"]}), tmp_path / "text/a.parquet")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.parquet").write_bytes(b"PAR1")
    (tmp_path / "rowless").mkdir()
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "rowless/a.parquet")
    for name, code, named in (
        ("nowhere", "not-found", "nowhere:"),
        ("nowhere.parquet", "not-found", "nowhere.parquet:"),
        ("empty", "no-images", "empty:"),
        ("text", "no-images", "picture (string)"),
        ("broken", "no-images", "a.parquet: not a Parquet file"),
        ("rowless", "empty-input", "rowless:"),
    ):
        with refused(f"predict/{code}", named) as raised:
            run(model, tmp_path / name, tmp_path / "out")
        assert "\n" not in str(raised.value)


def test_an_output_inside_the_input_is_refused(model: ModelFiles, tmp_path: Path) -> None:
    source = photos(tmp_path / "in", 1)
    with refused("predict/output-in-input", source / "out"):
        run(model, source, source / "out")
    assert not (source / "out").exists()


def test_from_s3_to_s3(model: ModelFiles, bucket: str) -> None:
    for i in range(5):
        storage.write_bytes(f"{bucket}/in/{i}.jpg", photo(i))
    assert kind_of(f"{bucket}/in") == "images"
    settings = PredictSettings(rows_per_part=2)
    report = predict_input(model, f"{bucket}/in", f"{bucket}/out", settings)
    assert report.images == 5 and len(storage.list_files(f"{bucket}/out/overlays")) == 5
    _, mask, _ = by_hand(model, photo(3))
    assert storage.read_bytes(f"{bucket}/out/masks/3.png") == palette_png(mask, COLOURS)
    counting = Counting()
    assert predict_input(model, f"{bucket}/in", f"{bucket}/out", settings, run=counting).kept == 5
    assert counting.parts == []


# Names and parts


@pytest.mark.parametrize("name", ["a", "a/b", "a b/ü.x", "..a/b..", "a" * 200])
def test_a_good_name_stays(name: str) -> None:
    assert safe_name(name) == name


@pytest.mark.parametrize("name", ["", "/", "..", "../a", "a/../../b", "/etc/a", "a//b", "./a", "a/", "a\0", "ü" * 200])
def test_no_name_leaves_its_folder(name: str) -> None:
    safe = safe_name(name)
    assert safe and not {"", ".", ".."} & set(safe.split("/")) and "\0" not in safe
    assert max(len(part.encode()) for part in safe.split("/")) < 250
    assert safe != safe_name(name + "/..") and safe == safe_name(name)


def test_names_of_repeated_ids() -> None:
    repeated = {id_hash("a/b")}
    rows = [PoolRow("a/b", f"s3://x/in/a/b.{kind}", b"") for kind in ("jpg", "png")]
    assert [output_name(row, "s3://x/in", "images", repeated) for row in rows] == ["a/b.jpg", "a/b.png"]
    assert output_name(rows[0], "s3://x/in", "images", set()) == "a/b"
    names = [output_name(row, "s3://x/in", "parquet", repeated) for row in rows]
    assert len(set(names)) == 2 and all(name.startswith("a/b-") for name in names)


def test_a_part_that_changes_is_another(tmp_path: Path) -> None:
    def digests() -> list[str]:
        return [part.digest for part in plan_parts(str(tmp_path), "parquet", "", 1, one_by_one)]

    pq.write_table(pa.table({"image": [b"a", b"b"]}), tmp_path / "a.parquet", row_group_size=1)
    first = digests()
    assert len(set(first)) == 2 and digests() == first
    pq.write_table(pa.table({"image": [b"a", b"bb"]}), tmp_path / "a.parquet", row_group_size=1)
    assert not set(digests()) & set(first)


def one_by_one(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    return map(function, items)


def test_an_output_behind_a_link_into_the_input_is_refused(model: ModelFiles, tmp_path: Path) -> None:
    photos(tmp_path / "images", 1)
    (tmp_path / "link").symlink_to("images")
    for source, out in (("images", "link/out"), ("link", "images/out")):
        with refused("predict/output-in-input", tmp_path / out):
            run(model, tmp_path / source, tmp_path / out)


def test_files_that_are_passed_over_are_counted(model: ModelFiles, tmp_path: Path) -> None:
    photos(tmp_path / "images", 1)
    (tmp_path / "images/a.heic").write_bytes(b"")
    (tmp_path / "images/manifest.json").mkdir()
    for _ in range(2):
        (warning,) = run(model, tmp_path / "images", tmp_path / "out").warnings
        assert "1 files passed over: 1 .heic" in warning
