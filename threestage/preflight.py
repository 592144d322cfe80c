"""What is checked before any training: every mistake that can be known early costs one line, not a GPU."""

import numpy as np

from threestage import IGNORE_INDEX
from threestage.config import Config
from threestage.data.batches import SampleSet
from threestage.data.records import Manifest, pool_files
from threestage.errors import InputError
from threestage.models.network import check_settings


def check_run(config: Config, manifest: Manifest, labelled: SampleSet, validation: SampleSet) -> list[int]:
    """Raises InputError when the run could not go well; returns the labels' pixel count per class."""
    check_settings(config.network)
    _check_batches(config, manifest, labelled, validation)
    counts = _count_pixels(manifest, labelled)
    if sum(counts) == 0:
        raise InputError(f"{config.data.root}: every pixel of the {len(labelled)} labelled masks is ignored (255)")
    if sum(_count_pixels(manifest, validation)) == 0:
        raise InputError(
            f"{config.data.root}: no pixel to validate on: set data.validation above 0, or ingest a val split with masks"
        )
    return counts


def _check_batches(config: Config, manifest: Manifest, labelled: SampleSet, validation: SampleSet) -> None:
    carved = len(validation) if manifest.counts["val"].labelled == 0 else 0
    pool = sum(file.rows for file in pool_files(manifest)) - carved
    for stage in config.stage_names:
        settings = config.stage(stage)
        for key, size, available, what in (
            ("labelled_batch", settings.labelled_batch, len(labelled), "labelled"),
            ("unlabelled_batch", settings.unlabelled_batch, pool, "unlabelled"),
        ):
            if size * config.cluster.workers > available:
                raise InputError(
                    f"{stage}.{key}={size} on cluster.workers={config.cluster.workers} is more than the {available} {what} "
                    f"images that there are: at most {available // config.cluster.workers}"
                )


def _count_pixels(manifest: Manifest, samples: SampleSet) -> list[int]:
    """Pixels per class. InputError names the image whose mask holds an id that is neither a class nor 255."""
    classes = len(manifest.classes)
    counts = np.zeros(256, np.int64)
    for index in range(len(samples)):
        found = np.bincount(samples.decoded(index).maps["mask"].ravel(), minlength=256)
        wrong = [i for i in np.flatnonzero(found) if i >= classes and i != IGNORE_INDEX]
        if wrong:
            raise InputError(
                f"{samples.samples[index].image_id}: its mask holds id {wrong[0]}, the data set has classes 0..{classes - 1} "
                "and 255 (ignore): mend the class map and ingest again"
            )
        counts += found
    return counts[:classes].tolist()
