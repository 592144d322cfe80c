"""What `threestage labels export` gives a format to write, and files that are written piece by piece."""

import contextlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape, quoteattr

import numpy as np
import numpy.typing as npt

from threestage.data import storage
from threestage.data.classes import Colour
from threestage.labels.outlines import Ring
from threestage.labels.rle import Mask

COPY_BYTES = 2**22
NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML cannot hold, even escaped."""


@dataclass(frozen=True)
class ExportedRegion:
    """The pixels of one class in an image. `polygons`: where outlines are wanted."""

    class_id: int
    inside: Mask
    polygons: Sequence[Ring] | None = None

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, width and height of the smallest box around it."""
        rows, columns = (np.flatnonzero(self.inside.any(axis)) for axis in (1, 0))
        return int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)

    @property
    def cropped(self) -> Mask:
        left, top, width, height = self.box
        return self.inside[top : top + height, left : left + width]


@dataclass(frozen=True)
class ExportedImage:
    """`name`: the image's path, for the tool. `stem`: a path without suffix for files of the image's own, unlike any other's.
    `mask`: class ids (H,W), 255 where there is none. `regions`: of the classes in it, in the order of their ids."""

    name: str
    stem: str
    mask: npt.NDArray[np.uint8]
    regions: Sequence[ExportedRegion]


Add = Callable[[ExportedImage], None]
Write = Callable[[str, Sequence[tuple[str, Colour]]], AbstractContextManager[Add]]
"""(folder, names and colours of the classes) → what takes the images one by one; what it wrote is whole when it ends."""


@contextlib.contextmanager
def streamed(uri: str) -> Iterator[Callable[[str], None]]:
    """Takes a text piece by piece and publishes it at the end; nothing after an error. It waits in a temporary file."""
    with tempfile.TemporaryFile() as waiting:

        def write(text: str) -> None:
            waiting.write(text.encode("utf-8", "backslashreplace"))

        yield write
        waiting.seek(0)
        storage.write_pieces(uri, iter(lambda: waiting.read(COPY_BYTES), b""))


def as_json(value: Any) -> str:
    """Compact, in ASCII."""
    return json.dumps(value, separators=(",", ":"))


def hex_colour(colour: Colour) -> str:
    return "#" + bytes(colour).hex()


def xml_text(text: str) -> str:
    return escape(NO_XML.sub("\ufffd", text))


def xml_attribute(text: str) -> str:
    """In quotes."""
    return quoteattr(NO_XML.sub("\ufffd", text))
