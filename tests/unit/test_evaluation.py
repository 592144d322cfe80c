"""The report's figures against their definitions, written image by image."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from tests.refusals import refused
from threestage import IGNORE_INDEX, evaluation
from threestage.data.batches import SampleSet
from threestage.data.records import labelled_rows, load_manifest
from threestage.data.samples import Decoded, TableSamples
from threestage.evaluation import Scores, evaluate, evaluate_model
from threestage.models.export import ModelCard
from threestage.models.network import Network, build_network
from threestage.models.settings import NetworkSettings
from threestage.prediction.pseudo_masks import predict_images
from threestage.prediction.tta import TTASettings
from threestage.report.scores import reliability_diagram, score_tables, write_scores
from threestage.training.metrics import boundary_f_scores, class_counts, confusion_matrix, mean_iou

CPU = torch.device("cpu")


def model_for(scenes: Path) -> tuple[Network, ModelCard]:
    manifest = load_manifest(str(scenes))
    settings = NetworkSettings(encoder="test_resnet", batch_norm="live", dilations=(1, 2))
    card = ModelCard(
        network=settings, classes=manifest.classes, colours=manifest.colours, downscale=1, stage="stage1"
    )  # fmt: skip
    return build_network(settings, len(card.classes)).eval(), card


def test_the_report_is_of_every_image_once(scenes: Path) -> None:
    network, card = model_for(scenes)
    samples = SampleSet(TableSamples(labelled_rows(str(scenes), load_manifest(str(scenes)), "train")), 1)
    seen: list[tuple[int, int]] = []
    scores = evaluate_model(network, card, str(scenes), "train", show=lambda *done: seen.append(done))
    assert scores == json.loads(json.dumps(scores, allow_nan=False))
    assert scores["images"] == 40 and seen[-1] == (40, 40) and scores["protocol"] == "whole image, single scale"

    confusion, _ = evaluate(network, samples, len(card.classes), CPU)
    assert scores["confusion_matrix"] == confusion.tolist() and scores["mean_iou"] == mean_iou(confusion)

    decoded = [samples.decoded(i) for i in range(len(samples))]
    boundary, right, sure = [], [], []
    for index, class_ids, confidence, _ in predict_images(network, [one.image for one in decoded], 1, CPU):
        mask = torch.from_numpy(decoded[index].maps["mask"])
        boundary.append(boundary_f_scores(mask[None], class_ids[None], len(card.classes))[0].numpy())
        right.append((mask == class_ids)[mask != IGNORE_INDEX].numpy())
        sure.append(confidence[mask != IGNORE_INDEX].numpy())
    per_class = np.nanmean(boundary, axis=0)
    np.testing.assert_allclose(list(scores["per_class_boundary_f"].values()), per_class)
    assert scores["boundary_f"] == pytest.approx(np.nanmean(per_class))
    correct, confidence_of = np.concatenate(right), np.concatenate(sure).astype(np.float64)
    place = np.minimum((confidence_of * len(scores["reliability"])).astype(int), len(scores["reliability"]) - 1)
    gaps = [abs((confidence_of - correct)[place == b].sum()) for b in range(len(scores["reliability"]))]
    assert scores["expected_calibration_error"] == pytest.approx(sum(gaps) / len(correct), abs=1e-5)
    assert sum(row["pixels"] for row in scores["reliability"]) == len(correct)


class SmallDevice(nn.Module):
    """A network on a device that takes few images at a time."""

    def __init__(self, network: Network, room: int) -> None:
        super().__init__()
        self.network, self.room, self.batches = network, room, list[int]()

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        self.batches.append(len(image))
        if len(image) > self.room:
            raise torch.OutOfMemoryError("as a GPU says it")
        found: tuple[torch.Tensor, torch.Tensor | None] = self.network(image)
        return found


def test_a_batch_is_of_the_size_that_is_set_and_one_that_does_not_fit_is_taken_apart(scenes: Path) -> None:
    network, card = model_for(scenes)
    samples = SampleSet(TableSamples(labelled_rows(str(scenes), load_manifest(str(scenes)), "train"))[:11], 1)
    expected, images = evaluate(network, samples, len(card.classes), CPU)
    few, small, none = SmallDevice(network, 99), SmallDevice(network, 2), SmallDevice(network, 0)
    assert torch.equal(evaluate(few, samples, len(card.classes), CPU, batch_size=3).confusion, expected)
    assert few.batches == [3, 3, 2, 3]
    assert torch.equal(evaluate(small, samples, len(card.classes), CPU).images, images)
    assert small.batches == [8, *[1] * 8, 3, *[1] * 3]
    low, _ = evaluate(network, samples, len(card.classes), CPU, dtype=torch.bfloat16)
    assert low.sum() == expected.sum() and low.diag().sum() == pytest.approx(int(expected.diag().sum()), rel=0.05)
    with pytest.raises(torch.OutOfMemoryError):
        evaluate(none, samples, len(card.classes), CPU)


def test_each_image_is_counted_in_its_own_place(scenes: Path) -> None:
    """Images of two sizes, which are predicted in another order than they have."""
    network, card = model_for(scenes)
    rows = labelled_rows(str(scenes), load_manifest(str(scenes)), "train")
    samples = SampleSet(TableSamples(rows)[:19], 1)
    for index in range(0, 19, 2):
        decoded = samples.decoded(index)
        maps = {name: value[:32] for name, value in decoded.maps.items()}
        samples._cache[index] = Decoded(decoded.image[:32], maps)
    confusion, images = evaluate(network, samples, len(card.classes), CPU)
    assert torch.equal(images.sum(0), class_counts(confusion))
    for index in range(19):
        decoded = samples.decoded(index)
        found = next(iter(predict_images(network, [decoded.image], 1, CPU)))[1]
        alone = class_counts(confusion_matrix(torch.from_numpy(decoded.maps["mask"]), found, len(card.classes)))
        assert torch.equal(images[index, 1], alone[1]), "true pixels"
        assert (images[index] - alone).abs().max() <= 2, "in a batch, a pixel may round to another class"


def test_another_protocol_scores_another_prediction(scenes: Path) -> None:
    network, card = model_for(scenes)
    whole = evaluate_model(network, card, str(scenes), "val")
    covering = evaluate_model(network, card, str(scenes), "val", TTASettings(window=(64, 64)))
    assert covering | {"protocol": ""} == whole | {"protocol": ""}
    flipped = evaluate_model(network, card, str(scenes), "val", TTASettings(flip=True, scales=(0.5, 1)))
    assert flipped["confusion_matrix"] != whole["confusion_matrix"]
    assert flipped["protocol"].startswith("whole image, scales 0.5, 1, flipped too")


def test_what_does_not_fit_is_refused(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, card = model_for(scenes)
    with refused("network/size-multiple", "window=30x30:", 8):
        evaluate_model(network, card, str(scenes), "val", TTASettings(window=(30, 30)))
    with refused("evaluate/other-classes", scenes, ["a", "b"]):
        evaluate_model(network, card.model_copy(update={"classes": ("a", "b")}), str(scenes), "val")
    monkeypatch.setattr(evaluation, "labelled_rows", lambda *given: labelled_rows(*given).slice(0, 0))
    with refused("evaluate/no-masks", scenes, "'val'", "train"):
        evaluate_model(network, card, str(scenes), "val")


def scores_of(classes: int) -> dict[str, object]:
    names = tuple(f"[class] {number}" for number in range(classes))
    scores = Scores(names, CPU)
    random = torch.Generator().manual_seed(0)
    mask, found = (torch.randint(0, 2, (2, 9, 9), generator=random).byte() for _ in range(2))
    scores.add(mask, found, torch.rand(mask.shape, generator=random))
    return {"protocol": "whole image", "images": scores.images, **scores.summary()}


def test_classes_that_do_not_occur_have_no_figures() -> None:
    scores = scores_of(3)
    assert scores["per_class_iou"]["[class] 2"] is None and scores["per_class_boundary_f"]["[class] 2"] is None  # type: ignore[index]
    nothing = Scores(("a", "b"), CPU)
    nothing.add(torch.full((1, 4, 4), 255).byte(), torch.zeros(1, 4, 4).byte(), torch.ones(1, 4, 4))
    empty = {"protocol": "", "images": 1, **nothing.summary()}
    assert empty["mean_iou"] is None and empty["boundary_f"] is None and empty["expected_calibration_error"] is None
    json.dumps(empty, allow_nan=False)
    reliability_diagram(empty)
    assert len(score_tables(empty)) == 2


@pytest.mark.parametrize(("classes", "tables"), [(20, 2), (21, 1)])
def test_the_confusion_matrix_is_printed_while_it_is_small(classes: int, tables: int) -> None:
    console = Console(width=300, file=io.StringIO(), record=True)
    found = score_tables(scores_of(classes))
    for table in found:
        console.print(table)
    text = console.export_text()
    assert len(found) == tables and "[class] 0" in text and "boundary F" in text


def test_a_folder_of_figures(tmp_path: Path) -> None:
    scores = scores_of(3)
    write_scores(str(tmp_path / "out"), scores)
    assert json.loads((tmp_path / "out/metrics.json").read_text()) == scores
    with Image.open(tmp_path / "out/reliability.png") as diagram:
        colours = {colour for _, colour in diagram.convert("RGB").getcolors(1 << 20) or []}
    assert len(colours) > 3
