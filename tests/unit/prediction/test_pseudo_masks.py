"""Every image of the pool ends as a pseudo-mask or as a reject with its reason, in the order of its file, and once."""

import base64
import io
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from tests.refusals import refused
from threestage.data import storage
from threestage.data.batches import SampleSet
from threestage.data.datasets import static_void_mask, unpacked
from threestage.data.pool import PoolFile, pseudo_mask_uri, read_index
from threestage.data.records import RECORD_SCHEMA, decode_mask, encode_mask
from threestage.data.rejects import Reject, read_rejects
from threestage.data.samples import Sample
from threestage.errors import StageFailure
from threestage.prediction import pool_prediction
from threestage.prediction.pool_prediction import predict_files
from threestage.prediction.pseudo_masks import (
    FileReport,
    PoolTask,
    Statistics,
    check_collapse,
    class_confidence_entropy,
    gather,
    pixel_statistics,
    predict_images,
    quantise,
    set_digest,
    stored_report,
    vanished_classes,
)
from threestage.training.metrics import confusion_matrix

CPU = torch.device("cpu")
CLASSES = 4
SIZES = [(16, 20), (20, 16), (16, 20), (9, 31)]


class Colours(nn.Module):
    """Logits that are a function of the pixel alone; counts its calls and their batch sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []
        self.weight = torch.randn(CLASSES, 3, generator=torch.Generator().manual_seed(0))

    def forward(self, image: Tensor) -> tuple[Tensor, None]:
        self.batches.append(len(image))
        return 6 * torch.einsum("cj,njhw->nchw", self.weight, image - 0.5), None


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def picture(seed: int, size: tuple[int, int]) -> bytes:
    return png(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def bomb(height: int, width: int) -> bytes:
    """A PNG that announces more pixels than anyone wants to decode, and holds none."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return start + png(np.zeros((1, 1, 3), np.uint8))[33:]


def by_value(folder: Path, images: Sequence[bytes], masks: Sequence[bytes | None] | None = None) -> PoolFile:
    """A file of a data set that holds the images, named i000, i001 …"""
    ids = [f"i{number:03d}" for number in range(len(images))]
    columns = {
        "image_id": ids,
        "image": list(images),
        "mask": list(masks) if masks is not None else [None] * len(images),
        "height": [1] * len(images),
        "width": [1] * len(images),
        "source": [f"s3://bucket/{image_id}.png" for image_id in ids],
    }
    uri = str(folder / f"train-{len(list(folder.iterdir()))}.parquet")
    storage.write_table(uri, pa.table(columns, RECORD_SCHEMA))
    return PoolFile(uri=uri, rows=len(images), digest=f"digest of {uri}", own=True)


def by_reference(folder: Path, uris: Sequence[str]) -> PoolFile:
    table = {
        "image_id": [f"i{number:03d}" for number in range(len(uris))],
        "image_uri": list(uris),
        "bytes": [os.path.getsize(uri) if os.path.isfile(uri) else 100 for uri in uris],
    }
    storage.write_table(str(folder / "listed.parquet"), pa.table(table))
    return PoolFile(uri=str(folder / "listed.parquet"), rows=len(uris), digest="d", by_reference=True)


def task_for(folder: Path, **changes: Any) -> PoolTask:
    settings: dict[str, Any] = {
        "destination": str(folder / "pseudo_masks"),
        "model_digest": "model",
        "num_classes": CLASSES,
        "downscale": 1,
        "batch_size": 3,
        "max_image_pixels": 10_000,
        "used_ids": frozenset(),
        "excluded_ids": frozenset(),
    }
    return PoolTask(**settings | changes)


def predict_file(network: nn.Module, task: PoolTask, file: PoolFile, device: torch.device) -> FileReport:
    (report,) = predict_files(network, task, [file], device)
    return report


def written(task: PoolTask, file: PoolFile) -> list[dict[str, Any]]:
    return storage.read_table(pseudo_mask_uri(task.destination, file)).to_pylist()


def alone(image: bytes) -> tuple[np.ndarray, np.ndarray]:
    """What the network says of one image: class ids and confidence, uint8."""
    pixels = np.asarray(Image.open(io.BytesIO(image)))
    ((_, class_ids, confidence, _),) = predict_images(Colours(), [pixels], 1, CPU)
    return class_ids.numpy(), quantise(confidence).numpy()


def test_every_row_is_predicted_in_its_place_whatever_batch_it_was_in(tmp_path: Path) -> None:
    images = [picture(number, SIZES[number % len(SIZES)]) for number in range(150)]  # three row groups
    file, task = by_value(tmp_path, images), task_for(tmp_path)
    network = Colours()
    report = predict_file(network, task, file, CPU)
    assert max(network.batches) == 3 and len(network.batches) < 60
    assert (report.file, report.statistics.images, report.rejects) == (file.name, 150, ())
    assert (report.max_height, report.max_width) == (20, 31)
    rows = written(task, file)
    assert [row["image_id"] for row in rows] == [f"i{number:03d}" for number in range(150)]
    for row, image in zip(rows, images, strict=True):
        class_ids, confidence = alone(image)
        assert np.array_equal(decode_mask(row["pseudo_mask"]), class_ids)
        stored = np.frombuffer(row["confidence"], np.uint8).reshape(class_ids.shape)
        assert np.abs(stored.astype(int) - confidence).max() <= 1


def test_statistics_are_those_of_the_images_one_by_one(tmp_path: Path) -> None:
    images = [picture(number, SIZES[number % len(SIZES)]) for number in range(10)]
    shapes = [SIZES[number % len(SIZES)] for number in range(10)]
    rng = np.random.default_rng(0)
    truth = [rng.choice([0, 1, 2, 3, 255], size=shape).astype(np.uint8) for shape in shapes]
    masks = [None if number == 4 else encode_mask(mask) for number, mask in enumerate(truth)]
    task = task_for(tmp_path, used_ids=frozenset({"i001", "elsewhere"}), excluded_ids=frozenset({"i002"}))
    report = predict_file(Colours(), task, by_value(tmp_path, images, masks), CPU)
    expected = torch.zeros(CLASSES, CLASSES, dtype=torch.int64)
    pixels = np.zeros(CLASSES, np.int64)
    above = 0
    for number, image in enumerate(images):
        ((_, class_ids, confidence, _),) = predict_images(
            Colours(), [np.asarray(Image.open(io.BytesIO(image)))], 1, CPU
        )
        if number != 2:
            pixels += np.bincount(class_ids.numpy().ravel(), minlength=CLASSES)
            above += int((confidence > 0.9).sum())
        if number not in (1, 2, 4):  # trained on, excluded, without a mask
            expected += confusion_matrix(torch.from_numpy(truth[number]), class_ids, CLASSES)
    found = report.statistics
    assert found.images == 9 and found.pixels == pixels.sum() and found.class_pixels == tuple(pixels.tolist())
    assert found.confusion == tuple(map(tuple, expected.tolist()))
    assert found.above[2] == above and 0.25 < found.summary()["mean_confidence"] < 1
    assert report.labelled_ids == ("i001",)


def test_excluded_images_are_null_and_no_rejects(tmp_path: Path) -> None:
    file = by_value(tmp_path, [picture(0, (8, 8)), b"whatever", picture(2, (8, 8))])
    task = task_for(tmp_path, excluded_ids=frozenset({"i001", "i002"}))
    report = predict_file(Colours(), task, file, CPU)
    assert report.rejects == () and report.statistics.images == 1
    assert [row["pseudo_mask"] is None for row in written(task, file)] == [False, True, True]


def test_a_bad_image_costs_itself_only_and_says_why(tmp_path: Path) -> None:
    good = picture(0, (16, 20))
    images = [good, b"no image", bomb(60_000, 60_000), bomb(101, 100), picture(1, (40, 40))[:-500], b"", good]
    file, task = by_value(tmp_path, images), task_for(tmp_path)
    report = predict_file(Colours(), task, file, CPU)
    assert report.statistics.images == 2 and report.statistics.unreadable == 5
    assert [reject.image_id for reject in report.rejects] == ["i001", "i002", "i003", "i004", "i005"]
    assert report.rejects[0].source == "s3://bucket/i001.png"
    reasons = [reject.reason for reject in report.rejects]
    assert reasons[0].startswith("cannot be decoded: it is no image")
    assert "decompression bomb" in reasons[1] and "100x101 pixels, more than 10000" in reasons[2]
    assert "truncated" in reasons[3] and "no image" in reasons[4]
    assert [row["confidence"] is None for row in written(task, file)] == [False, *[True] * 5, False]


def test_a_vanished_image_is_a_reject(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(0, (8, 8)))
    uris = [str(tmp_path / "a.png"), str(tmp_path / "gone.png")]
    file, task = by_reference(tmp_path, uris), task_for(tmp_path)
    report = predict_file(Colours(), task, file, CPU)
    (reject,) = report.rejects
    assert reject.source == uris[1] and "cannot be read" in reject.reason
    assert [row["pseudo_mask"] is None for row in written(task, file)] == [False, True]


def test_an_image_that_changed_since_it_was_listed_is_a_reject(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(0, (8, 8)))
    file = by_reference(tmp_path, [str(tmp_path / "a.png")])
    (tmp_path / "a.png").write_bytes(picture(1, (9, 30)))
    (reject,) = predict_file(Colours(), task_for(tmp_path), file, CPU).rejects
    assert "has changed since it was listed" in reject.reason


def test_the_masks_and_ids_of_another_data_set_are_not_the_runs(tmp_path: Path) -> None:
    file = by_value(tmp_path, [picture(0, (8, 8))], [b"broken"]).model_copy(update={"own": False})
    report = predict_file(Colours(), task_for(tmp_path, used_ids=frozenset({"i000"})), file, CPU)
    assert report.rejects == () and report.labelled_ids == () and report.statistics.images == 1


def test_an_image_smaller_than_the_downscale_is_a_reject(tmp_path: Path) -> None:
    file, task = by_value(tmp_path, [picture(0, (1, 9)), picture(1, (8, 9))]), task_for(tmp_path, downscale=2)
    report = predict_file(Colours(), task, file, CPU)
    assert [reject.image_id for reject in report.rejects] == ["i000"]
    assert (report.max_height, report.max_width) == (4, 4)


def test_a_mask_of_another_size_or_broken_is_a_reject(tmp_path: Path) -> None:
    image = picture(0, (8, 8))
    masks = [encode_mask(np.zeros((4, 8), np.uint8)), b"broken", encode_mask(np.zeros((8, 8), np.uint8))]
    report = predict_file(Colours(), task_for(tmp_path), by_value(tmp_path, [image] * 3, masks), CPU)
    assert [reject.image_id for reject in report.rejects] == ["i000", "i001"]
    assert all("its mask" in reject.reason for reject in report.rejects)


class SmallMemory(Colours):
    def forward(self, image: Tensor) -> tuple[Tensor, None]:
        if image[:, 0].numel() > 400:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(image)


@pytest.fixture(autouse=True)
def enough_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured before the first batch: these networks count what they are given."""
    monkeypatch.setattr(pool_prediction, "most_pixels", lambda *_: 2**40)


def test_what_does_not_fit_is_tried_alone_and_then_rejected(tmp_path: Path) -> None:
    images = [picture(number, size) for number, size in enumerate([(16, 20), (16, 20), (16, 20), (21, 20)])]
    network = SmallMemory()
    report = predict_file(network, task_for(tmp_path), by_value(tmp_path, images), CPU)
    assert network.batches == [1, 1, 1]
    assert [reject.image_id for reject in report.rejects] == ["i003"]
    assert "20x21 pixels do not fit into the memory" in report.rejects[0].reason


def test_a_file_of_only_bad_or_no_rows_is_published(tmp_path: Path) -> None:
    for images in ([b"bad"], []):
        file, task = by_value(tmp_path, images), task_for(tmp_path)
        report = predict_file(Colours(), task, file, CPU)
        assert (report.statistics.images, report.max_height, report.max_width) == (0, 0, 0)
        assert len(written(task, file)) == len(images)
        assert stored_report(pseudo_mask_uri(task.destination, file)) == report


def test_rare_sizes_wait_for_each_other_but_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_prediction, "WAITING_ROWS", 10)
    sizes = [(9, 9), *[(8, 8)] * 20, (9, 9), (9, 9)]
    network = Colours()
    predict_file(
        network, task_for(tmp_path, batch_size=4), by_value(tmp_path, [picture(0, size) for size in sizes]), CPU
    )
    assert network.batches == [4, 4, 1, 4, 4, 4, 2]
    monkeypatch.setattr(pool_prediction, "WAITING_BYTES", 9 * 9 * 3 + 8 * 8 * 3 - 1)
    network = Colours()
    images = [picture(0, size) for size in [(9, 9), (8, 8), (9, 9), (9, 9)]]
    predict_file(network, task_for(tmp_path, batch_size=2), by_value(tmp_path, images), CPU)
    assert network.batches == [1, 1, 2]


def test_a_batch_of_large_images_is_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("threestage.prediction.pseudo_masks.BATCH_PIXELS", 200)
    network = Colours()
    file = by_value(tmp_path, [picture(0, (10, 10))] * 4 + [picture(0, (20, 20))] * 2)
    predict_file(network, task_for(tmp_path), file, CPU)
    assert network.batches == [2, 2, 1, 1]


def test_a_rerun_keeps_what_is_written(tmp_path: Path) -> None:
    files = [by_value(tmp_path, [picture(number, (8, 8)), b"bad"]) for number in range(3)]
    task = task_for(tmp_path, used_ids=frozenset({"i000"}))
    reports = list(predict_files(Colours(), task, files[:2], CPU))
    before = [Path(pseudo_mask_uri(task.destination, file)).stat() for file in files[:2]]
    network = Colours()
    again = list(predict_files(network, task, files, CPU))
    assert network.batches == [1] and again[:2] == reports
    assert [report.file for report in again] == [file.name for file in files]
    after = [Path(pseudo_mask_uri(task.destination, file)).stat() for file in files[:2]]
    assert [(s.st_mtime_ns, s.st_ino) for s in before] == [(s.st_mtime_ns, s.st_ino) for s in after]


@pytest.mark.parametrize(
    "change",
    [
        {"model_digest": "other"},
        {"max_image_pixels": 5},
        {"excluded_ids": frozenset({"i000"})},
        {"fixed_void": base64.b64encode(encode_mask(np.eye(8, dtype=np.uint8))).decode()},
    ],
)
def test_what_another_model_or_setting_made_is_made_again(tmp_path: Path, change: dict[str, Any]) -> None:
    file, task = by_value(tmp_path, [picture(0, (8, 8))]), task_for(tmp_path)
    first = predict_file(Colours(), task, file, CPU)
    other = task.model_copy(update=change)
    network = Colours()
    assert predict_file(network, other, file, CPU) == stored_report(pseudo_mask_uri(task.destination, file))
    assert network.batches == [1] or not predict_file(network, other, file, CPU).statistics.images
    assert set_digest(task, [file]) != set_digest(other, [file])
    predict_file(Colours(), task, file, CPU)
    assert stored_report(pseudo_mask_uri(task.destination, file)) == first


def labelled(*masks: np.ndarray) -> SampleSet:
    return SampleSet([Sample(f"i{n}", picture(n, mask.shape), encode_mask(mask)) for n, mask in enumerate(masks)], 2)


class Autocast(Colours):
    """Notes the number type that it is asked in."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def forward(self, image: Tensor) -> tuple[Tensor, None]:
        self.dtypes.add(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        return super().forward(image)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_the_pool_is_predicted_in_the_precision_of_the_task(precision: str, dtype: torch.dtype, tmp_path: Path) -> None:
    network, task = Autocast(), task_for(tmp_path, precision=precision)
    predict_file(network, task, by_value(tmp_path, [picture(0, (16, 20))]), CPU)
    assert network.dtypes == {dtype}
    assert (task.digest() == task_for(tmp_path).digest()) == (precision == "auto")


def test_what_is_void_in_most_labels_is_void_in_every_pseudo_mask_of_that_size(tmp_path: Path) -> None:
    masks = np.zeros((4, 8, 12), np.uint8)
    masks[:, -2:] = 255  # a bonnet in all, a lorry in one of four
    masks[0, :2, :2] = 255
    region = static_void_mask(labelled(*masks), 0.5)
    bonnet = np.zeros((4, 6), bool)
    bonnet[-1] = True
    assert np.array_equal(unpacked(region), bonnet)
    assert unpacked(static_void_mask(labelled(*masks), 0.25)).sum() == 7

    images = [picture(0, (8, 12)), picture(1, (12, 8))]
    file, task = by_value(tmp_path, images), task_for(tmp_path, downscale=2)
    whole, before = predict_file(Colours(), task, file, CPU), written(task, file)
    task = task.model_copy(update={"fixed_void": region})
    assert predict_file(Colours(), task, file, CPU).statistics == whole.statistics
    first, second = written(task, file)
    expected = np.where(bonnet, 255, decode_mask(before[0]["pseudo_mask"]))
    assert np.array_equal(decode_mask(first["pseudo_mask"]), expected)
    assert first["confidence"] == before[0]["confidence"] and second == before[1]


def test_a_fixed_region_takes_masks_of_one_size() -> None:
    samples = labelled(np.zeros((8, 12), np.uint8), np.zeros((12, 8), np.uint8))
    with refused("data/mask-sizes", "i0 has (4, 6)", "i1 (6, 4)", "set it to null"):
        static_void_mask(samples, 0.5)


def test_nothing_is_published_when_the_prediction_dies(tmp_path: Path) -> None:
    class Dies(Colours):
        def forward(self, image: Tensor) -> tuple[Tensor, None]:
            if len(self.batches) == 2:
                raise RuntimeError("killed")
            return super().forward(image)

    file, task = by_value(tmp_path, [picture(0, (8, 8))] * 9), task_for(tmp_path)
    with pytest.raises(RuntimeError, match="killed"):
        predict_file(Dies(), task, file, CPU)
    assert stored_report(pseudo_mask_uri(task.destination, file)) is None
    assert not Path(task.destination).exists()


def test_a_store_that_fails_is_an_error_and_no_reject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(uri: str, data: object) -> None:
        raise OSError("no space left on device")

    file, task = by_value(tmp_path, [picture(0, (8, 8))]), task_for(tmp_path)
    monkeypatch.setattr(storage, "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        predict_file(Colours(), task, file, CPU)


def test_predicting_may_be_given_up(tmp_path: Path) -> None:
    files = [by_value(tmp_path, [picture(0, (8, 8))] * 20) for _ in range(6)]
    network = Colours()
    reports = predict_files(network, task_for(tmp_path), files, CPU)
    next(reports)
    reports.close()  # type: ignore[attr-defined]
    assert sum(network.batches) < 120


def rejects(number: int, file: str) -> tuple[Reject, ...]:
    return tuple(Reject(image_id=f"{file}-{i}", source=f"s3://b/{file}/{i}", reason="bad") for i in range(number))


def reports_of(bad: Sequence[int]) -> Callable[[], Iterator[FileReport]]:
    """Reports of files a, b, … of 20 images with so many rejects each, the last file first."""

    def give() -> Iterator[FileReport]:
        for number, count in reversed(list(enumerate(bad))):
            name = "abcdefgh"[number]
            statistics = Statistics(images=20 - count, unreadable=count, pixels=100 * (20 - count))
            yield FileReport(
                file=name, statistics=statistics, max_height=number, max_width=2 * number, labelled_ids=(f"{name}-l",) * number,
                rejects=rejects(count, name),
            )  # fmt: skip

    return give


def pool(number: int) -> list[PoolFile]:
    return [PoolFile(uri=f"s3://b/{name}", rows=20, digest=name) for name in "abcdefgh"[:number]]


def test_gather_sums_up_and_writes_the_index_and_the_rejects(tmp_path: Path) -> None:
    task = task_for(tmp_path)
    statistics = gather(task, pool(3), reports_of([2, 0, 1])(), max_bad_fraction=0.05)  # 5 % exactly
    assert (statistics.images, statistics.unreadable, statistics.pixels) == (57, 3, 5700)
    index = read_index(task.destination)
    assert [(row.file, row.images, row.max_height, row.max_width) for row in index] == [
        ("a", 18, 0, 0), ("b", 20, 1, 2), ("c", 19, 2, 4)
    ]  # fmt: skip
    assert [row.labelled_ids for row in index] == [(), ("b-l",), ("c-l", "c-l")]
    listed = read_rejects(storage.join(task.destination, "rejects.parquet"))
    assert listed == [*rejects(2, "a"), *rejects(1, "c")]


def test_statistics_by_hand() -> None:
    """Of 8 pixels, 3 of them above 0.9; the true mask of 4 is known."""
    statistics = Statistics(
        pixels=8, confidence_sum=6, entropy_sum=2, above=(8, 7, 3, 0), class_pixels=(4, 4), confusion=((1, 1), (0, 2))
    )
    figures = statistics.summary()
    assert [figures[f"share_above_{share}"] for share in (0.5, 0.7, 0.9, 0.95)] == [1.0, 7 / 8, 3 / 8, 0.0]
    assert figures["mean_confidence"] == 0.75 and figures["mean_entropy"] == 0.25
    assert figures["pseudo_mask_mean_iou"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    one = Statistics(pixels=1, confidence_sum=0.5, above=(1, 0, 0, 0)).summary()
    assert one["mean_confidence"] == 0.5 and "pseudo_mask_mean_iou" not in one
    with pytest.raises(ValueError, match="zip"):
        Statistics(above=(1,)).summary()


def test_a_file_of_150_classes_is_a_short_report() -> None:
    """Of 10^8 images the driver takes hundreds of thousands of reports."""

    def report_of(confusion: np.ndarray) -> FileReport:
        sums = [np.concatenate([np.zeros(2 + len(Statistics().above)), np.ones(150), confusion.ravel()])]
        statistics = Statistics.of(1, 0, sums, 150)
        return FileReport(file="a", statistics=statistics, max_height=1, max_width=1, labelled_ids=(), rejects=())

    nothing, some = np.zeros((150, 150)), np.zeros((150, 150))
    some[3, 149], some[149, 149] = 7, 2
    for confusion in (nothing, some):
        report = report_of(confusion)
        text = report.model_dump_json()
        assert len(text) < 1000 and FileReport.model_validate_json(text) == report
    assert report.statistics.confusion == tuple(map(tuple, some.astype(int).tolist()))
    before = report.model_dump()  # as footers held it, and done.json does
    assert FileReport.model_validate(before) == report
    assert (report_of(nothing).statistics + report.statistics).confusion == report.statistics.confusion


def test_statistics_add_up_also_where_one_knows_no_classes() -> None:
    known = Statistics(images=1, class_pixels=(1, 2), confusion=((1, 0), (0, 2)))
    assert Statistics(images=2) + known == known + Statistics(images=2) == known.model_copy(update={"images": 3})
    assert (known + known).class_pixels == (2, 4)


def test_a_class_has_vanished_under_a_hundredth_of_its_share() -> None:
    """Class b has half of the 400 labelled pixels: it vanishes below 1/200 of the pseudo-masks' 1,000 pixels."""
    for found, vanished in ((5, []), (4, ["b"])):
        statistics = Statistics(pixels=1000, class_pixels=(1000 - found, found, 0))
        assert vanished_classes(statistics, [200, 200, 0], ["a", "b", "never labelled"]) == vanished
    assert vanished_classes(Statistics(class_pixels=(0,)), [1], ["a"]) == ["a"], "nothing is predicted"
    assert vanished_classes(Statistics(class_pixels=(0,)), [0], ["a"]) == [], "nothing is labelled"
    with pytest.raises(ValueError, match="zip"):
        vanished_classes(Statistics(class_pixels=(0, 0)), [1], ["a"])


def test_a_guard_warns_stops_or_says_nothing() -> None:
    said: list[str] = []
    check_collapse("ignore", "it fell", said.append)
    assert said == []
    check_collapse("warn", "it fell", said.append)
    assert said == ["it fell"]
    with refused("stage/collapsed", "it fell; ", "pseudo_mask.on_collapse=stop", error=StageFailure):
        check_collapse("stop", "it fell", said.append)
    assert said == ["it fell"]


def test_gather_writes_the_lists_also_when_they_are_empty(tmp_path: Path) -> None:
    task = task_for(tmp_path)
    assert gather(task, [], iter(()), 0.0) == Statistics()
    assert read_index(task.destination) == []
    assert read_rejects(storage.join(task.destination, "rejects.parquet")) == []


def test_a_pool_without_a_usable_image_stops_the_job(tmp_path: Path) -> None:
    task = task_for(tmp_path)
    with refused("data/bad-images", "no image of the pool", task.destination, error=StageFailure):
        gather(task, pool(1), reports_of([20])(), 1.0)


def test_too_many_bad_images_stop_the_job_at_once(tmp_path: Path) -> None:
    task = task_for(tmp_path)
    given = []
    closed = []

    def watched() -> Iterator[FileReport]:
        try:
            for report in reports_of([0, 0, 0, 20, 20])():
                given.append(report.file)
                yield report
        finally:
            closed.append(True)

    listed = storage.join(task.destination, "rejects.parquet")
    with refused("data/bad-images", "40 of 100 images", listed, "data.max_bad_fraction", error=StageFailure):
        gather(task, pool(5), watched(), max_bad_fraction=0.2)
    assert given == ["e", "d"] and closed
    assert len(read_rejects(listed)) == 40
    assert not storage.exists(storage.join(task.destination, "index.parquet"))


def test_a_report_that_comes_twice_counts_once(tmp_path: Path) -> None:
    b, a = reports_of([1, 1])()
    assert gather(task_for(tmp_path), pool(2), [b, b, a, b], 0.05).unreadable == 2


def test_many_rejects_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("threestage.data.rejects.WRITTEN_AT_ONCE", 7)
    task = task_for(tmp_path)
    gather(task, pool(4), reports_of([5, 5, 5, 5])(), 1.0)
    listed = read_rejects(storage.join(task.destination, "rejects.parquet"))
    assert sorted(listed, key=lambda reject: reject.source) == [r for name in "abcd" for r in rejects(5, name)]


def test_tiles_give_what_the_whole_gives() -> None:
    logits = torch.randn(2, 5, 300, 70, generator=torch.Generator().manual_seed(1)) * 3
    class_ids, confidence, entropy = class_confidence_entropy(logits.to(memory_format=torch.channels_last))
    log_probabilities = logits.log_softmax(1)
    assert torch.equal(class_ids, logits.argmax(1).to(torch.uint8))
    assert torch.allclose(confidence, log_probabilities.exp().amax(1))
    assert torch.allclose(entropy, -(log_probabilities.exp() * log_probabilities).sum(1), atol=1e-6)


def test_measure_of_a_batch_is_the_sum_over_its_images() -> None:
    logits = torch.randn(3, CLASSES, 8, 9, generator=torch.Generator().manual_seed(1))
    class_ids, confidence, entropy = class_confidence_entropy(logits)
    masks = [None, np.full((8, 9), 2, np.uint8), np.full((8, 9), 255, np.uint8)]
    whole = pixel_statistics(class_ids, confidence, entropy, masks, CLASSES)
    single = [
        pixel_statistics(class_ids[i : i + 1], confidence[i : i + 1], entropy[i : i + 1], masks[i : i + 1], CLASSES)
        for i in range(3)
    ]
    assert torch.allclose(whole, torch.stack(single).sum(0))
    statistics = Statistics.of(3, 0, [whole.numpy()], CLASSES)
    assert statistics == Statistics.of(3, 0, [part.numpy() for part in single], CLASSES)
    assert sum(statistics.confusion[2]) == 72 == np.sum(statistics.confusion)
    assert statistics.pixels == 3 * 72


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_class_ids_survive_their_png(height: int, width: int, seed: int) -> None:
    class_ids = np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
    assert np.array_equal(decode_mask(encode_mask(class_ids, fast=True)), class_ids)
