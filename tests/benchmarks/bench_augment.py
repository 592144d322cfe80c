"""Views of whole batches against the same operations image by image: images a second of one core, label maps moved too.

    python -m tests.benchmarks.bench_augment [--images 8] [--draws 8] [--repeats 5] [--json FILE]

Each way begins with decoded images and two label maps (pseudo-mask, teacher's classes) of 8 bits and ends with the images
as one float32 tensor in [0,1] and the maps moved.

Strong views: three operations drawn of the paper's fourteen, each applied with chance ½, those of levels on the image stretched
over 0..255 (undone afterwards) as in the paper, then three cutouts of 32 pixels.
ours: `strong_view` and `View.warp`. plain PIL: every operation by PIL, on image and maps. published way: the same, and
pixels pass through `Image.getdata`, as in the authors' code. torchvision: v2.RandAugment of one image after the other, with
its own operations, no maps and no floats.

Weak views: a crop of an image a quarter larger on each side, and a flip with chance ½; `weak_view` against PIL's crop and
transpose. CPU seconds of the fastest of some repeats, in turns within one run, for each of some draws of operations or crops.
"""

import argparse
import math
import random
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torch import Tensor
from torchvision.transforms import v2

from tests.benchmarks.measure import report
from threestage.allocator import disable_malloc_trim
from threestage.augment.draws import Draws, generator
from threestage.augment.photometry import PHOTOMETRIC
from threestage.augment.plans import OPERATIONS, StrongSettings
from threestage.augment.views import AugmentSettings, View, network_input, strong_view, weak_view

SIZES = ((80, 112), (160, 224), (321, 321), (256, 512))
GREY = (128, 128, 128)
AFFINE = Image.Transform.AFFINE
Picture = Image.Image
Way = Callable[[int], object]  # of a step, which says what is drawn

ENHANCERS: dict[str, Any] = {
    "color": ImageEnhance.Color, "contrast": ImageEnhance.Contrast, "brightness": ImageEnhance.Brightness,
    "sharpness": ImageEnhance.Sharpness,
}  # fmt: skip


def affine(name: str, m: float) -> tuple[float, ...]:
    return {
        "shear_x": (1, 0.3 * m, 0, 0, 1, 0), "shear_y": (1, 0, 0, 0.3 * m, 1, 0),
        "translate_x": (1, 0, 10 * m, 0, 1, 0), "translate_y": (1, 0, 0, 0, 1, 10 * m),
    }[name]  # fmt: skip


def operate(name: str, m: float, image: Picture, labels: list[Picture]) -> tuple[Picture, list[Picture]]:
    """One operation of magnitude `m`; label maps are moved with the image."""
    if name in ENHANCERS:
        return ENHANCERS[name](image).enhance(0.1 + 1.8 * m), labels
    if name == "rotate":
        return image.rotate(30 * m, fillcolor=GREY), [label.rotate(30 * m, fillcolor=255) for label in labels]
    if name.startswith(("shear", "translate")):
        how = affine(name, m)
        moved = [label.transform(label.size, AFFINE, how, fillcolor=255) for label in labels]
        return image.transform(image.size, AFFINE, how, fillcolor=GREY), moved
    plain: dict[str, Callable[[Picture], Picture]] = {
        "identity": lambda picture: picture, "autocontrast": ImageOps.autocontrast, "equalize": ImageOps.equalize,
        "solarize": lambda picture: ImageOps.solarize(picture, int(256 - 256 * m)),
        "posterize": lambda picture: ImageOps.posterize(picture, 4 - int(4 * m)),
    }  # fmt: skip
    return plain[name](image), labels


def by_pil(images: Iterable[np.ndarray], labels: Iterable[np.ndarray], step: int, through_lists: bool) -> Tensor:
    """Images (H,W,3) and label maps (K,H,W) uint8 → images (N,3,H,W) float."""
    done, rng = [], random.Random(step)
    for array, maps in zip(images, labels, strict=True):
        picture, moved = Image.fromarray(array), [Image.fromarray(one) for one in maps]
        drawn = [(name, rng.random() < 0.5, rng.randint(1, 9) / 10) for name in rng.choices(OPERATIONS, k=3)]
        plan = [(name, m) for name, applied, m in drawn if applied]
        low, high = int(array.min()), int(array.max())
        stretched = high > low and any(name in PHOTOMETRIC for name, _ in plan)
        if stretched:
            picture = picture.point([round((level - low) * 255 / (high - low)) for level in range(256)] * 3)
        for name, m in plan:
            picture, moved = operate(name, m, picture, moved)
        if stretched:
            picture = picture.point([round(level * (high - low) / 255 + low) for level in range(256)] * 3)
        draw = ImageDraw.Draw(picture)
        for _ in range(3):
            x, y = rng.randrange(picture.width) - 16, rng.randrange(picture.height) - 16
            draw.rectangle((x, y, x + 31, y + 31), GREY)
        done.append(from_lists(picture) if through_lists else np.asarray(picture))
        for one in moved:
            from_lists(one) if through_lists else np.asarray(one)
    return as_input(done)


def weakly_by_pil(
    images: Iterable[np.ndarray], labels: Iterable[np.ndarray], size: tuple[int, int], step: int
) -> Tensor:
    """As `by_pil`, of crops of `size`."""
    done, rng = [], random.Random(step)
    for array, maps in zip(images, labels, strict=True):
        top, left = rng.randint(0, array.shape[0] - size[0]), rng.randint(0, array.shape[1] - size[1])
        pictures = [Image.fromarray(one).crop((left, top, left + size[1], top + size[0])) for one in (array, *maps)]
        if rng.random() < 0.5:
            pictures = [one.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for one in pictures]
        image, *_ = [np.asarray(one) for one in pictures]
        done.append(image)
    return as_input(done)


def as_input(images: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def from_lists(picture: Picture) -> np.ndarray:
    shape = (picture.height, picture.width, *([3] if picture.mode == "RGB" else []))
    return np.array(list(picture.getdata()), np.uint8).reshape(shape)


def by_torchvision(operations: v2.RandAugment, pixels: Tensor, step: int) -> list[Tensor]:
    torch.manual_seed(step)
    return [operations(one) for one in pixels]


def ours(image: Tensor, labels: Tensor, step: int) -> Tensor:
    """Images (N,3,H,W) and label maps (N,K,H,W) uint8 → images (N,3,H,W) float."""
    number, _, height, width = image.shape
    weak = View(image, torch.ones(number, height, width, dtype=torch.bool), torch.eye(2, 3).repeat(number, 1, 1))
    view = strong_view(weak, StrongSettings(), Draws(generator("bench", step)))
    for position in range(labels.shape[1]):
        view.warp(labels[:, position])
    return network_input(view.image)


def ours_weak(image: Tensor, labels: Tensor, size: tuple[int, int], step: int) -> Tensor:
    """As `ours`, of crops of `size`."""
    sizes = torch.tensor([image.shape[2:]] * len(image))
    view = weak_view(image, sizes, AugmentSettings(crop_size=size), Draws(generator("bench", step)))
    for position in range(labels.shape[1]):
        view.warp(labels[:, position])
    return network_input(view.image)


def scenes(size: tuple[int, int], number: int) -> tuple[list[np.ndarray], np.ndarray, Tensor, Tensor]:
    """Images (H,W,3) and label maps (N,2,H,W), as arrays for PIL and as tensors, laid out as a batch's."""
    noise = np.random.default_rng(0)
    small = noise.integers(0, 255, (number, 12, 16, 3), np.uint8)
    arrays = [np.asarray(Image.fromarray(one).resize(size[::-1])) for one in small]
    labels = noise.integers(0, 11, (number, 2, *size), np.uint8)
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    return arrays, labels, pixels, torch.from_numpy(labels)


def strong_ways(size: tuple[int, int], number: int) -> dict[str, Way]:
    arrays, labels, pixels, maps = scenes(size, number)
    other = v2.RandAugment(num_ops=3)
    return {
        "ours": lambda step: ours(pixels, maps, step),
        "plain PIL": lambda step: by_pil(arrays, labels, step, through_lists=False),
        "published way": lambda step: by_pil(arrays, labels, step, through_lists=True),
        "torchvision": lambda step: by_torchvision(other, pixels, step),
    }


def weak_ways(size: tuple[int, int], number: int) -> dict[str, Way]:
    arrays, labels, pixels, maps = scenes((size[0] * 5 // 4, size[1] * 5 // 4), number)
    return {
        "ours": lambda step: ours_weak(pixels, maps, size, step),
        "plain PIL": lambda step: weakly_by_pil(arrays, labels, size, step),
    }


def images_per_second(ways: dict[str, Way], number: int, draws: int, repeats: int) -> dict[str, float]:
    """Of each way: `number` images a call, each of the draws in the least CPU seconds that it took."""
    seconds = {name: [math.inf] * draws for name in ways}
    for _ in range(repeats):
        for draw in range(draws):
            for name, act in ways.items():
                began = time.process_time()
                act(draw)
                seconds[name][draw] = min(seconds[name][draw], time.process_time() - began)
    return {name: number * draws / sum(taken) for name, taken in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8, help="of a batch")
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    disable_malloc_trim()
    rows: list[dict[str, Any]] = []
    for view, ways in (("strong", strong_ways), ("weak", weak_ways)):
        for size in SIZES:
            found = images_per_second(ways(size, options.images), options.images, options.draws, options.repeats)
            row: dict[str, Any] = {"view": view, "crop": f"{size[0]}×{size[1]}", "ours": found.pop("ours")}
            for name, theirs in found.items():
                row |= {name: theirs, f"of {name}": row["ours"] / theirs}
            rows.append(row)
    report(f"images a second of one core, batches of {options.images}", rows, options.json)


if __name__ == "__main__":
    main()
