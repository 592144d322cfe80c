"""What a run's stages say of its validation images: predicted here, in batches, each image decoded once per pass."""

import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from threestage import IGNORE_INDEX
from threestage.config import Config
from threestage.data import storage
from threestage.data.datasets import labelled_set, validation_set
from threestage.data.records import Manifest, load_manifest
from threestage.data.samples import Decoded
from threestage.data.split import Split, saved_split
from threestage.errors import InputError
from threestage.evaluation import BATCH, read_image_counts
from threestage.models.export import load_card, load_model
from threestage.models.network import Network
from threestage.prediction.pseudo_masks import predict_images, quantise
from threestage.report.mask_images import colourise, panel
from threestage.report.run_reader import Run
from threestage.run_folder.records import Results
from threestage.run_folder.reuse import resolve_part
from threestage.training.metrics import (
    RELIABILITY_BINS,
    confusion_matrix,
    expected_calibration_error,
    iou_of_counts,
    mean_iou,
    pixel_accuracy,
    reliability_counts,
)
from threestage.training.worker import default_device

CPU_PIXELS = 8_000_000
ExampleGroup = Literal["worst", "middle", "best"]
OnImages = Callable[[int, int], None]  # (images done, of so many)


class Chosen(NamedTuple):
    place: int  # in the validation set
    group: ExampleGroup


@dataclass
class StageMeasure:
    """A stage's sums over the measured validation images, ignored pixels left out, and the mean IoU of each image."""

    confusion: Tensor  # (C,C) int64
    counts: Tensor = field(default_factory=lambda: torch.zeros(RELIABILITY_BINS, 3, dtype=torch.float64))
    entropy_sum: float = 0.0  # nats
    image_iou: dict[int, float] = field(default_factory=dict)

    def add(self, index: int, mask: Tensor, class_ids: Tensor, confidence: Tensor, entropy: Tensor) -> None:
        """One image, all (H,W)."""
        valid = mask != IGNORE_INDEX
        confusion = confusion_matrix(mask, class_ids, len(self.confusion))
        self.confusion += confusion
        self.counts += reliability_counts(confidence[valid], (class_ids == mask)[valid])
        self.entropy_sum += float(entropy[valid].double().sum())
        self.image_iou[index] = mean_iou(confusion)

    @property
    def pixels(self) -> float:
        return float(self.counts[:, 0].sum())

    @property
    def mean_confidence(self) -> float:
        return float(self.counts[:, 1].sum()) / self.pixels

    @property
    def mean_entropy(self) -> float:
        return self.entropy_sum / self.pixels

    @property
    def accuracy(self) -> float:
        return pixel_accuracy(self.confusion)

    @property
    def calibration_error(self) -> float:
        return expected_calibration_error(self.counts)


@dataclass(frozen=True)
class Example:
    """A chosen image at full size; per stage its class ids (H,W) uint8, confidence (H,W) uint8 (255 = 1) and mean IoU."""

    image_id: str
    group: ExampleGroup
    image: np.ndarray
    mask: np.ndarray
    class_ids: tuple[np.ndarray, ...]
    confidence: tuple[np.ndarray, ...]
    scores: tuple[float, ...]


class Validation:
    """The finished stages' models and the images that the run validated on."""

    def __init__(self, run: Run, root: str) -> None:
        """Raises InputError where the data set is not there, is another one, or holds none of the images any more."""
        card = load_card(run.stages[0].model)
        self.manifest = _manifest(root, card.classes)
        self.downscale = card.downscale
        self.samples = validation_set(root, self.manifest, run.split, card.downscale, card.bands)
        if len(self.samples) == 0:
            raise InputError(
                f"{root}: holds none of the images that the run validated on; give another data set with --data",
                "run/other-data-set",
            )
        self.changed = run.stages[-1].validation_digest not in (None, self.samples.digest())
        self._labelled = labelled_set(root, self.manifest, run.split, card.downscale, None, card.bands)
        self._device = default_device()
        self._networks = [load_model(stage.model)[0].to(self._device) for stage in run.stages]

    def label_pixels(self) -> list[int]:
        """Pixels of each class in the labels that the run may see."""
        counts = np.zeros(IGNORE_INDEX + 1, np.int64)
        for index in range(len(self._labelled)):
            counts += np.bincount(self._labelled.decoded(index).maps["mask"].ravel(), minlength=len(counts))
        return [int(count) for count in counts[: len(self.manifest.classes)]]

    def affordable(self, least: int) -> int:
        """On how many images to measure unless told: all on a GPU, on a CPU CPU_PIXELS of them but at least `least`."""
        sizes = self.manifest.sizes
        pixels = sizes.mean_height * sizes.mean_width / self.downscale**2
        if self._device.type != "cpu" or pixels == 0:
            return len(self.samples)
        return max(least, int(CPU_PIXELS / pixels))

    def measure(self, count: int, show: OnImages) -> list[StageMeasure]:
        """Every stage on `count` images, evenly spread over the set; on all where there are no more."""
        indices = evenly(len(self.samples), count)
        classes = len(self.manifest.classes)
        found = [StageMeasure(torch.zeros(classes, classes, dtype=torch.int64)) for _ in self._networks]
        for start in range(0, len(indices), BATCH):
            batch = indices[start : start + BATCH]
            decoded = [self.samples.decoded(index) for index in batch]
            for measured, network in zip(found, self._networks, strict=True):
                for place, *predicted in self._predict(network, decoded):
                    measured.add(batch[place], torch.from_numpy(decoded[place].maps["mask"]), *predicted)
            show(start + len(batch), len(indices))
        return found

    def examples(self, chosen: Sequence[Chosen], measured: Sequence[StageMeasure]) -> Iterator[Example]:
        """The chosen images in their order, a batch in memory at a time."""
        for start in range(0, len(chosen), BATCH):
            batch = chosen[start : start + BATCH]
            decoded = [self.samples.decoded(index) for index, _ in batch]
            stages = [{i: (m, c) for i, m, c, _ in self._predict(n, decoded)} for n in self._networks]
            for place, (index, group) in enumerate(batch):
                yield Example(
                    image_id=self.samples.ids[index],
                    group=group,
                    image=decoded[place].image,
                    mask=decoded[place].maps["mask"],
                    class_ids=tuple(stage[place][0].numpy() for stage in stages),
                    confidence=tuple(quantise(stage[place][1]).numpy() for stage in stages),
                    scores=tuple(m.image_iou[index] for m in measured),
                )

    def _predict(self, network: Network, decoded: Sequence[Decoded]) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        return predict_images(network, [d.image for d in decoded], BATCH, self._device)


def _manifest(root: str, classes: tuple[str, ...]) -> Manifest:
    manifest = load_manifest(root)
    if manifest.classes != classes:
        raise InputError(
            f"{root}: has the classes {list(manifest.classes)}, the run's models know {list(classes)}; give the run's data set "
            "with --data",
            "run/other-data-set",
        )
    return manifest


def evenly(length: int, count: int) -> list[int]:
    """`count` of the indices 0..length-1, evenly spread; all of them when there are no more."""
    count = min(length, count)
    return [i * length // count for i in range(count)]


def choose(scores: dict[int, float], count: int) -> list[Chosen]:
    """`count` images by their scores, lowest first: a third the worst, a third the best, the others around the median.

    An image without a score (every pixel ignored) is not chosen; equal scores keep the order of the indices.
    """
    ranked = sorted((i for i, score in scores.items() if not math.isnan(score)), key=lambda i: (scores[i], i))
    count = min(count, len(ranked))
    worst, best = math.ceil(count / 3), count // 3
    middle = count - worst - best
    first = worst + (len(ranked) - count) // 2
    groups: list[tuple[ExampleGroup, list[int]]] = [
        ("worst", ranked[:worst]),
        ("middle", ranked[first : first + middle]),
        ("best", ranked[len(ranked) - best :]),
    ]
    return [Chosen(index, group) for group, members in groups for index in members]


# ---- pictures.png of a run

SCENES = 4


class Shown(NamedTuple):
    """A column of the picture: what the model of a stage sees. `mean_iou`: on all validation images."""

    title: str
    folder: str
    mean_iou: float


def write_pictures(config: Config, out: str) -> None:
    """`pictures.png`: four validation images, their truth, what stage 1 sees of them, and what the last stage sees."""
    results = storage.read_json(storage.join(out, "results.json"), Results)["stages"]
    split = saved_split(storage.join(out, "split.json"))[0]
    first, last, steps = config.stage_names[0], config.stage_names[-1], 0
    columns = []
    for stage in config.stage_names:
        steps += results[stage]["steps"]
        if stage in (first, last):
            from_labels = stage == first and config.stage1.unlabelled_batch == 0
            name = "labels only" if from_labels else f"threestage, stage {stage[-1]}"
            columns.append(Shown(f"{name}\n{steps:,} steps", resolve_part(out, stage), results[stage]["mean_iou"]))
    stream = io.BytesIO()
    comparison_picture(config.data.root, split, columns).save(stream, format="PNG")
    storage.write_bytes(storage.join(out, "pictures.png"), stream.getvalue())


def comparison_picture(data: str, split: Split, columns: Sequence[Shown]) -> Image.Image:
    """Four validation images and their truth beside what some models see of them, with names and scores."""
    card = load_card(storage.join(columns[0].folder, "model"))
    manifest = _manifest(data, card.classes)
    samples = validation_set(data, manifest, split, card.downscale, card.bands)
    image_ids = [sample.image_id for sample in samples.samples]
    chosen = _scenes(image_ids, columns[0].folder, columns[-1].folder)
    decoded = [samples.decoded(place) for place in chosen]
    images, masks = [one.image for one in decoded], [one.maps["mask"] for one in decoded]
    shown = [("image", images), ("truth", [colourise(mask, manifest.colours) for mask in masks])]
    captions = [[image_ids[place] for place in chosen], [""] * len(chosen)]
    device = default_device()
    for title, folder, score in columns:
        network = load_model(storage.join(folder, "model"))[0].to(device)
        found = {place: class_ids for place, class_ids, *_ in predict_images(network, images, BATCH, device)}
        predicted = [found[place] for place in range(len(images))]
        shown.append((f"{title}: {score:.3f}", [colourise(ids.numpy(), manifest.colours) for ids in predicted]))
        confusions = [
            confusion_matrix(torch.from_numpy(mask), ids, len(manifest.classes))
            for mask, ids in zip(masks, predicted, strict=True)
        ]
        captions.append([f"mean IoU {mean_iou(confusion):.3f}" for confusion in confusions])
    return panel(shown, manifest.classes, manifest.colours, captions)


def _scenes(image_ids: Sequence[str], first: str, last: str) -> list[int]:
    """Places of four images, chosen by the gain from the first stage's folder to the last's, where it is known."""
    gains = torch.zeros(len(image_ids))
    found, before = read_image_counts(last), read_image_counts(first)
    if found is not None and before is not None and found[0] == before[0] == image_ids:
        gains = (iou_of_counts(found[1]) - iou_of_counts(before[1])).nanmean(-1).nan_to_num()
    return median_of_quarters(gains)


def median_of_quarters(gains: Tensor) -> list[int]:
    """Of each quarter of the images (N,), in their order, the place of the one with the median gain: neither the best nor the
    worst is shown, and frames of one film are far from each other."""
    quarters = [part for part in torch.arange(len(gains)).tensor_split(SCENES) if len(part)]
    return [int(part[gains[part].argsort(stable=True)[len(part) // 2]]) for part in quarters]
