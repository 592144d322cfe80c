"""Palettes of masks: of those that are written a viewer shows the classes' colours, and a program reads the class ids; those
that users bring may be in another order than the ids."""

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from threestage import IGNORE_INDEX
from threestage.data.classes import Colour, Lookup
from threestage.data.headers import BadImage

Bytes = npt.NDArray[np.uint8]
Key = TypeVar("Key", int, str)


def palette(colours: Sequence[Colour]) -> Bytes:
    """RGB (256,3) of every id; ids without a colour, 255 among them, are black. `colours` holds at most 255."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(colours)] = np.asarray(colours, np.uint8).reshape(-1, 3)
    return table


def _distinct_colours() -> Iterator[Colour]:
    """Colours that are easy to tell apart, for classes that have none: PASCAL VOC's, without its black."""
    for number in range(1, 256):
        bits = [[number >> (3 * place + band) & 1 for place in range(3)] for band in range(3)]
        red, green, blue = (sum(bit << (7 - place) for place, bit in enumerate(band)) for band in bits)
        yield red, green, blue


def each_its_colour(
    keys: Sequence[Key], given: Mapping[Key, Colour | None], taken: set[Colour] | None = None
) -> dict[Key, Colour]:
    """The colours that were given, each once, and free ones for the others."""
    used = set(taken or ()) | set(given.values())
    free = (colour for colour in _distinct_colours() if colour not in used)
    shown: dict[Key, Colour] = {}
    for key in keys:
        colour = given.get(key)
        shown[key] = next(free) if colour is None or colour in shown.values() else colour
    return shown


def palette_png(mask: Bytes, colours: Sequence[Colour]) -> bytes:
    """Class ids (H,W) uint8 as a PNG of mode P, whose indices are the ids."""
    image = Image.fromarray(np.ascontiguousarray(mask, dtype=np.uint8))
    image.putpalette(palette(colours).tobytes())
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def refuse_other_order(image: Image.Image, lookup: Lookup) -> None:
    """Raise BadImage when the palette of a mask (mode P) has the map's colours in another order than the map has ids.

    A palette that has nothing to do with the map (a grey ramp, VOC's) may share a colour with it. It is the map's when all
    colours that the mask uses are the map's, and these are several or most of the palette.
    """
    colours = np.asarray(image.getpalette("RGB"), np.uint8).reshape(1, -1, 3)
    used = np.flatnonzero(image.histogram()[:256])
    if used.size == 0 or used[-1] >= colours.shape[1]:
        return
    by_colour, is_colour = (values[0] for values in lookup.targets(colours))
    if not is_colour[used].all() or (used.size == 1 and 2 * is_colour.sum() <= is_colour.size):
        return
    by_id, is_id = (values[0] for values in lookup.targets(used[None]))
    for index, coloured, named in zip(used[is_id], by_colour[used][is_id], by_id[is_id], strict=True):
        if coloured != named:
            raise BadImage(
                f"has the colour {colours[0, index].tolist()} ({_class(lookup, coloured)}) in its palette for id {index} "
                f"({_class(lookup, named)} in class map {lookup.name}): leave ids out of the map to read "
                "colours; save the mask as grey if its ids are right",
                "mask/palette-order",
            )


def _class(lookup: Lookup, class_id: int) -> str:
    return "ignored" if class_id == IGNORE_INDEX else lookup.names[class_id]
