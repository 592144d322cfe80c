"""A model over many images, from any input into one folder: what is done is kept, so the same command continues.

OUTPUT/prediction.json   the model and the settings that made it; others are refused
OUTPUT/listing/          the listing of an input of image files
OUTPUT/rejects.parquet   images that could not be used, and why; rejects.csv: the same

format png                                     format parquet
OUTPUT/masks/NAME.png       palette, class ids
OUTPUT/overlays/NAME.jpg    the image under the colours
OUTPUT/confidence/NAME.png  grey, 255 = 1
format geotiff, of scenes: masks/NAME.tif and confidence/NAME.tif, no overlays
OUTPUT/parts/PART.parquet   image_id, file     OUTPUT/parts/PART.parquet   image_id, mask, confidence
                                               both: mean_iou, drift (estimates.py), of a model that is calibrated

Masks and confidences have the size of the image as it was given. A part's Parquet file is written last: its footer holds
the part's report and a digest of all that decides what its predictions are, so a rerun knows what is done.
"""

import contextlib
import errno
import hashlib
import io
import os
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from threestage.allocator import disable_malloc_trim
from threestage.config import STAGES, StageName
from threestage.data import storage
from threestage.data.band_images import decode_pixels
from threestage.data.classes import Colour
from threestage.data.formats import passed_over
from threestage.data.headers import BadImage
from threestage.data.listing import Each, suffixes_passed_over
from threestage.data.outputs import PREDICTIONS, claim
from threestage.data.palette import palette_png
from threestage.data.parallel import map_ahead
from threestage.data.pool import PoolFile, PoolRow, rows_of
from threestage.data.raster import refuse_missing_rasterio
from threestage.data.records import DECODER_ERRORS, MAX_IMAGE_PIXELS, encode_mask
from threestage.data.rejects import Reject, RejectList
from threestage.errors import InputError, StageFailure
from threestage.evaluation import BATCH
from threestage.mlflow_sync.client import open_models
from threestage.mlflow_sync.records import RegistrySettings
from threestage.models.export import CARD, RESTORE, WEIGHTS, ModelCard, model_of, parse_card, parse_weights
from threestage.models.network import Network, size_multiple
from threestage.prediction.estimates import CALIBRATION, Calibration, Estimate, Estimator, JobEstimate
from threestage.prediction.input_parts import (
    Kind,
    Part,
    crowded_names,
    kind_of,
    output_name,
    path_below,
    plan_parts,
    read_part,
    safe_name,
    scene_id,
)
from threestage.prediction.pool_features import NothingMeasured
from threestage.prediction.pool_prediction import predict_files
from threestage.prediction.prediction_writer import Encoded, Measured, PredictionWriter, Unwritable
from threestage.prediction.pseudo_masks import (
    DIGEST_KEY,
    REJECTS_NAME,
    REPORT_KEY,
    FileReport,
    PoolTask,
    Statistics,
    file_digest,
    stored_report,
)
from threestage.prediction.scene_prediction import SceneTask, predict_scene, scene_protocol
from threestage.prediction.tta import TTASettings, check_protocol, predict_with_tta, protocol_for
from threestage.report.mask_images import overlay
from threestage.run_folder.reuse import resolve_part
from threestage.settings import Settings
from threestage.training.worker import default_device
from threestage.verdict import verdict_in

RECORD_NAME = "prediction.json"
RECORD_FORMAT = 1
WORDS_KEY = "protocol_in_words"
CLASSES_NAME = "classes.json"
READERS = 16
PARTS_FOLDER = "parts"
MASKS, MASK_SUFFIX = "masks/", ".png"
FILES_SCHEMA = pa.schema([("image_id", pa.string()), ("file", pa.string())])
ROWS_SCHEMA = pa.schema([("image_id", pa.string()), ("mask", pa.binary()), ("confidence", pa.binary())])
ESTIMATE_COLUMNS = (pa.field("mean_iou", pa.float32()), pa.field("drift", pa.float32()))
JPEG_SIDE = 65_500  # libjpeg's JPEG_MAX_DIMENSION
NAME_ERRORS = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EINVAL, errno.ELOOP, errno.EILSEQ)
"""Of one file; after others, such as ENOSPC, no file can be written."""
WRITERS = 16  # a put takes an object store tens of milliseconds

Format = Literal["png", "parquet", "geotiff"]
ModelFiles = Mapping[str, bytes]
"""The files of a model's folder."""


class PredictionTask(PoolTask):
    """What is needed to predict any part of the input, on any machine, as plain JSON. `crowded`: see `crowded_names`."""

    source: str
    kind: Kind
    protocol: TTASettings
    format: Format
    overlays: bool
    confidences: bool
    crowded: frozenset[int] = frozenset()
    batch_size: int = BATCH
    max_image_pixels: int = MAX_IMAGE_PIXELS
    used_ids: frozenset[str] = frozenset()
    excluded_ids: frozenset[str] = frozenset()

    def digest(self) -> str:
        decisive = self.model_dump_json(include={"protocol", "format", "overlays", "confidences"})
        return hashlib.sha256(f"{super().digest()}/{decisive}".encode()).hexdigest()


Run = Callable[[ModelFiles, PredictionTask, Sequence[Part]], Generator[FileReport]]
"""Predicts parts anywhere; their reports in any order."""


class PredictSettings(Settings):
    """`format`: geotiff is of scenes only. `overlays`: of format png only, not of scenes. `confidence`: write it too.
    `rows_per_part`: images in one part, which is predicted whole or again. `input_format`: of a folder that holds more than one
    kind. `max_drift`: of the images that are predicted, above which the job ends."""

    protocol: TTASettings = TTASettings()
    format: Format = "png"
    overlays: bool = True
    confidence: bool = False
    input_format: Kind | None = None
    max_bad_fraction: float = Field(default=0.02, ge=0, le=1)
    max_drift: float | None = None
    rows_per_part: int = Field(default=256, ge=1)


class PredictReport(Settings):
    """`images`: predicted, now or before; `kept`: those before; `in_windows`: those too large for the memory as a whole.
    `bad`: left out; `rejected`: the first of them, at most 20; `rejects_uri`: where all are listed. `warnings`: what else the
    user should know, one line each. `estimate`: without labels, of as many of the images as it could be measured of; None of
    a model without calibration."""

    images: int
    kept: int
    bad: int
    rejected: tuple[Reject, ...]
    rejects_uri: str
    in_windows: int = 0
    estimate: Estimate | None = None
    warnings: tuple[str, ...] = ()


def read_model(model: str, registry: RegistrySettings) -> ModelFiles:
    """A model of the registry (models:/NAME@stage3, models:/NAME/2), or of a folder: a model's, a stage's or a run's (its best).

    Raises InputError where there is none.
    """
    if model.startswith("models:/"):
        with tempfile.TemporaryDirectory() as folder:
            return _files_of(str(open_models(registry).pull(model, folder)))
    for folder in (model, storage.join(model, "model"), *_models_of_run(model)):
        if storage.exists(storage.join(folder, CARD)):
            return _files_of(folder)
    raise InputError(
        f"{model}: holds no model; give models:/NAME@stage3, or the folder of a run, a stage or a model",
        "models/no-model",
    )


def _models_of_run(run: str) -> list[str]:
    """Models of a run's stages, in the order in which they are taken: its best one, else the last."""
    return [storage.join(resolve_part(run, stage), "model") for stage in best_stages(run)]


def best_stages(run: str) -> list[StageName]:
    """The stages of a run, its best one first, then the last ones."""
    results, last_first = storage.join(run, "results.json"), sorted(STAGES, reverse=True)
    verdict = verdict_in(storage.read_json(results)) if storage.exists(results) else None
    best = [] if verdict is None else [verdict.choice]
    return [*best, *last_first]


def _files_of(folder: str) -> ModelFiles:
    if not storage.exists(storage.join(folder, WEIGHTS)):
        raise InputError(f"{folder}: has {CARD} and no {WEIGHTS}; {RESTORE}", "models/no-weights")
    card = storage.read_small(storage.join(folder, CARD), storage.MAX_JSON_BYTES)
    files = {WEIGHTS: storage.read_bytes(storage.join(folder, WEIGHTS)), CARD: card}
    classes = len(parse_card(files[CARD], folder).classes)
    parse_weights(files[WEIGHTS], folder)
    with contextlib.suppress(FileNotFoundError):
        files[CALIBRATION] = storage.read_small(storage.join(folder, CALIBRATION), storage.MAX_JSON_BYTES)
        Calibration.parse(files[CALIBRATION], folder, classes)
    return files


def network_of(files: ModelFiles, where: str = "the model") -> tuple[Network, ModelCard]:
    """The network in eval mode, and its card. `where`: the model's name in an InputError."""
    return model_of(parse_card(files[CARD], where), parse_weights(files[WEIGHTS], where), where)


def estimator_of(files: ModelFiles, where: str = "the model") -> Estimator | None:
    """What the model says of its predictions without labels; None of a model of an older version."""
    if CALIBRATION not in files:
        return None
    return Estimator(Calibration.parse(files[CALIBRATION], where, len(parse_card(files[CARD], where).classes)))


def open_model(model: str, registry: RegistrySettings) -> tuple[Network, ModelCard]:
    """The network of `read_model` in eval mode, and its card."""
    return network_of(read_model(model, registry), model)


def predict_here(files: ModelFiles, task: PredictionTask, parts: Sequence[Part]) -> Generator[FileReport]:
    """Predict parts in this process, one after the other."""
    disable_malloc_trim()
    device = default_device()
    network, card = network_of(files)
    yield from predict_parts(network.to(device), card, task, parts, device, estimator_of(files))


def predict_parts(
    network: Network,
    card: ModelCard,
    task: PredictionTask,
    parts: Sequence[Part],
    device: torch.device,
    estimator: Estimator | None,
) -> Iterator[FileReport]:
    """Predict parts with a network that is on the device."""
    if task.kind == "scenes":
        return (_predict_scene_part(network, card, task, part, device, estimator) for part in parts)
    return predict_files(network, task, parts, device, Predictions(task, card, estimator))


def predict_input(
    model: ModelFiles,
    source: str,
    out: str,
    settings: PredictSettings,
    show: Callable[[int, int], None] = lambda done, total: None,
    run: Run = predict_here,
    each: Each = map_ahead,
) -> PredictReport:
    """Predict every image of an input into the folder `out`; parts that are done are kept.

    `show` gets images done and images in all; `run` predicts, `each` lists. Raises InputError where there is nothing to
    predict, where `out` holds predictions of another model, input or settings, or where `max_drift` is asked of a model
    without calibration; OSError when a store fails, StageFailure as soon as the images drift more than `max_drift`, and at the
    end when more than the share `max_bad_fraction` of them is bad.
    """
    source, out = storage.absolute(source), storage.absolute(out)
    card = ModelCard.model_validate_json(model[CARD])
    kind = "scenes" if settings.format == "geotiff" else kind_of(source, settings.input_format)
    settings = _for_model(settings, card, kind)
    if kind != "data set":
        _refuse_output_inside(source, out)
    job = JobEstimate(estimator_of(model), settings.max_drift)
    record = _record(model, source, settings)
    claim(out, PREDICTIONS)
    _check_record(out, record)
    write_record = partial(_write_record, out, record, card)
    if kind == "images":
        write_record()  # it marks the folder, and a listing is written first
    listing = storage.join(out, "listing")
    parts = plan_parts(source, kind, listing, settings.rows_per_part, each)
    warnings = passed_over(source, suffixes_passed_over(listing)) if kind == "images" else []
    write_record()
    task = _task(model, card, source, out, settings, kind)
    if settings.format == "png" and (kind in ("images", "parquet") or (kind == "data set" and not storage.is_s3(out))):
        crowded = crowded_names(parts, source, kind, partial(_names_kept, task, parts))
        task = task.model_copy(update={"crowded": crowded})
    report = _gather(task, parts, settings.max_bad_fraction, job, show, partial(run, model, task))
    return report.model_copy(update={"warnings": (*warnings, *job.warnings())})


def _refuse_output_inside(source: str, out: str) -> None:
    if f"{_place(out)}/".startswith(f"{_place(source)}/"):
        raise InputError(
            f"{out}: it lies inside the input {source} and would become a part of it; give another folder",
            "predict/output-in-input",
        )


def _for_model(settings: PredictSettings, card: ModelCard, kind: Kind) -> PredictSettings:
    """In the model's own windows, unless others are asked for; scenes always in windows. InputError where the windows do not suit
    the network, or the format does not suit scenes."""
    protocol = protocol_for(settings.protocol, card.inference)
    if kind == "scenes":
        refuse_missing_rasterio("predict")
        if settings.format == "parquet":
            raise InputError(
                "format=parquet: a scene's mask is a file of its own; give --format geotiff or png",
                "predict/scene-format",
            )
        protocol = scene_protocol(protocol, size_multiple(card.network))
    check_protocol(protocol, card.network)
    return settings.model_copy(update={"protocol": protocol})


def _task(
    model: ModelFiles, card: ModelCard, source: str, out: str, settings: PredictSettings, kind: Kind
) -> PredictionTask:
    return PredictionTask(
        destination=out,
        model_digest=_digest(model),
        num_classes=len(card.classes),
        downscale=card.downscale,
        source=source,
        kind=kind,
        protocol=settings.protocol,
        format=settings.format,
        overlays=settings.overlays and settings.format == "png" and kind != "scenes",
        confidences=settings.confidence,
        bands=card.bands,
    )


def _place(uri: str) -> str:
    """Where a folder really lies, behind links."""
    return uri if storage.is_s3(uri) else os.path.realpath(uri)


def _digest(model: ModelFiles) -> str:
    """Of weights and card."""
    parts = b"".join(hashlib.sha256(model[name]).digest() for name in (WEIGHTS, CARD))
    return hashlib.sha256(parts).hexdigest()


def _record(model: ModelFiles, source: str, settings: PredictSettings) -> dict[str, Any]:
    """What decides what the predictions are, as JSON; and the protocol in words."""
    left_out = {"max_bad_fraction", "max_drift", "rows_per_part"} | (
        {"input_format"} if settings.input_format is None else set()
    )
    chosen = settings.model_dump(mode="json", exclude=left_out)
    words = settings.protocol.describe()
    return {"version": RECORD_FORMAT, "model": _digest(model)[:16], "input": source, **chosen, WORDS_KEY: words}


def _write_record(out: str, record: dict[str, Any], card: ModelCard) -> None:
    """With the classes in a file of their own, but in a folder of an older version, which stays as it is."""
    uri = storage.join(out, RECORD_NAME)
    is_new = not storage.exists(uri)
    storage.write_json(uri, record)
    if is_new:
        storage.write_json(storage.join(out, CLASSES_NAME), list(zip(card.classes, card.colours, strict=True)))


def _check_record(out: str, record: dict[str, Any]) -> None:
    """InputError, naming the first difference, where the folder's record is another one."""
    uri = storage.join(out, RECORD_NAME)
    if not storage.exists(uri):
        return
    before = storage.read_json(uri, dict[str, Any])
    for key, value in record.items():
        if key != WORDS_KEY and before.get(key) != value:
            shown = WORDS_KEY if key == "protocol" else key
            raise InputError(
                f"{out}: it holds predictions with {key}={before.get(shown)}, not {record[shown]}; give another folder",
                "predict/other-settings",
            )


def _gather(
    task: PredictionTask,
    parts: Sequence[Part],
    max_bad_fraction: float,
    job: JobEstimate,
    show: Callable[[int, int], None],
    run: Callable[[Sequence[Part]], Generator[FileReport]],
) -> PredictReport:
    """Predict the parts that are missing, and take the reports of all."""
    missing = {part.name: part for part in parts}
    images, in_windows, total, rejects = 0, 0, rows_of(parts), RejectList()

    def take(report: FileReport) -> None:
        nonlocal images, in_windows
        if missing.pop(report.file, None) is not None:  # a part that was lost and predicted again may report twice
            images += report.statistics.images
            in_windows += report.in_windows
            rejects.add(report.rejects)
            show(images + rejects.count, total)
            job.add(report.measured)

    for report in map_ahead(lambda found: _without_replaced(task, *found), _done(task, parts), READERS):
        take(report)
    kept = images
    if missing:
        with contextlib.closing(run(list(missing.values()))) as reports:
            for report in reports:
                take(report)
    return PredictReport(
        images=images,
        kept=kept,
        bad=rejects.count,
        rejected=tuple(rejects.first),
        rejects_uri=_listed(task, rejects, total, max_bad_fraction),
        in_windows=in_windows,
        estimate=job.estimate,
    )


def _listed(task: PredictionTask, rejects: RejectList, total: int, max_bad_fraction: float) -> str:
    """Where the bad images are written down. Raises StageFailure where they are too many."""
    listed = storage.join(task.destination, REJECTS_NAME)
    rejects.write_for_people(listed, task.destination)
    if complaint := rejects.complaint(total, max_bad_fraction, listed):
        raise StageFailure(
            f"{complaint}; raise --max-bad-fraction, or replace them and run this again", "data/bad-images"
        )
    return listed


def _done(task: PredictionTask, parts: Sequence[Part]) -> Iterator[tuple[Part, FileReport]]:
    """The parts that are done, and the reports in the footers of their files."""
    there = set(storage.list_files(storage.join(task.destination, PARTS_FOLDER)))
    digest = task.digest()
    done = [part for part in parts if part_uri(task, part) in there]
    reports = map_ahead(lambda part: stored_report(part_uri(task, part), file_digest(digest, part)), done, READERS)
    return ((part, report) for part, report in zip(done, reports, strict=True) if report is not None)


# ---- What is written of a part


def part_uri(task: PoolTask, file: PoolFile) -> str:
    """Where the Parquet file of a part lies."""
    return storage.join(task.destination, PARTS_FOLDER, file.name)


def _names_kept(task: PredictionTask, parts: Sequence[Part]) -> dict[str, list[str]]:
    return {part.name: _names_written(task, part) for part, _ in _done(task, parts)}


def _names_written(task: PredictionTask, part: Part) -> list[str]:
    """The names of the masks of a part that is done, less those of images that were replaced since."""
    files = storage.read_table(part_uri(task, part), ["file"]).column("file").to_pylist()
    replaced = frozenset(part.replaced)
    return [
        file.removeprefix(MASKS).removesuffix(MASK_SUFFIX)
        for row, file in enumerate(files)
        if file is not None and row not in replaced
    ]


def _without_replaced(task: PredictionTask, part: Part, report: FileReport) -> FileReport:
    """Empty the rows of a part whose images were replaced since they were predicted: another part has them now."""
    images = part.rows - len(part.replaced) - len(report.rejects)
    if not part.replaced or report.statistics.images == images:
        return report
    uri, sources = part_uri(task, part), storage.read_table(part.uri, ["image_uri"]).column("image_uri")
    gone = {sources[row].as_py() for row in part.replaced}
    rejects = tuple(reject for reject in report.rejects if reject.source not in gone)
    counts = {"images": part.rows - len(gone) - len(rejects), "unreadable": len(rejects)}
    statistics = report.statistics.model_copy(update=counts)
    report = report.model_copy(update={"statistics": statistics, "rejects": rejects, "measured": ()})
    table = storage.read_table(uri)
    kept = pa.array([row not in part.replaced for row in range(part.rows)])
    for number, name in enumerate(table.column_names[1:], 1):
        table = table.set_column(number, name, pc.if_else(kept, table.column(name), None))
    metadata = (table.schema.metadata or {}) | {REPORT_KEY: report.model_dump_json().encode()}
    storage.write_table(uri, table.replace_schema_metadata(metadata))
    return report


class Predictions(PredictionWriter):
    """Masks of images, in the format of the task."""

    precision = "float32"  # as in an evaluation
    writers = WRITERS

    sums_measured = True

    def __init__(self, task: PredictionTask, card: ModelCard, estimator: Estimator | None = None) -> None:
        self._task = task
        self._estimator = estimator
        self.protocol = task.protocol
        self._card = card
        self._multiple = size_multiple(card.network)
        self.schema = with_estimates(FILES_SCHEMA if task.format == "png" else ROWS_SCHEMA, estimator)

    def rows(self, file: PoolFile) -> Iterator[list[PoolRow]]:
        assert isinstance(file, Part)
        return read_part(self._task.source, file)

    def uri(self, task: PoolTask, file: PoolFile) -> str:
        return part_uri(task, file)

    def predict(self, network: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return predict_with_tta(network, pixels, self._task.protocol, self._multiple)

    @contextlib.contextmanager
    def measure(self, network: nn.Module) -> Iterator[Measured]:
        if self._estimator is None:
            yield lambda entropy: None
        else:
            with self._estimator.measure(network) as measure:
                yield lambda entropy: measure(len(entropy), entropy[0].numel())

    def measured_columns(self, values: np.ndarray) -> Encoded:
        assert self._estimator is not None
        found = self._estimator.of(values)
        return found.mean_iou, found.drift

    def encode(self, row: PoolRow, pixels: np.ndarray, class_ids: np.ndarray, confidence: np.ndarray) -> Encoded:
        """Writes the image's files in format png."""
        if self._task.downscale > 1:
            pixels = decode_pixels(row.image, self._task.max_image_pixels, self._task.bands)
        mask, sure = (enlarged(values, self._task.downscale, pixels.shape) for values in (class_ids, confidence))
        if self._task.format == "parquet":
            return encode_mask(mask, fast=True), sure.tobytes() if self._task.confidences else None
        return (self._write(row, pixels, mask, sure),)

    def _write(self, row: PoolRow, pixels: np.ndarray, mask: np.ndarray, confidence: np.ndarray) -> str:
        """The mask's path below the output."""
        task, name = self._task, output_name(row, self._task.source, self._task.kind, self._task.crowded)
        file = f"{MASKS}{name}{MASK_SUFFIX}"
        colours = self._card.colours
        contents: dict[str, Callable[[], bytes]] = {file: lambda: palette_png(mask, colours)}
        if task.confidences:
            contents[f"confidence/{name}.png"] = lambda: encode_mask(confidence)
        if task.overlays:
            contents[f"overlays/{name}.jpg"] = lambda: overlay_jpeg(pixels, mask, colours)
        for path, encode in contents.items():
            try:
                content = encode()
            except (*DECODER_ERRORS, MemoryError) as error:
                raise Unwritable(
                    row, f"its {path.split('/')[0]} cannot be encoded: {error} [predict/not-written]"
                ) from None
            try:
                storage.write_bytes(storage.join(task.destination, path), content)
            except OSError as error:
                if error.errno not in NAME_ERRORS:
                    raise
                raise Unwritable(row, f"{path} cannot be written: {error.strerror} [predict/not-written]") from None
        return file


def _predict_scene_part(
    network: Network,
    card: ModelCard,
    task: PredictionTask,
    part: Part,
    device: torch.device,
    estimator: Estimator | None,
) -> FileReport:
    """Predict one scene, and write the file of its part last. A scene that cannot be used is a reject."""
    digest = file_digest(task.digest(), part)
    if (stored := stored_report(part_uri(task, part), digest)) is not None:
        return stored
    image_id = scene_id(path_below(task.source, part.uri))
    scene = _scene_task(card, task, part)
    file, size, rejects, measured = None, (0, 0), tuple[Reject, ...](), tuple[float, ...]()
    try:
        if part.problem is not None:
            raise BadImage(part.problem, "image/place")
        file, size, measured = _measured_scene(network, scene, device, estimator)
    except BadImage as error:
        rejects = (Reject(image_id=image_id, source=part.uri, reason=str(error)),)
    except (FileNotFoundError, PermissionError) as error:
        rejects = (Reject(image_id=image_id, source=part.uri, reason=f"cannot be read: {error} [image/unreadable]"),)
    report = FileReport(
        file=part.name,
        statistics=Statistics.of(int(file is not None), len(rejects), (), task.num_classes),
        max_height=size[0],
        max_width=size[1],
        labelled_ids=(),
        rejects=rejects,
        measured=measured,
    )
    _write_scene_part(task, part, {"image_id": image_id, "file": file}, report, estimator)
    return report


def _scene_task(card: ModelCard, task: PredictionTask, part: Part) -> SceneTask:
    return SceneTask(
        uri=part.uri,
        destination=task.destination,
        name=safe_name(scene_id(path_below(task.source, part.uri))),
        driver="GTiff" if task.format == "geotiff" else "PNG",
        protocol=task.protocol,
        downscale=card.downscale,
        multiple=size_multiple(card.network),
        colours=card.colours,
        confidence=task.confidences,
        bands=card.bands,
    )


def _measured_scene(
    network: Network, scene: SceneTask, device: torch.device, estimator: Estimator | None
) -> tuple[str, tuple[int, int], tuple[float, ...]]:
    """What `predict_scene` gives, and what was measured of it; nothing of a scene without data."""
    if estimator is None:
        return *predict_scene(network, scene, device), ()
    with estimator.measure(network) as measure:
        file, size = predict_scene(network, scene, device)
    try:
        return file, size, tuple(measure(1, size[0] * size[1])[0].tolist())
    except NothingMeasured:
        return file, size, ()


def _write_scene_part(
    task: PredictionTask, part: Part, row: dict[str, Any], report: FileReport, estimator: Estimator | None
) -> None:
    if estimator is not None:
        found = estimator.of(np.array(report.measured)) if report.measured else None
        row |= {"mean_iou": found and found.mean_iou, "drift": found and found.drift}
    table = pa.Table.from_pylist([row], with_estimates(FILES_SCHEMA, estimator))
    metadata = {REPORT_KEY: report.model_dump_json(), DIGEST_KEY: file_digest(task.digest(), part)}
    storage.write_table(part_uri(task, part), table.replace_schema_metadata(metadata))


def with_estimates(schema: pa.Schema, estimator: Estimator | None) -> pa.Schema:
    """With the columns of a model that is calibrated."""
    for column in ESTIMATE_COLUMNS if estimator else ():
        schema = schema.append(column)
    return schema


def enlarged(values: np.ndarray, factor: int, size: tuple[int, ...]) -> np.ndarray:
    """(h,w) at the size (H,W,…): each value is its block's, the last ones also the ragged rest's (`downscale_image`)."""
    if factor == 1:
        return values
    whole = values.repeat(factor, 0).repeat(factor, 1)
    return np.pad(whole, [(0, long - short) for long, short in zip(size, whole.shape, strict=False)], mode="edge")


def overlay_jpeg(pixels: np.ndarray, mask: np.ndarray, colours: Sequence[Colour]) -> bytes:
    """The image under the colours of its mask; every n-th row and column where the sides are too long for a JPEG."""
    step, stream = -(-max(mask.shape) // JPEG_SIDE), io.BytesIO()
    picture = overlay(pixels[::step, ::step], mask[::step, ::step], colours)
    Image.fromarray(picture).save(stream, format="JPEG", quality=90)
    return stream.getvalue()
