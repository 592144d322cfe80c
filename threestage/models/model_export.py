"""A trained model as one file for other programs: ONNX, ONNX in eight-bit integers, or a torch.export program."""

import tempfile
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np

from threestage.data import storage
from threestage.data.bands import Bands
from threestage.data.pool import data_set_files, read_pool_rows
from threestage.data.records import load_manifest
from threestage.data.samples import Sample, decode_sample
from threestage.errors import InputError
from threestage.evaluation import evaluate_model
from threestage.models.export import CARD, PROGRAM, ModelCard
from threestage.models.onnx_model import (
    ONNX,
    OPSET,
    OnnxNetwork,
    quantised,
    refuse_missing_packages,
    shortest_side,
    with_class_ids,
)
from threestage.models.program import least_side, write_program
from threestage.prediction.predict import ModelFiles
from threestage.settings import Settings

CALIBRATION_FILES, CALIBRATION_IMAGES = 8, 64
"""Of the data set: so many Parquet files at most, and images from all of them together."""


class ModelExportSettings(Settings):
    """`class_ids`: the class of each pixel in place of logits (ONNX). `data`: a data set; onnx-int8 takes the ranges of the
    activations from its pool, and is scored on its validation images."""

    to: Literal["onnx", "onnx-int8", "program"] = "onnx"
    class_ids: bool = False
    data: str | None = None


class Int8Scores(Settings):
    """Of the float model and of the eight-bit one, in onnxruntime on this machine's CPU, on the same images."""

    split: str
    images: int
    mean_iou: float
    mean_iou_int8: float
    seconds_per_megapixel: float
    seconds_per_megapixel_int8: float

    @property
    def lost(self) -> float:
        """Mean IoU, in [0,1], that eight bits cost."""
        return self.mean_iou - self.mean_iou_int8


class ModelExportReport(Settings):
    """`downscale`: how many times images are reduced before the model sees them; `least_side`: the shortest side it takes;
    `bands`: None for 8-bit RGB."""

    file: str
    to: str
    bytes: int
    opset: int | None
    downscale: int
    least_side: int
    int8: Int8Scores | None = None
    bands: Bands | None = None

    def lines(self) -> list[str]:
        """In words, for the terminal."""
        opset = "" if self.opset is None else f", opset {self.opset}"
        takes = "RGB in [0,1] (N,3,H,W)" if self.bands is None else f"bands in [0,1] (N,{self.bands.channels},H,W)"
        lines = [
            f"{self.file}: {self.to}{opset}, {self.bytes / 2**20:.1f} MiB; takes {takes}, sides from {self.least_side} pixels"
        ]
        if self.bands is not None:
            lines.append(f"what is 0 and 1 of each band: {self.bands.model_dump_json(include={'used', 'low', 'high'})}")
        if self.downscale > 1:
            lines.append(
                f"reduce images {self.downscale} times first, by the mean of each block: the model was trained so"
            )
        if (found := self.int8) is not None:
            faster = found.seconds_per_megapixel / found.seconds_per_megapixel_int8
            lines.append(
                f"mean IoU on {found.images} images of {found.split}: {found.mean_iou_int8:.4f}, as floats {found.mean_iou:.4f}; "
                f"{found.seconds_per_megapixel_int8:.2f} s a megapixel here, {faster:.1f} times as fast"
            )
        return lines


def export_model(
    files: ModelFiles,
    out: str,
    settings: ModelExportSettings,
    show: Callable[[int, int], None] = lambda done, total: None,
) -> ModelExportReport:
    """Write a model, as `read_model` returns it, to the file `out`. `show` gets images scored, and images in all.

    Raises InputError where the network cannot be exported or the written form does not give the network's logits.
    """
    _refuse(out, settings)
    card = ModelCard.model_validate_json(files[CARD])
    name, scores = PROGRAM if settings.to == "program" else ONNX, None
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for file, content in files.items():
            (folder / file).write_bytes(content)
        if reason := write_program(folder, name=name):
            raise InputError(
                f"network.encoder={card.network.encoder}: cannot be exported to {settings.to} ({reason}); `threestage check` "
                "tells before training",
                "models/not-exportable",
            )
        content = (folder / name).read_bytes()
        least = least_side(folder / PROGRAM) if name == PROGRAM else shortest_side(content)
    if settings.to == "onnx-int8" and settings.data is not None:
        images = calibration_images(settings.data, card.downscale, least, card.bands)
        whole, content = content, quantised(content, _some(images, settings.data))
        scores = _scores(whole, content, card, settings.data, show)
    storage.write_bytes(out, with_class_ids(content) if settings.class_ids else content)
    return ModelExportReport(
        file=out,
        to=settings.to,
        bytes=len(content),
        opset=None if name == PROGRAM else OPSET,
        downscale=card.downscale,
        least_side=least,
        int8=scores,
        bands=card.bands,
    )


def _refuse(out: str, settings: ModelExportSettings) -> None:
    if settings.to == "program" and settings.class_ids:
        raise InputError("--class-ids: not with --to program, which gives logits; leave it out", "config/usage")
    if (settings.to == "onnx-int8") != (settings.data is not None):
        raise InputError(
            f"--to {settings.to}: --data DATA_SET goes with onnx-int8, which takes its ranges from it; "
            f"{'give it' if settings.data is None else 'leave it out'}",
            "config/usage",
        )
    if storage.exists(out):
        raise InputError(f"{out}: exists already and would be overwritten; give another file", "models/file-exists")
    if settings.to != "program":
        refuse_missing_packages()


def calibration_images(
    dataset: str, downscale: int, least_side: int, bands: Bands | None = None
) -> Iterator[np.ndarray]:
    """Images of the pool, uint8 (H,W,C) as the network sees them, from files and rows that lie evenly apart."""
    files = _evenly(data_set_files(dataset, load_manifest(dataset)), CALIBRATION_FILES)
    for file in files:
        rows = [row for chunk in read_pool_rows(file, masks=False) for row in chunk if row.problem is None]
        for row in _evenly(rows, CALIBRATION_IMAGES // len(files)):
            image = decode_sample(Sample(row.image_id, row.image), downscale, bands=bands).image
            if min(image.shape[:2]) >= least_side:
                yield image


def _some(images: Iterator[np.ndarray], dataset: str) -> Iterator[np.ndarray]:
    """The images. InputError where there is none."""
    first = next(images, None)
    if first is None:
        raise InputError(
            f"{dataset}: its pool has no image that the model can take; give another data set", "models/no-calibration"
        )
    return chain([first], images)


def _evenly(values: list[Any], most: int) -> list[Any]:
    return values[:: -(-len(values) // most) or 1]


def _scores(whole: bytes, small: bytes, card: ModelCard, dataset: str, show: Callable[[int, int], None]) -> Int8Scores:
    split: Literal["val", "train"] = "val" if load_manifest(dataset).counts["val"].labelled else "train"
    forms = [OnnxNetwork(content) for content in (whole, small)]
    found = [evaluate_model(form, card, dataset, split, show=show) for form in forms]
    times = [form.seconds / form.pixels * 1e6 for form in forms]
    return Int8Scores(
        split=split,
        images=found[0]["images"],
        mean_iou=found[0]["mean_iou"],
        mean_iou_int8=found[1]["mean_iou"],
        seconds_per_megapixel=times[0],
        seconds_per_megapixel_int8=times[1],
    )
