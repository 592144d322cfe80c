"""People judge a run by these pictures and tables: a wrong colour or figure would be believed."""

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from threestage.report import terminal_tables

COLOURS = ((10, 20, 30), (200, 100, 50))
CLASSES = ("ground", "disc")
MASK = np.array([[0, 1, 255], [1, 1, 0]], np.uint8)


def test_colourise_gives_each_class_its_colour_and_void_black() -> None:
    expected = [[COLOURS[0], COLOURS[1], (0, 0, 0)], [COLOURS[1], COLOURS[1], COLOURS[0]]]
    result = terminal_tables.colourise(MASK, COLOURS)
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, expected)


def test_overlay_mixes_by_alpha() -> None:
    image = np.full((2, 3, 3), 100, np.uint8)
    np.testing.assert_array_equal(terminal_tables.overlay(image, MASK, COLOURS, alpha=0), image)
    np.testing.assert_array_equal(
        terminal_tables.overlay(image, MASK, COLOURS, alpha=1), terminal_tables.colourise(MASK, COLOURS)
    )
    np.testing.assert_array_equal(
        terminal_tables.overlay(image, MASK, COLOURS, alpha=0.5)[0], [(55, 60, 65), (150, 100, 75), (50, 50, 50)]
    )


def test_palette_png_keeps_ids_and_shows_colours() -> None:
    with Image.open(io.BytesIO(terminal_tables.palette_png(MASK, COLOURS))) as png:
        assert png.mode == "P"
        np.testing.assert_array_equal(np.asarray(png), MASK)
        np.testing.assert_array_equal(np.asarray(png.convert("RGB")), terminal_tables.colourise(MASK, COLOURS))


def test_palette_png_keeps_all_256_values() -> None:
    mask = np.arange(256, dtype=np.uint8).reshape(16, 16)
    with Image.open(io.BytesIO(terminal_tables.palette_png(mask, COLOURS))) as png:
        np.testing.assert_array_equal(np.asarray(png), mask)


def test_a_panel_shows_every_picture_enlarged_without_mixing_pixels() -> None:
    red, blue = np.full((64, 64, 3), (255, 0, 0), np.uint8), np.full((64, 64, 3), (0, 0, 255), np.uint8)
    picture = terminal_tables.panel([("image", [red, red]), ("truth", [blue])], CLASSES, COLOURS)
    pixels = np.asarray(picture).reshape(-1, 3)
    assert (pixels == (255, 0, 0)).all(1).sum() == 2 * 192 * 192
    assert (pixels == (0, 0, 255)).all(1).sum() == 192 * 192
    for colour in COLOURS:
        assert (pixels == colour).all(1).sum() > 100, "the legend shows every class"


def test_a_panel_reduces_wide_pictures_and_keeps_their_shape() -> None:
    wide = np.full((500, 1000, 3), (255, 0, 0), np.uint8)
    pixels = np.asarray(terminal_tables.panel([("image", [wide])], CLASSES, COLOURS)).reshape(-1, 3)
    assert (pixels == (255, 0, 0)).all(1).sum() == 480 * 240


def test_a_panel_with_many_classes_breaks_the_legend_into_lines() -> None:
    picture = np.zeros((64, 64, 3), np.uint8)
    few = terminal_tables.panel([("image", [picture])], CLASSES, COLOURS)
    many = terminal_tables.panel([("image", [picture])], CLASSES * 10, COLOURS * 10)
    assert many.width == few.width
    assert many.height > few.height + 100


def test_a_panel_without_pictures_is_still_a_picture() -> None:
    assert terminal_tables.panel([("image", [])], CLASSES, COLOURS).height > 0


RESULTS = {
    "stages": {
        "stage1": {"mean_iou": 0.40651, "best_mean_iou": 0.42, "student_mean_iou": 0.4,
                   "pseudo_mask_mean_iou": 0.41, "mean_confidence": 0.7,
                   "share_above_0.9": 0.256, "rejected": 12, "seconds": 42.04},
        "stage2": {"mean_iou": float("nan"), "pseudo_mask_mean_iou": None, "seconds": 150},
        "stage3": {"mean_iou": 0.5, "seconds": 7500.0, "per_class_iou": {"ground": 0.5}},
    }
}  # fmt: skip


def test_the_table_prints_figures_and_dashes() -> None:
    header, rule, *rows = terminal_tables.results_table(RESULTS).splitlines()
    assert header.split("  ")[0] == "stage"
    assert "pseudo-mask mean IoU" in header
    assert rows[0].split() == ["stage1", "0.407", "0.420", "0.400", "0.410", "0.700", "26", "%", "12", "42.0", "s"]
    assert rows[1].split() == ["stage2", "–", "–", "–", "–", "–", "–", "–", "150", "s"]
    assert rows[2].split() == ["stage3", "0.500", "–", "–", "–", "–", "–", "–", "2.1", "h"]
    assert len({len(line) for line in (header, rule, *rows)}) == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (179, "179 s"), (180, "3 min"), (5999, "100 min"), (6001, "1.7 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert terminal_tables.results_table({"stages": {"s": {"seconds": seconds}}}).endswith(f" {text}")


def test_the_rich_table_holds_the_same_cells() -> None:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=140)
    with console.capture() as capture:
        console.print(terminal_tables.rich_table(RESULTS))
    for cell in ("stage1", "0.407", "26 %", "150 s", "2.1 h", "–"):
        assert cell in capture.get()


def test_a_terminal_of_80_columns_shows_all_of_a_run_that_left_nothing_out() -> None:
    from rich.console import Console

    figures = {
        "mean_iou": 0.4, "best_mean_iou": 0.4, "student_mean_iou": 0.4, "pseudo_mask_mean_iou": 0.4,
        "mean_confidence": 0.9, "share_above_0.9": 0.88, "rejected": 0, "seconds": 5900,
    }  # fmt: skip
    console = Console(file=io.StringIO(), width=80)
    with console.capture() as capture:
        console.print(terminal_tables.rich_table({"stages": {"stage1": figures}}))
    assert "confidence" in capture.get() and "pseudo-mask" in capture.get() and "98 min" in capture.get()
    assert "left" not in capture.get() and "…" not in capture.get()


def test_the_module_imports_neither_rich_nor_torch() -> None:
    modules = "('rich', 'torch', 'mlflow', 'ray')"
    code = f"import sys, threestage.report.terminal_tables; print([m for m in {modules} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
