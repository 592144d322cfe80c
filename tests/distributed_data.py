"""Tiny PASCAL VOC 2012 and Cityscapes folders, laid out and encoded as the real ones are distributed."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

VOC_SIZES = ((75, 100), (100, 75), (67, 100))  # height, width; the real ones have 500 on their longer side
CITYSCAPES_SIZE = (128, 256)  # the real ones: 1024, 2048
EGO_ROWS, BORDER_COLUMNS = 16, 4
CITYSCAPES_IDS = (7, 8, 9, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # 9, parking, is void
CITIES = {"train": ("aachen", "ulm"), "val": ("lindau",), "test": ("berlin",), "train_extra": ("troisdorf",)}


def voc_palette() -> bytes:
    """The bits of an id, dealt out to red, green and blue from the highest bit of each down."""
    colours = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        bits = np.arange(256)[:, None] >> [3 * bit, 3 * bit + 1, 3 * bit + 2] & 1
        colours |= (bits << (7 - bit)).astype(np.uint8)
    return colours.tobytes()


def write_voc(folder: Path, train: int, augmented: int, val: int, others: int) -> Path:
    """VOCdevkit/VOC2012 with `train` images of its own, `augmented` ones more, and `others` of other tasks."""
    root = folder / "VOCdevkit" / "VOC2012"
    names = [f"2007_{number:06d}" for number in range(train + augmented + val + others)]
    of_train, with_masks = names[:train], names[: train + augmented + val]
    of_val = with_masks[train + augmented :]
    for number, name in enumerate(names):
        ids = _scene(VOC_SIZES[number % len(VOC_SIZES)], classes=range(21), seed=number)
        _save(root / "JPEGImages" / f"{name}.jpg", _photo(ids, number))
        _write(root / "Annotations" / f"{name}.xml", "<annotation/>")
        ids = _outlined(ids)
        if name in of_train or name in of_val:
            for kind in ("SegmentationClass", "SegmentationObject"):
                mask = Image.fromarray(ids).convert("P")
                mask.putpalette(voc_palette())
                _save(root / kind / f"{name}.png", mask)
        if name in with_masks:
            _save(root / "SegmentationClassAug" / f"{name}.png", Image.fromarray(ids))
    sets = {"train": of_train, "val": of_val, "trainval": of_train + of_val}
    for list_name, listed in sets.items():
        _write(root / "ImageSets" / "Segmentation" / f"{list_name}.txt", _lines(listed))
        _write(root / "ImageSets" / "Main" / f"{list_name}.txt", _lines(names))
    _write(root / "ImageSets" / "Segmentation" / "train_aug.txt", _lines(names[: train + augmented]))
    return root


def write_cityscapes(folder: Path, train: int, val: int, test: int = 1, extra: int = 1) -> Path:
    """leftImg8bit, gtFine and gtCoarse, with what cityscapesScripts adds, and an ego vehicle below and a border beside."""
    for split, count in (("train", train), ("val", val), ("test", test), ("train_extra", extra)):
        for number in range(count):
            city = CITIES[split][number % len(CITIES[split])]
            frame = f"{split}/{city}/{city}_{number:06d}_000019"
            ids = _scene(CITYSCAPES_SIZE, classes=CITYSCAPES_IDS, seed=number)
            _save(folder / "leftImg8bit" / f"{frame}_leftImg8bit.png", _photo(ids, number))
            ids[:, :BORDER_COLUMNS] = 2
            ids[-EGO_ROWS:] = 1
            labels = "gtCoarse" if split == "train_extra" else "gtFine"
            for kind, values in _cityscapes_masks(np.zeros_like(ids) if split == "test" else ids):
                _save(folder / labels / f"{frame}_{labels}_{kind}.png", values)
            _write(folder / labels / f"{frame}_{labels}_polygons.json", "{}")
    for name in ("README", "license.txt"):
        _write(folder / name, "")
    return folder


def _cityscapes_masks(ids: np.ndarray) -> Iterator[tuple[str, Image.Image]]:
    yield "labelIds", Image.fromarray(ids)
    yield "labelTrainIds", Image.fromarray(np.where(ids < 7, 255, ids % 19).astype(np.uint8))
    yield "instanceIds", Image.fromarray(ids.astype(np.uint16) * 1000)
    yield "color", Image.fromarray(np.repeat(ids[..., None], 4, axis=2))


def _scene(size: tuple[int, int], classes: Sequence[int], seed: int) -> np.ndarray:
    """uint8 (H,W): a ground of the first class and rectangles of others."""
    rng = np.random.default_rng(seed)
    ids = np.full(size, classes[0], np.uint8)
    for class_id in rng.choice(classes, 4, replace=False):
        top, left = (int(rng.integers(0, side // 2)) for side in size)
        ids[top : top + size[0] // 2, left : left + size[1] // 2] = class_id
    return ids


def _photo(ids: np.ndarray, seed: int) -> Image.Image:
    light = np.random.default_rng(seed).integers(0, 40, (*ids.shape, 3))
    return Image.fromarray((ids[..., None] * (3, 5, 7) + light).clip(0, 255).astype(np.uint8))


def _outlined(ids: np.ndarray) -> np.ndarray:
    """255 where the class changes, as between the objects of VOC."""
    changes = np.zeros(ids.shape, bool)
    changes[1:] |= ids[1:] != ids[:-1]
    changes[:, 1:] |= ids[:, 1:] != ids[:, :-1]
    return np.where(changes, 255, ids).astype(np.uint8)


def _save(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _lines(names: Sequence[str]) -> str:
    return "".join(f"{name}\n" for name in names)
