"""At 80 columns the stage, its bar, the steps and the time left stand whole; losses are shown where they fit."""

import io
import re

import pytest
from rich.console import Console

from threestage.cli.progress import BAR_WIDTH, StageProgress
from threestage.config import load

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
ROW = {
    "step": 400.0, "steps_per_second": 0.4, "supervised_loss": 0.3, "consistency_loss": 0.2, "pseudo_mask_loss": 0.3,
    "mean_iou": 0.446,
}  # fmt: skip


def last_frame(width: int, with_figures: bool = True) -> list[str]:
    """The lines that stand on the terminal in the end."""
    screen = io.StringIO()
    console = Console(width=width, force_terminal=True, file=screen, legacy_windows=False)
    with StageProgress(load("own_images", ["data.root=x", "stage2.steps=800"]), console) as progress:
        if with_figures:
            progress.on_metrics("stage2", ROW)
            progress.on_progress("pseudo-masks 2", 348, 348)
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", ANSI.sub("", screen.getvalue())) if line.strip()]
    return lines[-2:] if with_figures else lines[-1:]


def test_at_80_columns() -> None:
    stage, pool = last_frame(80)
    assert stage.startswith("stage2") and " 400/800 " in stage and "-:--:--" in stage and stage.endswith("…")
    assert pool.startswith("pseudo-masks 2") and " 348/348 " in pool and pool.count("━") == BAR_WIDTH
    assert max(map(len, (stage, pool))) <= 80


def test_at_200_columns() -> None:
    stage, _ = last_frame(200)
    assert stage.endswith("pseudo_mask 0.300  mean IoU 0.446")


def test_something_moves_before_there_are_figures() -> None:
    (line,) = last_frame(80, with_figures=False)
    assert line.startswith("starting") and line.count("━") == BAR_WIDTH


@pytest.mark.parametrize("width", [40, 60])
def test_a_narrow_terminal_keeps_the_steps(width: int) -> None:
    assert "400/800" in last_frame(width)[0]
