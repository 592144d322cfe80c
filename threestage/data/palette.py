"""Masks as palette PNG: a viewer shows the classes' colours, a program reads the class ids."""

import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from threestage.data.classes import Colour

Bytes = npt.NDArray[np.uint8]


def palette(colours: Sequence[Colour]) -> Bytes:
    """RGB (256,3) of every id; ids without a colour, 255 among them, are black. `colours` holds at most 255."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(colours)] = np.asarray(colours, np.uint8).reshape(-1, 3)
    return table


def palette_png(mask: Bytes, colours: Sequence[Colour]) -> bytes:
    """Class ids (H,W) uint8 as a PNG of mode P, whose indices are the ids."""
    image = Image.fromarray(np.ascontiguousarray(mask, dtype=np.uint8))
    image.putpalette(palette(colours).tobytes())
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
