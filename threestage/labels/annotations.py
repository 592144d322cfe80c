"""What the export of a labelling tool says, whatever its format: categories, images, and the regions of each image.

A reader (one file for each format, see docs/add-a-format.md) tells an `Annotations` what it finds, in any order. Regions
wait in a temporary file: memory holds some 300 bytes for each image and 16 for each region.
"""

import json
import os
import tempfile
import weakref
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from threestage.data.classes import Colour
from threestage.errors import InputError
from threestage.labels.rasterise import Region, Size

WRITTEN_AT_ONCE = 2**20  # bytes


class Category(NamedTuple):
    """`colour`: that of the tool, where it has one."""

    name: str
    colour: Colour | None


@dataclass(slots=True)
class AnnotatedImage:
    """`name`: the image's path or file name, as the tool has it; "" while only its regions are known."""

    name: str = ""
    size: Size | None = None


class Annotations:
    """See the module. `where`: the export. `used_keys`: how many regions each category's key has. `passed_over`: what was found
    and is not read, and how often. `mask_uris`: files that regions name, which are no images."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.categories: dict[str, Category] = {}
        self.used_keys: Counter[str] = Counter()
        self.mask_uris: set[str] = set()
        self.passed_over: Counter[str] = Counter()
        self.images: list[AnnotatedImage] = []
        self.regions = RegionStore()
        self._numbers: dict[str, int] = {}

    def add_category(self, key: str, name: str, colour: Colour | None = None) -> None:
        """A category, under the key that regions name it by."""
        self.categories.setdefault(key, Category(name, colour))

    def add_image(self, key: str, name: str, size: Size | None) -> None:
        """An image, under the key that regions name it by. Raises InputError where another image has the key."""
        image = self.images[self._number(key)]
        if image.name not in ("", name):
            raise InputError(
                f"{self.where}: {image.name} and {name} have one id, {key.rpartition(':')[2]}, so whose regions are whose "
                "cannot be told; export it again",
                "data/annotations",
            )
        image.name, image.size = name, size

    def join_images(self) -> None:
        """One image in place of those that have one name and size, in several files, whose number begins the keys. Call it when
        all is read."""
        joined: dict[tuple[str, Size | None], tuple[int, set[str]]] = {}
        numbers, images = array("q"), list[AnnotatedImage]()
        for key, image in zip(self._numbers, self.images, strict=True):
            file = key.partition(":")[0]
            number, files = joined.setdefault((image.name, image.size), (len(images), set()))
            if not image.name or file in files or number == len(images):  # of one file, two images of a name are two
                number = len(images)
                images.append(image)
            files.add(file)
            numbers.append(number)
        self.images = images
        self.regions.renumber(numbers)

    def add_region(self, image_key: str, region: Region) -> None:
        """The next region of an image: it lies over the earlier ones."""
        self.used_keys.update(region.categories)
        if region.kind in ("file", "values"):
            self.mask_uris.add(region.shape["uri"])
        self.regions.add(self._number(image_key), region)

    def name_of(self, category_key: str) -> str:
        """Of a category; one that the export only uses is called by its key."""
        category = self.categories.get(category_key)
        return category_key.rsplit(":", 1)[-1] if category is None else category.name

    @property
    def used(self) -> Counter[str]:
        """How many regions each category has, by its name."""
        names: Counter[str] = Counter()
        for key, count in self.used_keys.items():
            names[self.name_of(key)] += count
        return names

    def _number(self, key: str) -> int:
        if key not in self._numbers:
            self._numbers[key] = len(self.images)
            self.images.append(AnnotatedImage())
        return self._numbers[key]


class RegionStore:
    """The regions of images in a temporary file without a name. They are added in any order, then read image by image."""

    def __init__(self) -> None:
        self._file, path = tempfile.mkstemp()
        os.unlink(path)
        weakref.finalize(self, os.close, self._file)
        self._waiting = bytearray()
        self._owners, self._ends = array("q"), array("q", [0])

    def add(self, image: int, region: Region) -> None:
        data = json.dumps(region).encode()
        self._waiting += data
        self._owners.append(image)
        self._ends.append(self._ends[-1] + len(data))
        if len(self._waiting) > WRITTEN_AT_ONCE:
            self._write()

    def renumber(self, numbers: Sequence[int]) -> None:
        """Give the regions of image i to the image numbers[i]."""
        self._owners = array("q", (numbers[owner] for owner in self._owners))

    def of(self, image: int) -> list[Region]:
        """The regions of an image, in the order in which they came. Nothing is added any more."""
        self._write()
        starts = ((self._ends[place], self._ends[place + 1]) for place in self._places(image).tolist())
        texts = (os.pread(self._file, end - start, start) for start, end in starts)
        return [Region(*json.loads(text)) for text in texts]

    def _write(self) -> None:
        while self._waiting:
            del self._waiting[: os.write(self._file, self._waiting)]

    def bytes_of(self, image: int) -> int:
        """How much the regions of an image are, as text; 0 where it has none."""
        return sum(self._ends[place + 1] - self._ends[place] for place in self._places(image).tolist())

    def _places(self, image: int) -> npt.NDArray[np.int64]:
        order, owners = self._by_image
        begin, end = np.searchsorted(owners, [image, image + 1])
        return order[begin:end]

    @cached_property
    def _by_image(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The regions sorted by their images, and the image of each."""
        owners = np.array(self._owners, np.int64)
        order = np.argsort(owners, kind="stable")
        return order, owners[order]
