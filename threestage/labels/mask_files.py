"""Masks as palette PNGs of class ids, 255 where there is none: what `threestage ingest --masks` reads."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from threestage.data import storage
from threestage.data.classes import Colour
from threestage.data.palette import palette_png
from threestage.labels.output_files import Add, ExportedImage


@contextmanager
def write_masks(folder: str, classes: Sequence[tuple[str, Colour]]) -> Iterator[Add]:
    """FOLDER/masks/NAME.png for each image."""
    colours = [colour for _, colour in classes]

    def add(image: ExportedImage) -> None:
        storage.write_bytes(storage.join(folder, "masks", f"{image.stem}.png"), palette_png(image.mask, colours))

    yield add
