"""Whether the data set fits the settings, before any training: images against batches, masks against classes, validation
against training. A mistake that can be known early costs one line, not a GPU."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from threestage import IGNORE_INDEX
from threestage.checks.result import CheckOutcome
from threestage.config import Config, StageName, changed
from threestage.data import parquet, storage
from threestage.data.batches import SampleSet, share_of
from threestage.data.data_set_checks import (
    LEAST_CLASSES,
    Gradients,
    check_class_pixels,
    gradients,
    note_near_copies,
)
from threestage.data.listing import first_image, holds_data_set
from threestage.data.records import (
    Manifest,
    SplitName,
    decode_mask,
    files_with_masks,
    labelled_rows,
    load_manifest,
    pool_files,
)
from threestage.data.samples import TableSamples
from threestage.data.split import Split, make_split, saved_split
from threestage.errors import InputError, StageFailure
from threestage.models.network import check_settings, doubtful_normalisation
from threestage.training.step import micro_batches

SAMPLE = 64  # masks
SAMPLE_OF_IMAGES = 256  # on each side of a split
NOTHING_TO_VALIDATE = "no pixel to validate on: set data.validation above 0, or ingest a val split with masks"
WAYS_OUT: dict[str, Any] = {"network.head": "deeplabv2", "cluster.workers": 1, "training.accumulate": 1}
"""Settings that let smaller batches be trained."""


def check_run(
    config: Config, manifest: Manifest, labelled: SampleSet, validation: SampleSet, warn: Callable[[str], None]
) -> list[int]:
    """Pixels of each class in the labelled masks. Warns of classes without any, and of near-copies among the images.

    Raises:
        InputError: the run could not go well.
    """
    check_settings(config.network)
    check_batches(config, manifest, len(labelled), len(validation))
    counts, labelled_looks = _look(manifest, labelled)
    warning = check_class_pixels(config.data.root, manifest.classes, counts, masks_in_words(len(labelled)))
    if warning is not None:
        warn(warning)
    validation_counts, validation_looks = _look(manifest, validation)
    if sum(validation_counts) == 0:
        raise InputError(f"{config.data.root}: {NOTHING_TO_VALIDATE}", "data/no-validation")
    if (warning := note_near_copies(labelled.ids, labelled_looks, validation.ids, validation_looks)) is not None:
        warn(warning)
    return counts


def masks_in_words(number: int, of: int | None = None) -> str:
    """`1 labelled mask`, `64 of 300 labelled masks`."""
    all_ = number if of is None else of
    return ("" if all_ == number else f"{number} of ") + f"{all_} labelled mask" + "s" * (all_ != 1)


def check_pool(config: Config, images: int) -> None:
    """Raises InputError when the pool has fewer images than a step of all workers takes."""
    for stage in config.stage_names:
        settings = config.stage(stage)
        reliable = int(images * settings.reliable_share)
        _check_unlabelled_batch(config, f"{stage}.unlabelled_batch", settings.unlabelled_batch, reliable)


def check_batches(config: Config, manifest: Manifest, labelled: int, validation: int) -> None:
    """Raises InputError when there are too few images for a step of all workers: so many labelled, and to validate on."""
    _check_labelled_batches(config, labelled)
    for stage in config.stage_names:
        check_shares(config, stage)
    if config.data.unlabelled is None:
        carved = validation if manifest.counts["val"].labelled == 0 else 0
        check_pool(config, sum(file.rows for file in pool_files(manifest)) - carved)
    else:
        _check_unlabelled(config.data.unlabelled)


def _check_unlabelled(place: str) -> None:
    """Raises InputError where there is nothing, or two things of which one would be passed over."""
    is_data_set, image = holds_data_set(place), first_image(place)
    if not is_data_set and image is None:
        raise InputError(
            f"data.unlabelled={place}: no image below it, and it is no data set either; correct the path",
            "data/no-images",
        )
    if is_data_set and image:
        raise InputError(
            f"data.unlabelled={place}: holds a data set (manifest.json) and images ({image}), of which only the data set would "
            "be read; move one of them to a folder of its own",
            "data/two-inputs",
        )


def check_shares(config: Config, stage: StageName) -> None:
    """InputError where the worker that gets the fewest images of a step gets too few."""
    own = config.for_stage(stage)
    _check_mixed(own, stage)
    _check_pieces(own, stage)
    _check_pooled(own, stage)


def _check_labelled_batches(config: Config, available: int) -> None:
    """Raises InputError, with settings that can be trained, where a stage's labelled batch cannot."""
    problem = next(filter(None, (_labelled_problem(config, stage, available) for stage in config.stage_names)), None)
    if problem is None:
        return
    for way_out in _ways_out():
        batches = _labelled_batches(changed(config, way_out), available)
        if batches is not None:
            why = ", and no other size can be trained with these settings" if way_out else ""
            fix = " and ".join(f"{key}={value}" for key, value in {**way_out, **batches}.items())
            raise InputError(f"{problem}{why}: set {fix}, or label more images", "config/batch")
    raise InputError(f"{problem}: label more images", "config/batch")


def _ways_out() -> Iterator[dict[str, Any]]:
    """No change, then WAYS_OUT one by one, then more of them together."""
    for number in range(len(WAYS_OUT) + 1):
        yield from map(dict, combinations(WAYS_OUT.items(), number))


def _labelled_batches(config: Config, available: int) -> dict[str, int] | None:
    """The labelled batches to change so that all stages can be trained, the nearest sizes; None where no size can."""
    sizes = {}
    for stage in config.stage_names:
        now = config.stage(stage).labelled_batch
        possible = (
            size for size in range(1, available + 1) if _labelled_problem(config, stage, available, size) is None
        )
        nearest = min(possible, key=lambda size: abs(size - now), default=None)
        if nearest is None:
            return None
        if nearest != now:
            sizes[f"{stage}.labelled_batch"] = nearest
    return sizes


def _labelled_problem(config: Config, stage: StageName, available: int, size: int | None = None) -> str | None:
    """Why a stage cannot be trained with its labelled batch, or with `size` in its place."""
    size = config.stage(stage).labelled_batch if size is None else size
    batch, workers = f"{stage}.labelled_batch={size}", config.cluster.most_workers
    if size > available:
        return f"{batch} is more than the {_images(available, 'labelled')}"
    if config.training.batch_scope == "global" and size < workers:
        return f"{batch} with training.batch_scope=global leaves some of up to {workers} workers (cluster.workers) no image"
    return _pooled_problem(config.for_stage(stage), stage, size)


def _images(number: int, what: str) -> str:
    return f"1 {what} image that there is" if number == 1 else f"{number} {what} images that there are"


def _check_unlabelled_batch(config: Config, key: str, size: int, available: int) -> None:
    workers = config.cluster.most_workers
    shared = config.training.batch_scope == "global"
    if shared and 0 < size < workers:
        raise_it = "" if workers > available else "raise it, or "
        raise InputError(
            f"{key}={size} with training.batch_scope=global is shared by up to {workers} workers (cluster.workers), at least one "
            f"image for each: {raise_it}lower cluster.workers",
            "config/batch",
        )
    needed = size if shared else size * workers
    if needed > available:
        together = "" if needed == size else f" on each of cluster.workers={workers}"
        raise InputError(
            f"{key}={size}{together} is more than the {_images(available, 'unlabelled')}: lower it, or add images",
            "config/batch",
        )


def _check_mixed(config: Config, stage: StageName) -> None:
    """CutMix mixes the images of one worker."""
    size, workers = config.stage(stage).unlabelled_batch, config.cluster.most_workers
    if config.consistency.cutmix > 0 and size > 0 and share_of(size, config.training.batch_scope, 0, workers).count < 2:
        raise InputError(
            f"{stage}.unlabelled_batch={size} leaves a worker one image (cluster.workers: up to {workers}), and "
            f"consistency.cutmix={config.consistency.cutmix} mixes the images of a worker: raise it, or set cutmix to 0",
            "config/batch",
        )


def _check_pieces(config: Config, stage: StageName) -> None:
    """Raises InputError where workers that share batch norm would make different numbers of forward passes."""
    workers = config.cluster.most_workers
    if workers == 1 or not config.cluster.synchronises(config.network.batch_norm == "live"):
        return
    least, most = (images_of(config, stage, rank) for rank in (0, workers - 1))
    if least < config.training.accumulate and least < most:
        raise InputError(
            f"training.accumulate={config.training.accumulate}: in {stage} the worker with the fewest images has {least}, "
            "and batch norm over all workers needs the same number of forward passes on each: lower it, raise the batches, "
            "or set cluster.sync_batch_norm to false",
            "config/batch",
        )


def images_of(config: Config, stage: StageName, rank: int, labelled_batch: int | None = None) -> int:
    """Images of a step's forward passes on a rank of the largest group; no rank has fewer than 0, none more than the last.

    labelled_batch: in place of the stage's.
    """
    settings, workers = config.stage(stage), config.cluster.most_workers
    labelled_batch = settings.labelled_batch if labelled_batch is None else labelled_batch
    labelled, unlabelled = (
        share_of(size, config.training.batch_scope, rank, workers).count
        for size in (labelled_batch, settings.unlabelled_batch)
    )
    views = 1 + (config.stage1.strong_view if stage == "stage1" else config.supervised.strong_view)
    return labelled * views + unlabelled * config.consistency.strong_views


def _check_pooled(config: Config, stage: StageName) -> None:
    problem = _pooled_problem(config, stage, config.stage(stage).labelled_batch)
    if problem is not None:
        fix = "raise the batch, or lower cluster.workers or training.accumulate, or set network.head=deeplabv2"
        raise InputError(f"{problem}: {fix}", "config/batch")


def _pooled_problem(config: Config, stage: StageName, labelled_batch: int) -> str | None:
    """DeepLabV3+ normalises, over the images of a forward pass, one value that it pools from each of them."""
    workers = config.cluster.most_workers
    if config.network.head != "deeplabv3plus" or (workers > 1 and config.cluster.synchronises(live=True)):
        return None
    images = images_of(config, stage, 0, labelled_batch)
    if all(piece.stop - piece.start >= 2 for piece in micro_batches(images, config.training.accumulate)):
        return None
    labelled = share_of(labelled_batch, config.training.batch_scope, 0, workers).count
    together = f" of up to {workers} workers (cluster.workers)" if labelled < labelled_batch else ""
    return (
        f"{stage}.labelled_batch={labelled_batch} leaves one image to a forward pass{together}, and "
        "network.head=deeplabv3plus takes at least two"
    )


def _look(manifest: Manifest, samples: SampleSet) -> tuple[list[int], list[Gradients]]:
    """Pixels per class, and the gradients of every image. InputError names the image whose mask holds an id that is neither a
    class nor 255."""
    classes, found = len(manifest.classes), []
    counts = np.zeros(256, np.int64)
    for index, image_id in enumerate(samples.ids):
        decoded = samples.decoded(index)
        counts += pixels_by_id(image_id, decoded.maps["mask"], classes)
        found.append(gradients(decoded.image))
    return counts[:classes].tolist(), found


def pixels_by_id(image_id: str, mask: np.ndarray, classes: int) -> np.ndarray:
    """(256,) pixels of a mask (H,W) per id. InputError names an id that is neither a class nor 255."""
    found = np.bincount(mask.ravel(), minlength=256)
    wrong = [i for i in np.flatnonzero(found) if i >= classes and i != IGNORE_INDEX]
    if wrong:
        raise InputError(
            f"{image_id}: its mask holds id {wrong[0]}, the data set has classes 0..{classes - 1} and {IGNORE_INDEX} "
            "(ignore): correct the class map and ingest again",
            "mask/unknown-value",
        )
    return found


# ---- The same in a sample, for `threestage check`


def read_split(config: Config, manifest: Manifest, out: str | None) -> Split:
    """That of the run in `out`, where there is one; else the one that a run would make."""
    saved = None if out is None else storage.join(out, "split.json")
    if saved is not None and storage.exists(saved):
        return saved_split(saved)[0]
    return make_split(config.data.root, manifest, config.data)


def input_fits(config: Config, out: str | None) -> CheckOutcome:
    """Raises InputError when there are too few images for a step of all workers, or the network's settings do not fit."""
    manifest = load_manifest(config.data.root)
    split = read_split(config, manifest, out)
    check_settings(config.for_manifest(manifest).network)
    check_batches(config, manifest, len(split.labelled), len(split.validation))
    pool = sum(file.rows for file in pool_files(manifest)) - split.carved
    workers = config.cluster.most_workers
    more = "" if config.data.unlabelled is None else f" and those of {config.data.unlabelled}"
    return CheckOutcome(
        f"version {manifest.version}: {len(split.labelled)} labelled images, {len(split.validation)} to validate on, "
        f"{pool:,} in the pool{more}; enough for every step of {workers} worker{'s' * (workers > 1)}",
        doubtful_normalisation(config.network),
    )


def classes_fit(config: Config, out: str | None) -> CheckOutcome:
    """Classes with labelled pixels, counted in a sample of the masks; the doubt names the classes without any.

    Raises:
        InputError: a mask holds an id that is no class, fewer than two classes have labelled pixels, or no pixel is
            left to validate on.
    """
    root, manifest = config.data.root, load_manifest(config.data.root)
    split = read_split(config, manifest, out)
    looked_at = sample_of(split.labelled, SAMPLE)
    counts = _count_pixels(root, manifest, "train", looked_at)
    if np.count_nonzero(counts) < LEAST_CLASSES:
        looked_at = split.labelled
        counts = _count_pixels(root, manifest, "train", looked_at)
    seen = masks_in_words(len(looked_at), len(split.labelled))
    warning = check_class_pixels(root, manifest.classes, counts.tolist(), seen)
    validating: SplitName = "val" if split.validation_split == "val" else "train"
    if not _count_pixels(root, manifest, validating, sample_of(split.validation, SAMPLE)).any():
        raise InputError(f"{root}: {NOTHING_TO_VALIDATE}", "data/no-validation")
    return CheckOutcome(f"{len(manifest.classes)} classes, all in {seen}", warning)


def sides_differ(config: Config, out: str | None) -> CheckOutcome:
    """Doubts near-copies of labelled images among the validation images, in a sample of both. Raises InputError where an image
    cannot be read."""
    root, manifest = config.data.root, load_manifest(config.data.root)
    split = read_split(config, manifest, out)
    validating: SplitName = "val" if split.validation_split == "val" else "train"
    labelled, validation = (sample_of(ids, SAMPLE_OF_IMAGES) for ids in (split.labelled, split.validation))
    warning = note_near_copies(
        *_seen(config, manifest, "train", labelled), *_seen(config, manifest, validating, validation)
    )
    sides = ((labelled, split.labelled, "labelled"), (validation, split.validation, "validation"))
    looked_at = " and ".join(f"{len(some)} of {len(every)} {name}" for some, every, name in sides)
    return CheckOutcome(f"no near-copies between {looked_at} images of {root}", warning)


def sample_of(ids: Sequence[str], at_most: int) -> Sequence[str]:
    """So many ids at most, evenly among them."""
    return ids[:: max(1, math.ceil(len(ids) / at_most))]


def _seen(
    config: Config, manifest: Manifest, split: SplitName, ids: Sequence[str]
) -> tuple[list[str], list[Gradients]]:
    rows = labelled_rows(config.data.root, manifest, split, ids)
    samples = SampleSet(TableSamples(rows), config.data.downscale, bands=manifest.bands)
    try:
        return samples.ids, [gradients(samples.decoded(index).image) for index in range(len(samples))]
    except StageFailure as error:
        raise InputError(f"{error.message}; ingest it again", "data/unreadable-image") from None


def _count_pixels(root: str, manifest: Manifest, split: SplitName, ids: Sequence[str]) -> np.ndarray:
    """Pixels per class in the masks of images."""
    classes, counts = len(manifest.classes), np.zeros(256, np.int64)
    for image_id, mask in _masks_of(root, manifest, split, ids).items():
        try:
            decoded = decode_mask(mask)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{image_id}: its mask cannot be read ({error}); ingest it again", "data/unreadable-image"
            ) from None
        counts += pixels_by_id(image_id, decoded, classes)
    return counts[:classes]


def _masks_of(root: str, manifest: Manifest, split: SplitName, ids: Sequence[str]) -> dict[str, bytes]:
    """The latest mask of each image; reads no image."""
    wanted, found = set(ids), {}
    for file in reversed(files_with_masks(manifest, split)):
        if wanted:
            for row in parquet.read_file(storage.join(root, file.path), ["image_id", "mask"]).to_pylist():
                if row["mask"] is not None and row["image_id"] in wanted:
                    found[row["image_id"]] = row["mask"]
                    wanted.remove(row["image_id"])
    return found
