"""Why: ADE20K and Mapillary Vistas bring the names of their classes along, and these must be those of the ids in the masks."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.refusals import refused
from threestage.data.formats import IngestSettings, discover
from threestage.data.included_classes import included_class_map
from threestage.data.ingest import ingest

HEAD = "Idx\tRatio\tTrain\tVal\tStuff\tName\n"


def write(root: Path, *pairs: tuple[str, str], ids: tuple[int, ...] = (1, 2, 0)) -> None:
    """Images, each with a mask of three ids, or with none."""
    for seed, (image, mask) in enumerate(pairs):
        pixels = np.random.default_rng(seed).integers(0, 255, (2, 3, 3), np.uint8)
        for name, array in ((image, pixels), (mask, np.array([ids] * 2, np.uint8))):
            if name:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(root / name)


def test_ade20k(tmp_path: Path) -> None:
    folders = (("training", "ADE_train_1"), ("validation", "ADE_val_1"))
    write(tmp_path, *((f"images/{f}/{n}.jpg", f"annotations/{f}/{n}.png") for f, n in folders))
    (tmp_path / "objectInfo150.txt").write_text(f"{HEAD}1\t0.1\t9\t9\t1\twall\n2\t0.1\t9\t9\t1\tbuilding, edifice\n")
    report = ingest(str(tmp_path), f"{tmp_path}/.ds", IngestSettings(format="ade20k"))
    assert report.manifest.classes == ("wall", "building") and report.added_labels == 2
    assert report.manifest.counts["val"].labelled == 1 and report.warnings == ()
    (tmp_path / "objectInfo150.txt").write_text(f"{HEAD}1\tscreen, door\n2\tscreen, film\n3\ttree, oak\n")
    names = [entry.name for entry in included_class_map("ade20k", str(tmp_path))[0].classes]
    assert names == ["screen, door", "screen, film", "tree"]
    (tmp_path / "objectInfo150.txt").write_text(f"{HEAD}wall\n")
    with refused("data/layout", "objectInfo150.txt"):
        included_class_map("ade20k", str(tmp_path))
    with refused("data/layout", "objectInfo150.txt", "--class-map"):
        included_class_map("ade20k", str(tmp_path / "images"))
    with refused("data/layout", "ADE20K"):
        discover(str(tmp_path / "images"), IngestSettings(format="ade20k"))


@pytest.mark.parametrize("labels", ["labels", "v1.2/labels", "v2.0/labels"])
def test_vistas(labels: str, tmp_path: Path) -> None:
    write(tmp_path, *((f"{f}/images/a.jpg", f"{f}/{labels}/a.png") for f in ("training", "validation")), ids=(0, 1, 2))
    write(tmp_path, ("testing/images/b.jpg", ""))
    entries = [
        {"name": name, "color": [n, n, n], "evaluate": n < 3} for n, name in enumerate(("curb", "road", "car"), 1)
    ]
    config = {"labels": "config.json"}.get(labels, f"config_{labels.partition('/')[0]}.json")
    (tmp_path / config).write_text(json.dumps({"labels": entries, "version": "1"}))
    report = ingest(str(tmp_path), f"{tmp_path}/.ds", IngestSettings(format="vistas"))
    assert (report.manifest.classes, report.manifest.colours) == (("curb", "road"), ((1, 1, 1), (2, 2, 2)))
    assert {split: (n.images, n.labelled) for split, n in report.manifest.counts.items()} == {
        "train": (1, 1), "val": (1, 1), "test": (1, 0),
    }  # fmt: skip
    (tmp_path / config).write_text(json.dumps({"labels": [{"name": "curb"}]}))
    with refused("storage/damaged-json", config):
        included_class_map("vistas", str(tmp_path))
    (tmp_path / config).unlink()
    with refused("data/layout", config):
        included_class_map("vistas", str(tmp_path))
