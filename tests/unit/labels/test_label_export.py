"""Why: what an annotator corrects must be what the model said, at the image that it said it of."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from tests.refusals import refused
from tests.unit.labels.exports import CLASSES, read
from threestage.data import storage
from threestage.data.outputs import EXPORT_MARK
from threestage.data.palette import palette_png
from threestage.data.records import encode_mask
from threestage.labels.label_export import ExportSettings, export_labels
from threestage.labels.rasterise import Bytes
from threestage.prediction.predict import FILES_SCHEMA, ROWS_SCHEMA

MASKS = {"a": np.array([[0, 1, 1], [2, 0, 0]], np.uint8), "in/b": np.array([[2, 2]], np.uint8)}
SURE = {"a": np.array([[250, 250, 100], [250, 100, 250]], np.uint8), "in/b": np.array([[0, 255]], np.uint8)}


def prediction(folder: Path, format: str = "parquet", confidence: bool = True, **record: Any) -> str:
    """The folder of a prediction of MASKS, as `threestage predict` leaves it."""
    classes = [[name, list(colour)] for name, colour in CLASSES]
    content = {"model": "0" * 16, "input": f"{folder}/none", **record}
    storage.write_json(f"{folder}/classes.json", classes)
    storage.write_json(f"{folder}/prediction.json", content)
    rows: list[dict[str, Any]] = [{"image_id": "bad"}]
    for name, mask in MASKS.items():
        sure = SURE[name].tobytes() if confidence else None
        row = {"image_id": name, "mask": encode_mask(mask), "confidence": sure}
        if format == "png":
            row = {"image_id": name, "file": f"masks/{name}.png"}
            storage.write_bytes(f"{folder}/masks/{name}.png", palette_png(mask, [colour for _, colour in CLASSES]))
            storage.write_bytes(f"{folder}/confidence/{name}.png", encode_mask(SURE[name]))
        rows.append(row)
    schema = FILES_SCHEMA if format == "png" else ROWS_SCHEMA
    storage.write_table(f"{folder}/parts/0123456789abcdef.parquet", pa.Table.from_pylist(rows, schema))
    return str(folder)


def masks_in(out: Path) -> dict[str, list[list[int]]]:
    return {
        str(file.relative_to(out / "masks").with_suffix("")): np.array(Image.open(file)).tolist()
        for file in sorted((out / "masks").rglob("*.png"))
    }


@pytest.mark.parametrize("format", ["parquet", "png"])
def test_predictions_go_out_as_they_are(format: str, tmp_path: Path) -> None:
    report = export_labels(prediction(tmp_path / "p", format), f"{tmp_path}/out", ExportSettings(to="masks"))
    assert (report.images, report.iou) == (2, None)
    assert masks_in(tmp_path / "out") == {name: mask.tolist() for name, mask in MASKS.items()}
    assert "дом" in (tmp_path / "out/classes.yaml").read_text()


def test_uncertain_pixels_are_left_out_and_only_listed_images_go(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a,0.3\nother\n")
    chosen = ExportSettings(to="masks", below=0.8, images=f"{tmp_path}/list.txt")
    report = export_labels(prediction(tmp_path / "p"), f"{tmp_path}/out", chosen)
    assert report.not_found == ("other",)
    assert masks_in(tmp_path / "out") == {"a": [[0, 1, 255], [2, 255, 0]]}


def test_the_iou_of_polygons_is_reported(tmp_path: Path) -> None:
    exact = export_labels(prediction(tmp_path / "p"), f"{tmp_path}/out", ExportSettings(to="coco", simplify=0))
    assert exact.iou == 1
    loose = export_labels(prediction(tmp_path / "p"), f"{tmp_path}/out2", ExportSettings(to="coco", simplify=9))
    assert loose.iou is not None and loose.iou < 1
    found: dict[str, Bytes] = read("coco", tmp_path / "out/annotations.json", {k: m.shape for k, m in MASKS.items()})[0]
    assert {name: mask.tolist() for name, mask in found.items()} == {
        name: mask.tolist() for name, mask in MASKS.items()
    }


def test_names_have_the_suffix_of_their_files(tmp_path: Path) -> None:
    """A tool looks for its images by it; here those of a data set, whose rows say where they came from."""
    manifest = {
        "format": 1, "version": 1, "classes": [], "colours": [], "counts": {}, "sizes": {}, "digest": "x",
        "files": [{"path": "images/x.parquet", "kind": "images", "split": "train", "rows": 3, "labelled_rows": 0,
                   "digest": "0123456789abcdef0"}],
    }  # fmt: skip
    storage.write_json(f"{tmp_path}/ds/manifest.json", manifest)
    sources = pa.table({"source": ["/x/bad.jpg", "/x/a.JPG", "s3://b/in/b.tif"]})
    storage.write_table(f"{tmp_path}/ds/images/x.parquet", sources)
    place = prediction(tmp_path / "p", input=f"{tmp_path}/ds")
    export_labels(place, f"{tmp_path}/out", ExportSettings(to="labelme"))
    names = {file.stem: storage.read_json(str(file))["imagePath"] for file in (tmp_path / "out").rglob("[ab].json")}
    assert names == {"a": "a.JPG", "b": "b.tif"}


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    place, out = prediction(tmp_path / "p", confidence=False), f"{tmp_path}/out"
    with refused("labels/format", "yolo9"):
        export_labels(place, out, ExportSettings(to="yolo9"))
    with refused("labels/format", "--simplify"):
        export_labels(place, out, ExportSettings(to="masks", simplify=1))
    with refused("labels/no-confidence"):
        export_labels(place, out, ExportSettings(to="masks", below=0.5))
    with refused("labels/no-masks", tmp_path):
        export_labels(str(tmp_path), f"{tmp_path}/out2", ExportSettings(to="masks"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/a.txt").touch()
    with refused("data/foreign-folder", "mine"):
        export_labels(place, f"{tmp_path}/mine", ExportSettings(to="masks"))
    (tmp_path / "p/classes.json").unlink()
    with refused("labels/no-classes", "classes.json"):
        export_labels(place, f"{tmp_path}/out3", ExportSettings(to="masks"))


def test_a_finished_export_is_not_written_over_and_a_killed_one_continues(tmp_path: Path) -> None:
    place, out = prediction(tmp_path / "p"), f"{tmp_path}/out"
    export_labels(place, out, ExportSettings(to="labelme"))
    with refused("labels/exists", out):
        export_labels(place, out, ExportSettings(to="labelme"))
    mark = storage.read_json(f"{out}/{EXPORT_MARK}")
    storage.write_json(f"{out}/{EXPORT_MARK}", {key: value for key, value in mark.items() if key != "finished"})
    with refused("labels/exists", out):
        export_labels(place, out, ExportSettings(to="coco"))
    assert export_labels(place, out, ExportSettings(to="labelme")).images == 2
