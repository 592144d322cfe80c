"""Class maps: YAML that says which id or colour of a source mask is which class, or is ignored.

    classes:
      - {name: road, colour: [128, 64, 128], ids: [7, 8]}
      - {name: car, colour: [0, 0, 142], colours: [[0, 0, 142], [0, 0, 70]]}
    ignore: {ids: [255], colours: [[0, 0, 0]]}

The order of `classes` gives the class ids, from 0. `colour` is the class's colour in pictures and, unless `colours`
says otherwise, in colour-coded masks.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Annotated, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError, model_validator

from threestage import IGNORE_INDEX
from threestage.data import storage
from threestage.errors import InputError
from threestage.settings import Settings
from threestage.yaml_text import read_yaml

Channel = Annotated[int, Field(ge=0, le=255)]
Colour = tuple[Channel, Channel, Channel]
SourceId = Annotated[int, Field(ge=0, le=65535)]


class ClassEntry(Settings):
    name: str = Field(min_length=1)
    colour: Colour
    ids: tuple[SourceId, ...] = ()
    colours: tuple[Colour, ...] = ()


class Ignored(Settings):
    ids: tuple[SourceId, ...] = ()
    colours: tuple[Colour, ...] = ()


class ClassMap(Settings):
    """A class map as its file says it; see the module."""

    classes: tuple[ClassEntry, ...] = Field(min_length=1, max_length=IGNORE_INDEX)
    ignore: Ignored = Ignored()

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        _refuse_repeats("class name", (entry.name for entry in self.classes))
        _refuse_repeats("id", (i for ids in (*(entry.ids for entry in self.classes), self.ignore.ids) for i in ids))
        _refuse_repeats(
            "colour", (c for group in (*map(_mask_colours, self.classes), self.ignore.colours) for c in group)
        )
        return self


def _mask_colours(entry: ClassEntry) -> tuple[Colour, ...]:
    return entry.colours or (entry.colour,)


def _refuse_repeats(what: str, values: Iterable[object]) -> None:
    repeated = [value for value, count in Counter(values).items() if count > 1]
    if repeated:
        raise ValueError(f"{what} {repeated[0]} stands there more than once")


def load_class_map(uri: str) -> ClassMap:
    """Read and check a class map. Raises InputError, naming the file and the place in it."""
    try:
        text = storage.read_bytes(uri)
    except FileNotFoundError:
        raise InputError(f"{uri}: no such class map; mend class_map") from None
    return _validated(uri, read_yaml(text, uri))


def shipped_class_map(name: str) -> ClassMap:
    """One of the maps in the package: camvid, voc, cityscapes."""
    text = (resources.files("threestage.data") / "class_maps" / f"{name}.yaml").read_text("utf-8")
    return _validated(f"{name}.yaml", read_yaml(text, name))


def _validated(uri: str, raw: object) -> ClassMap:
    if not isinstance(raw, dict):
        raise InputError(f"{uri}: a class map is a mapping with classes: and ignore:; mend the class map")
    try:
        return ClassMap.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{uri}: {f'{place}: ' if place else ''}{message}; mend the class map") from None


@dataclass(frozen=True)
class Unknown:
    """The first value of a mask that its class map does not know."""

    value: str
    row: int
    column: int


class Lookup:
    """Source masks to class ids, by sorted keys: an id, or a colour packed into 24 bits."""

    def __init__(self, class_map: ClassMap, name: str) -> None:
        self.name = name
        entries = class_map.classes
        self._ids = _table([entry.ids for entry in entries], class_map.ignore.ids)
        self._colours = _table(
            [[_packed(colour) for colour in _mask_colours(entry)] for entry in entries],
            [_packed(colour) for colour in class_map.ignore.colours],
        )

    def __call__(self, values: npt.NDArray[np.integer]) -> npt.NDArray[np.uint8] | Unknown:
        """(H,W) source ids, or (H,W,3) uint8 colours, to uint8 (H,W) class ids (255: ignored), or the first unknown."""
        coloured = values.ndim == 3
        keys, targets = self._colours if coloured else self._ids
        flat = values.astype(np.int64)
        if coloured:
            flat = flat[..., 0] << 16 | flat[..., 1] << 8 | flat[..., 2]
        place = np.minimum(np.searchsorted(keys, flat), len(keys) - 1)
        known = keys[place] == flat
        if not known.all():
            row, column = np.argwhere(~known)[0]
            return Unknown(str(values[row, column].tolist()), int(row), int(column))
        return targets[place]


def _packed(colour: Colour) -> int:
    return colour[0] << 16 | colour[1] << 8 | colour[2]


def _table(
    classes: Sequence[Sequence[int]], ignored: Sequence[int]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """Sorted source keys and the class id of each. An impossible key (-1) keeps an empty table searchable."""
    pairs = sorted(
        [(-1, IGNORE_INDEX)]
        + [(key, class_id) for class_id, keys in enumerate(classes) for key in keys]
        + [(key, IGNORE_INDEX) for key in ignored]
    )
    return np.array([key for key, _ in pairs], np.int64), np.array([target for _, target in pairs], np.uint8)
