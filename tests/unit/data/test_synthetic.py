"""The demo and many tests learn from these scenes: they must repeat exactly, and show what their masks say."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from pydantic import ValidationError

from threestage.data.classes import ClassMap
from threestage.data.formats import IngestSettings, discover
from threestage.data.synthetic import CLASSES, COLOURS, SceneSettings, class_map, scene, write_scenes

PLAIN = SceneSettings(objects=(1, 1), clutter=0, colour_variation=0, texture=0, noise=0)


def test_a_scene_is_a_function_of_seed_index_and_settings() -> None:
    for first, second in zip(scene(3, 5), scene(3, 5), strict=True):
        np.testing.assert_array_equal(first, second)
    assert not np.array_equal(scene(3, 5)[0], scene(3, 6)[0])
    assert not np.array_equal(scene(3, 5)[0], scene(4, 5)[0])


def test_shapes_types_and_ids() -> None:
    for size in (32, 64, 96):
        image, mask = scene(0, 1, SceneSettings(size=size))
        assert (image.shape, image.dtype) == ((size, size, 3), np.dtype(np.uint8))
        assert (mask.shape, mask.dtype) == ((size, size), np.dtype(np.uint8))
        assert mask.max() < len(CLASSES)


def test_every_class_occurs_often_and_background_prevails() -> None:
    masks = np.stack([scene(0, i)[1] for i in range(60)])
    shares = np.bincount(masks.ravel(), minlength=len(CLASSES)) / masks.size
    assert 0.6 < shares[0] < 0.9
    assert shares[1:].min() > 0.02


def test_no_objects_and_no_clutter_is_all_background() -> None:
    image, mask = scene(0, 0, PLAIN.model_copy(update={"objects": (0, 0)}))
    assert not mask.any()
    assert np.ptp(image.reshape(-1, 3), axis=0).max() <= 1


def test_image_and_mask_show_the_same_object() -> None:
    for index in range(20):
        image, mask = scene(1, index, PLAIN)
        inside, outside = image[mask > 0].astype(float), image[mask == 0].astype(float)
        contrast = np.abs(np.median(inside, axis=0) - np.median(outside, axis=0)).max()
        assert contrast > 60
        nearer_inside = np.abs(image - np.median(inside, axis=0)).sum(2) < np.abs(
            image - np.median(outside, axis=0)
        ).sum(2)
        assert (nearer_inside == (mask > 0)).mean() > 0.98


def test_strokes_over_an_object_are_background() -> None:
    settings = SceneSettings(objects=(3, 3), clutter=0)
    cluttered = settings.model_copy(update={"clutter": 60})
    objects, occluded = (np.mean([scene(2, i, s)[1] > 0 for i in range(20)]) for s in (settings, cluttered))
    assert 0.5 * objects < occluded < 0.97 * objects


def test_hue_names_the_class_only_without_variation() -> None:
    def spread(colour_variation: float) -> float:
        settings = PLAIN.model_copy(update={"colour_variation": colour_variation})
        hues = []
        for index in range(60):
            image, mask = scene(4, index, settings)
            if (mask == 1).any():
                hue = np.asarray(Image.fromarray(image).convert("HSV"))[..., 0]
                hues.append(np.exp(2j * np.pi * np.median(hue[mask == 1]) / 256))
        return 1 - float(np.abs(np.mean(hues)))

    assert spread(0) < 0.01 < 0.3 < spread(1)


def test_written_scenes_are_what_ingest_reads(tmp_path: Path) -> None:
    settings = SceneSettings(size=32)
    write_scenes(str(tmp_path), {"train": 3, "val": 2}, seed=7, settings=settings)

    items = discover(str(tmp_path), IngestSettings(format="camvid"))
    assert [(item.split, item.mask_uri is not None, item.problem) for item in items] == [("train", True, None)] * 3 + [
        ("val", True, None)
    ] * 2
    with Image.open(tmp_path / "train" / "masks" / "train_00001.png") as png:
        assert png.mode == "P"
        np.testing.assert_array_equal(np.asarray(png), scene(7, 1, settings)[1])
    with Image.open(tmp_path / "train" / "images" / "train_00001.jpg") as jpeg:
        assert np.abs(np.asarray(jpeg).astype(int) - scene(7, 1, settings)[0]).mean() < 4
    assert yaml.safe_load((tmp_path / "class_map.yaml").read_text()) == class_map()


def test_splits_are_disjoint_and_grow_by_appending(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    write_scenes(str(small), {"train": 2, "val": 2, "test": 2}, seed=0)
    write_scenes(str(large), {"train": 4, "val": 2, "test": 2}, seed=0)
    for path in small.rglob("*.*"):
        assert path.read_bytes() == (large / path.relative_to(small)).read_bytes()
    digests = {hashlib.sha256(path.read_bytes()).hexdigest() for path in large.rglob("*.jpg")}
    assert len(digests) == 8


def test_the_class_map_is_a_valid_one() -> None:
    checked = ClassMap.model_validate(class_map())
    assert tuple(entry.name for entry in checked.classes) == CLASSES
    assert tuple(entry.colour for entry in checked.classes) == COLOURS
    assert checked.ignore.ids == (255,)


def test_settings_refuse_what_cannot_be_drawn() -> None:
    for wrong in ({"objects": (4, 2)}, {"noise": 1.5}, {"size": 4}, {"colour": 1}):
        with pytest.raises(ValidationError):
            SceneSettings.model_validate(wrong)
