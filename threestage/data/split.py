"""Which labels a run may see and what it validates on: one rule, from a seed and the image ids alone."""

import csv
import hashlib
import math
import posixpath
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import chain, groupby
from typing import Any, Literal

from pydantic import Field

from threestage.data import storage
from threestage.data.pairs import Paths
from threestage.data.records import DataSettings, Manifest, labelled_ids
from threestage.data.scenes import scenes_of
from threestage.errors import InputError
from threestage.settings import Settings


class Split(Settings):
    """Image ids. `labelled`: train rows whose masks may be used. `validation`: rows of the val split ("val"), or train
    rows taken out of the labelled ones ("carved"), which the pool must leave out as well. `groups`: of each validation image,
    empty without `data.group`."""

    labelled: tuple[str, ...]
    validation: tuple[str, ...]
    validation_split: Literal["carved", "val"]
    groups: dict[str, str] = Field({})

    @property
    def carved(self) -> int:
        """How many images of the pool validate and are not predicted."""
        return len(self.validation) if self.validation_split == "carved" else 0


def saved_split(uri: str) -> tuple[Split, dict[str, Any]]:
    """The split of a run's split.json, and the settings that it was made with. Raises InputError for another file."""
    saved = storage.read_json(uri)
    try:
        return Split.model_validate(saved["split"]), dict(saved.get("settings", {}))
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f"{uri}: is no split of a run; bring it back from a copy, or give another folder", "data/foreign-folder"
        ) from None


def make_split(root: str, manifest: Manifest, settings: DataSettings, before: Split | None = None) -> Split:
    """The rule:

    1. Candidates are the train rows that have a mask, in the order of sha256("{split_seed}:{image_id}").
    2. The first n of them are the labels that the run may see: n = `labelled`, or that fraction of the candidates (to
       the nearest whole, at least one), or all. Where `labelled` names a list, they are those of the list.
    3. If the val split has masks, all its masked rows validate. Else positions 0, 1/v, 2/v, … (rounded down) of these
       n, which are ceil(n·v) images for v = `validation`, are carved off to validate; the rest are trained on.

    So a smaller `labelled` gives subsets of what a greater one gives, and images added later leave the others' order.

    With `group`, the order is that of sha256("{split_seed}:{group}") first, the last group of the n may be cut, whole groups are
    carved (see `_carve`), and candidates of a group that the val split has are left out.

    `before`, the split of the run that this one continues: what was carved there validates here too, and nothing else does;
    images of its groups are no labels.

    Raises InputError when there are fewer candidates than asked for, or too few to carve from, or a listed one has no mask.
    """
    train, validation = labelled_ids(root, manifest, "train"), labelled_ids(root, manifest, "val")
    groups = groups_of(settings, [*train, *validation])
    candidates = _candidates(root, settings, train, validation, groups)
    if settings.labelled_list is not None:
        chosen = _listed(root, settings.labelled_list, candidates, set(train) - set(candidates))
    else:
        chosen = candidates[: _count(root, settings, len(candidates), len(train))]
    if validation:
        return Split(
            labelled=tuple(chosen),
            validation=tuple(validation),
            validation_split="val",
            groups={image_id: groups[image_id] for image_id in validation} if groups else {},
        )
    if before is not None and before.validation_split == "carved":
        apart = {*before.validation, *before.groups.values()}
        labelled = (image_id for image_id in chosen if not {image_id, groups.get(image_id)} & apart)
        return before.model_copy(update={"labelled": tuple(labelled)})
    return _carve(chosen, settings.validation, groups)


def _candidates(
    root: str, settings: DataSettings, train: Sequence[str], validation: Sequence[str], groups: Mapping[str, str]
) -> list[str]:
    """Train images that may be labels, in their order. InputError where all of them are of groups that the val split has."""

    def order(image_id: str) -> tuple[str, str]:
        group = groups.get(image_id, image_id)
        return _key(settings.split_seed, group), _key(settings.split_seed, image_id)

    validating = {groups[image_id] for image_id in validation} if groups else set()
    candidates = sorted((i for i in train if groups.get(i) not in validating), key=order)
    if train and not candidates:
        raise InputError(
            f"{root}: every labelled train image is of a group that the val split has, by data.group={settings.group}; "
            "change data.group, or the val split",
            "data/group-on-both-sides",
        )
    return candidates


def groups_of(settings: DataSettings, ids: Sequence[str]) -> dict[str, str]:
    """The group of every image: without `data.group` the scene of a tile, and none of a data set without tiles. InputError where
    an image has none."""
    if settings.group is None:
        return scenes_of(settings.root, ids)
    if settings.group_list is not None:
        found = _listed_groups(settings.group_list, Paths({image_id: image_id for image_id in ids}))
    else:
        matches = {image_id: re.search(settings.group, image_id) for image_id in ids}
        found = {image_id: _matched(match) for image_id, match in matches.items() if match is not None}
    if missing := [image_id for image_id in ids if not found.get(image_id)]:
        raise InputError(
            f"data.group={settings.group}: {len(missing)} of {len(ids)} labelled images have no group, {missing[0]} first; "
            "change it so that every labelled image has one",
            "data/no-group",
        )
    return found


def _matched(match: re.Match[str]) -> str:
    return next((group for group in match.groups() if group is not None), match[0])


def _listed_groups(uri: str, known: Paths) -> dict[str, str]:
    """From the columns image_id (or a file's name) and group."""
    rows = csv.DictReader(_lines(f"data.group={uri}", uri, "a .csv file with the columns image_id and group"))
    try:
        table = [(row.get("image_id") or "", row.get("group") or "") for row in rows]
    except csv.Error as error:
        raise InputError(f"data.group={uri}: is no .csv file ({error}); write it again", "data/group-columns") from None
    if not {"image_id", "group"} <= set(rows.fieldnames or ()):
        raise InputError(
            f"data.group={uri}: its first line has the columns {rows.fieldnames or 'none'}; name them image_id and group",
            "data/group-columns",
        )
    found: dict[str, str] = {}
    for name, group in table:
        image_id = _id_of(name.strip(), known) if name.strip() else None
        if image_id is not None and found.setdefault(image_id, group.strip()) != group.strip():
            raise InputError(
                f"data.group={uri}: {image_id} stands in two groups, {found[image_id]} and {group.strip()}; keep one",
                "data/two-groups",
            )
    return found


def _key(seed: int, image_id: str) -> str:
    return hashlib.sha256(f"{seed}:{image_id}".encode()).hexdigest()


def _lines(key: str, uri: str, instead: str) -> list[str]:
    """Of a text file that a setting names. InputError says what to give `instead`."""
    try:
        return storage.read_lines(uri)
    except FileNotFoundError:
        raise InputError(f"{key}: no such file; give {instead}", "storage/not-found") from None


def _listed(root: str, uri: str, candidates: list[str], left_out: set[str]) -> list[str]:
    """The candidates that the lines of a file name: a line is an id or a file's name, or begins with one and a space.

    left_out: train images of a group that the val split has; InputError where one is listed.
    """
    named = _lines(f"data.labelled={uri}", uri, "a count, a fraction below 1, all, or a file with an image id a line")
    known = Paths({image_id: image_id for image_id in (*candidates, *left_out)})
    wanted = [_id_of(line, known) for line in named]
    if not named:
        raise InputError(f"data.labelled={uri}: is empty; give a file with an image id a line", "data/labelled-list")
    if missing := [line for line, image_id in zip(named, wanted, strict=True) if image_id is None]:
        raise InputError(
            f"data.labelled={uri}: {len(missing)} of its {len(named)} images are no train images with a mask in {root}, "
            f"{missing[0]} first (ids are like {candidates[0] if candidates else 'none'}); correct the list, or ingest them",
            "data/labelled-list",
        )
    if both := sorted(left_out & set(wanted)):
        raise InputError(
            f"data.labelled={uri}: {len(both)} of its {len(named)} images are of a group of the val split, {both[0]} first; take "
            "them out of the list, or change data.group",
            "data/group-on-both-sides",
        )
    chosen = set(wanted)
    return [image_id for image_id in candidates if image_id in chosen]


def _id_of(line: str, known: Paths) -> str | None:
    first = line.split()[0]
    candidates = (line, posixpath.splitext(line)[0], first, posixpath.splitext(first)[0])
    return next(filter(None, map(known.find, candidates)), None)


def _count(root: str, settings: DataSettings, candidates: int, labelled: int) -> int:
    if candidates == 0:
        raise InputError(f"{root}: no train image has a mask; add labels with `threestage ingest`", "data/no-masks")
    if settings.labelled == "all":
        return candidates
    if isinstance(settings.labelled, float):
        return max(1, round(settings.labelled * candidates))
    assert isinstance(settings.labelled, int)
    if settings.labelled > candidates:
        outside = "" if candidates == labelled else " outside the groups of its val split"
        raise InputError(
            f"data.labelled is {settings.labelled}, but {root} has {candidates} labelled train images{outside}; ask for fewer",
            "data/too-few-labels",
        )
    return settings.labelled


def _carve(chosen: Sequence[str], share: float, groups: Mapping[str, str] = {}) -> Split:
    """A group of g images validates if v validate so far and v + g/2 < ceil(share · images up to its last); where none or all
    do, the smallest group changes sides. Without groups every image is one: ceil(share · n) validate, but not all n."""
    exact = Fraction(str(share))
    whole = [list(members) for _, members in groupby(chosen, lambda image_id: groups.get(image_id, image_id))]
    labelled, validation = list[list[str]](), list[list[str]]()
    seen = validating = 0
    for members in whole:
        seen += len(members)
        carved = validating + len(members) / 2 < math.ceil(seen * exact)
        validating += len(members) if carved else 0
        (validation if carved else labelled).append(members)
    for side, other in ((validation, labelled), (labelled, validation)):
        if not side and len(other) > 1 and share > 0:
            side.append(other.pop(other.index(min(other, key=len))))
    if not labelled or (share > 0 and not validation):
        together = f", in {len(whole)} group{'s' * (len(whole) > 1)} by data.group or scene," if groups else ""
        raise InputError(
            f"data.labelled gives {len(chosen)} labelled{together} and data.validation {share} takes them all; "
            "label more, or give the data set a val split",
            "data/no-validation",
        )
    return Split(
        labelled=tuple(chain.from_iterable(labelled)),
        validation=tuple(chain.from_iterable(validation)),
        validation_split="carved",
        groups={image_id: groups[image_id] for image_id in chain.from_iterable(validation)} if groups else {},
    )
