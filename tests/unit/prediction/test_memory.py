"""Why: a small file of many pixels must not fill the memory, however large the network's maps are."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.unit.prediction.test_predict import files_below, make_model, photo, run
from threestage.data.pool import PoolFile
from threestage.prediction import memory, pool_prediction
from threestage.prediction.memory import LEAST_PIXELS, MARGIN, bytes_per_pixel, free_bytes, most_pixels

CPU = torch.device("cpu")
PROBE_SIDES = memory.PROBE_SIDES  # tests elsewhere have smaller ones


@pytest.fixture(autouse=True)
def large_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "PROBE_SIDES", PROBE_SIDES)


class Holding(nn.Module):
    """Takes so many bytes for each pixel, for so many seconds."""

    held_s = 0.0

    def __init__(self, per_pixel: int) -> None:
        super().__init__()
        self._per_pixel = per_pixel
        self.passes = 0

    def forward(self, image: Tensor) -> None:
        self.passes += 1
        held = torch.ones(image.shape[-2] * image.shape[-1] * self._per_pixel, dtype=torch.uint8)
        time.sleep(self.held_s)
        del held


@pytest.mark.parametrize("per_pixel", [100, 1000])
@pytest.mark.parametrize("counted_by", ["kernel", "looking"])
def test_what_is_measured_is_within_a_factor(per_pixel: int, counted_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if counted_by == "looking":  # which a short pass can escape on a busy machine
        monkeypatch.setattr(memory, "_proc_bytes", lambda file, name: {}[name])
        monkeypatch.setattr(Holding, "held_s", 0.02)
    for _ in range(2):  # also where freed memory is kept
        assert per_pixel / 1.5 <= bytes_per_pixel(Holding(per_pixel), CPU) / MARGIN <= per_pixel * 1.5


def test_a_network_is_measured_once_and_the_memory_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Holding(1000)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**30)
    first = most_pixels(network, network, CPU)
    passes = network.passes
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**29)
    assert abs(most_pixels(network, network, CPU) * 2 - first) <= 2 and network.passes == passes
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    assert most_pixels(network, network, CPU) == LEAST_PIXELS


def test_free_memory_is_that_of_the_container(tmp_path: Path) -> None:
    """With what can be reclaimed, in the names of both versions; without a limit there is none."""
    for names, stat in (
        (("memory.max", "memory.current"), "anon 1\ninactive_file 30\n"),
        (("memory.limit_in_bytes", "memory.usage_in_bytes"), "inactive_file 5\ntotal_inactive_file 30\n"),
    ):
        (tmp_path / "memory.stat").write_text(stat)
        (tmp_path / names[0]).write_text("1000\n")
        (tmp_path / names[1]).write_text("400\n")
        assert memory._free_of_group(tmp_path, *names) == 630
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._free_of_group(tmp_path, "memory.max", "memory.current") == float("inf")
    assert 0 < free_bytes(CPU) < 2**50


def test_images_above_what_fits_are_predicted_in_windows_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(tmp_path / "model")
    source = tmp_path / "in"
    source.mkdir()
    for number in range(4):
        (source / f"{number}.jpg").write_bytes(photo(number))  # of 2000 and 2013 pixels
    whole = run(model, source, tmp_path / "whole")
    monkeypatch.setattr(pool_prediction, "most_pixels", lambda *_: 2005)
    report = run(model, source, tmp_path / "cut")
    assert (whole.in_windows, report.in_windows, report.images) == (0, 1, 4)
    before, after = files_below(tmp_path / "whole"), files_below(tmp_path / "cut")
    masks = [name for name in before if name.startswith("masks/")]
    assert [name for name in masks if before[name] != after[name]] in ([], ["masks/2.png"])
    assert run(model, source, tmp_path / "cut").in_windows == 1


def test_what_the_device_cannot_hold_is_tried_in_smaller_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.unit.prediction.test_pseudo_masks import Colours, by_value, picture, task_for

    class Small(Colours):
        def forward(self, image: Tensor) -> tuple[Tensor, None]:
            if image.shape[-1] * image.shape[-2] > 500:
                raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
            return super().forward(image)

    monkeypatch.setattr(pool_prediction, "most_pixels", lambda *_: 2**40)
    monkeypatch.setattr(pool_prediction, "LEAST_PIXELS", 16)
    file: PoolFile = by_value(tmp_path, [picture(0, (40, 50))])
    task: Any = task_for(tmp_path)
    (report,) = pool_prediction.predict_files(Small(), task, [file], CPU)
    assert (report.statistics.images, report.in_windows) == (1, 1)
    assert np.sum(report.statistics.class_pixels) == 2000
