"""Why: masks must come back from a labelling tool as they went out, to the pixel, whatever the tool writes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.label_masks import random_mask, random_size
from tests.refusals import refused
from tests.unit.labels.exports import CLASSES, coco, read, write
from threestage.data.drawings import DRAWINGS
from threestage.data.formats import LABELLING_TOOLS, IngestSettings
from threestage.data.ingest import IngestReport, ingest
from threestage.data.records import decode_mask, labelled_ids, labelled_rows, load_manifest
from threestage.data.rejects import read_rejects
from threestage.labels.label_export import WRITERS
from threestage.labels.rasterise import Bytes
from threestage.labels.readers import READERS

LOSSLESS = ["coco", "cvat", "label-studio", "labelme"]


def masks_of(seed: int, count: int, most: int) -> dict[str, Bytes]:
    rng = np.random.default_rng(seed)
    return {f"in/{n}.jpg": random_mask(rng, random_size(rng, most), len(CLASSES)) for n in range(count)}


def same(format: str, folder: Path, masks: dict[str, Bytes], simplify: float | None = None) -> None:
    write(format, folder, masks, simplify)
    labelled = {name.removesuffix(".jpg"): mask for name, mask in masks.items() if (mask != 255).any()}
    found, _ = read(format, folder, {name.removesuffix(".jpg"): mask.shape for name, mask in masks.items()})
    assert found.keys() == labelled.keys()
    wrong = {name: int((found[name] != mask).sum()) for name, mask in labelled.items()}
    assert not any(wrong.values()), wrong


def test_formats_are_those_of_the_settings() -> None:
    assert sorted(READERS) == sorted(LABELLING_TOOLS) and set(LOSSLESS) | {"masks"} == set(WRITERS)


@pytest.mark.parametrize("format", LOSSLESS)
def test_masks_come_back_as_they_went_out(format: str, tmp_path: Path) -> None:
    same(format, tmp_path, masks_of(0, 30, 50))


@pytest.mark.parametrize("format", LOSSLESS)
def test_polygons_that_are_not_simplified_come_back_too(format: str, tmp_path: Path) -> None:
    same(format, tmp_path, masks_of(1, 8, 30), simplify=0)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("format", LOSSLESS)
def test_a_thousand_masks_come_back(format: str, tmp_path: Path) -> None:
    for seed in range(10):
        same(format, tmp_path / str(seed), masks_of(seed, 100, 300))
    large = np.random.default_rng(5)
    same(format, tmp_path / "large", {"12mp.jpg": random_mask(large, (3000, 4000), len(CLASSES))})


# ---- From an export to a data set


def photos(folder: Path, *names: str, size: tuple[int, int] = (6, 8)) -> str:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)).save(folder / name)
    return str(folder)


def settings(format: str, masks: Path, **others: object) -> IngestSettings:
    return IngestSettings.model_validate({"format": format, "masks": str(masks), **others})


def stored(root: Path) -> dict[str, Bytes]:
    table = labelled_rows(str(root), load_manifest(str(root)), "train")
    return {row["image_id"]: decode_mask(row["mask"]) for row in table.to_pylist()}


TWO: list[dict[str, Any]] = [
    {"segmentation": [[0, 0, 8, 0, 8, 6, 0, 6]], "category_id": 0},
    {"segmentation": [[1, 1, 4, 1, 4, 3, 1, 3]]},
]


def test_an_export_becomes_a_data_set(tmp_path: Path) -> None:
    source = photos(tmp_path / "photos", "a.png", "b.png")
    path = coco(tmp_path / "a.json", TWO)
    report = ingest(source, f"{tmp_path}/ds", settings("coco", path))
    assert (report.added_images, report.added_labels, report.bad) == (2, 1, 0)
    assert report.manifest.classes == ("ground", "thing")
    assert f"{path}: pixels without a region are ignored" in report.warnings
    mask = stored(tmp_path / "ds")["a"]
    assert np.argwhere(mask == 1).tolist() == [[1, 1], [1, 2], [1, 3], [2, 1], [2, 2], [2, 3]] and mask.sum() == 6
    assert not list((tmp_path / "ds").glob(f"{DRAWINGS}*"))
    again = ingest(source, f"{tmp_path}/ds", settings("coco", path))
    assert again.manifest == report.manifest and again.skipped == 2


def test_a_corrected_export_makes_a_new_version(tmp_path: Path) -> None:
    source = photos(tmp_path / "photos", "a.png", "b.png")
    ingest(source, f"{tmp_path}/ds", settings("coco", coco(tmp_path / "a.json", TWO)))
    corrected = coco(tmp_path / "a.json", [TWO[0], {"segmentation": [[0, 0, 1, 0, 1, 1, 0, 1]]}])
    report = ingest(source, f"{tmp_path}/ds", settings("coco", corrected))
    assert (report.added_images, report.added_labels, report.manifest.version) == (0, 1, 2)
    assert np.argwhere(stored(tmp_path / "ds")["a"] == 1).tolist() == [[0, 0]]


def test_regions_that_were_removed_take_the_mask_with_them(tmp_path: Path) -> None:
    source, root = photos(tmp_path / "photos", "a.png", "b.png"), f"{tmp_path}/ds"
    images = [{"id": i, "file_name": f"{name}.png", "height": 6, "width": 8} for i, name in ((3, "a"), (4, "b"))]
    of_b = [{**entry, "image_id": 4} for entry in TWO]

    def again(of_a: list[dict[str, Any]], **others: Any) -> IngestReport:
        export = coco(tmp_path / "a.json", [*of_b, *of_a], images=images)
        return ingest(source, root, settings("coco", export, **others))

    assert again(TWO).manifest.counts["train"].labelled == 2
    emptied = again([])
    assert (emptied.manifest.counts["train"].labelled, list(stored(Path(root)))) == (1, ["b"])
    assert labelled_ids(root, emptied.manifest, "train") == ["b"]
    assert f"{tmp_path}/a.json: 1 images have no region any more and lose their mask: a" in emptied.warnings
    assert again([]).manifest == emptied.manifest, "it is empty already"
    assert again([], unlabelled_pixels="ground").added_labels == 1 and not stored(Path(root))["a"].any()
    assert again(TWO).manifest.counts["train"].labelled == 2 and stored(Path(root))["a"].any()


def test_two_ingests_at_once_do_not_delete_each_others_drawings(tmp_path: Path) -> None:
    root, ended = f"{tmp_path}/ds", list[IngestReport]()

    def other(done: int, of: int) -> None:
        if not ended:
            source = photos(tmp_path / "others", "c.png")
            ended.append(ingest(source, root, settings("coco", coco(tmp_path / "c.json", TWO, images=[C]))))

    C = {"id": 3, "file_name": "c.png", "height": 6, "width": 8}
    chosen = settings("coco", coco(tmp_path / "a.json", TWO)).model_copy(update={"rows_per_file": 1})
    with refused("data/concurrent-ingest"):  # said at the end, not of a file that is missing in the middle
        ingest(photos(tmp_path / "photos", "a.png", "b.png"), root, chosen, other)
    assert ingest(f"{tmp_path}/photos", root, chosen).manifest.counts["train"].images == 3


def test_an_image_that_does_not_fit_its_annotation_is_left_out(tmp_path: Path) -> None:
    source = photos(tmp_path / "photos", "b.png")
    photos(tmp_path / "photos", "a.png", size=(8, 6))
    with refused("data/bad-images", "a.png", "8x6"):
        ingest(source, f"{tmp_path}/ds", settings("coco", coco(tmp_path / "a.json", TWO)))
    (reject,) = read_rejects(f"{tmp_path}/ds/rejected/v0001.parquet")
    assert reject.image_id == "a" and reject.reason.endswith("[mask/size]")


def test_a_class_map_joins_and_ignores_categories(tmp_path: Path) -> None:
    left = {"segmentation": [[0, 0, 4, 0, 4, 6, 0, 6]], "category_id": 0}
    source, path = photos(tmp_path / "photos", "a.png"), coco(tmp_path / "a.json", [left, TWO[1]])
    (tmp_path / "map.yaml").write_text(
        "classes: [{name: other, colour: [0, 0, 0]}, {name: object, colour: [1, 0, 0], categories: [thing]}]\n"
        "ignore: {categories: [ground]}"
    )
    chosen = settings("coco", path, class_map=f"{tmp_path}/map.yaml")
    with refused("data/one-class", "object"):
        ingest(source, f"{tmp_path}/ds", chosen)
    report = ingest(source, f"{tmp_path}/ds", chosen.model_copy(update={"unlabelled_pixels": "other"}))
    assert report.manifest.classes == ("other", "object")
    mask = stored(tmp_path / "ds")["a"]
    assert (mask[:, 4:] == 0).all() and (mask == 1).sum() == 6 and (mask == 255).sum() == 18


def test_masks_among_the_images_are_no_images(tmp_path: Path) -> None:
    photos(tmp_path, "a.jpg", "b.jpg")
    for name, row in (("a_car", 1), ("a_road", 3)):
        mask = np.zeros((6, 8), np.uint8)
        mask[row] = 255
        Image.fromarray(mask).save(tmp_path / f"{name}.png")
    report = ingest(str(tmp_path), f"{tmp_path}/.ds", settings("binary-masks", tmp_path))
    assert (report.added_images, report.added_labels) == (2, 1) and report.manifest.classes == ("car", "road")
    mask = stored(tmp_path / ".ds")["a"]
    assert (mask[1] == 0).all() and (mask[3] == 1).all() and (mask == 255).sum() == 32


@pytest.mark.parametrize(
    "given",
    [{"format": "coco"}, {"format": "images", "unlabelled_pixels": "car"},
     {"format": "folders", "masks": "m", "unlabelled_pixels": "car"}],
)  # fmt: skip
def test_options_that_do_not_fit_the_format_are_refused(given: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="data/format-option"):
        IngestSettings.model_validate(given)
