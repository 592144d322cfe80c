"""What is checked before any training: every mistake that can be known early costs one line, not a GPU."""

import numpy as np

from threestage import IGNORE_INDEX
from threestage.config import Config, StageName
from threestage.data import storage
from threestage.data.batches import SampleSet, share_of
from threestage.data.listing import first_image
from threestage.data.records import MANIFEST_NAME, Manifest, pool_files
from threestage.errors import InputError
from threestage.models.network import check_settings
from threestage.training.step import pieces

NOTHING_TO_VALIDATE = "no pixel to validate on: set data.validation above 0, or ingest a val split with masks"


def check_run(config: Config, manifest: Manifest, labelled: SampleSet, validation: SampleSet) -> list[int]:
    """Raises InputError when the run could not go well; returns the labels' pixel count per class."""
    check_settings(config.network)
    check_batches(config, manifest, labelled, validation)
    counts = _count_pixels(manifest, labelled)
    if sum(counts) == 0:
        raise InputError(
            f"{config.data.root}: every pixel of the {len(labelled)} labelled masks is ignored (255): mend the class map and "
            "ingest again"
        )
    if sum(_count_pixels(manifest, validation)) == 0:
        raise InputError(f"{config.data.root}: {NOTHING_TO_VALIDATE}")
    return counts


def check_pool(config: Config, images: int) -> None:
    """Raises InputError when the pool has fewer images than a step of all workers takes."""
    for stage in config.stage_names:
        settings = config.stage(stage)
        reliable = int(images * settings.reliable_share)
        _check_batch(config, f"{stage}.unlabelled_batch", settings.unlabelled_batch, reliable, "unlabelled")


def check_batches(config: Config, manifest: Manifest, labelled: SampleSet, validation: SampleSet) -> None:
    for stage in config.stage_names:
        _check_batch(config, f"{stage}.labelled_batch", config.stage(stage).labelled_batch, len(labelled), "labelled")
        check_shares(config, stage)
    if config.data.unlabelled is None:
        carved = len(validation) if manifest.counts["val"].labelled == 0 else 0
        check_pool(config, sum(file.rows for file in pool_files(manifest)) - carved)
    elif (
        not storage.exists(storage.join(config.data.unlabelled, MANIFEST_NAME))
        and first_image(config.data.unlabelled) is None
    ):
        raise InputError(
            f"data.unlabelled={config.data.unlabelled}: no image below it, and it is no data set either: mend the path"
        )


def check_shares(config: Config, stage: StageName) -> None:
    """InputError where the worker that gets the fewest images of a step gets too few."""
    own = config.for_stage(stage)
    _check_mixed(own, stage)
    _check_pieces(own, stage)
    _check_pooled(own, stage)


def _check_batch(config: Config, key: str, size: int, available: int, what: str) -> None:
    workers = config.cluster.most_workers
    shared = config.training.batch == "global"
    if shared and 0 < size < workers:
        raise InputError(
            f"{key}={size} with training.batch=global is shared by up to {workers} workers (cluster.workers), at least one "
            "image for each: raise it, or lower cluster.workers"
        )
    needed = size if shared or what == "labelled" else size * workers
    if needed > available:
        together = "" if needed == size else f" on each of cluster.workers={workers}"
        raise InputError(
            f"{key}={size}{together} is more than the {available} {what} images that there are: lower it, or add images"
        )


def _check_mixed(config: Config, stage: StageName) -> None:
    """CutMix mixes the images of one worker."""
    size, workers = config.stage(stage).unlabelled_batch, config.cluster.most_workers
    if config.consistency.cutmix > 0 and size > 0 and share_of(size, config.training.batch, 0, workers).count < 2:
        raise InputError(
            f"{stage}.unlabelled_batch={size} leaves a worker one image (cluster.workers: up to {workers}), and "
            f"consistency.cutmix={config.consistency.cutmix} mixes the images of a worker: raise it, or set cutmix to 0"
        )


def _check_pieces(config: Config, stage: StageName) -> None:
    """Where batch norm is over the images of all workers, they wait for each other in every forward pass."""
    workers = config.cluster.most_workers
    if workers == 1 or not config.cluster.synchronises(config.network.batch_norm == "live"):
        return
    least, most = (_images_of(config, stage, rank) for rank in (0, workers - 1))
    if least < config.training.accumulate and least < most:
        raise InputError(
            f"training.accumulate={config.training.accumulate}: in {stage} the worker with the fewest images has {least}, "
            "and batch norm over all workers needs the same number of forward passes on each: lower it, raise the batches, "
            "or set cluster.sync_batch_norm to false"
        )


def _images_of(config: Config, stage: StageName, rank: int) -> int:
    """Images of a step's forward passes on a rank of the largest group; no rank has fewer than 0, none more than the last."""
    settings, workers = config.stage(stage), config.cluster.most_workers
    labelled, unlabelled = (
        share_of(size, config.training.batch, rank, workers).count
        for size in (settings.labelled_batch, settings.unlabelled_batch)
    )
    views = 1 + (config.stage1.strong_view if stage == "stage1" else config.supervised.strong_view)
    return labelled * views + unlabelled * config.consistency.strong_views


def _check_pooled(config: Config, stage: StageName) -> None:
    """DeepLabV3+ normalises, over the images of a forward pass, one value that it pools from each of them."""
    settings, workers = config.stage(stage), config.cluster.most_workers
    if config.network.head != "deeplabv3plus" or (workers > 1 and config.cluster.synchronises(live=True)):
        return
    images = _images_of(config, stage, 0)
    labelled = share_of(settings.labelled_batch, config.training.batch, 0, workers).count
    if any(piece.stop - piece.start < 2 for piece in pieces(images, config.training.accumulate)):
        together = f" of up to {workers} workers (cluster.workers)" if labelled < settings.labelled_batch else ""
        raise InputError(
            f"{stage}.labelled_batch={settings.labelled_batch}: leaves one image to a forward pass{together}, of which "
            "network.head=deeplabv3plus takes two at least: raise the batch, or lower cluster.workers or training.accumulate"
        )


def _count_pixels(manifest: Manifest, samples: SampleSet) -> list[int]:
    """Pixels per class. InputError names the image whose mask holds an id that is neither a class nor 255."""
    classes = len(manifest.classes)
    counts = np.zeros(256, np.int64)
    for index in range(len(samples)):
        counts += pixels_by_id(samples.samples[index].image_id, samples.decoded(index).maps["mask"], classes)
    return counts[:classes].tolist()


def pixels_by_id(image_id: str, mask: np.ndarray, classes: int) -> np.ndarray:
    """(256,) pixels of a mask (H,W) per id. InputError names an id that is neither a class nor 255."""
    found = np.bincount(mask.ravel(), minlength=256)
    wrong = [i for i in np.flatnonzero(found) if i >= classes and i != IGNORE_INDEX]
    if wrong:
        raise InputError(
            f"{image_id}: its mask holds id {wrong[0]}, the data set has classes 0..{classes - 1} and {IGNORE_INDEX} "
            "(ignore): mend the class map and ingest again"
        )
    return found
