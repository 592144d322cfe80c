"""A model over many images, from any input into one folder: what is done is kept, so the same command goes on.

OUTPUT/prediction.json   the model and the settings that made it; others are refused
OUTPUT/listing/          the listing of an input of image files
OUTPUT/rejects.parquet   images that could not be used, and why
OUTPUT/masks/, parts/ …  see threestage.prediction.output
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from pydantic import Field

from threestage.allocator import disable_malloc_trim
from threestage.config import STAGES
from threestage.data import storage
from threestage.data.formats import passed_over
from threestage.data.listing import Each, in_threads, suffixes_passed_over
from threestage.data.outputs import PREDICTIONS, claim
from threestage.data.pool import rows_of
from threestage.data.rejects import Reject, RejectList
from threestage.errors import InputError, StageFailure
from threestage.mlflow_sync.client import open_models
from threestage.mlflow_sync.records import RegistrySettings
from threestage.models.export import CARD, RESTORE, WEIGHTS, ModelCard, model_of, parse_card, parse_weights
from threestage.models.network import Network
from threestage.prediction.input_parts import Kind, Part, crowded_names, kind_of, plan_parts
from threestage.prediction.output import (
    PARTS_FOLDER,
    Format,
    Predictions,
    PredictionTask,
    names_written,
    part_uri,
    without_replaced,
)
from threestage.prediction.pool_prediction import predict_files
from threestage.prediction.pseudo_masks import REJECTS_NAME, FileReport, file_digest, stored_report
from threestage.prediction.tta import TTASettings, check_protocol
from threestage.run_folder.reuse import resolve_part
from threestage.settings import Settings
from threestage.training.worker import default_device
from threestage.verdict import verdict_in

RECORD_NAME = "prediction.json"
RECORD_FORMAT = 1
WORDS_KEY = "protocol_in_words"
READERS = 16

ModelFiles = Mapping[str, bytes]
"""The files of a model's folder."""

Run = Callable[[ModelFiles, PredictionTask, Sequence[Part]], Iterator[FileReport]]
"""Predicts parts anywhere; their reports in any order."""


class PredictSettings(Settings):
    """`overlays`: of format png only. `confidence`: write it too. `rows_per_part`: images in one part, which is predicted
    whole or again. `input_format`: of a folder that holds more than one kind."""

    protocol: TTASettings = TTASettings()
    format: Format = "png"
    overlays: bool = True
    confidence: bool = False
    input_format: Kind | None = None
    max_bad_fraction: float = Field(default=0.02, ge=0, le=1)
    rows_per_part: int = Field(default=256, ge=1)


class PredictReport(Settings):
    """`images`: predicted, now or before; `kept`: those before; `in_windows`: those too large for the memory as a whole.
    `bad`: left out; `rejected`: the first of them, at most 20; `rejects_uri`: where all are listed. `warnings`: what else the
    user should know, one line each."""

    images: int
    kept: int
    bad: int
    rejected: tuple[Reject, ...]
    rejects_uri: str
    in_windows: int = 0
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
    results, last_first = storage.join(run, "results.json"), sorted(STAGES, reverse=True)
    verdict = verdict_in(storage.read_json(results)) if storage.exists(results) else None
    best = [] if verdict is None else [verdict.choice]
    return [storage.join(resolve_part(run, stage), "model") for stage in [*best, *last_first]]


def _files_of(folder: str) -> ModelFiles:
    if not storage.exists(storage.join(folder, WEIGHTS)):
        raise InputError(f"{folder}: has {CARD} and no {WEIGHTS}; {RESTORE}", "models/no-weights")
    card = storage.read_small(storage.join(folder, CARD), storage.MAX_JSON_BYTES)
    files = {WEIGHTS: storage.read_bytes(storage.join(folder, WEIGHTS)), CARD: card}
    parse_card(files[CARD], folder)
    parse_weights(files[WEIGHTS], folder)
    return files


def network_of(files: ModelFiles, where: str = "the model") -> tuple[Network, ModelCard]:
    """The network in eval mode, and its card. `where`: the model's name in an InputError."""
    return model_of(parse_card(files[CARD], where), parse_weights(files[WEIGHTS], where), where)


def open_model(model: str, registry: RegistrySettings) -> tuple[Network, ModelCard]:
    """The network of `read_model` in eval mode, and its card."""
    return network_of(read_model(model, registry), model)


def predict_here(files: ModelFiles, task: PredictionTask, parts: Sequence[Part]) -> Iterator[FileReport]:
    """Predict parts in this process, one after the other."""
    disable_malloc_trim()
    device = default_device()
    network, card = network_of(files)
    yield from predict_files(network.to(device), task, parts, device, Predictions(task, card))


def predict_input(
    model: ModelFiles,
    source: str,
    out: str,
    settings: PredictSettings,
    show: Callable[[int, int], None] = lambda done, total: None,
    run: Run = predict_here,
    each: Each = in_threads,
) -> PredictReport:
    """Predict every image of an input into the folder `out`; parts that are done are kept.

    `show` gets images done and images in all; `run` predicts, `each` lists. Raises InputError where there is nothing to
    predict, or where `out` holds predictions of another model, input or settings; OSError when a store fails, and
    StageFailure at the end when more than the share `max_bad_fraction` of the images is bad.
    """
    source, out = storage.absolute(source), storage.absolute(out)
    card = ModelCard.model_validate_json(model[CARD])
    check_protocol(settings.protocol, card.network)
    kind = kind_of(source, settings.input_format)
    if kind != "data set" and f"{_place(out)}/".startswith(f"{_place(source)}/"):
        raise InputError(
            f"{out}: it lies inside the input {source} and would become a part of it; give another folder",
            "predict/output-in-input",
        )
    record = _record(model, source, settings)
    claim(out, PREDICTIONS)
    _check_record(out, record)
    write_record = partial(storage.write_json, storage.join(out, RECORD_NAME), record)
    if kind == "images":
        write_record()  # it marks the folder, and a listing is written first
    listing = storage.join(out, "listing")
    parts = plan_parts(source, kind, listing, settings.rows_per_part, each)
    warnings = passed_over(source, suffixes_passed_over(listing)) if kind == "images" else []
    write_record()
    task = _task(model, card, source, out, settings, kind)
    if settings.format == "png" and (kind != "data set" or not storage.is_s3(out)):  # whose ids only folders can be
        crowded = crowded_names(parts, source, kind, lambda: dict(_named(task, parts)))
        task = task.model_copy(update={"crowded": crowded})
    report = _gather(task, parts, settings.max_bad_fraction, show, partial(run, model, task))
    return report.model_copy(update={"warnings": tuple(warnings)})


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
        overlays=settings.overlays and settings.format == "png",
        confidences=settings.confidence,
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
    left_out = {"max_bad_fraction", "rows_per_part"} | ({"input_format"} if settings.input_format is None else set())
    chosen = settings.model_dump(mode="json", exclude=left_out)
    words = settings.protocol.describe()
    return {"version": RECORD_FORMAT, "model": _digest(model)[:16], "input": source, **chosen, WORDS_KEY: words}


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
    show: Callable[[int, int], None],
    run: Callable[[Sequence[Part]], Iterator[FileReport]],
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

    for report in _stored(task, parts):
        take(report)
    kept = images
    if missing:
        for report in run(list(missing.values())):
            take(report)
    listed = storage.join(task.destination, REJECTS_NAME)
    rejects.write(listed)
    if complaint := rejects.complaint(total, max_bad_fraction, listed):
        raise StageFailure(
            f"{complaint}; raise --max-bad-fraction, or replace them and run this again", "data/bad-images"
        )
    return PredictReport(
        images=images,
        kept=kept,
        bad=rejects.count,
        rejected=tuple(rejects.first),
        rejects_uri=listed,
        in_windows=in_windows,
    )


def _stored(task: PredictionTask, parts: Sequence[Part]) -> Iterator[FileReport]:
    """The reports of the parts that are done, less the images that were replaced since."""
    with ThreadPoolExecutor(READERS) as pool:
        yield from pool.map(lambda found: without_replaced(task, *found), _done(task, parts))


def _named(task: PredictionTask, parts: Sequence[Part]) -> Iterator[tuple[str, list[str]]]:
    for done, _ in _done(task, parts):
        yield done.name, names_written(task, done)


def _done(task: PredictionTask, parts: Sequence[Part]) -> Iterator[tuple[Part, FileReport]]:
    """The parts that are done, and the reports in the footers of their files."""
    there = set(storage.list_files(storage.join(task.destination, PARTS_FOLDER)))
    digest = task.digest()
    done = [part for part in parts if part_uri(task, part) in there]

    def report_of(part: Part) -> FileReport | None:
        return stored_report(part_uri(task, part), file_digest(digest, part))

    with ThreadPoolExecutor(READERS) as pool:
        for part, report in zip(done, pool.map(report_of, done), strict=True):
            if report is not None:
                yield part, report
