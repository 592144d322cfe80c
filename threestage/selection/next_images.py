"""`threestage next`: which images of a run's pool to label next, as a list, a page and a start for a labelling tool.

OUT/next.json        what was asked for, and the images with the figures that they were chosen by
OUT/next.csv         the same images, one a line
OUT/images.txt       their ids, one a line, as `labels export --images` takes them
OUT/next.html        their pictures
OUT/features/        of the whole pool: what is there is kept, so the same command continues after a kill
OUT/predictions/     the champion's masks of the images, where the run has not stored them
OUT/pool.csv …       see pool_report.py
OUT/coco/ …          the export, by the name of its format
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from threestage.config import Config
from threestage.data import storage
from threestage.data.outputs import EXPORT_MARK, SELECTION, SELECTION_MARK, claim
from threestage.data.pool import pseudo_mask_uri
from threestage.data.records import labelled_ids, load_manifest
from threestage.data.split import saved_split
from threestage.errors import InputError
from threestage.labels.label_export import ExportSettings, check_format, export_labels
from threestage.prediction.champion import Champion, PredictPool, champion_features, champion_of, champion_predictions
from threestage.prediction.pool_prediction import predict_pool_here
from threestage.run_folder.reuse import CONFIG_NAME
from threestage.selection.candidates import CandidateFiles
from threestage.selection.choice import STRATEGIES, Choice, StrategyName, Survey, choose_images, survey
from threestage.selection.image_lists import LIST_NAME, Progress, begin_list, write_lists
from threestage.selection.pool_report import PoolReport, write_pool_report
from threestage.selection.selection_page import write_page
from threestage.settings import Settings


class NextSettings(Settings):
    """`count`: how many images; `strategy`: see choice.py; `seed`: of a random choice, and of ties; `export`: a labelling tool's
    format; `pool_report`: look for near-copies and images unlike every labelled one too."""

    count: int = Field(20, ge=1)
    strategy: StrategyName = "combined"
    seed: int = 0
    export: str | None = None
    pool_report: bool = False


class NextImage(Settings):
    """An image to label. `entropy`: of the champion, 1 = every class is as likely; `margin`: of the two best classes, 0 = they
    are as likely; `distance`: to the nearest image that is labelled or chosen before it; `rarest`: a class that it sees there."""

    image_id: str
    source: str
    entropy: float
    margin: float
    distance: float
    rarest: str
    why: str


class NextReport(Settings):
    """`pool`: images that could be chosen. `export`: folder of the export; `not_exported`: images that it lacks, at most 20.
    `pool_report`: how many images were found, if that was asked for."""

    out: str
    run: str
    strategy: str
    pool: int
    images: tuple[NextImage, ...]
    export: str | None = None
    not_exported: tuple[str, ...] = ()
    pool_report: PoolReport | None = None


def next_images(
    run: str,
    out: str,
    settings: NextSettings,
    predict: PredictPool = predict_pool_here,
    progress: Progress = lambda what, done, total: None,
) -> NextReport:
    """Choose images of a run's pool and write them into the folder `out`; `predict` looks at the pool, and at what is missing.

    Raises InputError where the run has no champion or all is labelled, where `out` holds something else or another choice, and
    as `predict` does.
    """
    run, out = storage.absolute(run), storage.absolute(out)
    if settings.export is not None:
        check_format(settings.export, "--export")
    champion = champion_of(run)
    record = {
        "run": run,
        "model": champion.model,
        **settings.model_dump(mode="json", exclude={"export", "pool_report"}),
    }
    claim(out, SELECTION)
    done = begin_list(out, SELECTION_MARK, record)
    if "images" not in done:  # else somebody may be labelling them
        files = _candidates(champion, out, settings, predict, progress)
        done = record | _chosen(champion, files, settings)
        write_lists(out, SELECTION_MARK, tuple(NextImage.model_fields), done)
    images = [NextImage.model_validate(image) for image in done["images"]]
    wanted = frozenset(image.image_id for image in images)
    predictions = champion_predictions(champion, out, wanted, predict, partial(progress, "predicted"))
    write_page(out, done, predictions, champion.card)
    found = (
        write_pool_report(out, _candidates(champion, out, settings, predict, progress))
        if settings.pool_report
        else None
    )
    report = NextReport(
        out=out, run=run, strategy=settings.strategy, pool=done["pool"], images=tuple(images), pool_report=found
    )
    return report if settings.export is None else _export(report, settings.export, predict, progress)


def _candidates(
    champion: Champion, out: str, settings: NextSettings, predict: PredictPool, progress: Progress
) -> CandidateFiles:
    """The pool as the champion sees it, as far as it has not looked at it yet."""
    features = champion_features(champion, out, predict, partial(progress, "looked at"))
    uris = [pseudo_mask_uri(features.folder, file) for file in features.files]
    return CandidateFiles(uris, pa.array(sorted(_covered(champion)), pa.string()), settings.seed)


def _chosen(champion: Champion, files: CandidateFiles, settings: NextSettings) -> dict[str, Any]:
    """The images, as plain JSON, and of how many they were chosen."""
    of_pool = survey(files)
    if not of_pool.images:
        raise InputError(
            f"{champion.run.out}: every image of its pool is labelled already; add images to the pool",
            "next/all-labelled",
        )
    chosen = choose_images(files, of_pool, STRATEGIES[settings.strategy], settings.count)
    images = [_described(files, of_pool, champion.card.classes, choice) for choice in chosen]
    return {"pool": of_pool.images, "images": [image.model_dump(mode="json") for image in images]}


def _covered(champion: Champion) -> set[str]:
    """Images that are labelled or validate: in the run, and where it takes all labels, those that came since."""
    split = saved_split(champion.run.part("split.json"))[0]
    config: Config = storage.read_json(storage.join(champion.run.out, CONFIG_NAME), Config)
    since = (
        labelled_ids(config.data.root, load_manifest(config.data.root), "train")
        if config.data.labelled == "all"
        else []
    )
    return {*split.labelled, *split.validation, *since}


def _described(files: CandidateFiles, of_pool: Survey, classes: Sequence[str], choice: Choice) -> NextImage:
    row = storage.read_table(files.uris[choice.file]).slice(choice.row, 1).to_pylist()[0]
    shares = np.frombuffer(row["class_shares"], np.float32)
    rarest = int((shares * of_pool.rarities).argmax())
    parts = [
        f"less certain than {of_pool.share_below(row['entropy']):.0%} of the pool",
        f"distance {choice.distance:.2f} to the nearest labelled or chosen image",
        f"{classes[rarest]} on {shares[rarest]:.0%} of it, on {of_pool.class_shares[rarest]:.1%} of the labelled images",
    ]
    return NextImage(
        image_id=row["image_id"],
        source=row["source"] or "",
        entropy=round(row["entropy"], 4),
        margin=round(row["margin"], 4),
        distance=round(choice.distance, 4),
        rarest=classes[rarest],
        why="; ".join(parts),
    )


def _export(report: NextReport, to: str, predict: PredictPool, progress: Progress) -> NextReport:
    """The report with the folder of the export; one that is finished stays as it is."""
    folder, missing = storage.join(report.out, to), tuple[str, ...]()
    mark = storage.join(folder, EXPORT_MARK)
    if not (storage.exists(mark) and storage.read_json(mark, dict[str, Any]).get("finished")):
        settings = ExportSettings(to=to, images=storage.join(report.out, LIST_NAME))
        made = export_labels(report.run, folder, settings, lambda what, done: progress(what, done, 0), predict)
        missing = made.not_found
    return report.model_copy(update={"export": folder, "not_exported": missing})
