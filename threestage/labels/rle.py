"""Run-length codes of binary masks: plain counts, COCO's compressed text, and Label Studio's brush.

Counts are lengths of runs in turn, of background first. COCO counts down the columns, CVAT along the rows.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from threestage.data.headers import BadImage

Mask = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]
RunOrder = Literal["rows", "columns"]

MAX_GROUP = 9  # letters of a number in COCO's text: 45 bits
BRUSH_SIZES = (3, 4, 8, 16)  # bits of a run's length
BRUSH_CHANNELS = 4
CODE = "mask/run-length"


def counts_of(mask: Mask, order: RunOrder) -> Counts:
    """The counts of a mask (H,W)."""
    flat = mask.ravel() if order == "rows" else mask.ravel(order="F")
    ends = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    first = [0] if flat.size and flat[0] else []  # no background before it
    bounds = np.concatenate([first, [0], ends, [flat.size]]).astype(np.int64)
    return bounds[1:] - bounds[:-1]


def mask_of(counts: Sequence[int] | Counts, height: int, width: int, order: RunOrder) -> Mask:
    """The mask (H,W) of counts. Raises BadImage where they do not cover it exactly."""
    lengths = np.asarray(counts)
    if lengths.dtype.kind not in "iu" or lengths.ndim != 1 or (lengths < 0).any():
        raise BadImage("has run lengths that are no whole numbers from 0 up", CODE)
    pixels = height * width
    too_long = lengths.size > 2 * pixels + 2 or int(lengths.max(initial=0)) > pixels  # whose sum may overflow
    if too_long or int(lengths.sum()) != pixels:
        raise BadImage(f"has run lengths that do not cover {width}x{height} pixels", CODE)
    flat = np.repeat(np.arange(lengths.size) % 2 == 1, lengths)
    return flat.reshape(height, width) if order == "rows" else flat.reshape(width, height).T


# ---- COCO's text: differences to the count before the last, 5 bits in a letter, the sixth says that more follow


def coco_text(counts: Counts) -> str:
    """Counts as COCO's compressed text."""
    rest = counts.copy()
    rest[3:] -= counts[1:-2]
    letters = np.zeros((len(rest), MAX_GROUP), np.uint8)
    more = np.ones(len(rest), bool)
    for place in range(MAX_GROUP):
        bits, written = rest & 0x1F, more
        rest = rest >> 5
        more = written & np.where(bits & 0x10, rest != -1, rest != 0)
        letters[:, place] = np.where(written, bits + 0x20 * more + 48, 0)
    return letters[letters > 0].tobytes().decode("ascii")


def coco_counts(text: str) -> Counts:
    """Counts of COCO's compressed text. Raises BadImage."""
    codes = np.frombuffer(text.encode(errors="replace"), np.uint8).astype(np.int64) - 48
    last = np.flatnonzero((codes & 0x20) == 0)
    starts = np.concatenate([[0], last + 1])[: len(last)]
    lengths = last - starts + 1
    damaged = not len(last) or last[-1] != len(codes) - 1 or (codes < 0).any() or (codes > 63).any()
    if damaged or (lengths > MAX_GROUP).any():
        raise BadImage("has a run-length text that is cut or holds other letters", CODE)
    place = np.arange(len(codes)) - np.repeat(starts, lengths)
    values = np.add.reduceat((codes & 0x1F) << (5 * place), starts)
    values -= np.where(codes[last] & 0x10, 1 << (5 * lengths), 0)
    for first in (1, 2):
        values[first::2] = np.cumsum(values[first::2])
    return values


# ---- Label Studio's brush: four equal channels (red, green, blue, opacity) along the rows, packed into bits


def brush_code(mask: Mask) -> list[int]:
    """A mask as the bytes of Label Studio's brush; 255 inside."""
    counts = counts_of(mask, "rows") * BRUSH_CHANNELS
    longest = 1 << BRUSH_SIZES[-1]
    sizes = "".join(f"{size - 1:04b}" for size in BRUSH_SIZES)
    bits = [f"{mask.size * BRUSH_CHANNELS:032b}{8 - 1:05b}{sizes}"]
    for number, count in enumerate(counts.tolist()):
        value = "11111111" if number % 2 else "00000000"
        bits += [f"111{longest - 1:016b}{value}"] * (count // longest)
        if rest := count % longest:
            kind = next(kind for kind, size in enumerate(BRUSH_SIZES) if rest <= 1 << size)
            bits.append(f"1{kind:02b}{rest - 1:0{BRUSH_SIZES[kind]}b}{value}")
    text = "".join(bits)
    text += "0" * (-len(text) % 8)
    return list(int(text, 2).to_bytes(len(text) // 8, "big"))


def brush_mask(code: Sequence[int], height: int, width: int) -> Mask:
    """The mask (H,W) of Label Studio's brush: what is not wholly transparent. Raises BadImage."""
    try:
        bits = _Bits(bytes([*code]))  # bytes(a number) would be so many zeros
    except (ValueError, TypeError):
        raise BadImage("has a brush that is no list of bytes", CODE) from None
    number, word = bits.read(32), bits.read(5) + 1
    if number != height * width * BRUSH_CHANNELS or word != 8:
        raise BadImage(f"has a brush that does not cover {width}x{height} pixels", CODE)
    sizes = [bits.read(4) + 1 for _ in BRUSH_SIZES]
    values, place = np.zeros(number, np.uint8), 0
    while place < number:
        is_run = bits.read(1)
        end = min(number, place + 1 + bits.read(sizes[bits.read(2)]))
        values[place:end] = bits.read(8) if is_run else bits.read_bytes(end - place)
        place = end
    return values.reshape(height, width, BRUSH_CHANNELS)[..., -1] > 0


class _Bits:
    """Numbers of some bits each, one after another. Raises BadImage at the end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._place = 0

    def read(self, bits: int) -> int:
        first = self._advance(bits)
        last = (self._place + 7) // 8
        return int.from_bytes(self._data[first // 8 : last], "big") >> (8 * last - self._place) & ((1 << bits) - 1)

    def read_bytes(self, count: int) -> npt.NDArray[np.uint8]:
        """Eight bits each."""
        first = self._advance(8 * count)
        part = np.unpackbits(np.frombuffer(self._data[first // 8 : (self._place + 7) // 8], np.uint8))
        return np.packbits(part[first % 8 : first % 8 + 8 * count])

    def _advance(self, bits: int) -> int:
        """Where what was read now begins."""
        first, self._place = self._place, self._place + bits
        if self._place > 8 * len(self._data):
            raise BadImage("has a brush that is cut", CODE)
        return first
