"""`threestage labels export`: predictions or pseudo-masks as a start for a labelling tool, image by image."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import yaml

from threestage import IGNORE_INDEX
from threestage.data import storage
from threestage.data.classes import Colour
from threestage.data.outputs import EXPORT, EXPORT_MARK, claim
from threestage.data.publish import id_hash
from threestage.errors import InputError
from threestage.labels.coco import write_coco
from threestage.labels.cvat import write_cvat
from threestage.labels.label_studio import write_label_studio
from threestage.labels.labelme import write_labelme
from threestage.labels.mask_files import write_masks
from threestage.labels.outlines import polygons_of
from threestage.labels.output_files import ExportedImage, ExportedRegion, Write
from threestage.labels.predicted_masks import PredictedMask, PredictedMasks, predicted_masks
from threestage.labels.rasterise import fill_ring
from threestage.prediction.champion import Champion, PoolPredictions, PredictPool, champion_predictions
from threestage.prediction.input_parts import safe_name
from threestage.prediction.pool_prediction import predict_pool_here
from threestage.settings import Settings

WRITERS: dict[str, Write] = {
    "coco": write_coco,
    "cvat": write_cvat,
    "label-studio": write_label_studio,
    "labelme": write_labelme,
    "masks": write_masks,
}

Bytes = np.ndarray
Progress = Callable[[str, int], None]
"""What is done with images, and how many."""


class ExportSettings(Settings):
    """`to`: the format. `images`: a text file of image ids, one a line. `below`: pixels less certain than this are left out.
    `simplify`: outlines as polygons, moved by so many pixels at most; None: the masks themselves, exactly."""

    to: str
    images: str | None = None
    below: float | None = None
    simplify: float | None = None


class ExportReport(Settings):
    """`not_found`: listed images without a mask, at most 20. `iou`: of the polygons with the masks, over all pixels of all
    classes; None where the masks were written themselves."""

    images: int
    masks: str
    not_found: tuple[str, ...] = ()
    iou: float | None = None


def export_labels(
    place: str,
    out: str,
    settings: ExportSettings,
    progress: Progress = lambda what, done: None,
    predict: PredictPool = predict_pool_here,
) -> ExportReport:
    """Write the masks of a run or a prediction into the folder `out`; `predict` makes those that the run does not have.

    Raises InputError where there are none, where `out` holds something else, for settings that do not fit, and as `predict`.
    """
    _check_settings(settings)
    asked_for = None if settings.images is None else frozenset(_listed(settings.images))

    def make(champion: Champion) -> PoolPredictions:
        return champion_predictions(champion, out, asked_for, predict, lambda done, _: progress("predicted", done))

    return export_masks(predicted_masks(place, make), out, settings, progress)


def export_masks(
    found: PredictedMasks, out: str, settings: ExportSettings, progress: Progress = lambda what, done: None
) -> ExportReport:
    """Write masks into the folder `out`. Raises InputError as `export_labels`."""
    _check_settings(settings)
    wanted = None if settings.images is None else _listed(settings.images)
    claim(out, EXPORT)
    mark = {"exported_from": found.place, **settings.model_dump(mode="json")}
    _refuse_other_exports(out, mark)
    storage.write_json(storage.join(out, EXPORT_MARK), mark)
    _write_class_map(out, found.classes)
    done, overlap, stems = 0, _Overlap(), _Stems()
    with WRITERS[settings.to](out, found.classes) as add:
        for mask in _chosen(found, wanted):
            class_ids = _certain(mask, settings.below)
            image = ExportedImage(mask.name, stems.of(mask), class_ids, _regions(class_ids, settings.simplify))
            overlap.add(image)
            add(image)
            done += 1
            progress("exported", done)
    storage.write_json(storage.join(out, EXPORT_MARK), mark | {"finished": True})
    missing = sorted(wanted or ())[:20]
    return ExportReport(images=done, masks=found.place, not_found=tuple(missing), iou=overlap.iou)


def _check_settings(settings: ExportSettings) -> None:
    check_format(settings.to)
    if settings.simplify is not None and settings.to == "masks":
        raise InputError("--simplify: masks have no outlines; leave it out, or give another --to", "labels/format")


def check_format(to: str, option: str = "--to") -> None:
    """InputError where there is no such format."""
    if to not in WRITERS:
        raise InputError(f"{option} {to}: unknown format; give one of {', '.join(WRITERS)}", "labels/format")


def _refuse_other_exports(out: str, mark: dict[str, Any]) -> None:
    """InputError where an export is finished, whose files may be corrected by now, or where another was begun."""
    before = storage.join(out, EXPORT_MARK)
    if storage.exists(before) and storage.read_json(before) != mark:
        raise InputError(
            f"{out}: holds an export already, whose files may be corrected by now; give another folder", "labels/exists"
        )


def _write_class_map(out: str, classes: Sequence[tuple[str, Colour]]) -> None:
    entries = [{"name": name, "colour": list(colour), "ids": [n]} for n, (name, colour) in enumerate(classes)]
    content = {"classes": entries, "ignore": {"ids": [IGNORE_INDEX]}}
    text = yaml.safe_dump(content, default_flow_style=None, allow_unicode=True, sort_keys=False)
    storage.write_bytes(storage.join(out, "classes.yaml"), text.encode())


def _listed(uri: str) -> set[str]:
    """The image ids of a list: what stands before the first comma or tab of a line."""
    lines = storage.read_lines(uri)
    return {line.split("\t")[0].split(",")[0].strip() for line in lines}


def _chosen(found: PredictedMasks, wanted: set[str] | None) -> Iterator[PredictedMask]:
    """Those whose id, or name, is listed, which is taken off the list."""
    for mask in found.masks:
        names = {mask.image_id, mask.name}
        if wanted is None or wanted & names:
            yield mask
            if wanted is not None:
                wanted -= names


def _certain(mask: PredictedMask, below: float | None) -> Bytes:
    if below is None:
        return mask.class_ids
    if mask.confidence is None:
        raise InputError(
            "--below: these predictions have no confidences; predict with --confidence, or leave it out",
            "labels/no-confidence",
        )
    return np.where(mask.confidence < below * 255, np.uint8(IGNORE_INDEX), mask.class_ids)


def _regions(class_ids: Bytes, simplify: float | None) -> list[ExportedRegion]:
    regions = []
    for class_id in np.flatnonzero(np.bincount(class_ids.ravel(), minlength=256)[:IGNORE_INDEX]).tolist():
        inside = class_ids == class_id
        polygons = None if simplify is None else polygons_of(inside, simplify)
        regions.append(ExportedRegion(class_id, inside, polygons))
    return regions


class _Overlap:
    """Intersection and union of masks with the polygons that stand for them."""

    def __init__(self) -> None:
        self._both = self._either = 0

    def add(self, image: ExportedImage) -> None:
        for region in image.regions:
            if region.polygons is None:
                return
            drawn = np.zeros(region.inside.shape, bool)
            for ring in region.polygons:
                patch = fill_ring(ring, region.inside.shape)
                rows, columns = patch.inside.shape
                drawn[patch.top : patch.top + rows, patch.left : patch.left + columns] |= patch.inside
            self._both += int((drawn & region.inside).sum())
            self._either += int((drawn | region.inside).sum())

    @property
    def iou(self) -> float | None:
        return self._both / self._either if self._either else None


class _Stems:
    """Names of images' own files, each once: 8 bytes for each image."""

    def __init__(self) -> None:
        self._taken: set[int] = set()

    def of(self, mask: PredictedMask) -> str:
        name = safe_name(mask.name)
        stem = name.removesuffix(PurePosixPath(name).suffix) or name
        for candidate in (stem, name, f"{name}-{len(self._taken)}"):
            if id_hash(candidate) not in self._taken:
                break
        self._taken.add(id_hash(candidate))
        return candidate
