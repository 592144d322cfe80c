"""Which labels a run may see and what it validates on: one rule, from a seed and the image ids alone."""

import hashlib
import math
import posixpath
from fractions import Fraction
from typing import Any, Literal

from threestage.data import storage
from threestage.data.pairs import Paths
from threestage.data.records import DataSettings, Manifest, labelled_ids
from threestage.errors import InputError
from threestage.settings import Settings


class Split(Settings):
    """Image ids. `labelled`: train rows whose masks may be used. `validation`: rows of the val split ("val"), or train
    rows taken out of the labelled ones ("carved"), which the pool must leave out as well."""

    labelled: tuple[str, ...]
    validation: tuple[str, ...]
    validation_split: Literal["carved", "val"]


def saved_split(uri: str) -> tuple[Split, dict[str, Any]]:
    """The split of a run's split.json, and the settings that it was made with. Raises InputError for another file."""
    saved = storage.read_json(uri)
    try:
        return Split.model_validate(saved["split"]), dict(saved.get("settings", {}))
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{uri}: is no split of a run: bring it back from a copy, or give another folder") from None


def make_split(root: str, manifest: Manifest, settings: DataSettings) -> Split:
    """The rule:

    1. Candidates are the train rows that have a mask, in the order of sha256("{split_seed}:{image_id}").
    2. The first n of them are the labels that the run may see: n = `labelled`, or that fraction of the candidates (to
       the nearest whole, at least one), or all. Where `labelled` names a list, they are those of the list.
    3. If the val split has masks, all its masked rows validate. Else positions 0, 1/v, 2/v, … (rounded down) of these
       n, which are ceil(n·v) images for v = `validation`, are carved off to validate; the rest are trained on.

    So a smaller `labelled` gives subsets of what a greater one gives, and images added later leave the others' order.
    Raises InputError when there are fewer candidates than asked for, or too few to carve from, or a listed one has no mask.
    """
    candidates = sorted(labelled_ids(root, manifest, "train"), key=lambda image_id: _key(settings.split_seed, image_id))
    if settings.labelled_list is not None:
        chosen = _listed(root, settings.labelled_list, candidates)
    else:
        chosen = candidates[: _count(root, settings, len(candidates))]
    validation = labelled_ids(root, manifest, "val")
    if validation:
        return Split(labelled=tuple(chosen), validation=tuple(validation), validation_split="val")
    return _carve(chosen, settings.validation)


def _key(seed: int, image_id: str) -> str:
    return hashlib.sha256(f"{seed}:{image_id}".encode()).hexdigest()


def _listed(root: str, uri: str, candidates: list[str]) -> list[str]:
    """The candidates that the lines of a file name: a line is an id or a file's name, or begins with one and a space."""
    try:
        named = storage.read_lines(uri)
    except FileNotFoundError:
        raise InputError(
            f"data.labelled={uri}: no such file; give a count, a fraction below 1, all, or a file with an image id a line"
        ) from None
    known = Paths({image_id: image_id for image_id in candidates})
    wanted = [_id_of(line, known) for line in named]
    if not named:
        raise InputError(f"data.labelled={uri} is empty; give a file with an image id a line")
    if missing := [line for line, image_id in zip(named, wanted, strict=True) if image_id is None]:
        raise InputError(
            f"data.labelled={uri}: {len(missing)} of its {len(named)} images are no train images with a mask in {root}, "
            f"{missing[0]} first (there, ids are like {candidates[0] if candidates else 'none'}): mend the list, or ingest them"
        )
    chosen = set(wanted)
    return [image_id for image_id in candidates if image_id in chosen]


def _id_of(line: str, known: Paths) -> str | None:
    first = line.split()[0]
    candidates = (line, posixpath.splitext(line)[0], first, posixpath.splitext(first)[0])
    return next(filter(None, map(known.find, candidates)), None)


def _count(root: str, settings: DataSettings, candidates: int) -> int:
    if candidates == 0:
        raise InputError(f"{root}: no train image has a mask; add labels with `threestage ingest`")
    if settings.labelled == "all":
        return candidates
    if isinstance(settings.labelled, float):
        return max(1, round(settings.labelled * candidates))
    assert isinstance(settings.labelled, int)
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
