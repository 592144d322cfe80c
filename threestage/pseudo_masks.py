"""From a stage's network to pseudo-masks: class, confidence and statistics for every image of the pool.

A pseudo-mask file belongs to one image file of the data set: same name, same row order, columns PSEUDO_MASK_SCHEMA.
Rows that are not in the pool (validation images, undecodable ones) are null. Confidences are stored, so a threshold
is applied when they are read and a new one costs no new prediction.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Self

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor, nn

from threestage.data import storage
from threestage.data.batches import Decoded, Sample, decode_sample, samples_of
from threestage.data.records import DataFile, encode_mask
from threestage.errors import StageFailure
from threestage.settings import Settings
from threestage.training.metrics import confusion_matrix, mean_iou

PSEUDO_MASK_SCHEMA = pa.schema([("image_id", pa.string()), ("pseudo_mask", pa.binary()), ("confidence", pa.binary())])
CONFIDENCE_SHARES = (0.5, 0.7, 0.9, 0.95)
STATISTICS_KEY = b"threestage.statistics"
MODEL_DIGEST_KEY = b"threestage.model_digest"
VANISHED_SHARE = 0.01


class PseudoMaskSettings(Settings):
    weight: float = Field(0.25, ge=0, description="w_pm")
    confidence_threshold: float = Field(
        0.0, ge=0, le=1, description="pixels below it become 255 in L_pm; 0 is faithful"
    )
    guard: Literal["ignore", "warn", "stop"] = Field(
        "warn",
        description="what to do when a labelled class vanishes from the pseudo-masks or a stage scores below the last",
    )
    batch_size: int = Field(8, ge=1, description="images per forward pass of prediction and evaluation")


class Statistics(Settings):
    """Counts over the pixels of the pool; they add up, so files and workers can be merged in any order."""

    images: int = 0
    unreadable: int = 0
    pixels: int = 0
    confidence_sum: float = 0.0
    entropy_sum: float = 0.0  # nats
    above: tuple[int, ...] = (0,) * len(CONFIDENCE_SHARES)
    class_pixels: tuple[int, ...] = ()
    confusion: tuple[tuple[int, ...], ...] = ()  # on images whose mask is known but was not used for training

    def __add__(self, other: Self) -> "Statistics":
        merged = {}
        for name in type(self).model_fields:
            mine, theirs = np.asarray(getattr(self, name)), np.asarray(getattr(other, name))
            merged[name] = (mine + theirs if mine.shape == theirs.shape else max(mine, theirs, key=np.size)).tolist()
        return Statistics(**merged)

    def summary(self) -> dict[str, float]:
        """The figures of method.md, "What to measure beside mIoU"; pseudo_mask_mean_iou only where masks are known."""
        pixels = max(1, self.pixels)
        result = {"mean_confidence": self.confidence_sum / pixels, "mean_entropy": self.entropy_sum / pixels}
        result |= {f"share_above_{t}": n / pixels for t, n in zip(CONFIDENCE_SHARES, self.above, strict=True)}
        if np.sum(self.confusion) > 0:
            result["pseudo_mask_mean_iou"] = mean_iou(torch.tensor(self.confusion))
        return result


@torch.inference_mode()
def predict(network: nn.Module, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whole images, single scale: (N,3,H,W) uint8 → class (N,H,W) uint8, confidence (N,H,W) float in [0,1],
    entropy (N,H,W) in nats."""
    logits, _ = network(image.float() / 255)
    log_probabilities = logits.float().log_softmax(dim=1)
    confidence, class_ids = log_probabilities.max(dim=1)
    entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=1)
    return class_ids.to(torch.uint8), confidence.exp(), entropy


def predict_images(
    network: nn.Module, images: Sequence[np.ndarray], batch_size: int, device: torch.device
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Predict images (H,W,3) uint8 of any sizes, batching those of one size; yields (index, class, confidence, entropy)
    on the CPU, grouped by size."""
    by_size: dict[tuple[int, ...], list[int]] = {}
    for index, image in enumerate(images):
        by_size.setdefault(image.shape, []).append(index)
    for members in by_size.values():
        for start in range(0, len(members), batch_size):
            chosen = members[start : start + batch_size]
            batch = torch.from_numpy(np.stack([images[i] for i in chosen])).to(device).permute(0, 3, 1, 2)
            predicted = [tensor.cpu() for tensor in predict(network, batch)]
            yield from zip(chosen, *predicted, strict=True)


def quantise(confidence: Tensor) -> Tensor:
    """Probabilities to uint8, 255 = 1."""
    return (confidence * 255).round().to(torch.uint8)


class PoolTask(Settings):
    """What is needed to predict any file of the pool, on any machine, as plain JSON."""

    root: str
    destination: str
    model_digest: str
    num_classes: int
    downscale: int
    batch_size: int
    used_ids: frozenset[str]  # labelled images: their masks were trained on, so they are left out of the mIoU
    excluded_ids: frozenset[str]  # validation images: not in the pool


def pseudo_mask_uri(folder: str, file: DataFile) -> str:
    """Where the pseudo-masks of an image file lie."""
    return storage.join(folder, file.path.rsplit("/", 1)[-1])


def predict_file(network: nn.Module, task: PoolTask, file: DataFile, device: torch.device) -> Statistics:
    """Predict every pool image of one file and publish its pseudo-mask file atomically; a file that this model has
    already predicted is kept."""
    target = pseudo_mask_uri(task.destination, file)
    if (done := stored_statistics(target, task.model_digest)) is not None:
        return done
    table = storage.read_table(storage.join(task.root, file.path), ["image_id", "image", "mask"])
    samples = samples_of(table.to_pydict())
    rows: list[tuple[bytes | None, bytes | None]] = [(None, None)] * len(samples)
    statistics = Statistics()
    for chunk in _chunks(samples, 64):
        members, decoded, unreadable = _decode_pool(chunk, task)
        statistics += Statistics(unreadable=unreadable)
        for i, class_ids, confidence, entropy in predict_images(
            network, [d.image for d in decoded], task.batch_size, device
        ):
            index = members[i]
            rows[index] = (encode_mask(class_ids.numpy()), quantise(confidence).numpy().tobytes())
            known = decoded[i].maps.get("mask") if samples[index].image_id not in task.used_ids else None
            statistics += measure(class_ids, confidence, entropy, known, task.num_classes)
    metadata = {STATISTICS_KEY: statistics.model_dump_json(), MODEL_DIGEST_KEY: task.model_digest}
    columns = [table.column("image_id"), *(pa.array(column, pa.binary()) for column in zip(*rows, strict=True))]
    storage.write_table(target, pa.table(columns, PSEUDO_MASK_SCHEMA.with_metadata(metadata)))
    return statistics


def _chunks(samples: Sequence[Sample], size: int) -> Iterator[list[tuple[int, Sample]]]:
    numbered = list(enumerate(samples))
    return (numbered[start : start + size] for start in range(0, len(numbered), size))


def _decode_pool(chunk: Sequence[tuple[int, Sample]], task: PoolTask) -> tuple[list[int], list[Decoded], int]:
    """Row numbers and pixels of the pool's images in the chunk, and how many could not be decoded."""
    members, decoded, unreadable = [], [], 0
    for index, sample in chunk:
        if sample.image_id in task.excluded_ids:
            continue
        try:
            decoded.append(decode_sample(sample, task.downscale))
            members.append(index)
        except (OSError, ValueError):
            unreadable += 1
    return members, decoded, unreadable


def measure(
    class_ids: Tensor, confidence: Tensor, entropy: Tensor, mask: np.ndarray | None, num_classes: int
) -> Statistics:
    """Statistics of one predicted image (H,W); `mask` is its true mask where that is known and was not trained on."""
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    if mask is not None:
        confusion = confusion_matrix(torch.from_numpy(mask), class_ids, num_classes)
    return Statistics(
        images=1,
        pixels=class_ids.numel(),
        confidence_sum=float(confidence.double().sum()),
        entropy_sum=float(entropy.double().sum()),
        above=tuple(int((confidence > share).sum()) for share in CONFIDENCE_SHARES),
        class_pixels=tuple(torch.bincount(class_ids.flatten().long(), minlength=num_classes).tolist()),
        confusion=tuple(map(tuple, confusion.tolist())),
    )


def stored_statistics(uri: str, model_digest: str | None = None) -> Statistics | None:
    """The statistics of a finished pseudo-mask file; None if there is none, or none of the model asked for."""
    metadata = storage.read_metadata(uri) or {}
    if STATISTICS_KEY not in metadata:
        return None
    if model_digest is not None and metadata.get(MODEL_DIGEST_KEY) != model_digest.encode():
        return None
    return Statistics.model_validate_json(metadata[STATISTICS_KEY])


def set_digest(task: PoolTask, files: Sequence[DataFile]) -> str:
    """Digest of a set of pseudo-masks: which model predicted which images."""
    parts = [task.model_digest, str(task.downscale), *sorted(task.excluded_ids), *(file.digest for file in files)]
    return hashlib.sha256("/".join(parts).encode()).hexdigest()


def vanished_classes(statistics: Statistics, label_pixels: Sequence[int], classes: Sequence[str]) -> list[str]:
    """Labelled classes whose share of the pseudo-masks is under a hundredth of their share of the labels."""
    labels, predicted = max(1, sum(label_pixels)), max(1, statistics.pixels)
    return [
        name
        for name, labelled, found in zip(classes, label_pixels, statistics.class_pixels, strict=True)
        if found / predicted < VANISHED_SHARE * labelled / labels
    ]


def check_guard(guard: str, complaint: str, warn: Callable[[str], None]) -> None:
    """Warn of a complaint, or stop (StageFailure) when the user asked for that."""
    if guard == "stop":
        raise StageFailure(f"{complaint}; pseudo_mask.guard=stop ends the run here, warn would go on")
    if guard == "warn":
        warn(complaint)
