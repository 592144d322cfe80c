"""The champion of a run, and its predictions of images of the run's pool: those that the run has stored, else made now.

OUT/predictions/<name of the pool file>    PSEUDO_MASK_SCHEMA, the pool file's rows in their order; null: not asked for, or bad
OUT/predictions/rejects.parquet            images that could not be used, and why
OUT/features/…                             the same with the rows of prediction/pool_features.py

A pool file that is predicted is kept, so the same call continues after a kill.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath

from threestage.config import Config, StageName
from threestage.data import storage
from threestage.data.datasets import labelled_set, static_void_mask
from threestage.data.pairs import PICTURE_SUFFIXES
from threestage.data.parallel import map_ahead
from threestage.data.pool import FETCH_THREADS, PoolFile, load_pool, pseudo_mask_uri, rows_of
from threestage.data.records import load_manifest
from threestage.data.split import Split, saved_split
from threestage.errors import InputError
from threestage.models.export import CARD, ModelCard, parse_card
from threestage.prediction.pool_prediction import predict_pool_here
from threestage.prediction.predict import best_stages
from threestage.prediction.pseudo_masks import FileReport, PoolTask, file_digest, gather, stored_report
from threestage.run_folder.folder import RunFolder
from threestage.run_folder.reuse import CONFIG_NAME

PREDICTIONS_FOLDER, FEATURES_FOLDER = "predictions", "features"

PredictPool = Callable[[str, PoolTask, Sequence[PoolFile]], Iterator[FileReport]]
"""Predicts files of a pool anywhere with the model in a folder, as `Backend.predict_pool` of a run does."""


@dataclass(frozen=True)
class Champion:
    """The stage of a run that scored best on the validation images; of an unfinished run the last one that has ended."""

    run: RunFolder
    stage: StageName
    card: ModelCard

    @property
    def model(self) -> str:
        return storage.join(self.run.part(self.stage), "model")

    @property
    def stored_masks(self) -> str | None:
        """The folder of its pseudo-masks of the whole pool; None where the run did not predict them, or `clean` removed them."""
        part = f"pseudo_masks{self.stage.removeprefix('stage')}"
        stored = storage.exists(storage.join(self.run.part(part), "done.json"))
        return self.run.part(part) if stored and not self.run.set_marker(part).get("masks_removed") else None


@dataclass(frozen=True)
class PoolPredictions:
    """The champion's masks in `folder`, where `pseudo_mask_uri` finds those of each of the `files`; rows whose number is in
    `file.replaced` have none."""

    folder: str
    files: Sequence[PoolFile]


def champion_of(run: str) -> Champion:
    """Raises InputError where no stage of the run has ended."""
    folder = RunFolder.at(run)
    done: list[StageName] = [stage for stage in best_stages(folder.out) if folder.is_done(stage)]
    if not done:
        raise InputError(f"{run}: none of its stages has ended; run it until one has", "run/no-champion")
    uri = storage.join(folder.part(done[0]), "model", CARD)
    return Champion(folder, done[0], parse_card(storage.read_bytes(uri), uri))


def champion_predictions(
    champion: Champion,
    out: str,
    wanted: frozenset[str] | None = None,
    predict: PredictPool = predict_pool_here,
    show: Callable[[int, int], None] = lambda done, total: None,
) -> PoolPredictions:
    """The champion's masks of the images that are `wanted` (all: None), predicted into `out`/predictions where the run has none.

    `wanted`: ids, or ids with the suffix of their file. `show` gets images done and images in all. The validation
    images are not in the pool. Raises InputError where the run has no list of its pool, and as `predict` does.
    """
    files = _pool_of(champion, wanted)
    stored = champion.stored_masks
    if stored is not None or not files:
        return PoolPredictions(stored or out, files)
    task = _task(champion, storage.join(storage.absolute(out), PREDICTIONS_FOLDER))
    gather(task, files, _reports(champion.model, task, files, predict, show), max_bad_fraction=1)
    return PoolPredictions(task.destination, files)


def champion_features(
    champion: Champion,
    out: str,
    predict: PredictPool = predict_pool_here,
    show: Callable[[int, int], None] = lambda done, total: None,
) -> PoolPredictions:
    """What `threestage next` chooses by, of the whole pool, as `champion_predictions` makes masks."""
    files = _pool_of(champion, None)
    task = _task(champion, storage.join(storage.absolute(out), FEATURES_FOLDER)).model_copy(update={"features": True})
    gather(task, files, _reports(champion.model, task, files, predict, show), max_bad_fraction=1)
    return PoolPredictions(task.destination, files)


def named(image_id: str, uri: str) -> str:
    """An image's id with the suffix of its file; without one where `uri` is not that of an image file."""
    suffix = PurePosixPath(uri).suffix
    return f"{image_id}{suffix}" if suffix.lower() in PICTURE_SUFFIXES else image_id


def _pool_of(champion: Champion, wanted: frozenset[str] | None) -> list[PoolFile]:
    uri = champion.run.part("pool.parquet")
    if not storage.exists(uri):
        raise InputError(f"{uri}: is missing, the run has not listed its pool yet; continue the run", "run/no-pool")
    files = load_pool(uri)
    if wanted is None:
        return files
    chosen = map_ahead(partial(_with_rows_of, wanted), files, FETCH_THREADS)
    return [file for file in chosen if rows_of([file])]


def _with_rows_of(wanted: frozenset[str], file: PoolFile) -> PoolFile:
    """The file less the rows that are not wanted."""
    place = "image_uri" if file.by_reference else "source"
    rows = storage.read_table(file.uri, ["image_id", place]).to_pylist()
    others = [n for n, row in enumerate(rows) if not wanted & {row["image_id"], named(row["image_id"], row[place])}]
    return file.without(others)


def _reports(
    model: str, task: PoolTask, files: Sequence[PoolFile], predict: PredictPool, show: Callable[[int, int], None]
) -> Iterator[FileReport]:
    """Of files that are predicted already, then of the others."""
    digest, total, done = task.digest(), rows_of(files), 0
    stored = partial(_stored, task.destination, digest)
    missing = []
    for file, report in zip(files, map_ahead(stored, files, FETCH_THREADS), strict=True):
        if report is None:
            missing.append(file)
        else:
            done += rows_of([file])
            yield report
    for report in predict(model, task, missing) if missing else ():
        done += report.statistics.images + report.statistics.unreadable
        show(done, total)
        yield report


def _stored(folder: str, task_digest: str, file: PoolFile) -> FileReport | None:
    return stored_report(pseudo_mask_uri(folder, file), file_digest(task_digest, file))


def _task(champion: Champion, destination: str) -> PoolTask:
    """As the run itself predicts its pool."""
    run = champion.run
    config: Config = storage.read_json(storage.join(run.out, CONFIG_NAME), Config)
    split = saved_split(run.part("split.json"))[0]
    return PoolTask(
        destination=destination,
        model_digest=run.result(champion.stage)["model_digest"],
        num_classes=len(champion.card.classes),
        downscale=champion.card.downscale,
        max_image_pixels=config.data.max_image_pixels,
        batch_size=config.pseudo_mask.batch_size,
        used_ids=frozenset(split.labelled),
        excluded_ids=frozenset(split.validation),
        fixed_void=_static_void(config, split),
        precision=config.for_stage(champion.stage).training.precision,
        inference=config.inference,
        bands=champion.card.bands,
    )


def _static_void(config: Config, split: Split) -> str | None:
    root, share = config.data.root, config.data.fixed_void
    if share is None:
        return None
    return static_void_mask(labelled_set(root, load_manifest(root), split, config.data.downscale, None), share)
