"""Why: who takes a model elsewhere must learn of what it loses there, and never lose a file of their own."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.refusals import refused
from tests.unit.models.conftest import card_for
from threestage.models import model_export
from threestage.models.export import CARD
from threestage.models.model_export import ModelExportSettings, export_model
from threestage.models.onnx_model import OPSET, OnnxNetwork
from threestage.prediction.predict import ModelFiles


@pytest.fixture
def files(scenes: Path) -> ModelFiles:
    return {CARD: card_for(scenes).model_dump_json().encode()}


@pytest.fixture
def exported_as(onnx_model: bytes, monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """In place of another process: a reason, or the model of `small_network`."""

    def patch(reason: str | None) -> None:
        def write(folder: Path, name: str) -> str | None:
            assert (folder / CARD).is_file()
            (folder / name).write_bytes(onnx_model)
            return reason

        monkeypatch.setattr(model_export, "write_program", write)

    patch(None)
    return patch


def test_the_file_and_what_is_reported_of_it(
    files: ModelFiles, exported_as: object, onnx_model: bytes, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "model.onnx"
    report = export_model(files, str(out), ModelExportSettings())
    assert out.read_bytes() == onnx_model
    assert (report.to, report.opset, report.least_side, report.bytes) == ("onnx", OPSET, 33, len(onnx_model))
    ids = tmp_path / "ids.onnx"
    export_model(files, str(ids), ModelExportSettings(class_ids=True))
    assert [each.name for each in OnnxNetwork(ids.read_bytes()).session.get_outputs()] == ["class_ids"]


def test_eight_bits_are_scored_beside_the_floats(
    files: ModelFiles, exported_as: object, scenes: Path, tmp_path: Path
) -> None:
    settings = ModelExportSettings(to="onnx-int8", data=str(scenes))
    report = export_model(files, str(tmp_path / "small.onnx"), settings)
    found = report.int8
    assert found is not None and (found.split, found.images) == ("val", 6)
    assert 0 < found.mean_iou_int8 < 1 and abs(found.lost) < 0.02
    assert found.seconds_per_megapixel > 0 and "times as fast" in report.lines()[-1]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (ModelExportSettings(to="onnx-int8"), "give it"),
        (ModelExportSettings(to="onnx", data="data"), "leave it out"),
        (ModelExportSettings(to="program", class_ids=True), "--class-ids"),
    ],
)
def test_options_that_do_not_go_together(
    files: ModelFiles, exported_as: object, settings: ModelExportSettings, named: str, tmp_path: Path
) -> None:
    with refused("config/usage", named):
        export_model(files, str(tmp_path / "out"), settings)


def test_a_file_that_is_there_stays(files: ModelFiles, exported_as: object, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with refused("models/file-exists", tmp_path / "mine"):
        export_model(files, str(tmp_path / "mine"), ModelExportSettings())
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_network_that_cannot_be_exported_leaves_no_file(
    files: ModelFiles, exported_as: Callable[[str | None], None], tmp_path: Path
) -> None:
    exported_as("UserError: no such op")
    with refused("models/not-exportable", "narrow_resnet", "UserError: no such op"):
        export_model(files, str(tmp_path / "out"), ModelExportSettings())
    assert not (tmp_path / "out").exists()


def test_a_pool_of_tiny_images_sets_no_ranges(files: ModelFiles, exported_as: object, scenes: Path) -> None:
    assert len(list(model_export.calibration_images(str(scenes), 1, 33))) == 40
    assert not list(model_export.calibration_images(str(scenes), 1, 65))
