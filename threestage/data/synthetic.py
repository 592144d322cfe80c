"""Synthetic scenes for the demo and the tests: the shape of an object decides its class.

Texture, light, noise, blur, clutter, occlusion, scale and rotation vary independently of the class, and hue is a hint
as weak as `colour_variation` says. So a small network trained on a few labelled scenes over-fits them, and unlabelled
scenes seen under strong augmentation can help.
"""

import colorsys
import io
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import yaml
from PIL import Image
from pydantic import Field, model_validator

from threestage import IGNORE_INDEX
from threestage.data import storage
from threestage.data.classes import Colour
from threestage.data.palette import Bytes, palette_png
from threestage.data.records import SplitName
from threestage.errors import InputError
from threestage.settings import Settings

Floats = npt.NDArray[np.float64]

CLASSES: tuple[str, ...] = ("background", "disc", "ring", "square", "triangle", "cross")
COLOURS: tuple[Colour, ...] = (
    (112, 112, 124), (226, 74, 66), (248, 176, 40), (66, 140, 240), (84, 190, 96), (188, 88, 212),
)  # fmt: skip
# First index of a split: far apart, so that a split keeps its scenes when another one grows.
SPLIT_START: dict[SplitName, int] = {"train": 0, "val": 1_000_000, "test": 2_000_000}


class SceneSettings(Settings):
    """How hard the scenes are. The three strengths lie in [0,1]; 0 removes the nuisance."""

    size: int = Field(64, ge=16)  # pixels, both sides
    objects: tuple[int, int] = (2, 4)  # fewest and most objects an image
    clutter: int = Field(6, ge=0)  # most strokes an image; they count as background, a third lies over the objects
    colour_variation: float = Field(0.3, ge=0, le=1)  # 0: every class has its own hue; 1: the hue says nothing
    texture: float = Field(0.5, ge=0, le=1)  # patterns of background and objects, light gradient, cast and contrast
    noise: float = Field(0.5, ge=0, le=1)  # blur and sensor noise

    @model_validator(mode="after")
    def _ordered(self) -> "SceneSettings":
        if not 0 <= self.objects[0] <= self.objects[1]:
            raise InputError(
                f"objects {self.objects} must be (fewest, most) with 0 <= fewest <= most", "config/invalid-value"
            )
        return self


class _Placement(NamedTuple):
    class_id: int
    x: float
    y: float
    radius: float
    angle: float
    stretch: float


def scene(seed: int, index: int, settings: SceneSettings | None = None) -> tuple[Bytes, Bytes]:
    """Scene `index` of the series `seed`: image (S,S,3) uint8 RGB and mask (S,S) uint8 with ids into CLASSES.

    The same three arguments give the same scene. The image has soft edges; a mask pixel is an object's when its centre
    is inside.
    """
    settings = settings or SceneSettings()
    rng = np.random.default_rng([seed, index])
    image, backdrop = _background(rng, settings)
    mask = np.zeros((settings.size, settings.size), np.uint8)
    strokes = int(rng.integers(0, settings.clutter + 1))
    in_front = strokes // 3
    for _ in range(strokes - in_front):
        _draw_stroke(rng, image, mask, backdrop, settings)
    for placement in _placements(rng, settings):
        _draw_object(rng, image, mask, placement, backdrop, settings)
    for _ in range(in_front):
        _draw_stroke(rng, image, mask, backdrop, settings)
    image = _photograph(rng, image, settings)
    return np.ascontiguousarray((image * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0)), mask


def write_scenes(
    folder: str, counts: Mapping[SplitName, int], seed: int, settings: SceneSettings | None = None
) -> None:
    """Write counts[split] scenes into folder/<split>/images/*.jpg and /masks/*.png, and folder/class_map.yaml.

    That is the layout of ingest's format "camvid". `counts` names train, val and test, or some of them. JPEG of quality
    95 without chroma subsampling; palette PNG of class ids.
    """
    for split, count in counts.items():
        for index in range(SPLIT_START[split], SPLIT_START[split] + count):
            image, mask = scene(seed, index, settings)
            name = f"{split}_{index - SPLIT_START[split]:05d}"
            storage.write_bytes(storage.join(folder, split, "images", f"{name}.jpg"), _jpeg(image))
            storage.write_bytes(storage.join(folder, split, "masks", f"{name}.png"), palette_png(mask, COLOURS))
    storage.write_bytes(storage.join(folder, "class_map.yaml"), yaml.safe_dump(class_map(), sort_keys=False).encode())


def class_map() -> dict[str, object]:
    """The class map of the written masks, as ingest reads it."""
    named = zip(CLASSES, COLOURS, strict=True)
    classes = [{"name": name, "colour": list(colour), "ids": [i]} for i, (name, colour) in enumerate(named)]
    return {"classes": classes, "ignore": {"ids": [IGNORE_INDEX]}}


def _jpeg(image: Bytes) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


# Fields over the image: arrays (S,S) in about [-1,1].


@lru_cache(maxsize=8)
def _pixel_centres(size: int) -> tuple[Floats, Floats]:
    y, x = np.mgrid[0:size, 0:size] + 0.5
    return x, y


@lru_cache(maxsize=64)
def _interpolation(size: int, cells: int) -> Floats:
    """Matrix (size, cells) that resamples `cells` values linearly over `size` pixels."""
    position = np.linspace(0, cells - 1, size)[:, None]
    return np.clip(1 - np.abs(position - np.arange(cells)[None]), 0, 1)


def _smooth_noise(rng: np.random.Generator, size: int) -> Floats:
    cells = int(rng.integers(3, 9))
    weights = _interpolation(size, cells)
    return weights @ rng.uniform(-1, 1, (cells, cells)) @ weights.T


def _gradient(rng: np.random.Generator, size: int) -> Floats:
    x, y = _pixel_centres(size)
    angle = rng.uniform(0, 2 * np.pi)
    return np.asarray((np.cos(angle) * (x / size - 0.5) + np.sin(angle) * (y / size - 0.5)) * np.sqrt(2))


def _stripes(rng: np.random.Generator, size: int) -> Floats:
    x, y = _pixel_centres(size)
    angle, period = rng.uniform(0, np.pi), rng.uniform(0.06, 0.25) * size
    return np.sin(2 * np.pi * (np.cos(angle) * x + np.sin(angle) * y) / period + rng.uniform(0, 2 * np.pi))


def _pattern(rng: np.random.Generator, size: int, colour: Floats, strength: float) -> Floats:
    """A colour (3,) spread over the image (3,S,S) with a random pattern along a random colour direction."""
    field = (_smooth_noise, _gradient, _stripes)[rng.integers(3)](rng, size)
    direction = rng.uniform(0.5, 1, 3) * rng.choice((-1.0, 1.0))
    return colour[:, None, None] + 0.3 * strength * rng.uniform(0, 1) * direction[:, None, None] * field


def _background(rng: np.random.Generator, settings: SceneSettings) -> tuple[Floats, Floats]:
    colour = np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.05, 0.7), rng.uniform(0.2, 0.9)))
    return _pattern(rng, settings.size, colour, settings.texture), colour


# Objects and strokes: signed distances in pixels, negative inside.


def _shape_distance(class_id: int, x: Floats, y: Floats, radius: float) -> Floats:
    """Signed distance to the outline of a shape of about `radius`, upright at the origin (inexact off the corners)."""
    name = CLASSES[class_id]
    if name == "disc":
        return np.hypot(x, y) - 0.95 * radius
    if name == "ring":
        return np.abs(np.hypot(x, y) - 0.76 * radius) - 0.26 * radius
    if name == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.82 * radius
    if name == "triangle":
        slope = np.sqrt(3) / 2 * np.abs(x) - 0.5 * y
        return np.maximum(slope, y) - 0.64 * radius
    return np.maximum(np.maximum(np.abs(x), np.abs(y)) - radius, np.minimum(np.abs(x), np.abs(y)) - 0.34 * radius)


def _placements(rng: np.random.Generator, settings: SceneSettings) -> list[_Placement]:
    """Draw objects that touch or overlap a little at most; one for which there is no room is left out."""
    size, placed = settings.size, list[_Placement]()
    for _ in range(rng.integers(settings.objects[0], settings.objects[1] + 1)):
        class_id, radius = int(rng.integers(1, len(CLASSES))), rng.uniform(0.14, 0.24) * size
        for x, y in rng.uniform(0.6 * radius, size - 0.6 * radius, (12, 2)):
            if all(np.hypot(x - p.x, y - p.y) > 0.85 * (radius + p.radius) for p in placed):
                angle, stretch = rng.uniform(0, 2 * np.pi), np.exp(rng.uniform(-0.08, 0.08))
                placed.append(_Placement(class_id, x, y, radius, angle, stretch))
                break
    return placed


def _draw_object(
    rng: np.random.Generator,
    image: Floats,
    mask: Bytes,
    placement: _Placement,
    backdrop: Floats,
    settings: SceneSettings,
) -> None:
    x, y = _pixel_centres(settings.size)
    x, y, c, s = x - placement.x, y - placement.y, np.cos(placement.angle), np.sin(placement.angle)
    u, v = (c * x + s * y) * placement.stretch, (c * y - s * x) / placement.stretch
    distance = _shape_distance(placement.class_id, u, v, placement.radius)
    colour = _contrasting_colour(rng, backdrop, placement.class_id, settings.colour_variation)
    _paint(image, distance, _pattern(rng, settings.size, colour, settings.texture))
    mask[distance < 0] = placement.class_id


def _draw_stroke(
    rng: np.random.Generator, image: Floats, mask: Bytes, backdrop: Floats, settings: SceneSettings
) -> None:
    """A short straight stroke; where it covers an object the mask becomes background."""
    x, y = _pixel_centres(settings.size)
    scale = settings.size / 64
    x, y = x - rng.uniform(0, settings.size), y - rng.uniform(0, settings.size)
    angle, half_length, half_width = rng.uniform(0, np.pi), rng.uniform(2, 8) * scale, rng.uniform(0.5, 1.2) * scale
    along, across = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    distance = np.hypot(np.maximum(np.abs(along) - half_length, 0), across) - half_width
    colour = _contrasting_colour(rng, backdrop, int(rng.integers(1, len(CLASSES))), settings.colour_variation)
    _paint(image, distance, colour[:, None, None])
    mask[distance < 0] = 0


def _paint(image: Floats, distance: Floats, colours: Floats) -> None:
    image += np.clip(0.5 - distance, 0, 1) * (colours - image)


def _contrasting_colour(rng: np.random.Generator, backdrop: Floats, class_id: int, colour_variation: float) -> Floats:
    """RGB in [0,1], some way from the backdrop, whose hue spreads `colour_variation` turns about the class's own."""
    class_hue = colorsys.rgb_to_hsv(*COLOURS[class_id])[0]
    colour = backdrop
    for _ in range(20):
        hue = (class_hue + colour_variation * rng.uniform(-0.5, 0.5)) % 1
        colour = np.array(colorsys.hsv_to_rgb(hue, rng.uniform(0.25, 1), rng.uniform(0.25, 1)))
        if np.abs(colour - backdrop).max() > 0.35:
            break
    return colour


# The camera: light, colour cast, contrast, blur and noise.


@lru_cache(maxsize=64)
def _blur_matrix(size: int, sigma: float) -> Floats:
    offset = np.arange(size)[:, None] - np.arange(size)[None]
    weights = np.exp(-0.5 * (offset / sigma) ** 2)
    return weights / weights.sum(1, keepdims=True)


def _photograph(rng: np.random.Generator, image: Floats, settings: SceneSettings) -> Floats:
    """Image (3,S,S) → the same in [0,1] as a camera saw it."""
    size, texture, noise = settings.size, settings.texture, settings.noise
    image = image * (1 + 0.6 * texture * rng.uniform(0, 1) * _gradient(rng, size))
    image = image * (1 + 0.3 * texture * rng.uniform(-1, 1, (3, 1, 1)))
    image = 0.5 + (image - 0.5) * (1 - 0.5 * texture * rng.uniform(0, 1)) + 0.15 * texture * rng.uniform(-1, 1)
    blur = _blur_matrix(size, round(0.2 + noise * rng.uniform(0, 1), 1) * size / 64)
    image = blur @ image @ blur.T
    grain = 0.12 * noise * rng.uniform(0.1, 1)
    return np.clip(image + grain * rng.standard_normal(image.shape, np.float32), 0, 1)
