"""People judge a run by these images: a wrong colour would be believed."""

import io
import subprocess
import sys

import numpy as np
from PIL import Image

from threestage.data.palette import palette_png
from threestage.report import mask_images

COLOURS = ((10, 20, 30), (200, 100, 50))
CLASSES = ("ground", "disc")
MASK = np.array([[0, 1, 255], [1, 1, 0]], np.uint8)


def test_colourise_gives_each_class_its_colour_and_void_black() -> None:
    expected = [[COLOURS[0], COLOURS[1], (0, 0, 0)], [COLOURS[1], COLOURS[1], COLOURS[0]]]
    result = mask_images.colourise(MASK, COLOURS)
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, expected)


def test_overlay_mixes_by_alpha() -> None:
    image = np.full((2, 3, 3), 100, np.uint8)
    np.testing.assert_array_equal(mask_images.overlay(image, MASK, COLOURS, alpha=0), image)
    np.testing.assert_array_equal(
        mask_images.overlay(image, MASK, COLOURS, alpha=1), mask_images.colourise(MASK, COLOURS)
    )
    np.testing.assert_array_equal(
        mask_images.overlay(image, MASK, COLOURS, alpha=0.5)[0], [(55, 60, 65), (150, 100, 75), (50, 50, 50)]
    )


def test_palette_png_keeps_ids_and_shows_colours() -> None:
    with Image.open(io.BytesIO(palette_png(MASK, COLOURS))) as png:
        assert png.mode == "P"
        np.testing.assert_array_equal(np.asarray(png), MASK)
        np.testing.assert_array_equal(np.asarray(png.convert("RGB")), mask_images.colourise(MASK, COLOURS))


def test_palette_png_keeps_all_256_values() -> None:
    mask = np.arange(256, dtype=np.uint8).reshape(16, 16)
    with Image.open(io.BytesIO(palette_png(mask, COLOURS))) as png:
        np.testing.assert_array_equal(np.asarray(png), mask)


def test_a_panel_shows_every_picture_enlarged_without_mixing_pixels() -> None:
    red, blue = np.full((64, 64, 3), (255, 0, 0), np.uint8), np.full((64, 64, 3), (0, 0, 255), np.uint8)
    picture = mask_images.panel([("image", [red, red]), ("truth", [blue])], CLASSES, COLOURS)
    pixels = np.asarray(picture).reshape(-1, 3)
    assert (pixels == (255, 0, 0)).all(1).sum() == 2 * 192 * 192
    assert (pixels == (0, 0, 255)).all(1).sum() == 192 * 192
    for colour in COLOURS:
        assert (pixels == colour).all(1).sum() > 100, "the legend shows every class"


def test_a_panel_reduces_wide_pictures_and_keeps_their_shape() -> None:
    wide = np.full((500, 1000, 3), (255, 0, 0), np.uint8)
    pixels = np.asarray(mask_images.panel([("image", [wide])], CLASSES, COLOURS)).reshape(-1, 3)
    assert (pixels == (255, 0, 0)).all(1).sum() == 480 * 240


def test_a_panel_with_many_classes_breaks_the_legend_into_lines() -> None:
    picture = np.zeros((64, 64, 3), np.uint8)
    few = mask_images.panel([("image", [picture])], CLASSES, COLOURS)
    many = mask_images.panel([("image", [picture])], CLASSES * 10, COLOURS * 10)
    assert many.width == few.width
    assert many.height > few.height + 100


def test_a_panel_has_captions_that_never_widen_it() -> None:
    pictures = [np.zeros((64, 64, 3), np.uint8)] * 2
    columns = [("labels only\n1,600 steps", pictures), ("truth", pictures)]
    plain = mask_images.panel(columns, CLASSES, COLOURS)
    named = mask_images.panel(columns, CLASSES, COLOURS, [["a" * 500, ""], ["mean IoU 0.5", ""]])
    assert named.width == plain.width and named.height == plain.height + 2 * (mask_images.FONT_SIZE + mask_images.GAP)
    assert (np.asarray(named) == (105, 105, 105)).all(2).any(), "the captions are grey"


def test_a_panel_without_pictures_is_still_a_picture() -> None:
    assert mask_images.panel([("image", [])], CLASSES, COLOURS).height > 0


def test_changes_tell_what_became_right_and_wrong() -> None:
    mask = np.array([[0, 0, 1, 1, 255]], np.uint8)
    before, after = np.array([[0, 1, 1, 0, 0]], np.uint8), np.array([[0, 0, 0, 0, 1]], np.uint8)
    expected = [
        mask_images.STILL_RIGHT,
        mask_images.BECAME_RIGHT,
        mask_images.BECAME_WRONG,
        mask_images.STILL_WRONG,
        mask_images.IGNORED,
    ]
    assert mask_images.changes(mask, before, after).tolist() == [expected]


def test_a_class_number_stands_inside_its_class() -> None:
    mask = np.zeros((100, 120), np.uint8)
    mask[10:70, 50:115] = 3
    mask[95:97] = 2  # too thin for a number
    places = mask_images.label_places(mask, 4)
    assert set(places) == {0, 3}
    assert all(mask[place] == class_id for class_id, place in places.items())


def test_the_module_imports_neither_rich_nor_torch() -> None:
    modules = "('rich', 'torch', 'mlflow', 'ray')"
    code = f"import sys, threestage.report.mask_images; print([m for m in {modules} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
