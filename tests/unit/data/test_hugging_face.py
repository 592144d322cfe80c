"""Why: most public sets of segmentation are on the hub as Parquet, whose columns have several names and two forms."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.images import encoded
from tests.refusals import refused
from threestage.data.formats import IngestSettings
from threestage.data.ingest import IngestReport, ingest
from threestage.data.records import decode_mask, labelled_rows, load_manifest


def cells(seed: int, struct: bool) -> tuple[Any, Any]:
    """An image and its mask of the ids 0 and 1."""
    pixels = np.random.default_rng(seed).integers(0, 255, (2, 3, 3), np.uint8)
    image, mask = encoded(Image.fromarray(pixels)), encoded(Image.fromarray(np.array([[0, 1, 255]] * 2, np.uint8)))
    return ({"bytes": image, "path": f"{seed}.PNG"}, {"bytes": mask, "path": None}) if struct else (image, mask)


def write(folder: Path, name: str, mask_column: str, rows: list[tuple[Any, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    images, masks = zip(*rows, strict=True)
    pq.write_table(
        pa.table({"image": list(images), mask_column: list(masks), "id": list(range(len(rows)))}), folder / name
    )


def run(root: Path, **changes: object) -> IngestReport:
    return ingest(str(root / "hub"), f"{root}/ds", IngestSettings.model_validate({"format": "huggingface", **changes}))


@pytest.mark.parametrize("struct", [True, False])
@pytest.mark.parametrize("column", ["annotation", "label"])
def test_images_and_masks_with_the_splits_of_their_files(struct: bool, column: str, tmp_path: Path) -> None:
    rows = [cells(seed, struct) for seed in range(4)]
    write(tmp_path / "hub/data", "train-00000-of-00001.parquet", column, [rows[0], rows[1], (rows[2][0], None)])
    write(tmp_path / "hub/data", "validation-00000-of-00001.parquet", column, [rows[3]])
    (tmp_path / "hub/id2label.json").write_text(json.dumps({"0": "road", "1": "car"}))
    report = run(tmp_path)
    assert report.manifest.classes == ("road", "car") and (report.bad, report.skipped) == (0, 0)
    assert {s: (n.images, n.labelled) for s, n in report.manifest.counts.items() if n.images} == {
        "train": (3, 2), "val": (1, 1),
    }  # fmt: skip
    table = labelled_rows(f"{tmp_path}/ds", load_manifest(f"{tmp_path}/ds"), "val").to_pylist()
    assert decode_mask(table[0]["mask"]).tolist() == [[0, 1, 255]] * 2
    assert not list((tmp_path / "ds").glob("unpacked-*")), "deleted when all is read"
    assert run(tmp_path).manifest == report.manifest


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    (tmp_path / "map.yaml").write_text(
        "classes: [{name: a, colour: [1, 1, 1], ids: [0]}, {name: b, colour: [2, 2, 2], ids: [1]}]"
    )
    chosen = {"class_map": f"{tmp_path}/map.yaml"}
    (tmp_path / "hub/a.txt").touch()
    with refused("data/no-images", "hub"):
        run(tmp_path, **chosen)
    with refused("class-map/missing", "id2label.json"):
        run(tmp_path)
    write(tmp_path / "hub", "x.parquet", "text", [cells(0, True)])
    with refused("data/layout", "x.parquet", "text"):
        run(tmp_path, **chosen)
    (tmp_path / "hub/x.parquet").write_bytes(b"PAR1")
    with refused("data/damaged-file", "x.parquet"):
        run(tmp_path, **chosen)
