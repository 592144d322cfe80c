"""CVAT: "CVAT for images 1.1" (one XML file) and "Segmentation mask 1.1" (labelmap.txt and a folder of coloured PNGs).

Polygons, masks and ellipses are read, in the order of `z_order`. In labelmap.txt, `background` of the colour 0,0,0 is what CVAT
gives to pixels without a region.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any
from xml.parsers import expat

import pyarrow as pa

from threestage.data import storage
from threestage.data.classes import Colour
from threestage.errors import InputError
from threestage.labels.annotations import Annotations
from threestage.labels.export_files import CODE, ExportFiles
from threestage.labels.output_files import (
    Add,
    ExportedImage,
    ExportedRegion,
    hex_colour,
    streamed,
    xml_attribute,
    xml_text,
)
from threestage.labels.rasterise import Region, Size
from threestage.labels.rle import counts_of

LABEL_MAP = "labelmap.txt"
BACKGROUND = "background"
CHUNK_BYTES, HEAD_BYTES = 2**20, 2**12
MAX_ELEMENT = 2**26  # bytes of an element, and of all regions of an image
MAX_HEAD, MAX_DEPTH, MAX_NAME = 2**16, 32, 2**12
SHAPES = ("polygon", "mask", "ellipse", "box", "polyline", "points", "cuboid", "skeleton", "tag")

Attributes = Mapping[str, str]


def read_cvat(files: ExportFiles, into: Annotations) -> None:
    """The XML files there; else every labelmap.txt with the masks beside it."""
    maps = {path: uri for path, uri in files.paths.items() if path.rsplit("/", 1)[-1] == LABEL_MAP}
    found = files.ending(".xml")
    if not found and not maps:
        raise files.wrong(f"no XML file of CVAT there, and no {LABEL_MAP}")
    for uri in found.values():
        _read_xml(uri, into)
    for path, uri in ({} if found else maps).items():
        _read_label_map(files, path.removesuffix(LABEL_MAP), uri, into)
    if not into.images:
        raise files.wrong("no image in it; export the task as CVAT for images 1.1, or as Segmentation mask 1.1")


# ---- CVAT for images 1.1


def _read_xml(uri: str, into: Annotations) -> None:
    """Reads on as its images come, so memory is that of one image."""
    document = _Document(uri, into)
    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = document.start, document.end
    parser.CharacterDataHandler = document.text
    parser.StartDoctypeDeclHandler = _refuse_declarations
    parser.buffer_text = True
    read = 0
    files, path = storage.filesystem(uri)
    storage.refuse_special_file(uri)
    try:
        with files.open_input_stream(path) as stream:
            for piece in _pieces(stream, document):
                parser.Parse(piece)
                read += len(piece)
                if read - max(0, parser.CurrentByteIndex) > MAX_ELEMENT:
                    raise ValueError(f"an element of it has more than {MAX_ELEMENT} bytes")
            parser.Parse(b"", True)
    except (expat.ExpatError, ValueError, LookupError, ArithmeticError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{uri}: is no XML of CVAT that can be read ({error}); export it again", CODE) from None


def is_cvat(uri: str) -> bool:
    """Whether an XML file begins as CVAT's do."""
    files, path = storage.filesystem(uri)
    with files.open_input_stream(path) as stream:
        return b"<annotations" in stream.read(HEAD_BYTES)


def _pieces(stream: pa.NativeFile, document: "_Document") -> Iterator[bytes]:
    """A byte at a time until the first element begins: what is declared before it is refused before any more is parsed."""
    while data := stream.read(CHUNK_BYTES):
        place = 0
        while not document.begun and place < len(data):
            if place == MAX_HEAD:
                raise ValueError(f"no element begins in its first {MAX_HEAD} bytes")
            yield data[place : place + 1]
            place += 1
        yield data[place:]


def _refuse_declarations(name: str, *_: Any) -> None:
    raise ValueError(f"it declares {name} in a DOCTYPE, which may hold entities")


class _Document:
    """Listens to the parser."""

    def __init__(self, uri: str, into: Annotations) -> None:
        self._uri = uri
        self._into = into
        self._path: list[str] = []
        self._label = ["", ""]
        self._image: str | None = None
        self._regions: list[tuple[int, Region]] = []
        self._bytes = 0
        self.begun = False

    def start(self, name: str, attributes: dict[str, str]) -> None:
        self.begun = True
        self._path.append(name)
        if len(self._path) > MAX_DEPTH:
            raise ValueError(f"its elements are nested more than {MAX_DEPTH} deep")
        if name == "track":
            raise ValueError("it has tracks; export it as CVAT for images 1.1")
        if name == "label":
            self._label = ["", ""]
        elif name == "image" and len(self._path) == 2:
            self._image = f"{self._uri}:{attributes['id']}:{attributes['name']}"
            self._into.add_image(self._image, attributes["name"], _size(attributes))
        elif self._image is not None and name in SHAPES:
            self._add(name, attributes)

    def text(self, data: str) -> None:
        if self._path[-2:] in (["label", "name"], ["label", "color"]):
            self._label[self._path[-1] == "color"] += data
            if len(self._label[0]) + len(self._label[1]) > MAX_NAME:
                raise ValueError(f"a label's name has more than {MAX_NAME} letters")

    def end(self, name: str) -> None:
        self._path.pop()
        if name == "label" and self._label[0]:
            self._into.add_category(self._label[0], self._label[0], _hex(self._label[1]))
        elif name == "image" and self._image is not None:
            for _, region in sorted(self._regions, key=lambda entry: entry[0]):
                self._into.add_region(self._image, region)
            self._image, self._regions, self._bytes = None, [], 0

    def _add(self, name: str, attributes: dict[str, str]) -> None:
        read = READ.get(name)
        if read is None:
            self._into.passed_over[f"shapes of kind {name}"] += 1
            return
        label, self._bytes = attributes["label"], self._bytes + sum(map(len, attributes.values()))
        if self._bytes > MAX_ELEMENT:
            raise ValueError(f"{self._image} has more than {MAX_ELEMENT} bytes of regions")
        self._into.add_category(label, label)
        self._regions.append((int(attributes.get("z_order", 0)), read(label, attributes)))


def _size(attributes: Attributes) -> Size | None:
    return (int(attributes["height"]), int(attributes["width"])) if "width" in attributes else None


def _hex(text: str) -> Colour | None:
    digits = text.strip().removeprefix("#")
    try:
        red, green, blue = bytes.fromhex(digits)
    except ValueError:
        return None
    return red, green, blue


def _polygon(label: str, attributes: Attributes) -> Region:
    points = attributes["points"].replace(";", ",").split(",")
    return Region(label, "polygons", [[float(number) for number in points]])


def _mask(label: str, attributes: Attributes) -> Region:
    box = [int(attributes[name]) for name in ("left", "top", "width", "height")]
    counts = [int(number) for number in attributes["rle"].split(",")]
    return Region(label, "runs", {"counts": counts, "order": "rows", "box": box})


def _ellipse(label: str, attributes: Attributes) -> Region:
    numbers = [float(attributes[name]) for name in ("cx", "cy", "rx", "ry")]
    return Region(label, "ellipse", [*numbers, float(attributes.get("rotation", 0))])


READ: dict[str, Callable[[str, Attributes], Region]] = {"polygon": _polygon, "mask": _mask, "ellipse": _ellipse}


# ---- Segmentation mask 1.1


def _read_label_map(files: ExportFiles, folder: str, uri: str, into: Annotations) -> None:
    values: dict[str, str] = {}
    for name, colour in _label_map_lines(uri):
        if name == BACKGROUND and not any(colour):
            continue
        into.add_category(name, name, colour)
        values[str(colour[0] + 256 * colour[1] + 65536 * colour[2])] = name
    masks = f"{folder}SegmentationClass/"
    for path, mask in files.ending(".png").items():
        if path.startswith(masks):
            image = path.removeprefix(masks)
            into.add_image(f"{uri}:{image}", image, None)
            into.add_region(f"{uri}:{image}", Region("", "values", {**files.mask(mask), "values": values}))


def _label_map_lines(uri: str) -> Iterator[tuple[str, Colour]]:
    """`name:red,green,blue:parts:actions`, after a comment."""
    for line in storage.read_lines(uri):
        if line.startswith("#"):
            continue
        name, _, rest = line.partition(":")
        try:
            red, green, blue = (int(number) for number in rest.split(":")[0].split(","))
        except ValueError:
            raise InputError(
                f"{uri}: {line}: no line of the form name:red,green,blue::; export it again", CODE
            ) from None
        yield name, (red, green, blue)


# ---- Written


@contextmanager
def write_cvat(folder: str, classes: Sequence[tuple[str, Colour]]) -> Iterator[Add]:
    """FOLDER/annotations.xml (CVAT for images 1.1), and labels.json for the "Raw" tab of the label constructor."""
    names = [xml_attribute(name) for name, _ in classes]
    storage.write_json(
        storage.join(folder, "labels.json"),
        [{"name": name, "color": hex_colour(colour), "attributes": []} for name, colour in classes],
    )
    numbers = count()
    with streamed(storage.join(folder, "annotations.xml")) as write:
        write('<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n<version>1.1</version>\n<meta><task><labels>\n')
        for name, colour in classes:
            write(f"<label><name>{xml_text(name)}</name><color>{hex_colour(colour)}</color></label>\n")
        write("</labels></task></meta>\n")

        def add(image: ExportedImage) -> None:
            height, width = image.mask.shape
            write(f'<image id="{next(numbers)}" name={xml_attribute(image.name)} width="{width}" height="{height}">\n')
            for region in image.regions:
                write(_element(names[region.class_id], region))
            write("</image>\n")

        yield add
        write("</annotations>\n")


def _element(label: str, region: ExportedRegion) -> str:
    common = f'label={label} source="auto" occluded="0" z_order="0"'
    if region.polygons is not None:
        rings = (";".join(f"{x:.2f},{y:.2f}" for x, y in ring.tolist()) for ring in region.polygons)
        return "".join(f'<polygon {common} points="{points}"/>\n' for points in rings)
    left, top, width, height = region.box
    counts = ", ".join(map(str, counts_of(region.cropped, "rows").tolist()))
    place = f'left="{left}" top="{top}" width="{width}" height="{height}"'
    return f'<mask {common} rle="{counts}" {place}/>\n'
