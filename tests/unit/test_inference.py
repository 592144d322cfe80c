"""Why: windows that differ between training, pseudo-masks and the delivered model would make its figures another model's."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.bad_inputs.models import packed_model
from tests.conftest import local_config
from tests.refusals import refused
from tests.runs import run_local
from tests.unit.models.conftest import card_for, small_network
from threestage.config import changed, stage_keys
from threestage.data.batches import SampleSet
from threestage.data.records import labelled_rows, load_manifest
from threestage.data.samples import TableSamples
from threestage.evaluation import evaluate, evaluate_model
from threestage.models.export import ModelCard, load_card, parse_card
from threestage.models.settings import InferenceSettings
from threestage.prediction.pool_prediction import writer_of
from threestage.prediction.pseudo_masks import PoolTask
from threestage.prediction.tta import TTASettings, window_logits
from threestage.training.metrics import mean_iou

CPU = torch.device("cpu")
WINDOWS = InferenceSettings(window=(32, 64), stride=(16, 24), overlap="hann")
SETTINGS = {"inference": WINDOWS.model_dump(mode="json")}


def pool_task(inference: InferenceSettings = InferenceSettings()) -> PoolTask:
    return PoolTask(
        destination="out", model_digest="d", num_classes=4, downscale=1, batch_size=2, max_image_pixels=10**6,
        used_ids=frozenset(), excluded_ids=frozenset(), inference=inference,
    )  # fmt: skip


def test_evaluation_in_a_run_and_afterwards_are_one(scenes: Path) -> None:
    card = card_for(scenes).model_copy(update={"inference": WINDOWS})
    network, manifest = small_network(len(card.classes)), load_manifest(str(scenes))
    samples = SampleSet(TableSamples(labelled_rows(str(scenes), manifest, "val")), 1)
    found = evaluate(network, samples, len(card.classes), CPU, inference=WINDOWS).confusion
    later = evaluate_model(network, card, str(scenes), "val")
    assert later["confusion_matrix"] == found.tolist() and later["protocol"].startswith("windows of 32x64")
    whole = evaluate(network, samples, len(card.classes), CPU).confusion
    assert not torch.equal(found, whole) and later["mean_iou"] == mean_iou(found)


def test_pseudo_masks_are_made_in_the_windows() -> None:
    network = small_network(4)
    pixels = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0)).byte()
    product = writer_of(pool_task(WINDOWS), CPU)
    expected = window_logits(network, pixels.float() / 255, TTASettings(**WINDOWS.model_dump()))
    assert torch.equal(product.predict(network, pixels)[0].long(), expected.argmax(dim=1))


def test_the_default_changes_no_digest_and_no_card(scenes: Path) -> None:
    """Those of the versions that knew nothing of windows."""
    config = local_config(scenes)
    assert not any(key.startswith("inference") for key in stage_keys(config, "stage2"))
    windows = changed(config, {"inference.window": [40, 48]})
    assert stage_keys(windows, "stage2")["inference.window"] == [40, 48]
    assert pool_task().digest() != pool_task(WINDOWS).digest()
    card = card_for(scenes)
    assert "inference" not in card.model_dump(mode="json") and "inference" not in card.model_dump_json()
    own = card.model_copy(update={"inference": WINDOWS})
    assert parse_card(own.model_dump_json().encode(), "model").inference == WINDOWS


def test_windows_that_do_not_suit_the_network_are_refused_before_training(scenes: Path) -> None:
    with refused("network/size-multiple", "window=43x50"):
        changed(local_config(scenes, network__output_stride=32), {"inference.window": [43, 50]})


@pytest.mark.parametrize("inference", [WINDOWS, InferenceSettings(window=(40, 48)), InferenceSettings()])
@pytest.mark.parametrize("sides", [(64, 64), (33, 97)])
def test_a_registered_model_sees_what_the_run_saw(inference: InferenceSettings, sides: tuple[int, int]) -> None:
    network = small_network(4)
    image = torch.rand(2, 3, *sides, generator=torch.Generator().manual_seed(0))

    def ask(part: Tensor) -> Tensor:
        return network(part)[0]

    with torch.inference_mode():
        found = packed_model()._in_windows(ask, image, inference.model_dump(mode="json"))
        torch.testing.assert_close(found, window_logits(network, image, inference), rtol=1e-5, atol=1e-5)


def test_a_runs_models_keep_its_windows(scenes: Path, tmp_path: Path) -> None:
    run_local(local_config(scenes, stages=1, **SETTINGS), str(tmp_path / "run"), lambda stage, row: None)
    card: ModelCard = load_card(str(tmp_path / "run" / "stage1" / "model"))
    assert card.inference == WINDOWS
