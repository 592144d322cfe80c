"""`threestage classes`: a class map to correct by hand, from the values in masks or the categories of an export."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from threestage import IGNORE_INDEX
from threestage.data.classes import Colour
from threestage.data.formats import files_below
from threestage.data.image_validation import BadFile, read_values
from threestage.data.pairs import MASK_SUFFIXES, Paths
from threestage.data.palette import each_its_colour
from threestage.errors import InputError
from threestage.labels.annotations import Annotations
from threestage.labels.cvat import is_cvat
from threestage.labels.export_files import ExportFiles
from threestage.labels.json_stream import elements
from threestage.labels.readers import READERS

BINARY = [0, 255]


@dataclass(frozen=True)
class ClassLine:
    """A class as the map has it; `note` stands behind it."""

    entry: dict[str, object]
    note: str


def class_map_text(place: str, ignored_colours: Sequence[Colour] = ()) -> str:
    """YAML of a class for each value, colour or category below `place`, with how many pixels, files or regions have it.

    Raises InputError where neither masks nor an export are there.
    """
    files = _files_at(place)
    format = format_of(files.paths)
    lines, ignored = _of_masks(files, ignored_colours) if format is None else (_of_export(files, format), [])
    what = "masks" if format is None else f"export of format {format}"
    rows = [f"# Classes of {place} ({what}): correct the names, and move to `ignore` what is no class.", "classes:"]
    rows += [f"  - {_flow(line.entry)}  # {line.note}" for line in lines]
    rows += [f"ignore: {_flow(line.entry)}  # {line.note}" for line in ignored]
    return "\n".join(rows) + "\n"


def format_at(place: str) -> str:
    """The format in which `ingest` reads the masks or the export there."""
    return format_of(_files_at(place).paths) or "folders"


def _files_at(place: str) -> ExportFiles:
    return ExportFiles(place, *files_below(place, "masks, or the export of a labelling tool,"))


def format_of(paths: Paths) -> str | None:
    """The labelling tool that wrote the files; None for masks."""
    names = {path.rsplit("/", 1)[-1].lower() for path in paths}
    suffixes = {name.rsplit(".", 1)[-1] for name in names}
    xml = (uri for path, uri in paths.items() if path.lower().endswith(".xml"))
    if "labelmap.txt" in names or any(is_cvat(uri) for uri in xml):
        return "cvat"
    if suffixes & {"yaml", "yml"} and ("txt" in suffixes or len(paths) == 1):
        return "yolo"
    uri = next((uri for path, uri in paths.items() if path.lower().endswith(".json")), None)
    if uri is None:
        return None
    if "meta.json" in names and any("ann" in path.split("/")[:-1] for path in paths):
        return "supervisely"
    keys = {key for key, _ in islice(elements(uri), 50)}
    return "label-studio" if keys == {""} else "labelme" if "shapes" in keys else "coco"


def _flow(entry: dict[str, object]) -> str:
    """One line of YAML."""
    return "{" + ", ".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in entry.items()) + "}"


# ---- An export


def _of_export(files: ExportFiles, format: str) -> list[ClassLine]:
    annotations = Annotations(files.place)
    READERS[format](files, annotations)
    used = annotations.used
    given = {category.name: category.colour for category in annotations.categories.values()}
    shown = each_its_colour([*given, *(name for name in used if name not in given)], given)
    return [ClassLine({"name": n, "colour": list(colour)}, f"{used[n]} regions") for n, colour in shown.items()]


# ---- Masks


def _of_masks(files: ExportFiles, ignored_colours: Sequence[Colour]) -> tuple[list[ClassLine], list[ClassLine]]:
    """The classes, and what is ignored: `ignored_colours`, and the value 255 unless the masks hold 0 and 255 only."""
    ids, colours = _counted(files)
    values = sorted(ids.pixels)
    ignored = [IGNORE_INDEX] if IGNORE_INDEX in values and values != BINARY else []
    classes = [value for value in values if value not in ignored]
    coloured = [number for number in sorted(colours.pixels) if _colour(number) not in ignored_colours]
    if len(classes) + len(coloured) > IGNORE_INDEX:
        raise InputError(
            f"{files.place}: the masks hold {len(classes) + len(coloured)} values, more than {IGNORE_INDEX} classes; give "
            "masks of class ids or plain colours, without smooth edges",
            "class-map/too-many-values",
        )
    shown = each_its_colour(classes, ids.palette, set(map(_colour, colours.pixels)))
    lines = [
        ClassLine({"name": f"class_{value}", "colour": list(shown[value]), "ids": [value]}, ids.note(value))
        for value in classes
    ]
    lines += [
        ClassLine({"name": f"class_{number:06x}", "colour": list(_colour(number))}, colours.note(number))
        for number in coloured
    ]
    entry: dict[str, object] = {"ids": ignored} if ignored else {}
    if ignored_colours:
        entry["colours"] = [list(colour) for colour in ignored_colours]
    note = ids.note(IGNORE_INDEX) if ignored else "unlabelled"
    return lines, [ClassLine(entry, note)] * bool(entry)


def _as_numbers(values: npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
    """Colours as R 65536 + G 256 + B."""
    return values.astype(np.int32) @ np.array([65536, 256, 1], np.int32) if values.ndim == 3 else values


def _colour(number: int) -> Colour:
    return number >> 16, number >> 8 & 255, number & 255


class _Counts:
    """Pixels and files of each value: an id, or a colour as one number. `palette`: colours of ids, where masks have them."""

    def __init__(self) -> None:
        self.pixels: Counter[int] = Counter()
        self.files: Counter[int] = Counter()
        self.palette: dict[int, Colour] = {}

    def add(self, values: Sequence[int], counts: Sequence[int]) -> None:
        self.pixels.update(dict(zip(values, counts, strict=True)))
        self.files.update(values)

    def note(self, value: int) -> str:
        return f"{self.pixels[value]} pixels in {self.files[value]} files"


def _counted(files: ExportFiles) -> tuple[_Counts, _Counts]:
    """Ids, and colours, of all masks there. Raises InputError for a file that is no mask."""
    ids, colours = _Counts(), _Counts()
    masks = files.ending(*MASK_SUFFIXES)
    if not masks:
        raise files.wrong("neither masks (PNG, BMP, TIFF) nor an export of a labelling tool there")
    for path, content in files.read_all(masks):
        try:
            values, palette = read_values(content)
        except BadFile as error:
            raise InputError(f"{files.paths[path]}: {error.message}", error.code) from None
        found, counts = np.unique(_as_numbers(values), return_counts=True)
        (colours if values.ndim == 3 else ids).add(found.tolist(), counts.tolist())
        ids.palette |= palette
    return ids, colours
