"""The masks that `threestage predict` or a run has made, one after another: memory is that of some rows of a file."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from threestage.data import storage
from threestage.data.classes import Colour
from threestage.data.outputs import PREDICTIONS, RUN, is_marked
from threestage.data.pool import PoolFile, listed_pool, pseudo_mask_uri
from threestage.data.records import decode_mask, load_manifest, open_image, upright_size
from threestage.errors import InputError
from threestage.models.export import ModelCard
from threestage.prediction.champion import Champion, PoolPredictions, champion_of, named
from threestage.prediction.predict import CLASSES_NAME, PARTS_FOLDER, RECORD_NAME, enlarged

Bytes = npt.NDArray[np.uint8]
Make = Callable[[Champion], PoolPredictions]
"""The champion's predictions, found or made: `champion_predictions` with the place where it may write."""


class PredictedMask(NamedTuple):
    """`name`: the image's path with its suffix, where that is known. `class_ids`: (H,W) at the image's size; `confidence`:
    the same in 255ths, None where it was not written."""

    image_id: str
    name: str
    class_ids: Bytes
    confidence: Bytes | None


@dataclass(frozen=True)
class PredictedMasks:
    """`place`: what they are of. `classes`: names and colours, in the order of the ids."""

    place: str
    classes: Sequence[tuple[str, Colour]]
    masks: Iterator[PredictedMask]


def predicted_masks(place: str, make: Make) -> PredictedMasks:
    """Those of a prediction's folder, or of the champion of a run, which `make` predicts where the run has not stored them.

    Raises InputError where there are none.
    """
    place = storage.absolute(place)
    if is_marked(place, PREDICTIONS):
        return _of_prediction(place)
    if is_marked(place, RUN):
        champion = champion_of(place)
        what = champion.stored_masks or champion.model
        return PredictedMasks(what, _classes(champion.card), _of_champion(champion, make))
    raise InputError(
        f"{place}: neither a run nor predictions; give the folder of one (predictions: the OUTPUT of threestage predict)",
        "labels/no-masks",
    )


# ---- A run


def _of_champion(champion: Champion, make: Make) -> Iterator[PredictedMask]:
    predictions = make(champion)
    for file in predictions.files:
        yield from masks_of_file(predictions.folder, file, champion.card)


def _classes(card: ModelCard) -> list[tuple[str, Colour]]:
    return list(zip(card.classes, card.colours, strict=True))


def masks_of_file(folder: str, file: PoolFile, card: ModelCard) -> Iterator[PredictedMask]:
    """The rows of a pool file that have a pseudo-mask and are not left out."""
    images = ["image_id", "image_uri"] if file.by_reference else ["image_id", "source", "height", "width"]
    replaced = frozenset(file.replaced)
    both = _beside(pseudo_mask_uri(folder, file), storage.read_table(file.uri, images))
    for number, (row, image) in enumerate(both):
        if row["pseudo_mask"] is None or number in replaced:
            continue
        small = decode_mask(row["pseudo_mask"])
        sure = np.frombuffer(row["confidence"], np.uint8).reshape(small.shape)
        if card.downscale > 1:
            size = _size_of(image["image_uri"]) if file.by_reference else (image["height"], image["width"])
            small, sure = enlarged(small, card.downscale, size), enlarged(sure, card.downscale, size)
        yield PredictedMask(image["image_id"], _name(image), small, sure)


def _size_of(uri: str) -> tuple[int, int]:
    with open_image(storage.read_bytes(uri)) as image:
        return upright_size(image)


# ---- A prediction


def _of_prediction(out: str) -> PredictedMasks:
    record, uri = storage.read_json(storage.join(out, RECORD_NAME), dict[str, Any]), storage.join(out, CLASSES_NAME)
    if record.get("format") == "geotiff" or record.get("input_format") == "scenes":
        raise InputError(
            f"{out}: holds masks of whole scenes; predict the data set of their tiles (threestage ingest --format scenes)",
            "labels/scenes",
        )
    source = storage.shaped(record.get("input"), str, f"{out}: input")
    if not storage.exists(uri):
        raise InputError(
            f"{uri}: is missing, an older threestage made these predictions; predict into another folder",
            "labels/no-classes",
        )
    classes = storage.read_json(uri, list[tuple[str, Colour]])
    return PredictedMasks(out, classes, _predictions(out, source))


def _predictions(out: str, source: str) -> Iterator[PredictedMask]:
    files = _input_files(out, source)
    for uri in storage.list_files(storage.join(out, PARTS_FOLDER)):
        file = files.get(uri.rsplit("/", 1)[-1].removesuffix(".parquet"))
        columns = ["image_uri"] if file is not None and file.by_reference else ["source"]
        images = None if file is None else storage.read_table(file.uri, columns)
        for number, (row, image) in enumerate(_beside(uri, images)):
            if file is not None and number in file.replaced:
                continue
            name = _name({"image_id": row["image_id"], **image}, source if "image_uri" in image else None)
            if row.get("mask") is not None:
                mask = decode_mask(row["mask"])
                sure = row["confidence"]
                confidence = None if sure is None else np.frombuffer(sure, np.uint8).reshape(mask.shape)
                yield PredictedMask(row["image_id"], name, mask, confidence)
            elif row.get("file") is not None:
                yield PredictedMask(row["image_id"], name, *_read_pngs(out, row["file"]))


def _input_files(out: str, source: str) -> dict[str, PoolFile]:
    """The files of the input by the names of their parts; none of Parquet files of others."""
    listing = storage.join(out, "listing")
    if storage.exists(listing):
        files = listed_pool(listing)
    elif storage.exists(storage.join(source, "manifest.json")):
        found = [file for file in load_manifest(source).files if file.kind == "images"]
        files = [PoolFile(uri=storage.join(source, f.path), rows=f.rows, digest=f.digest) for f in found]
    else:
        files = []
    return {file.digest[:16]: file for file in files}


def _read_pngs(out: str, file: str) -> tuple[Bytes, Bytes | None]:
    mask = storage.read_bytes(storage.join(out, file))
    with open_image(mask) as image:
        class_ids = np.array(image)  # indices of its palette
    sure = storage.join(out, "confidence", file.removeprefix("masks/"))
    return class_ids, decode_mask(storage.read_bytes(sure)) if storage.exists(sure) else None


def _beside(uri: str, images: pa.Table | None) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The rows of a file of masks, each with the row of its image in the file of the same order."""
    start = 0
    for group in storage.read_groups(uri):
        rows = [{}] * len(group) if images is None else images.slice(start, len(group)).to_pylist()
        yield from zip(group.to_pylist(), rows, strict=True)
        start += len(group)


def _name(image: dict[str, Any], source: str | None = None) -> str:
    """The image's path below its source, else as `named`."""
    uri = str(image.get("image_uri") or image.get("source") or "")
    if source is not None and uri.startswith(f"{source.rstrip('/')}/"):
        return uri.removeprefix(f"{source.rstrip('/')}/")
    return named(image["image_id"], uri)
