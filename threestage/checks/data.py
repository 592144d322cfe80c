"""Whether the data set fits the settings: images against batches, masks against classes, validation against training."""

import math
from collections.abc import Sequence

import numpy as np

from threestage.checks.preflight import NOTHING_TO_VALIDATE, check_batches, masks_in_words, pixels_by_id
from threestage.checks.result import CheckOutcome
from threestage.config import Config
from threestage.data import parquet, storage
from threestage.data.batches import SampleSet
from threestage.data.data_set_checks import (
    LEAST_CLASSES,
    Gradients,
    check_class_pixels,
    gradients,
    note_near_copies,
)
from threestage.data.records import (
    Manifest,
    SplitName,
    decode_mask,
    files_with_masks,
    labelled_rows,
    load_manifest,
    pool_files,
)
from threestage.data.samples import Sample, samples_of
from threestage.data.split import Split, make_split, saved_split
from threestage.errors import InputError, StageFailure
from threestage.models.network import check_settings, doubtful_normalisation

SAMPLE = 64  # masks
SAMPLE_OF_IMAGES = 256  # on each side of a split


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
    check_settings(config.network)
    check_batches(config, manifest, _by_name(split.labelled), _by_name(split.validation))
    pool = sum(file.rows for file in pool_files(manifest))
    workers = config.cluster.most_workers
    more = "" if config.data.unlabelled is None else f" and those of {config.data.unlabelled}"
    return CheckOutcome(
        f"version {manifest.version}: {len(split.labelled)} labelled images, {len(split.validation)} to validate on, "
        f"{pool:,} in the pool{more}; enough for every step of {workers} worker{'s' * (workers > 1)}",
        doubtful_normalisation(config.network),
    )


def _by_name(ids: Sequence[str]) -> SampleSet:
    return SampleSet([Sample(image_id, b"") for image_id in ids], 1)


def classes_fit(config: Config, out: str | None) -> CheckOutcome:
    """Classes with labelled pixels, counted in a sample of the masks; the doubt names the classes without any.

    Raises:
        InputError: a mask holds an id that is no class, fewer than two classes have labelled pixels, or no pixel is
            left to validate on.
    """
    root, manifest = config.data.root, load_manifest(config.data.root)
    split = read_split(config, manifest, out)
    looked_at = sample_of(split.labelled)
    counts = _count_pixels(root, manifest, "train", looked_at)
    if np.count_nonzero(counts) < LEAST_CLASSES:
        looked_at = split.labelled
        counts = _count_pixels(root, manifest, "train", looked_at)
    seen = masks_in_words(len(looked_at), len(split.labelled))
    warning = check_class_pixels(root, manifest.classes, counts.tolist(), seen)
    validating: SplitName = "val" if split.validation_split == "val" else "train"
    if not _count_pixels(root, manifest, validating, sample_of(split.validation)).any():
        raise InputError(f"{root}: {NOTHING_TO_VALIDATE}", "data/no-validation")
    return CheckOutcome(f"{len(manifest.classes)} classes, all in {seen}", warning)


def sample_of(ids: Sequence[str]) -> Sequence[str]:
    """At most SAMPLE ids, evenly among them."""
    return ids[:: max(1, len(ids) // SAMPLE)][:SAMPLE]


def sides_differ(config: Config, out: str | None) -> CheckOutcome:
    """Doubts near-copies of labelled images among the validation images, in a sample of both. Raises InputError where an image
    cannot be read."""
    root, manifest = config.data.root, load_manifest(config.data.root)
    split = read_split(config, manifest, out)
    validating: SplitName = "val" if split.validation_split == "val" else "train"
    labelled, validation = _evenly(split.labelled), _evenly(split.validation)
    warning = note_near_copies(
        *_seen(config, manifest, "train", labelled), *_seen(config, manifest, validating, validation)
    )
    sides = ((labelled, split.labelled, "labelled"), (validation, split.validation, "validation"))
    looked_at = " and ".join(f"{len(some)} of {len(every)} {name}" for some, every, name in sides)
    return CheckOutcome(f"no near-copies between {looked_at} images of {root}", warning)


def _evenly(ids: Sequence[str]) -> Sequence[str]:
    return ids[:: max(1, math.ceil(len(ids) / SAMPLE_OF_IMAGES))]


def _seen(
    config: Config, manifest: Manifest, split: SplitName, ids: Sequence[str]
) -> tuple[list[str], list[Gradients]]:
    rows = labelled_rows(config.data.root, manifest, split, ids)
    samples = SampleSet(samples_of(rows.to_pydict()), config.data.downscale)
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
