"""Class maps: YAML that says which id or colour of a source mask is which class, or is ignored.

    classes:
      - {name: road, colour: [128, 64, 128], ids: [7, 8]}
      - {name: car, colour: [0, 0, 142], colours: [[0, 0, 142], [0, 0, 70]]}
    ignore: {ids: [255], colours: [[0, 0, 0]]}

Other spellings that can mean one thing only are read too: `color`, '#804080', `ids: 7`, `ignore: 255`.

The order of `classes` gives the class ids, from 0. `colour` is the class's colour in pictures and, unless `colours`
says otherwise, in colour-coded masks. `categories` are names in the export of a labelling tool that mean the class, or are
ignored; without them the class's own name is.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Annotated, Any, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, model_serializer, model_validator

from threestage import IGNORE_INDEX
from threestage.data import storage
from threestage.errors import InputError, did_you_mean
from threestage.settings import Settings
from threestage.user_files import read_yaml

NO_KEY = -(2**62)
PIXELS_AT_ONCE = 2**20  # of a mask: looking one up takes some 40 bytes a pixel

Channel = Annotated[int, Field(ge=0, le=255)]
Colour = tuple[Channel, Channel, Channel]
SourceId = Annotated[int, Field(ge=-32768, le=65535)]  # negative ones are of signed masks

OTHER_SPELLINGS = {"color": "colour", "colors": "colours", "id": "ids"}
HEX_COLOUR = re.compile("#?([0-9a-f]{6}|[0-9a-f]{3})", re.IGNORECASE)
COLOUR_FORM = "write [R, G, B] of 0 to 255, or '#rrggbb' in quotes"
IDS_FORM = "write whole numbers of -32768 to 65535, such as [0, 7]"
CODE = "data/class-map"


class _MaskValues(Settings):
    """What stands for something in masks and in exports."""

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without `categories` where there are none: digests of shards are those of maps before there was the key."""
        return {key: value for key, value in handler(self).items() if key != "categories" or value}


class ClassEntry(_MaskValues):
    name: str = Field(min_length=1)
    colour: Colour
    ids: tuple[SourceId, ...] = ()
    colours: tuple[Colour, ...] = ()
    categories: tuple[str, ...] = ()

    @property
    def category_names(self) -> tuple[str, ...]:
        return self.categories or (self.name,)


class Ignored(_MaskValues):
    ids: tuple[SourceId, ...] = ()
    colours: tuple[Colour, ...] = ()
    categories: tuple[str, ...] = ()


class ClassMap(Settings):
    """A class map as its file says it; see the module."""

    classes: tuple[ClassEntry, ...] = Field(min_length=1, max_length=IGNORE_INDEX)
    ignore: Ignored = Ignored()

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        _refuse_repeats("class name", (entry.name for entry in self.classes))
        _refuse_repeats("id", (i for ids in (*(entry.ids for entry in self.classes), self.ignore.ids) for i in ids))
        _refuse_repeats(
            "category",
            (n for names in (*(e.category_names for e in self.classes), self.ignore.categories) for n in names),
        )
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
        raise InputError(f"class_map={uri}: no such file; correct the path", CODE) from None
    return _validated(uri, read_yaml(text, uri))


def shipped_class_map(name: str) -> ClassMap:
    """One of the maps in the package: camvid, voc, cityscapes."""
    text = (resources.files("threestage.data") / "class_maps" / f"{name}.yaml").read_text("utf-8")
    return _validated(f"{name}.yaml", read_yaml(text, name))


def _validated(uri: str, raw: object) -> ClassMap:
    try:
        if not isinstance(raw, dict):
            raise ValueError("a class map is a mapping with `classes:` and `ignore:`; write it so")
        return ClassMap.model_validate(_canonical(raw))
    except ValidationError as error:
        raise InputError(f"{uri}: {_complaint(dict(error.errors()[0]))}", CODE) from None
    except ValueError as error:
        raise InputError(f"{uri}: {error}", CODE) from None


def _complaint(problem: Mapping[str, Any]) -> str:
    """What pydantic says, with the right form of the key."""
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        models: dict[int, type[Settings]] = {1: ClassMap, 2: Ignored, 3: ClassEntry}
        keys = models[min(len(problem["loc"]), 3)].model_fields
        return f"{place}: unknown key{did_you_mean(problem['loc'][-1], keys) or ';'} valid here: {', '.join(keys)}"
    forms = {
        "colour": COLOUR_FORM,
        "colours": COLOUR_FORM,
        "ids": IDS_FORM,
        "name": "write a text, in quotes if need be",
    }
    form = next((forms[part] for part in problem["loc"] if part in forms), "correct the class map")
    return f"{place}: {problem['msg'].removeprefix('Value error, ')}; {form}".removeprefix(": ")


# Other spellings


def _canonical(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A class map in the spelling of ClassMap. Raises ValueError, naming the key, for what could mean several things."""
    tree = dict(raw)
    if isinstance(tree.get("classes"), list):
        tree["classes"] = [_entry(f"classes.{number}", entry) for number, entry in enumerate(tree["classes"])]
    if "ignore" in tree:
        ignored = tree["ignore"]
        tree["ignore"] = _entry("ignore", ignored if isinstance(ignored, dict) else {"ids": ignored or ()})
    return tree


def _entry(place: str, raw: object) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise ValueError(f"{place}={raw!r}: not a class; write {{name: NAME, colour: [R, G, B], ids: [N]}}")
    entry: dict[str, Any] = {}
    for key, value in raw.items():
        name = OTHER_SPELLINGS.get(str(key), str(key))
        if name in entry:
            raise ValueError(f"{place}: has both {name} and {key}; keep {name}")
        entry[name] = FORMS[name](f"{place}.{key}", value) if name in FORMS else value
    return entry


def _ids(place: str, value: Any) -> list[Any]:
    ids = list(value) if isinstance(value, list | tuple) else [value]
    wrong = next((one for one in ids if not isinstance(one, int) or isinstance(one, bool)), None)
    if wrong is not None or None in ids:
        raise ValueError(f"{place}={value!r}: {wrong!r} is no id; {IDS_FORM}")
    return ids


def _colour(place: str, value: Any) -> list[int]:
    found = HEX_COLOUR.fullmatch(value) if isinstance(value, str) else None
    if found:
        digits = found[1] if len(found[1]) == 6 else "".join(2 * digit for digit in found[1])
        return list(bytes.fromhex(digits))
    if not isinstance(value, list) or not all(isinstance(one, int) and not isinstance(one, bool) for one in value):
        why = "is empty, and an unquoted # begins a comment" if value is None else "not a colour"
        raise ValueError(f"{place}={value!r}: {why}; {COLOUR_FORM}")
    return value


def _colours(place: str, value: Any) -> list[list[int]]:
    is_one = not isinstance(value, list) or (value and all(isinstance(one, int) for one in value))
    return [_colour(place, one) for one in ([value] if is_one else value)]


FORMS = {"ids": _ids, "colour": _colour, "colours": _colours}


MAX_UNKNOWN = 1000


@dataclass(frozen=True)
class Unknown:
    """The first value of a mask that its class map does not know, and the pixels of each, of MAX_UNKNOWN at most."""

    value: str
    row: int
    column: int
    pixels: Mapping[str, int]


class Lookup:
    """Source masks to class ids, by sorted keys: an id, or a colour packed into 24 bits."""

    def __init__(self, class_map: ClassMap, name: str) -> None:
        self.name = name
        self.class_map = class_map
        self.names = tuple(entry.name for entry in class_map.classes)
        entries = class_map.classes
        self.classes = len(entries)
        self.only_colours = not any(entry.ids for entry in entries)
        self._ids = _table([entry.ids for entry in entries], class_map.ignore.ids)
        self._colours = _table(
            [[_packed(colour) for colour in _mask_colours(entry)] for entry in entries],
            [_packed(colour) for colour in class_map.ignore.colours],
        )

    def __call__(self, values: npt.NDArray[np.integer]) -> npt.NDArray[np.uint8] | Unknown:
        """(H,W) source ids, or (H,W,3) uint8 colours, to uint8 (H,W) class ids (255: ignored), or the first unknown."""
        result = np.empty(values.shape[:2], np.uint8)
        rows = max(1, PIXELS_AT_ONCE // max(1, values.shape[1]))
        first: tuple[str, int, int] | None = None
        unknown: Counter[str] = Counter()
        for top in range(0, values.shape[0], rows):
            part = values[top : top + rows]
            result[top : top + rows], known = self.targets(part)
            if not known.all():
                row, column = np.argwhere(~known)[0]
                first = first or (str(part[row, column].tolist()), top + int(row), int(column))
                for value, pixels in _counted(part[~known]):
                    if value in unknown or len(unknown) < MAX_UNKNOWN:
                        unknown[value] += pixels
        return result if first is None else Unknown(*first, unknown)

    def targets(self, values: npt.NDArray[np.integer]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
        """(H,W) source ids, or (H,W,3) uint8 colours, to uint8 (H,W) class ids, and where the map has the value."""
        coloured = values.ndim == 3
        keys, targets = self._colours if coloured else self._ids
        flat = values.astype(np.int64)
        if coloured:
            flat = flat[..., 0] << 16 | flat[..., 1] << 8 | flat[..., 2]
        place = np.minimum(np.searchsorted(keys, flat), len(keys) - 1)
        return targets[place], keys[place] == flat


def _counted(values: npt.NDArray[np.integer]) -> Iterator[tuple[str, int]]:
    """Ids (N,) or colours (N,3), each as text, and how many there are."""
    if values.ndim == 1:
        found, counts = np.unique(values, return_counts=True)
        yield from zip(map(str, found.tolist()), counts.tolist(), strict=True)
        return
    found, counts = np.unique(values.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1]), return_counts=True)
    for number, count in zip(found.tolist(), counts.tolist(), strict=True):
        yield str([number >> 16, number >> 8 & 255, number & 255]), count


def _packed(colour: Colour) -> int:
    return colour[0] << 16 | colour[1] << 8 | colour[2]


def _table(
    classes: Sequence[Sequence[int]], ignored: Sequence[int]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """Sorted source keys and the class id of each. An impossible key keeps an empty table searchable."""
    pairs = sorted(
        [(NO_KEY, IGNORE_INDEX)]
        + [(key, class_id) for class_id, keys in enumerate(classes) for key in keys]
        + [(key, IGNORE_INDEX) for key in ignored]
    )
    return np.array([key for key, _ in pairs], np.int64), np.array([target for _, target in pairs], np.uint8)
