"""Which labels a run may see and what it validates on: one rule, from a seed and the image ids alone."""

import hashlib
import math
from fractions import Fraction
from typing import Literal

from threestage.data.records import DataSettings, Manifest, labelled_ids
from threestage.errors import InputError
from threestage.settings import Settings


class Split(Settings):
    """Image ids. `labelled`: train rows whose masks may be used. `validation`: rows of the val split ("val"), or train
    rows taken out of the labelled ones ("carved"), which the pool must leave out as well."""

    labelled: tuple[str, ...]
    validation: tuple[str, ...]
    validation_split: Literal["carved", "val"]


def make_split(root: str, manifest: Manifest, settings: DataSettings) -> Split:
    """The rule:

    1. Candidates are the train rows that have a mask, in the order of sha256("{split_seed}:{image_id}").
    2. The first n of them are the labels that the run may see: n = `labelled`, or that fraction of the candidates (to
       the nearest whole, at least one), or all.
    3. If the val split has masks, all its masked rows validate. Else positions 0, 1/v, 2/v, … (rounded down) of these
       n, which are ceil(n·v) images for v = `validation`, are carved off to validate; the rest are trained on.

    So a smaller `labelled` gives subsets of what a greater one gives, and images added later leave the others' order.
    Raises InputError when there are fewer candidates than asked for, or too few to carve from.
    """
    candidates = sorted(labelled_ids(root, manifest, "train"), key=lambda image_id: _key(settings.split_seed, image_id))
    chosen = candidates[: _count(root, settings, len(candidates))]
    validation = labelled_ids(root, manifest, "val")
    if validation:
        return Split(labelled=tuple(chosen), validation=tuple(validation), validation_split="val")
    return _carve(chosen, settings.validation)


def _key(seed: int, image_id: str) -> str:
    return hashlib.sha256(f"{seed}:{image_id}".encode()).hexdigest()


def _count(root: str, settings: DataSettings, candidates: int) -> int:
    if candidates == 0:
        raise InputError(f"{root}: no train image has a mask; add labels with `threestage ingest`")
    if settings.labelled == "all":
        return candidates
    if isinstance(settings.labelled, float):
        return max(1, round(settings.labelled * candidates))
    if settings.labelled > candidates:
        raise InputError(
            f"data.labelled is {settings.labelled}, but {root} has {candidates} labelled train images; ask for fewer"
        )
    return settings.labelled


def _carve(chosen: list[str], share: float) -> Split:
    exact = Fraction(str(share))
    carved = [math.ceil((i + 1) * exact) > math.ceil(i * exact) for i in range(len(chosen))]
    if all(carved):
        raise InputError(
            f"data.labelled gives {len(chosen)} labelled and data.validation {share} takes them all; "
            "label more, or give the data set a val split"
        )
    return Split(
        labelled=tuple(image_id for image_id, taken in zip(chosen, carved, strict=True) if not taken),
        validation=tuple(image_id for image_id, taken in zip(chosen, carved, strict=True) if taken),
        validation_split="carved",
    )
