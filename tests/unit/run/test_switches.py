"""The switches that the paper does not have: each changes what it says, trains, and can be gone on from."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.conftest import local_config
from tests.refusals import refused
from tests.runs import run_local
from threestage.augment.draws import Draws, generator
from threestage.augment.views import Extent, View
from threestage.checks.preflight import check_shares
from threestage.config import Config, ConsistencySettings, changed, stage_keys
from threestage.data.batches import BalancedOrder, label_weights
from threestage.data.datasets import pool_canvas, pool_set
from threestage.data.pool import data_set_files
from threestage.data.records import load_manifest
from threestage.data.rejects import Reject
from threestage.data.samples import Decoded, crop_to_canvas
from threestage.models.network import _dropped, build_network
from threestage.models.settings import NetworkSettings
from threestage.prediction.pseudo_masks import PseudoMaskSettings
from threestage.run.stages import auxiliary
from threestage.training.step import FeatureDropout, StepInputs, micro_batches, piece_sums
from threestage.training.step_inputs import StudentView, Target, pseudo_mask_targets, teacher_targets, warp_targets

SWITCHES: dict[str, dict[str, Any]] = {
    "cutmix": {"consistency__cutmix": 1.0},
    "second strong view": {"consistency__strong_views": 2},
    "feature dropout": {"consistency__feature_dropout": 0.5},
    "everything of UniMatch": {
        "consistency__strong_views": 2, "consistency__feature_dropout": 0.5, "consistency__cutmix": 0.5,
        "consistency__confidence_threshold": 0.3, "training__accumulate": 3,
    },
    "dynamic thresholds": {
        "consistency__confidence_threshold": 0.5, "consistency__threshold_rule": "dynamic",
        "pseudo_mask__confidence_threshold": 0.5, "pseudo_mask__threshold_rule": "per_class",
    },
    "weights by confidence": {"consistency__weight_by_confidence": True, "pseudo_mask__weight_by_confidence": True},
    "class-balanced crops": {"augment__class_balance": 0.5},
    "strong views of labelled images": {"supervised__strong_view": True},
    "complementary dropout": {"consistency__strong_views": 2, "consistency__complementary_dropout": True},
    "feature view as a term": {"consistency__feature_dropout": 0.5, "consistency__feature_weight": 0.2},
    "all pixels": {
        "consistency__normaliser": "all", "pseudo_mask__normaliser": "all", "consistency__confidence_threshold": 0.4,
    },
    "unlabelled images alone": {"consistency__labelled": False},
    "class weights": {"supervised__class_weight": 0.5},
    "hard pixels": {"supervised__hard_share": 0.3},
    "Dice": {"supervised__dice": 0.5},
    "jitter, grey, blur": {"augment__strong__jitter": 1.0, "augment__strong__grey": 0.5, "augment__strong__blur": 0.5},
    "EMA that warms up": {"ema__warm_up": True},
    "SGD": {"optimiser__algorithm": "sgd"},
    "mean teacher": {"pseudo_mask__weight": 0.0},
    "plain self-training": {"consistency__weight": 0.0, "pseudo_mask__head": "main"},
}  # fmt: skip


class Killed(BaseException):
    """Stands in for kill -9."""


SHORT = {"stage1__steps": 2, "pseudo_mask__final_stage": False}
Trained = Callable[[str], tuple[Path, list[Mapping[str, float]]]]


@pytest.fixture(scope="module")
def first_stage(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A finished stage 1 with its pseudo-masks, for every switch that leaves it alone."""
    out = str(tmp_path_factory.mktemp("first"))
    run_local(local_config(scenes, **{**SHORT, "stages": 1, "pseudo_mask__final_stage": True}), out, lambda *row: None)
    return out


@pytest.fixture(scope="module")
def trained(scenes: Path, first_stage: str, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Runs of two stages by the name of the switch, each trained once: its folder, and the rows that it showed."""

    @cache
    def run(name: str) -> tuple[Path, list[Mapping[str, float]]]:
        rows: list[Mapping[str, float]] = []
        config, out = local_config(scenes, stages=2, **SHORT, **SWITCHES[name]), tmp_path_factory.mktemp("trained")
        run_local(config, str(out), lambda stage, row: rows.append(row), reuse=reusable(config, scenes, first_stage))
        return out, rows

    return run


def reusable(config: Config, scenes: Path, first_stage: str) -> str | None:
    is_same = stage_keys(config, "stage1") == stage_keys(local_config(scenes, **SHORT), "stage1")
    return first_stage if is_same else None


OF_CI = ("everything of UniMatch", "dynamic thresholds", "plain self-training", "unlabelled images alone")


@pytest.mark.parametrize(
    "name", [name if name in OF_CI else pytest.param(name, marks=pytest.mark.slow) for name in SWITCHES]
)
def test_it_trains_on_the_terms_that_it_has(trained: Trained, name: str) -> None:
    _, rows = trained(name)
    terms = {key for key in rows[-1] if key.endswith("_loss")}
    without = {"mean teacher": {"pseudo_mask_loss"}, "plain self-training": {"consistency_loss"}}.get(name, set())
    more = {"Dice": {"dice_loss"}, "feature view as a term": {"feature_loss"}}.get(name, set())
    assert terms == {"supervised_loss", "consistency_loss", "pseudo_mask_loss"} - without | more


@pytest.mark.parametrize(
    "name",
    [
        "everything of UniMatch",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("class-balanced crops", "complementary dropout")),
    ],
)
def test_it_goes_on_where_it_was_killed(
    scenes: Path, tmp_path: Path, first_stage: str, trained: Trained, name: str
) -> None:
    config = local_config(scenes, stages=2, **SHORT, **SWITCHES[name])

    def die(stage: str, row: Mapping[str, float]) -> None:
        if stage == "stage2" and row["step"] == 4:
            raise Killed

    whole, killed = trained(name)[0], tmp_path / "killed"
    with pytest.raises(Killed):
        run_local(config, str(killed), die, reuse=reusable(config, scenes, first_stage))
    run_local(config, str(killed), lambda stage, row: None)
    model = "stage2/model/model.safetensors"
    assert (whole / model).read_bytes() == (killed / model).read_bytes()


def test_a_switch_that_is_off_is_no_key_of_a_stage(scenes: Path) -> None:
    """Runs that were made before the switches came go on."""
    keys = stage_keys(local_config(scenes), "stage2")
    assert not {"consistency.cutmix", "augment.class_balance", "pseudo_mask.head"} & set(keys)
    for changes in SWITCHES.values():
        assert stage_keys(local_config(scenes, **changes), "stage2") != keys


def test_one_image_cannot_be_mixed(scenes: Path) -> None:
    config = local_config(scenes, consistency__cutmix=0.5, stage3__unlabelled_batch=1)
    check_shares(config, "stage2")
    with refused("config/batch", "stage3.unlabelled_batch=1", "set cutmix to 0"):
        check_shares(config, "stage3")


def test_what_one_stage_mixes_asks_nothing_of_another(scenes: Path) -> None:
    changes = {"consistency": {"cutmix": 0.5}}
    config = local_config(scenes, stage2__overrides=changes, stage3__unlabelled_batch=1)
    for stage in config.stage_names:
        check_shares(config, stage)


@pytest.mark.parametrize("key", ["guard", "final_stage", "batch_size"])
def test_a_stage_cannot_change_what_is_the_run_s(scenes: Path, key: str) -> None:
    value = {"guard": "stop", "final_stage": False, "batch_size": 1}[key]
    with refused("config/conflict", f"stage3.overrides: pseudo_mask.{key}"):
        changed(local_config(scenes), {f"stage3.overrides.pseudo_mask.{key}": value})


def whole_view(image: Tensor) -> View:
    return View(
        image, torch.ones(len(image), *image.shape[2:], dtype=torch.bool), torch.eye(2, 3).repeat(len(image), 1, 1)
    )


class Sure(nn.Module):
    """A teacher whose confidence in class 1 is the first channel of the image."""

    def forward(self, image: Tensor) -> tuple[Tensor, None]:
        return torch.stack([(1 - image[:, 0]).log(), image[:, 0].log()], 1), None


def test_a_pixel_counts_for_the_confidence_of_the_teacher() -> None:
    image = torch.tensor([153, 204], dtype=torch.uint8).view(1, 1, 1, 2).expand(1, 3, 1, 2)
    view = whole_view(image)
    target = teacher_targets(
        Sure(), view, view, ConsistencySettings(weight_by_confidence=True, confidence_threshold=0.7)
    )
    assert target.class_ids.tolist() == [[[255, 1]]] * 2
    assert target.weight is not None and target.weight.tolist() == [[[153, 204]]] * 2


def test_each_view_has_its_own_geometry() -> None:
    labels = torch.tensor([[[0, 1]], [[2, 3]]], dtype=torch.uint8)
    views = [StudentView(torch.zeros(1, 3, 1, 2), warp) for warp in (lambda y: y.flip(-1), lambda y: y)]
    seen = warp_targets(Target(labels, labels), views)
    assert seen.class_ids.tolist() == [[[0, 1]], [[3, 2]], [[2, 3]]] and torch.equal(seen.weight, seen.class_ids)  # type: ignore[arg-type]


def test_features_are_dropped_of_the_last_images_only() -> None:
    settings = NetworkSettings(encoder="test_resnet", batch_norm="live", dilations=(1, 2))
    network = build_network(settings, 3, "shared", 0).eval()
    image = torch.rand(4, 3, 32, 32)
    plain, plain_auxiliary = network(image, with_auxiliary=True)
    torch.manual_seed(0)
    main, auxiliary = network(image, with_auxiliary=True, dropout=(2, 0.5))
    assert torch.equal(main[:2], plain[:2]) and torch.equal(auxiliary, plain_auxiliary)
    assert all(not torch.allclose(main[i], plain[i]) for i in (2, 3))


def test_pieces_drop_the_same_images() -> None:
    class Spy(nn.Module):
        def forward(self, image: Tensor, with_auxiliary: bool, dropout: tuple[int, float]) -> tuple[Tensor, None]:
            seen.append((len(image), dropout[0]))
            return image[:, :2], None

    seen: list[tuple[int, int]] = []
    target = torch.zeros(7, 1, 1, dtype=torch.uint8)
    inputs = StepInputs(
        torch.zeros(7, 3, 1, 1), {"consistency_loss": target}, {"consistency_loss": 1.0}, (),
        feature_dropout=FeatureDropout(3, 0.5),
    )  # fmt: skip
    for piece in micro_batches(7, 3):
        piece_sums(Spy(), inputs, piece)
    assert seen == [(2, 0), (2, 0), (3, 3)]
    for cut in (micro_batches(7, 7), micro_batches(7, 2)):
        seen.clear()
        for piece in cut:
            piece_sums(Spy(), inputs, piece)
        assert sum(dropped for _, dropped in seen) == 3


def test_a_class_is_drawn_by_its_rarity_and_lies_in_its_crop() -> None:
    masks = [np.zeros((20, 30), np.uint8) for _ in range(4)]
    masks[1][5, 7] = masks[1][19, 29] = 1  # 2 pixels of class 1 in the data set
    masks[2][:10] = 2
    masks[3][0] = 255
    pixels = np.stack([np.bincount(mask.ravel(), minlength=256)[:255] for mask in masks])
    drawn = [BalancedOrder(pixels, 1.0, 0, "labelled")[position] for position in range(400)]
    of_class = Counter(class_id for _, class_id in drawn)
    assert set(of_class) == {0, 1, 2} and of_class[1] > 380, "2 pixels against 300 and 1768"
    assert {item for item, class_id in drawn if class_id == 1} == {1}
    even = Counter(class_id for _, class_id in (BalancedOrder(pixels, 0.01, 1)[position] for position in range(300)))
    assert min(even.values()) > 70

    for seed in range(50):
        rng = np.random.default_rng(seed)
        placed = crop_to_canvas(Decoded(np.zeros((20, 30, 3), np.uint8), {"mask": masks[1]}), (8, 40), rng, 1)
        size, image, (top, left), _ = placed.extent.tolist()
        assert size == [8, 30] and image == [20, 30] and placed.pixel is not None
        assert placed.maps["mask"][placed.pixel[0] - int(top), placed.pixel[1] - int(left)] == 1


def test_plain_self_training_learns_no_pseudo_mask_of_a_labelled_image() -> None:
    from threestage.data.batches import Batch

    maps = {
        "pseudo_mask": torch.ones(1, 1, 2, dtype=torch.uint8),
        "confidence": torch.full((1, 1, 2), 200, dtype=torch.uint8),
    }
    batch, view = (
        Batch(torch.zeros(1, 3, 1, 2), Extent.whole(torch.tensor([[1, 2]]), Draws(generator())), maps, ("a",)),
        whole_view(torch.zeros(1, 3, 1, 2)),
    )
    target = pseudo_mask_targets(batch, batch, view, view, PseudoMaskSettings(head="main"))
    assert target.class_ids.tolist() == [[[255, 255]], [[1, 1]]]


def test_a_head_that_learns_nothing_is_not_built(scenes: Path) -> None:
    assert (
        auxiliary("stage2", local_config(scenes)) == "branch" and auxiliary("stage3", local_config(scenes)) == "shared"
    )
    for changes in (SWITCHES["mean teacher"], SWITCHES["plain self-training"]):
        assert auxiliary("stage2", local_config(scenes, **changes)) == "none"


ONE_STAGE: dict[str, Any] = {
    "stages": 1, "stage1__unlabelled_batch": 2, "pseudo_mask__final_stage": False, "consistency__strong_views": 2,
    "consistency__labelled": False, "consistency__normaliser": "all",
}  # fmt: skip


@pytest.fixture(scope="module")
def one_stage(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one_stage")
    run_local(local_config(scenes, **ONE_STAGE), str(out), lambda *row: None)
    return out


def test_a_one_stage_method_learns_the_pool_and_predicts_none_of_it(scenes: Path, one_stage: Path) -> None:
    config, results = local_config(scenes, **ONE_STAGE), json.loads((one_stage / "results.json").read_text())
    rows = json.loads((one_stage / "stage1/result.json").read_text())["history"]
    assert {key for key in rows[-1] if key.endswith("_loss")} == {"supervised_loss", "consistency_loss"}
    assert "student_mean_iou" in results["stages"]["stage1"], "what ships is the teacher"
    assert not (one_stage / "pseudo_masks1").exists() and (one_stage / "pool.parquet").exists()
    assert "consistency.weight" in stage_keys(config, "stage1") and "augment.strong.operations" in stage_keys(
        config, "stage1"
    )


def test_a_one_stage_method_continues_where_it_was_killed(scenes: Path, one_stage: Path, tmp_path: Path) -> None:
    config = local_config(scenes, **ONE_STAGE)

    def die(stage: str, row: Mapping[str, float]) -> None:
        if row["step"] == 4:
            raise Killed

    with pytest.raises(Killed):
        run_local(config, str(tmp_path), die)
    run_local(config, str(tmp_path), lambda stage, row: None)
    model = "stage1/model/model.safetensors"
    assert (one_stage / model).read_bytes() == (tmp_path / model).read_bytes()


def test_stage_1_can_ship_the_average_of_its_weights(scenes: Path, tmp_path: Path) -> None:
    """With a decay of 0 the average is the last step's weights."""
    weights, results = [], []
    for name, changes in {"off": {}, "zero": {"ema__decay": [[0, 0.0]]}, "on": {"ema__decay": [[0, 0.9]]}}.items():
        config = local_config(scenes, stages=1, **SHORT, stage1__ema=name != "off", **changes)
        results.append(run_local(config, str(tmp_path / name), lambda stage, row: None))
        weights.append((tmp_path / name / "stage1" / "model" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]
    assert ["student_mean_iou" in one["stages"]["stage1"] for one in results] == [False, True, True]
    assert "ema.decay" in stage_keys(config, "stage1") and "consistency.weight" not in stage_keys(config, "stage1")


def test_a_pool_without_pseudo_masks_leaves_out_validation_images_and_bad_ones(tmp_path: Path, scenes: Path) -> None:
    config = local_config(scenes, data__max_image_pixels=64 * 64)
    rejected: list[Reject] = []
    files = data_set_files(str(scenes), load_manifest(str(scenes)))
    every = pool_set(files, None, config.data, rejected.append)
    some = pool_set(files, None, config.data, rejected.append, excluded=frozenset({every.samples[3].image_id}))
    assert len(every) == 40 and not rejected
    assert {one.image_id for one in every.samples} - {one.image_id for one in some.samples} == {
        every.samples[3].image_id
    }
    small = config.data.model_copy(update={"max_image_pixels": 100})
    assert len(pool_set(files, None, small, rejected.append)) == 0 and len(rejected) == 40
    assert pool_canvas(None, config.augment) == config.augment.crop_size


def test_what_a_dropped_channel_of_one_view_is_the_other_view_has() -> None:
    torch.manual_seed(0)
    both = _dropped(torch.ones(2 + 8, 50, 1, 1), 8, 0.5, True)
    assert both is not None and torch.equal(both[:2], torch.ones(2, 50, 1, 1))
    first, second = both[2:6], both[6:]
    assert torch.equal(first + second, torch.full_like(first, 2.0))
    whole = (first == 1).all(1).flatten()
    assert whole.sum() == 2, "half of the images keep all channels"
    assert set(first[~whole].flatten().tolist()) == {0.0, 2.0}


def test_labels_that_are_rare_count_most() -> None:
    masks = [np.zeros((4, 4), np.uint8), np.full((4, 4), 255, np.uint8)]
    masks[0][0, 0] = 2

    class Decoded_:
        def __len__(self) -> int:
            return 2

        def decoded(self, index: int) -> Decoded:
            return Decoded(np.zeros((4, 4, 3), np.uint8), {"mask": masks[index]})

    weights = label_weights(Decoded_(), 0.5, torch.device("cpu"))  # type: ignore[arg-type]
    assert weights is not None and weights[2] == 255 and weights[0] == round(255 / 15**0.5)
    assert label_weights(Decoded_(), 0.0, torch.device("cpu")) is None  # type: ignore[arg-type]


def test_settings_that_belong_together_are_asked_for_together(scenes: Path) -> None:
    with refused("config/conflict", "consistency.complementary_dropout=true:", "strong_views=2"):
        changed(local_config(scenes), {"consistency.complementary_dropout": True})
    with refused("config/conflict", "consistency.feature_weight=0.5:", "set consistency.feature_dropout"):
        changed(local_config(scenes), {"consistency.feature_weight": 0.5})
