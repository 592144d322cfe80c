"""Which labelled images are held out together: folds of about one size that never part a group (`data.group`)."""

from collections.abc import Mapping, Sequence
from itertools import groupby


def folds_of(ids: Sequence[str], groups: Mapping[str, str], count: int) -> list[tuple[str, ...]]:
    """`count` folds, the next group always into the smallest. Images of a group follow each other in `ids`; one without a group
    is its own."""
    folds = [list[str]() for _ in range(count)]
    for _, members in groupby(ids, lambda image_id: groups.get(image_id, image_id)):
        min(folds, key=len).extend(members)
    return [tuple(fold) for fold in folds]
