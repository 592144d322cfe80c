"""DINOv2 and DINOv3 encoders (random weights: their own are not shipped) with DPT: three stages, and the exported program."""

import io
from pathlib import Path

import pytest
import torch

from tests.conftest import tiny_config
from tests.runs import run_local
from threestage.models.export import export_program, load_model


@pytest.mark.slow  # 22 million weights, three times, and the export: half a minute each
@pytest.mark.parametrize(("encoder", "side"), [("vit_small_patch14_dinov2", 14), ("vit_small_patch16_dinov3", 16)])
def test_it_trains_three_stages_and_is_exported(scenes: Path, tmp_path: Path, encoder: str, side: int) -> None:
    config = tiny_config(
        scenes,
        network={"encoder": encoder, "head": "dpt", "batch_norm": "live", "align_corners": False},
        augment={"crop_size": [4 * side, 3 * side]},
        stage1={"steps": 1, "labelled_batch": 2},
        stage2={"steps": 1, "labelled_batch": 1, "unlabelled_batch": 2},
        stage3={"steps": 1, "labelled_batch": 1, "unlabelled_batch": 2},
        consistency={"cutmix": 1.0, "feature_dropout": 0.5},
        optimiser={"learning_rate": 1e-4, "encoder_learning_rate": 1e-5, "layer_decay": 0.9, "decay_norms": False},
    )
    results = run_local(config, str(tmp_path), lambda stage, row: None)
    assert all(0 <= figures["mean_iou"] <= 1 for figures in results["stages"].values())
    model = str(tmp_path / "stage3" / "model")
    network, card = load_model(model)
    program = torch.export.load(io.BytesIO(export_program(model))).module()
    for height, width in ((56, 42), (64, 65), (71, 100)):
        image = torch.rand(1, 3, height, width)
        with torch.inference_mode():
            expected = network.eval()(image)[0]
            assert expected.shape == (1, len(card.classes), height, width)
            torch.testing.assert_close(program(image), expected, rtol=1e-4, atol=1e-4)
