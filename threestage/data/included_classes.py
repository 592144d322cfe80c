"""Class maps that a data set brings along: ADE20K's objectInfo150.txt, the config of Mapillary Vistas, and the id2label.json of
sets of Hugging Face."""

from collections import Counter
from collections.abc import Collection, Mapping

from pydantic import BaseModel

from threestage import IGNORE_INDEX
from threestage.data import storage
from threestage.data.classes import ClassEntry, ClassMap, Colour, Ignored
from threestage.data.palette import each_its_colour
from threestage.errors import InputError

INCLUDED = ("ade20k", "vistas", "huggingface")
ID2LABEL = "id2label.json"
ADE20K_NAMES = "objectInfo150.txt"
VISTAS_CONFIGS = {"v2.0/labels": "config_v2.0.json", "v1.2/labels": "config_v1.2.json", "labels": "config.json"}
CODE = "data/layout"


class VistasLabel(BaseModel):
    """A class of the config, whose place there is its id. Those that are not evaluated are no classes."""

    name: str
    color: Colour
    evaluate: bool = True


def vistas_labels(paths: Collection[str]) -> str:
    """Where the newest labels lie below training/ and validation/."""
    there = (labels for labels in VISTAS_CONFIGS if any(path.startswith(f"training/{labels}/") for path in paths))
    return next(there, "labels")


def included_class_map(format: str, source: str) -> tuple[ClassMap, str]:
    """The class map of one of INCLUDED, and its file. Raises InputError where that is missing or of another form."""
    if format == "ade20k":
        uri = storage.join(source, ADE20K_NAMES)
        return _as_map({number: (name, None) for number, name in _ade20k_names(uri).items()}, [0]), uri
    if format == "huggingface":
        return _id2label(storage.join(source, ID2LABEL))
    folders = [labels for labels in VISTAS_CONFIGS if storage.first_names(storage.join(source, "training", labels), 1)]
    uri = storage.join(source, VISTAS_CONFIGS[folders[0] if folders else "labels"])
    try:
        labels: list[VistasLabel] = storage.read_value(uri, "labels", list[VistasLabel])
    except FileNotFoundError:
        raise _missing(uri) from None
    classes = {number: (label.name, label.color) for number, label in enumerate(labels) if label.evaluate}
    return _as_map(classes, [number for number, label in enumerate(labels) if not label.evaluate]), uri


def _as_map(classes: Mapping[int, tuple[str, Colour | None]], ignored: list[int]) -> ClassMap:
    given = dict(classes.values())
    colours = each_its_colour(list(given), given)
    entries = [ClassEntry(name=name, colour=colours[name], ids=(number,)) for number, (name, _) in classes.items()]
    return ClassMap(classes=tuple(entries), ignore=Ignored(ids=tuple(ignored)))


def _id2label(uri: str) -> tuple[ClassMap, str]:
    try:
        names: dict[int, str] = storage.read_json(uri, dict[int, str])
    except FileNotFoundError:
        raise InputError(
            f"class_map is not given: {uri} is missing, which would name the classes; give --class-map FILE",
            "class-map/missing",
        ) from None
    ignored = [IGNORE_INDEX] if IGNORE_INDEX not in names else []
    return _as_map({number: (name, None) for number, name in names.items()}, ignored), uri


def _ade20k_names(uri: str) -> dict[int, str]:
    """Columns with tabs between them, below their heads: the id is the first, the class's names are the last. The first name
    counts, all of them where other classes begin with it."""
    try:
        rows = [line.split("\t") for line in storage.read_lines(uri)[1:]]
        names = {int(row[0]): row[-1].strip() for row in rows}
    except FileNotFoundError:
        raise _missing(uri) from None
    except ValueError:
        raise InputError(
            f"{uri}: a line there begins with no id; bring the file back, or give --class-map", CODE
        ) from None
    firsts = Counter(_first(name) for name in names.values())
    return {number: _first(name) if firsts[_first(name)] == 1 else name for number, name in names.items()}


def _first(name: str) -> str:
    return name.split(",")[0].strip()


def _missing(uri: str) -> InputError:
    return InputError(f"{uri}: is missing, it names the classes; bring it back, or give --class-map", CODE)
