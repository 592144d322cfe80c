"""Order, canvases and prefetching decide what a step sees: they must be functions of the step, or resume is not exact."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import tiny_config
from threestage.augment.draws import Draws, generator
from threestage.augment.views import AugmentSettings, weak_view
from threestage.data.batches import (
    Batch,
    BatchMode,
    SampleSet,
    ShuffledIndex,
    batches,
    canvas_size,
    prefetch,
    share_of,
    stack,
)
from threestage.data.datasets import labelled_set, pool_set, validation_set
from threestage.data.pool import data_set_files
from threestage.data.records import load_manifest
from threestage.data.samples import Decoded, crop_to_canvas
from threestage.data.split import make_split
from threestage.models.export import ModelCard, save_model
from threestage.models.network import build_network
from threestage.prediction.pseudo_masks import PoolTask, gather
from threestage.run.backend import RunCallbacks
from threestage.run.local_backend import LocalBackend
from threestage.training.schedule import EmaSettings, OptimiserSettings, ema_decay, learning_rate_factor, ramp_up


@pytest.fixture
def labelled(scenes: Path) -> SampleSet:
    config = tiny_config(scenes)
    manifest = load_manifest(str(scenes))
    return labelled_set(str(scenes), manifest, make_split(str(scenes), manifest, config.data), 1, None)


def test_every_pass_is_a_permutation_of_its_own() -> None:
    order = ShuffledIndex(7, 0, "labelled")
    passes = [[order[p * 7 + i] for i in range(7)] for p in range(3)]
    assert all(sorted(items) == list(range(7)) for items in passes)
    assert passes[0] != passes[1]
    assert [ShuffledIndex(7, 0, "labelled")[i] for i in range(14, 21)] == passes[2]


def test_batches_from_any_step_equal_those_of_an_undisturbed_run(labelled: SampleSet) -> None:
    whole = list(islice(batches(labelled, share_of(3, "per_worker", 0, 1), (48, 40), (0, "s")), 6))
    rest = list(islice(batches(labelled, share_of(3, "per_worker", 0, 1), (48, 40), (0, "s"), first_image=12), 2))
    for a, b in zip(whole[4:], rest, strict=True):
        assert (
            a.image_ids == b.image_ids and torch.equal(a.image, b.image) and torch.equal(a.maps["mask"], b.maps["mask"])
        )


@pytest.mark.parametrize(("size", "batch", "workers"), [(2, "per_worker", 2), (4, "global", 2), (4, "global", 3)])
def test_workers_share_the_global_batch(labelled: SampleSet, size: int, batch: BatchMode, workers: int) -> None:
    """The same images, cut at the same places, whatever their number."""
    one = next(batches(labelled, share_of(4, "per_worker", 0, 1), (24, 24), (0, "s"), first_image=4))
    shares = [share_of(size, batch, rank, workers) for rank in range(workers)]
    parts = [next(batches(labelled, share, (24, 24), (0, "s"), first_image=4)) for share in shares]
    assert one.image_ids == tuple(image_id for part in parts for image_id in part.image_ids)
    assert torch.equal(one.image, torch.cat([part.image for part in parts]))
    assert max(share.count for share in shares) - min(share.count for share in shares) <= 1


def test_small_images_are_padded_and_large_ones_cut() -> None:
    image = np.arange(4 * 10 * 3, dtype=np.uint8).reshape(4, 10, 3)
    mask = image[..., 0] % 5
    placed, maps, extent, _ = crop_to_canvas(Decoded(image, {"mask": mask}), (6, 8), np.random.default_rng(0))
    assert placed.shape == (6, 8, 3) and extent[:2].tolist() == [[4, 8], [4, 10]]
    assert (maps["mask"][4:] == 255).all()
    left = int(np.flatnonzero(image[0, :, 0] == placed[0, 0, 0])[0])
    assert np.array_equal(placed[:4], image[:, left : left + 8])
    assert np.array_equal(maps["mask"][:4], mask[:, left : left + 8])


def test_canvas_is_what_the_widest_view_needs(scenes: Path) -> None:
    config = tiny_config(scenes)
    assert canvas_size((64, 64), config.augment) == (32, 32)
    wide = config.augment.model_copy(update={"scale": (0.8, 1.5)})
    assert canvas_size((64, 64), wide) == (42, 42)
    assert canvas_size((32, 32), wide) == (32, 32)


LARGE = AugmentSettings(crop_size=(8, 64), scale=(0.5, 1.5), flip_probability=0)


def crops_of_a_ramp(augment: AugmentSettings, class_ids: Sequence[int | None]) -> torch.Tensor:
    """The columns (in 125ths of an image of 16×500 pixels) that crops show: canvas, then weak view."""
    columns = np.broadcast_to((np.arange(500) // 4).astype(np.uint8), (16, 500)).copy()
    decoded = Decoded(np.zeros((16, 500, 3), np.uint8), {"mask": columns})
    randoms = [np.random.default_rng(number) for number in range(len(class_ids))]
    batch = stack([("x", decoded)] * len(class_ids), canvas_size((16, 500), augment), randoms, class_ids)
    return weak_view(batch.image, batch.size, augment, Draws(generator(0))).warp(batch.maps["mask"])


def test_crops_of_every_scale_are_uniform_over_a_large_image() -> None:
    """As a random scale and then a random crop of the whole image would be, at the borders and in the middle."""
    shown = crops_of_a_ramp(LARGE, [None] * 8000)
    share = torch.bincount(shown.flatten().long(), minlength=125)[:125].double()
    rng = np.random.default_rng(0)
    scale = 0.5 + 0.1 * rng.integers(0, 11, (40_000, 1))
    first = rng.integers(0, (500 * scale).round().astype(int) - 64 + 1)
    seen = ((first + np.arange(64) + 0.5) / scale).astype(int).clip(0, 499) // 4
    plain = torch.bincount(torch.from_numpy(seen.ravel()), minlength=125).double()
    for part in (slice(0, 6), slice(119, 125), slice(50, 75)):
        assert share[part].sum() / share.sum() == pytest.approx(float(plain[part].sum() / plain.sum()), rel=0.2)


def test_a_crop_of_every_scale_holds_its_pixel_and_no_padding() -> None:
    class_ids = [number % 125 for number in range(1000)]
    shown = crops_of_a_ramp(LARGE, class_ids)
    assert all((one == class_id).any() for one, class_id in zip(shown, class_ids, strict=True))
    assert (shown == 255).float().mean() < 0.001


def test_prefetch_gives_all_in_order_and_passes_errors_on(labelled: SampleSet) -> None:
    def failing() -> Iterator[Batch]:
        yield from islice(batches(labelled, share_of(2, "per_worker", 0, 1), (64, 64), (0, "s")), 3)
        raise OSError("disk gone")

    source = prefetch(failing(), torch.device("cpu"), depth=1)
    got = [next(source).image_ids for _ in range(3)]
    assert got == [
        b.image_ids for b in islice(batches(labelled, share_of(2, "per_worker", 0, 1), (64, 64), (0, "s")), 3)
    ]
    with pytest.raises(OSError, match="disk gone"):
        next(source)


def test_the_pool_holds_labelled_images_but_no_validation_ones(scenes: Path, tmp_path: Path) -> None:
    config = tiny_config(scenes)
    manifest = load_manifest(str(scenes))
    split = make_split(str(scenes), manifest, config.data)
    card = ModelCard(
        network=config.network, classes=manifest.classes, colours=manifest.colours, downscale=1, stage="stage1"
    )
    digest = save_model(str(tmp_path / "model"), build_network(config.network, len(manifest.classes)), card)
    excluded = frozenset(split.labelled[:2])
    task = PoolTask(
        destination=str(tmp_path / "pm"), model_digest=digest, num_classes=len(manifest.classes), downscale=1,
        max_image_pixels=10**6, batch_size=4, used_ids=frozenset(split.labelled), excluded_ids=excluded,
    )  # fmt: skip
    files = data_set_files(str(scenes), manifest)
    backend = LocalBackend(config, RunCallbacks())
    statistics = gather(task, files, backend.predict_pool(str(tmp_path / "model"), task, files), 0.0)
    assert statistics.images == 38 and statistics.pixels == 38 * 64 * 64 == sum(statistics.class_pixels)
    assert np.sum(statistics.confusion) == 32 * 64 * 64  # the masks that training did not use
    pool = pool_set(files, str(tmp_path / "pm"), config.data, lambda reject: pytest.fail(reject.reason))
    ids = {sample.image_id for sample in pool.samples}
    assert len(ids) == 38 and not ids & excluded and set(split.labelled[2:]) <= ids
    assert pool.decoded(0).maps["pseudo_mask"].shape == (64, 64)
    again = labelled_set(
        str(scenes), manifest, split.model_copy(update={"labelled": split.labelled[2:]}), 1, task.destination
    )
    assert all(sample.pseudo_mask is not None for sample in again.samples) and len(again) == 6
    assert not ids & {s.image_id for s in validation_set(str(scenes), manifest, split, 1).samples}
    assert gather(task, files, backend.predict_pool(str(tmp_path / "model"), task, files), 0.0) == statistics


def test_schedules() -> None:
    paper = EmaSettings(decay=((0, 0.99), (20_000, 0.995), (40_000, 0.9975), (50_000, 0.999)))
    assert [ema_decay(step, paper) for step in (0, 19_999, 20_000, 59_999)] == [0.99, 0.99, 0.995, 0.999]
    assert [ramp_up(step, 10) for step in (10, 11)] == [1, 1] and ramp_up(0, 0) == 1
    assert ramp_up(0, 10) == pytest.approx(0.0067379, rel=1e-5) and ramp_up(5, 10) == pytest.approx(0.2865048, rel=1e-5)
    poly = OptimiserSettings(schedule="poly", warm_up_steps=2)
    assert [learning_rate_factor(s, 10, poly) for s in (0, 1)] == pytest.approx([0.5, 0.9**0.9])
    assert learning_rate_factor(5, 10, OptimiserSettings()) == 1
