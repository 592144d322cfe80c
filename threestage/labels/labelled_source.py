"""The images of a source with what an export of a labelling tool says of them: which class is which category, which image is
which, and what is drawn of each."""

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from threestage import IGNORE_INDEX
from threestage.data.classes import ClassEntry, ClassMap, Colour
from threestage.data.formats import SourceItem
from threestage.data.pairs import by_last_part, named_images
from threestage.data.palette import each_its_colour
from threestage.errors import InputError
from threestage.labels.annotations import Annotations
from threestage.labels.rasterise import encode_drawing

IGNORE = "ignore"
SHOWN = 3
MAX_LISTED = 1000
MAX_REGION_BYTES = 2**26  # of one image, as text


# ---- Which class a category is


def proposed_map(annotations: Annotations, unlabelled: str) -> ClassMap:
    """A class for each category, in the order of the export; first one for unlabelled pixels, where it is not among them.

    Raises InputError where there is none.
    """
    found: dict[str, Colour | None] = {} if unlabelled == IGNORE else {unlabelled: None}
    found |= {category.name: category.colour for category in annotations.categories.values()}
    found |= {name: None for name in annotations.used if name not in found}
    if not found:
        raise InputError(f"{annotations.where}: holds no category; check the export", "data/annotations")
    if len(found) > IGNORE_INDEX:
        raise InputError(
            f"{annotations.where}: has {len(found)} categories, more than {IGNORE_INDEX}; give a --class-map with those "
            "that you need",
            "data/annotations",
        )
    colours = each_its_colour(list(found), found)
    return ClassMap(classes=tuple(ClassEntry(name=name, colour=colour) for name, colour in colours.items()))


def map_of_classes(names: Sequence[str], colours: Sequence[Colour]) -> ClassMap:
    """That of a data set which has classes; colours may be there twice."""
    entries = [ClassEntry(name=name, colour=colour) for name, colour in zip(names, colours, strict=True)]
    return ClassMap.model_construct(classes=tuple(entries))


def class_ids(annotations: Annotations, class_map: ClassMap) -> dict[str, int]:
    """Name of a category → class id. Raises InputError that lists every category with regions which the map does not name."""
    ids = {name: number for number, entry in enumerate(class_map.classes) for name in entry.category_names}
    ids |= dict.fromkeys(class_map.ignore.categories, IGNORE_INDEX)
    unknown = [f"{name} ({count} regions)" for name, count in annotations.used.most_common() if name not in ids]
    if unknown:
        more = f" and {len(unknown) - MAX_LISTED} more" if len(unknown) > MAX_LISTED else ""
        raise InputError(
            f"{annotations.where}: categories that are no class: {', '.join(unknown[:MAX_LISTED])}{more}; name them in the class "
            "map, as a class, under the `categories` of one, or under `ignore: {categories: [NAME]}`",
            "class-map/unknown-categories",
        )
    return ids


def class_of_unlabelled(name: str, class_map: ClassMap) -> int:
    """The class id of pixels without a region. Raises InputError where no class has the name."""
    names = [entry.name for entry in class_map.classes]
    if name != IGNORE and name not in names:
        raise InputError(
            f"--unlabelled-pixels {name}: no class of that name; give ignore, or one of {', '.join(names)}",
            "class-map/unknown-class",
        )
    return IGNORE_INDEX if name == IGNORE else names.index(name)


# ---- Which image is which


class LabelledSource:
    """An export, and the classes of the data set that it goes into. Raises InputError where they do not fit."""

    def __init__(self, annotations: Annotations, class_map: ClassMap, unlabelled: str) -> None:
        self.annotations = annotations
        self.class_map = class_map
        ids = class_ids(annotations, class_map)
        self._class_ids = {key: ids[annotations.name_of(key)] for key in annotations.used_keys}
        self._unlabelled = unlabelled
        self._unlabelled_id = class_of_unlabelled(unlabelled, class_map)
        self._matched: dict[str, int] = {}

    def label(
        self,
        items: Sequence[SourceItem],
        notes: list[str],
        labelled_before: Callable[[Sequence[str]], Collection[str]] = lambda image_ids: (),
    ) -> list[SourceItem]:
        """The images of a source, with what the export has of each; adds to `notes` what the user should know.

        `labelled_before`: which of some images the data set has a mask of; one without a region any more loses it. Raises
        InputError where the export names none of them.
        """
        items = [item for item in items if item.image_uri not in self.annotations.mask_uris]
        found, problems, absent = self._match([item.image_id for item in items])
        where, images = self.annotations.where, self.annotations.images
        if not found and not problems:
            names = ", ".join(name or "one without a name" for name in absent[:SHOWN]) or "none"
            raise InputError(
                f"{where}: none of its {len(images)} images lies in the source (it names {names}; the first image there is "
                f"{items[0].image_id if items else 'missing'}); give the folder of these images",
                "data/no-pair",
            )
        empty = [image_id for image_id, number in found.items() if not self._is_labelled(number)]
        emptied = labelled_before(empty)
        self._matched = {i: n for i, n in found.items() if self._is_labelled(n) or i in emptied}
        problems |= {
            image_id: f"has more than {MAX_REGION_BYTES} bytes of regions: simplify them [mask/costly]"
            for image_id, number in self._matched.items()
            if self.annotations.regions.bytes_of(number) > MAX_REGION_BYTES
        }
        notes += self._notes(absent, sorted(emptied))
        return [self._labelled(item, problems.get(item.image_id)) for item in items]

    def drawing_of(self, image_id: str) -> bytes | None:
        """What `rasterise.draw` takes for an image; None where the export has nothing of it."""
        number = self._matched.get(image_id)
        if number is None:
            return None
        regions, size = self.annotations.regions.of(number), self.annotations.images[number].size
        return encode_drawing(regions, self._class_ids, size, self._unlabelled_id)

    def _labelled(self, item: SourceItem, problem: str | None) -> SourceItem:
        data = None if problem else self.drawing_of(item.image_id)
        if data is None:
            return replace(item, problem=item.problem or problem)
        digest = hashlib.sha256(data).hexdigest()[:32]
        return replace(item, mask_uri=f"{self.annotations.where}#{item.image_id}", stamp=digest)

    def _match(self, image_ids: Sequence[str]) -> tuple[dict[str, int], dict[str, str], list[str]]:
        """Image id → number of its image in the export; image id → why it has none; the names that are no image's."""
        by_last = by_last_part(image_ids)
        found: dict[str, int] = {}
        problems: dict[str, str] = {}
        absent = []
        for number, image in enumerate(self.annotations.images):
            fits = named_images(image.name, by_last)
            if len(fits) == 1 and fits[0] in found:
                first = self.annotations.images[found[fits[0]]].name
                problems[fits[0]] = f"is annotated twice, as {first} and as {image.name}: keep one [mask/unpaired]"
            elif len(fits) == 1:
                found[fits[0]] = number
            elif fits:
                reason = f"the annotations of {image.name} fit {fits[0]} and {fits[1]}: rename one [mask/unpaired]"
                problems |= dict.fromkeys(fits, reason)
            else:
                absent.append(image.name)
        return {image_id: number for image_id, number in found.items() if image_id not in problems}, problems, absent

    def _is_labelled(self, number: int) -> bool:
        """An image without regions is labelled where unlabelled pixels are a class."""
        return self._unlabelled != IGNORE or self.annotations.regions.bytes_of(number) > 0

    def _notes(self, absent: Sequence[str], emptied: Sequence[str]) -> list[str]:
        where, passed_over = self.annotations.where, self.annotations.passed_over
        fate = "ignored" if self._unlabelled == IGNORE else f"class {self._unlabelled}"
        notes = [f"{where}: pixels without a region are {fate}"]
        if absent:
            notes.append(f"{where}: {len(absent)} of its images are not in the source: {_first_of(absent)}")
        if emptied:
            notes.append(
                f"{where}: {len(emptied)} images have no region any more and lose their mask: {_first_of(emptied)}"
            )
        if passed_over:
            notes.append(
                f"{where}: not read: {', '.join(f'{count} {what}' for what, count in passed_over.most_common())}"
            )
        return notes


def _first_of(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + ", …" * (len(names) > SHOWN)
