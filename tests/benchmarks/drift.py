"""Does a model know, without labels, which mean IoU it has? docs/research/drift-plan.md is the plan.

    python -m tests.benchmarks.drift --data DATASET --models FOLDER [FOLDER …] [--drive Seq05VD] [--record FILE]

Each model is calibrated on the data set's split val and forecasts val (each half by the calibration of the other), test, the
images of test whose names begin with --drive, and val under nine corruptions. --record adds a line of JSON for each model.
"""

import argparse
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter

from tests.benchmarks.measure import report
from threestage.calibration import REFERENCE_IMAGES, Calibrator
from threestage.data.batches import SampleSet, send
from threestage.data.records import decode_image, labelled_rows, load_manifest
from threestage.data.samples import Sample, TableSamples
from threestage.evaluation import BATCH, WorkerShare, decoded_batches
from threestage.models.export import ModelCard, load_model
from threestage.models.network import Network
from threestage.prediction.estimates import Calibration, Estimator
from threestage.prediction.tta import TTASettings, predict_with_tta
from threestage.training.metrics import class_counts, confusion_matrix, iou_of_counts
from threestage.training.worker import default_device

BINS = 1000
METHODS = ("forecast", "mean confidence", "ATC", "DoC")


def noise(pixels: np.ndarray, strength: int, random: np.random.Generator) -> np.ndarray:
    return np.clip(pixels + random.normal(0, (12, 25, 50)[strength], pixels.shape), 0, 255).astype(np.uint8)


def blur(pixels: np.ndarray, strength: int, random: np.random.Generator) -> np.ndarray:
    radius = (0.004, 0.008, 0.016)[strength] * min(pixels.shape[:2])
    return np.array(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))


def fog(pixels: np.ndarray, strength: int, random: np.random.Generator) -> np.ndarray:
    share = (0.25, 0.5, 0.75)[strength]
    return (pixels * (1 - share) + 200 * share).round().astype(np.uint8)


Corruption = Callable[[np.ndarray, int, np.random.Generator], np.ndarray]
CORRUPTIONS: Mapping[str, Corruption] = {"noise": noise, "blur": blur, "fog": fog}


class Answers(NamedTuple):
    """Of N images: `class_counts` (N,3,C), what the estimator measured (N,K), pixels of each of BINS of confidence (N,BINS)."""

    counts: np.ndarray
    measured: np.ndarray
    confidence: np.ndarray

    def of(self, chosen: Sequence[bool]) -> "Answers":
        return Answers(*(part[np.array(chosen)] for part in self))

    @property
    def mean_iou(self) -> float:
        return float(iou_of_counts(torch.from_numpy(self.counts.sum(0))).nanmean())

    @property
    def mean_confidence(self) -> float:
        return float((self.confidence.sum(0) * (np.arange(BINS) + 0.5) / BINS).sum() / self.confidence.sum())


@dataclass(frozen=True)
class Asked:
    """A model of a folder."""

    network: Network
    card: ModelCard
    device: torch.device

    @classmethod
    def at(cls, folder: str) -> "Asked":
        device = default_device()
        network, card = load_model(folder)
        return cls(network.to(device), card, device)

    def samples(self, samples: Sequence[Sample]) -> SampleSet:
        return SampleSet(samples, self.card.downscale)

    @torch.inference_mode()
    def answers(self, samples: Sequence[Sample], estimator: Estimator | None = None) -> Answers:
        found: dict[int, tuple[np.ndarray, ...]] = {}
        for places, images, decoded in decoded_batches(self.samples(samples), BATCH):
            masks = torch.from_numpy(np.stack([one.maps["mask"] for one in decoded])).to(self.device)
            ask, pixels = (
                (lambda batch: predict_with_tta(self.network, batch, TTASettings(), 1)),
                send(images, self.device),
            )
            if estimator is None:
                class_ids, confidence, _ = ask(pixels)
                measured = torch.zeros(len(places), 1)
            else:
                with estimator.measure(self.network) as measure:
                    class_ids, confidence, _ = ask(pixels)
                measured = measure(len(places), class_ids[0].numel())
            for row, place in enumerate(places):
                confusion = confusion_matrix(masks[row], class_ids[row], len(self.card.classes))
                histogram = torch.histc(confidence[row].float(), BINS, 0, 1)
                found[place] = tuple(part.cpu().numpy() for part in (class_counts(confusion), measured[row], histogram))
        return Answers(*(np.stack(part) for part in zip(*(found[place] for place in sorted(found)), strict=True)))

    def calibrated(self, validation: Sequence[Sample], training: Sequence[Sample]) -> "Forecaster":
        clean = self.answers(validation)
        calibrator = Calibrator(
            self.network, self.device, WorkerShare(), BATCH, torch.float32, self.card.inference
        )  # fmt: skip
        counts = torch.from_numpy(clean.counts)
        calibration = calibrator.calibrate(self.samples(validation), counts, self.samples(training))
        assert calibration is not None
        return Forecaster(self, calibration, clean)


@dataclass(frozen=True)
class Forecaster:
    """A model with what was measured of it on the labelled images `clean`."""

    asked: Asked
    calibration: Calibration
    clean: Answers

    def answers(self, samples: Sequence[Sample]) -> Answers:
        return self.asked.answers(samples, Estimator(self.calibration))

    def row(self, job: str, found: Answers) -> dict[str, Any]:
        """Truth and forecasts of a job."""
        estimate, known = Estimator(self.calibration).of(found.measured.sum(0)), self.clean.confidence.sum(0)
        above = known[::-1].cumsum()[::-1] / known.sum()
        threshold = int(np.abs(above - self.clean.mean_iou).argmin())
        asked = found.confidence.sum(0)
        values = (
            estimate.mean_iou,
            found.mean_confidence,
            float(asked[threshold:].sum() / asked.sum()),
            self.clean.mean_iou - self.clean.mean_confidence + found.mean_confidence,
        )
        figures = dict(zip(METHODS, values, strict=True))
        return {"job": job, "images": len(found.counts), "truth": found.mean_iou, **figures, "drift": estimate.drift}


def corrupted(samples: Sequence[Sample], kind: str, strength: int) -> list[Sample]:
    """Images of a seed of their own, whatever others there are."""
    change = CORRUPTIONS[kind]
    return [
        replace(sample, image=_png(change(decode_image(sample.image), strength, _random(sample)))) for sample in samples
    ]


def _random(sample: Sample) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(sample.image_id.encode()))


def _png(pixels: np.ndarray) -> bytes:
    import io

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def measure_model(folder: str, data: str, drive: str) -> dict[str, Any]:
    manifest = load_manifest(data)
    train, val, test = (list(TableSamples(labelled_rows(data, manifest, split))) for split in ("train", "val", "test"))
    train = train[:: -(-len(train) // REFERENCE_IMAGES)]
    asked = Asked.at(folder)
    rows = []
    for number, half, other in ((1, val[::2], val[1::2]), (2, val[1::2], val[::2])):
        forecaster = asked.calibrated(other, train)
        rows.append(forecaster.row(f"val, half {number}", forecaster.answers(half)))
    forecaster = asked.calibrated(val, train)
    found = forecaster.answers(test)
    rows.append(forecaster.row("test", found))
    unseen = [sample.image_id.rpartition("/")[2].startswith(drive) for sample in test]
    rows.append(forecaster.row("unseen drive", found.of(unseen)))
    for kind in CORRUPTIONS:
        for strength in range(3):
            found = forecaster.answers(corrupted(val, kind, strength))
            rows.append(forecaster.row(f"val, {kind} {strength + 1}", found))
    facts = forecaster.calibration.model_dump(mode="json", exclude={"reference", "format"})
    return {"model": folder, "date": str(date.today()), "calibration": facts, "rows": rows, **summary(rows)}


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each method: the largest error where nothing was corrupted, and the rank correlation where something was; of minus the
    drift too."""
    clean, under = [row for row in rows if not _is_corrupted(row)], [row for row in rows if _is_corrupted(row)]
    truth = [row["truth"] for row in under]
    errors = {name: max(abs(row[name] - row["truth"]) for row in clean) for name in METHODS}
    ranks = {name: rank_correlation([row[name] for row in under], truth) for name in METHODS}
    return {"error": errors, "rank": ranks | {"drift": rank_correlation([-row["drift"] for row in under], truth)}}


def _is_corrupted(row: Mapping[str, Any]) -> bool:
    return any(f"val, {kind}" in row["job"] for kind in CORRUPTIONS)


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's, of values that are all different."""
    first, second = (np.argsort(np.argsort(values)).astype(np.float64) for values in (one, other))
    return float(np.corrcoef(first, second)[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--drive", default="Seq05VD")
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    for folder in options.models:
        found = measure_model(folder, options.data, options.drive)
        report(folder, found["rows"], None)
        print(json.dumps({name: found[name] for name in ("error", "rank")}), flush=True)
        if options.record:
            with options.record.open("a") as file:
                file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
