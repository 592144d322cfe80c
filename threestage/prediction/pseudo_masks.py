"""Pseudo-masks: logits to class, confidence and entropy, statistics of a set, and the files of a set.

pool_prediction.py predicts the pool with this and writes the files:

    folder/<name of the image file>    PSEUDO_MASK_SCHEMA, the image file's rows in their order; null: not in the pool
    folder/index.parquet               INDEX_SCHEMA, one row per file: what a stage must know before it reads any
    folder/rejects.parquet             images that could not be used, and why; rejects.csv: the same

Confidences are stored, so a threshold is applied when they are read and a new one costs no new prediction.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal, NotRequired, Self

import numpy as np
import torch
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, field_serializer, with_config
from torch import Tensor, nn
from typing_extensions import TypedDict

from threestage import IGNORE_INDEX
from threestage.data import storage
from threestage.data.bands import Bands
from threestage.data.batches import send
from threestage.data.pool import IndexRow, PoolFile, rows_of, write_index
from threestage.data.rejects import Reject, RejectList
from threestage.errors import StageFailure
from threestage.models.settings import InferenceSettings
from threestage.settings import Settings
from threestage.training.losses import Normaliser, ThresholdRule
from threestage.training.metrics import mean_iou, value_counts

REJECTS_NAME = "rejects.parquet"
REPORT_KEY = b"threestage.report"
DIGEST_KEY = b"threestage.prediction_digest"
CONFIDENCE_SHARES = (0.5, 0.7, 0.9, 0.95)
VANISHED_SHARE = 0.01
VANISHED_WHY = (
    "too few labels show it, or stage 1 was too short; label more images of it, give stage 1 more steps, or set "
    "augment.class_balance"
)
TILE_PIXELS = 8192
BATCH_PIXELS = 2**24  # of the images of a forward pass, at most, where it is more than one


class PseudoMaskSettings(Settings):
    weight: float = Field(0.25, ge=0, description="weight w_pm of the pseudo-mask loss")
    confidence_threshold: float = Field(
        0.0, ge=0, le=1, description="ignore pixels of lower confidence in L_pm; paper: 0"
    )
    threshold_rule: ThresholdRule = Field(
        "fixed",
        description="factor on the threshold: 1 (fixed; paper), the mean confidence of the batch (dynamic) or of each class",
    )
    weight_by_confidence: bool = Field(False, description="weight each pixel of L_pm by its confidence; paper: false")
    normaliser: Normaliser = Field(
        "kept", description="pixels to divide L_pm by: those above the threshold (kept; paper), or all"
    )
    head: Literal["auxiliary", "main"] = Field(
        "auxiliary",
        description="head that trains on pseudo-masks; main, with consistency.weight=0, is plain self-training",
    )
    on_collapse: Literal["ignore", "warn", "stop"] = Field(
        "warn",
        description="reaction if a labelled class vanishes from the pseudo-masks or a stage scores below the previous one",
    )
    batch_size: int = Field(8, ge=1, description="images per forward pass of prediction and evaluation")
    final_stage: bool = Field(True, description="predict the pool after the last stage too; no stage trains on it")


def _dense(confusion: Any) -> Any:
    """A matrix from its SparseCounts, in which a file's report carries it; a report of before has the matrix."""
    if not isinstance(confusion, dict):
        return confusion
    counts = _sparse_counts.validate_python(confusion)
    matrix = np.zeros((counts["classes"], counts["classes"]), np.int64)
    for true, predicted, pixels in counts["counts"]:
        matrix[true, predicted] = pixels
    return matrix.tolist()


ClassId = Annotated[int, Field(ge=0, lt=IGNORE_INDEX)]


class SparseCounts(TypedDict):
    """The entries of a confusion matrix that are not 0: true class, predicted class, pixels."""

    classes: Annotated[int, Field(ge=0, le=IGNORE_INDEX)]
    counts: list[tuple[ClassId, ClassId, int]]


_sparse_counts = TypeAdapter(SparseCounts)


class Statistics(Settings):
    """Counts over the pixels of the pool; they add up, so files and workers can be merged in any order."""

    images: int = 0
    unreadable: int = 0  # rejects, whatever the reason
    pixels: int = 0
    confidence_sum: float = 0.0
    entropy_sum: float = 0.0  # nats
    above: tuple[int, ...] = (0,) * len(CONFIDENCE_SHARES)
    class_pixels: tuple[int, ...] = ()
    confusion: Annotated[tuple[tuple[int, ...], ...], BeforeValidator(_dense)] = ()
    """On images whose mask is known but was not used for training; () without any."""
    agreement: tuple[
        int, ...
    ] = ()  # images of each agreement with the weights of half-way, in 255ths; () if not measured

    @classmethod
    def of(cls, images: int, unreadable: int, sums: Sequence[np.ndarray], num_classes: int) -> Self:
        """From the vectors that `measure` gave, each followed by that of `agreement_counts` or not."""
        lengths = (2, len(CONFIDENCE_SHARES), num_classes, num_classes**2)
        total = np.sum(sums, axis=0) if sums else np.zeros(sum(lengths))
        moments, *counts = np.split(total, np.cumsum(lengths))
        above, class_pixels, confusion, agreement = (part.astype(np.int64) for part in counts)
        return cls(
            images=images,
            unreadable=unreadable,
            pixels=int(class_pixels.sum()),
            confidence_sum=float(moments[0]),
            entropy_sum=float(moments[1]),
            above=tuple(above.tolist()),
            class_pixels=tuple(class_pixels.tolist()),
            confusion=tuple(map(tuple, confusion.reshape(num_classes, num_classes).tolist()))
            if confusion.any()
            else (),
            agreement=tuple(agreement.tolist()),
        )

    def __add__(self, other: Self) -> "Statistics":
        merged = {}
        for name in type(self).model_fields:
            mine, theirs = np.asarray(getattr(self, name)), np.asarray(getattr(other, name))
            merged[name] = (mine + theirs if mine.shape == theirs.shape else max(mine, theirs, key=np.size)).tolist()
        return Statistics(**merged)

    def summary(self) -> dict[str, float]:
        """Mean confidence and entropy (nats), shares above confidences; pseudo_mask_mean_iou only where masks are known."""
        pixels = max(1, self.pixels)
        result = {"mean_confidence": self.confidence_sum / pixels, "mean_entropy": self.entropy_sum / pixels}
        result |= {f"share_above_{t}": n / pixels for t, n in zip(CONFIDENCE_SHARES, self.above, strict=True)}
        if np.sum(self.confusion) > 0:
            result["pseudo_mask_mean_iou"] = mean_iou(torch.tensor(self.confusion))
        if sum(self.agreement) > 0:
            result["mean_agreement"] = float(np.average(np.arange(256) / 255, weights=self.agreement))
        return result


@torch.inference_mode()
def predict(network: nn.Module, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whole images, single scale: (N,3,H,W) uint8 → class (N,H,W) uint8, confidence (N,H,W) float in [0,1],
    entropy (N,H,W) in nats."""
    logits, _ = network(image.float() / 255)
    return class_confidence_entropy(logits)


def best_class(logits: Tensor) -> Tensor:
    """Logits (N,C,H,W) → class ids (N,H,W) int64. On a CPU `max` takes a quarter of the time of `argmax`."""
    return logits.max(dim=1).indices


def class_confidence_entropy(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (N,C,H,W) → class uint8, confidence in [0,1], entropy in nats, (N,H,W) each.

    On a CPU piece by piece, so that the intermediate values stay in its cache: that is four times as fast.
    """
    if logits.device.type != "cpu":
        return _class_confidence_entropy(logits)
    number, _, height, width = logits.shape
    rows = max(1, TILE_PIXELS * torch.get_num_threads() // width)
    images = [
        [_class_confidence_entropy(logits[i, :, top : top + rows].contiguous()) for top in range(0, height, rows)]
        for i in range(number)
    ]
    class_ids, confidence, entropy = (
        torch.stack([torch.cat([tile[part] for tile in tiles]) for tiles in images]) for part in range(3)
    )
    return class_ids, confidence, entropy


def _class_confidence_entropy(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `class_confidence_entropy`, of (…,C,H,W)."""
    log_probabilities = logits.float().log_softmax(dim=-3)
    confidence, class_ids = log_probabilities.max(dim=-3)
    entropy = -(log_probabilities.exp().mul_(log_probabilities)).sum(dim=-3)
    return class_ids.to(torch.uint8), confidence.exp(), entropy


def predict_images(
    network: nn.Module, images: Sequence[np.ndarray], batch_size: int, device: torch.device
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Predict images (H,W,3) uint8 of any sizes, batching those of one size; yields (index, class, confidence, entropy)
    on the CPU, grouped by size."""
    for chosen, batch in batches_by_size(images, batch_size):
        predicted = [tensor.cpu() for tensor in predict(network, send(batch, device))]
        yield from zip(chosen, *predicted, strict=True)


def images_at_once(size: tuple[int, ...], batch_size: int) -> int:
    """How many images of a size (H,W,…) a forward pass takes: `batch_size`, of large ones as many as have BATCH_PIXELS."""
    return max(1, min(batch_size, BATCH_PIXELS // (size[0] * size[1])))


def batches_by_size(images: Sequence[np.ndarray], batch_size: int) -> Iterator[tuple[list[int], Tensor]]:
    """Batches of images (H,W,3) uint8 of one size, at most `batch_size` of them and BATCH_PIXELS pixels: their indices, and
    their pixels (N,3,H,W) uint8 on the CPU."""
    by_size: dict[tuple[int, ...], list[int]] = {}
    for index, image in enumerate(images):
        by_size.setdefault(image.shape, []).append(index)
    for size, members in by_size.items():
        most = images_at_once(size, batch_size)
        for start in range(0, len(members), most):
            chosen = members[start : start + most]
            yield chosen, torch.from_numpy(np.stack([images[i] for i in chosen])).permute(0, 3, 1, 2)


def quantise(confidence: Tensor) -> Tensor:
    """Probabilities to uint8, 255 = 1."""
    return (confidence * 255).round().to(torch.uint8)


def pixel_statistics(
    class_ids: Tensor, confidence: Tensor, entropy: Tensor, masks: Sequence[np.ndarray | None], num_classes: int
) -> Tensor:
    """Sums over predicted images (N,H,W), on their device and without waiting for it: confidence, entropy, pixels above
    each of CONFIDENCE_SHARES, pixels of each class, confusion matrix, as one float64 vector (`Statistics.of` reads it).

    `masks`: their true masks (H,W) uint8 where those are known and were not trained on; 255 never counts.
    """
    moments = torch.stack([values.sum((1, 2)).double().sum() for values in (confidence, entropy)])
    above = torch.stack([(confidence > share).count_nonzero() for share in CONFIDENCE_SHARES])
    confusion = torch.zeros(num_classes**2, dtype=torch.float64, device=class_ids.device)
    known = {i: mask for i, mask in enumerate(masks) if mask is not None}
    if known:
        true = torch.from_numpy(np.stack(list(known.values()))).to(class_ids.device, non_blocking=True)
        pairs = true.int() * num_classes + torch.stack([class_ids[i] for i in known])
        confusion = value_counts(pairs, (IGNORE_INDEX + 1) * num_classes)[: num_classes**2]
    return torch.cat([moments, above.double(), value_counts(class_ids, num_classes), confusion])


def agreement(class_ids: Tensor, others: Tensor, num_classes: int) -> Tensor:
    """How much two predictions (N,H,W) of the same images are alike, (N,) uint8, 255 = the same: the mean IoU over the classes
    that either shows (ST++, eq. 5, of two checkpoints)."""
    images, classes = len(class_ids), num_classes
    place = torch.arange(images, device=class_ids.device)[:, None, None]
    pairs = (place * classes + class_ids.long()) * classes + others.long()
    counts = value_counts(pairs, images * classes**2).view(images, classes, classes)
    same, rows, columns = counts.diagonal(dim1=1, dim2=2), counts.sum(2), counts.sum(1)
    union = rows + columns - same
    seen = union > 0
    return quantise((same / union.clamp(min=1)).sum(1) / seen.sum(1).clamp(min=1))


def agreement_counts(agreement: Tensor) -> Tensor:
    """(256,) float64: how many images (N,) have each agreement."""
    return value_counts(agreement, 256)


class PoolTask(Settings):
    """What is needed to predict any file of the pool, on any machine, as plain JSON."""

    destination: str
    model_digest: str
    num_classes: int
    downscale: int
    batch_size: int
    max_image_pixels: int
    used_ids: frozenset[str]  # labelled images: their masks were trained on, so they are left out of the mIoU
    excluded_ids: frozenset[str]  # validation images: not in the pool
    fixed_void: str | None = None  # pixels that are void in every image of their size; see data/datasets.py
    halfway_model: str | None = None  # folder of the weights with which each image's agreement is measured
    precision: str = "auto"  # training.precision, as in an evaluation
    features: bool = False  # what `threestage next` chooses by, in place of pseudo-masks
    inference: InferenceSettings = InferenceSettings()  # whole images, or windows
    bands: Bands | None = None  # of the images; None: 8-bit RGB

    def digest(self) -> str:
        """Of all that decides what the pseudo-masks of a file are, the file apart."""
        parts = [self.model_digest, str(self.downscale), str(self.max_image_pixels)]
        parts += ["used", *sorted(self.used_ids), "excluded", *sorted(self.excluded_ids)]
        parts += [] if self.fixed_void is None else ["fixed void", self.fixed_void]
        parts += [] if self.halfway_model is None else ["agreement"]
        parts += [] if self.precision == "auto" else ["precision", self.precision]
        parts += ["features 1"] if self.features else []
        parts += [] if self.inference.window is None else ["inference", self.inference.model_dump_json()]
        parts += [] if self.bands is None else ["bands", self.bands.model_dump_json()]
        return hashlib.sha256("/".join(parts).encode()).hexdigest()


def _of_a_set(statistics: Statistics) -> Statistics:
    if len(statistics.above) != len(CONFIDENCE_SHARES) or not statistics.class_pixels:
        raise ValueError("counts of pixels are missing")
    return statistics


@with_config(ConfigDict(extra="allow"))
class SetMarker(TypedDict):
    """done.json of a set of pseudo-masks. masks_removed: `threestage clean` has left the marker alone."""

    digest: str
    masks_removed: NotRequired[bool]
    statistics: Annotated[Statistics, AfterValidator(_of_a_set)]


class FileReport(Settings):
    """What came of one file of the pool. `file`: its PoolFile's name. `in_windows`: images that were cut into windows, since
    the memory does not hold them whole. `max_height` and `max_width`: of the predicted
    images, downscaled; 0 without any. `labelled_ids`: those of `used_ids` that were predicted, in the file's order.
    `measured`: the sum over the images of what `PredictionWriter.measure` gave, where the writer keeps it."""

    file: str
    statistics: Statistics
    max_height: int
    max_width: int
    labelled_ids: tuple[str, ...]
    rejects: tuple[Reject, ...]
    in_windows: int = 0
    measured: tuple[float, ...] = ()

    @field_serializer("statistics", when_used="json")
    def _with_sparse_counts(self, statistics: Statistics) -> dict[str, Any]:
        """Of 150 classes a file shows few, and a pool has many files."""
        fields = statistics.model_dump(mode="json")
        if statistics.confusion:
            matrix = np.asarray(statistics.confusion)
            places = zip(*map(np.ndarray.tolist, matrix.nonzero()), strict=True)
            counts = [(true, predicted, int(matrix[true, predicted])) for true, predicted in places]
            fields["confusion"] = SparseCounts(classes=len(matrix), counts=counts)
        return fields


def stored_report(uri: str, digest: str | None = None) -> FileReport | None:
    """The report of a finished pseudo-mask file, from its footer; None if there is none, or none of `digest` (see
    `file_digest`)."""
    metadata = storage.read_metadata(uri) or {}
    if REPORT_KEY not in metadata or (digest is not None and metadata.get(DIGEST_KEY) != digest.encode()):
        return None
    return FileReport.model_validate_json(metadata[REPORT_KEY])


def file_digest(task_digest: str, file: PoolFile) -> str:
    """Of all that decides what a file's pseudo-masks are."""
    return hashlib.sha256(f"{task_digest}/{file.digest}".encode()).hexdigest()


def set_digest(task: PoolTask, files: Sequence[PoolFile]) -> str:
    """Digest of a set of pseudo-masks: which model predicted which images, and how."""
    whole = hashlib.sha256(task.digest().encode())
    for file in files:
        whole.update(f"/{file.digest}".encode())
    return whole.hexdigest()


def gather(
    task: PoolTask, files: Sequence[PoolFile], reports: Iterable[FileReport], max_bad_fraction: float
) -> Statistics:
    """Take the reports of all files, in any order, and complete the set: index.parquet and rejects.parquet.

    Raises StageFailure as soon as more than the share `max_bad_fraction` of the files' images is bad; rejects.parquet
    then holds those so far, and `reports` is closed.
    """
    statistics, index, rejected = Statistics(), {}, RejectList()
    limit = max_bad_fraction * rows_of(files)
    try:
        for report in reports:
            if report.file in index:
                continue
            index[report.file] = _index_row(report)
            statistics += report.statistics
            rejected.add(report.rejects)
            if rejected.count > limit:
                break
    finally:
        if (close := getattr(reports, "close", None)) is not None:
            close()
    listed = storage.join(task.destination, REJECTS_NAME)
    rejected.write_for_people(listed, task.destination)
    if (complaint := rejected.complaint(rows_of(files), max_bad_fraction, listed)) is not None:
        raise StageFailure(
            f"{complaint}; raise data.max_bad_fraction to continue, or fix the images and delete {task.destination}",
            "data/bad-images",
        )
    if files and not statistics.images:
        raise StageFailure(
            f"no image of the pool could be used; all are listed in {listed}: fix them and delete {task.destination}",
            "data/bad-images",
        )
    write_index(task.destination, [index[file.name] for file in files])
    return statistics


def _index_row(report: FileReport) -> IndexRow:
    statistics, size = report.statistics, (report.max_height, report.max_width)
    return IndexRow(report.file, statistics.images, *size, report.labelled_ids, statistics.agreement)


def vanished_classes(statistics: Statistics, label_pixels: Sequence[int], classes: Sequence[str]) -> list[str]:
    """Labelled classes whose share of the pseudo-masks is under a hundredth of their share of the labels."""
    labels, predicted = max(1, sum(label_pixels)), max(1, statistics.pixels)
    return [
        name
        for name, labelled, found in zip(classes, label_pixels, statistics.class_pixels, strict=True)
        if found / predicted < VANISHED_SHARE * labelled / labels
    ]


def vanished_text(vanished: Sequence[str], label_pixels: Sequence[int], classes: Sequence[str]) -> str:
    """What vanished, with the likely cause and what to do."""
    total = max(1, sum(label_pixels))
    shares = [f"{name} ({label_pixels[classes.index(name)] / total:.1%} of the labelled pixels)" for name in vanished]
    return f"{', '.join(shares)} vanished from the pseudo-masks: {VANISHED_WHY}"


def check_collapse(on_collapse: str, complaint: str, warn: Callable[[str], None]) -> None:
    """Warn of a complaint, or stop (StageFailure) when the user asked for that."""
    if on_collapse == "stop":
        raise StageFailure(
            f"{complaint}; pseudo_mask.on_collapse=stop ends the run here, warn would continue", "stage/collapsed"
        )
    if on_collapse == "warn":
        warn(complaint)
