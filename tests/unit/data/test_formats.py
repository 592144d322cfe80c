"""Why: a data set read with masks or splits mixed up trains without complaint; and what is refused must be named."""

import io
import struct
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from pydantic import ValidationError

from tests.refusals import refused
from threestage.data.classes import ClassMap, Lookup, load_class_map, shipped_class_map
from threestage.data.formats import IngestSettings, SourceItem, discover
from threestage.data.headers import BadImage
from threestage.data.image_validation import BadFile, UnknownValues, check_image, check_mask
from threestage.data.records import decode_image


def touch(root: Path, *names: str, text: str = "") -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def found(root: Path, format: str, **settings: object) -> dict[str, tuple[str | None, str, str | None]]:
    items = discover(str(root), IngestSettings.model_validate({"format": format, **settings}))
    base = f"{root}/"
    return {i.image_id: (i.mask_uri and i.mask_uri.removeprefix(base), i.split, i.problem) for i in items}


def test_folders_pair_by_relative_name(tmp_path: Path) -> None:
    touch(tmp_path, "x/a/1.jpg", "x/b/1.PNG", "x/b/2.jpeg", "x/notes.txt", "x/.DS_Store", "x/.a/3.jpg")
    touch(tmp_path, "y/a/1.png", "y/b/2.png", "y/c/9.png")
    items = discover(str(tmp_path / "x"), IngestSettings(format="folders", masks=str(tmp_path / "y"), split="val"))
    y = f"{tmp_path}/y"
    assert [(i.image_id, i.mask_uri, i.split, i.problem) for i in items] == [
        ("a/1", f"{y}/a/1.png", "val", None),
        ("b/1", None, "val", None),
        ("b/2", f"{y}/b/2.png", "val", None),
        ("c/9", None, "val", "mask without an image [mask/unpaired]"),
    ]


def test_an_image_with_two_masks_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "x/1.jpg", "x/2.jpg", "y/1.png", "y/1.tif", "y/2.png")
    items = discover(str(tmp_path / "x"), IngestSettings(format="folders", masks=str(tmp_path / "y")))
    assert [item.problem for item in items] == [
        f"has two masks, {tmp_path}/y/1.png and {tmp_path}/y/1.tif: keep one [mask/unpaired]",
        None,
    ]


def paired(
    root: Path, suffix: str = "", masks: str = "y", images: str = "x"
) -> tuple[dict[str, str | None], list[str]]:
    """Image id → its mask's path or the problem, and the notes."""
    notes: list[str] = []
    settings = IngestSettings(format="folders", masks=str(root / masks), mask_suffix=suffix)
    items = discover(str(root / images), settings, notes)
    base = f"{root}/{masks}/"
    return {
        item.image_id: item.problem or (item.mask_uri and item.mask_uri.removeprefix(base)) for item in items
    }, notes


def test_masks_of_other_suffixes_are_no_unlabelled_images(tmp_path: Path) -> None:
    touch(tmp_path, "x/1.jpg", "x/2.jpg", "x/3.jpg", "x/4.jpg", "x/5.heic", "x/6.heic", "y/1.png", "y/2.gif", "y/3.JPG")
    found, notes = paired(tmp_path)
    assert found["1"] == "1.png" and found["4"] is None and "5" not in found
    assert "y/2.gif is not read: save it as PNG" in str(found["2"]) and "y/3.JPG is not read" in str(found["3"])
    of_images, of_masks, unlabelled = notes
    assert "1 images have no mask and are unlabelled" in unlabelled and "4.jpg" in unlabelled
    assert of_images.endswith("x: 2 files passed over: 2 .heic") and "1 .gif" in of_masks and "1 .jpg" in of_masks


def test_masks_that_none_is_read_of_are_named_by_suffix(tmp_path: Path) -> None:
    touch(tmp_path, "x/1.jpg", "x/2.jpg", "y/1.gif", "y/2.gif")
    with refused("data/mask-format", "2 .gif"):
        paired(tmp_path)
    touch(tmp_path, "y/other.png")
    assert {"is not read" in str(problem) for problem in paired(tmp_path)[0].values()} == {True, False}


def test_one_end_of_the_names_that_explains_all_masks_is_proposed(tmp_path: Path) -> None:
    touch(tmp_path, "x/a/1.jpg", "x/a/1b.jpg", "y/a/1_mask.png", "y/a/1b_mask.png")
    with refused("data/mask-suffix", "--mask-suffix _mask"):
        paired(tmp_path)
    assert paired(tmp_path, suffix="_mask")[0] == {"a/1": "a/1_mask.png", "a/1b": "a/1b_mask.png"}
    touch(tmp_path, "y/other.png")
    with refused("data/no-pair"):
        paired(tmp_path)
    assert paired(tmp_path, suffix="_mask")[0]["other"] == "mask whose name does not end with _mask [mask/unpaired]"
    touch(tmp_path, "x/3.jpg", "x/4.jpg", "y/3.png", "y/4_mask.png")
    (tmp_path / "y/other.png").unlink()
    found, _ = paired(tmp_path)
    assert found["3"] == "3.png" and found["4_mask"] == "mask without an image; rename it without _mask [mask/unpaired]"
    for wrong in ("_mask.png", "a/b"):
        with pytest.raises(ValidationError, match=r"\[data/mask-suffix\]"):
            IngestSettings(format="folders", masks="y", mask_suffix=wrong)
    with pytest.raises(ValidationError, match=r"\[data/format-option\]"):
        IngestSettings(format="camvid", mask_suffix="_L")


def test_images_and_masks_in_one_folder(tmp_path: Path) -> None:
    here = {"masks": "x", "images": "x"}
    touch(tmp_path, "x/1.jpg", "x/1.png", "x/2.jpg", "x/2.PNG", "x/3.png")
    assert paired(tmp_path, **here)[0] == {"1": "1.png", "2": "2.PNG", "3": None}
    touch(tmp_path, "z/1.png", "z/1_m.png", "z/2.png", "z/2_m.png", "z/3.png", "z/odd_m.png")
    there = {"masks": "z", "images": "z"}
    with refused("data/masks-among-images", "--mask-suffix _m;"):
        paired(tmp_path, **there)
    assert paired(tmp_path, suffix="_m", **there)[0] == {"1": "1_m.png", "2": "2_m.png", "3": None, "odd_m": None}


def test_a_folder_of_masks_in_that_of_images_and_the_other_way_round(tmp_path: Path) -> None:
    touch(tmp_path, "x/1.png", "x/m/1.png")
    assert paired(tmp_path, masks="x/m")[0] == {"1": "1.png"}
    touch(tmp_path, "y/1.png", "y/photos/1.png")
    assert paired(tmp_path, images="y/photos")[0] == {"1": "1.png"}


def test_names_are_paired_whatever_their_unicode_form(tmp_path: Path) -> None:
    nfc, nfd = unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é")
    touch(tmp_path, f"x/{nfc}1.jpg", f"x/{nfd}2.jpg", f"y/{nfd}1.png", f"y/{nfc}2.png")
    assert paired(tmp_path)[0] == {f"{nfc}1": f"{nfd}1.png", f"{nfd}2": f"{nfc}2.png"}
    touch(tmp_path, f"y/{nfc}1.png")  # the mask of the same form is taken, the other is named
    found, _ = paired(tmp_path)
    assert found[f"{nfc}1"] == f"{nfc}1.png"
    assert "U+0065 U+0301 here, U+00E9 there" in str(found[f"{nfd}1"])


def test_the_lists_of_voc_name_images_whatever_their_unicode_form(tmp_path: Path) -> None:
    name, other = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    touch(
        tmp_path,
        f"JPEGImages/{name}.jpg",
        "JPEGImages/v.jpg",
        f"SegmentationClass/{other}.png",
        "SegmentationClass/v.png",
    )
    touch(tmp_path, "ImageSets/Segmentation/train.txt", text=f"\ufeff{other}\r\n")
    touch(tmp_path, "ImageSets/Segmentation/val.txt", text="v")
    assert found(tmp_path, "voc")[f"JPEGImages/{name}"] == (f"SegmentationClass/{other}.png", "train", None)
    (tmp_path / "ImageSets/Segmentation/val.txt").write_bytes("é".encode("latin-1"))
    with refused("data/not-utf8", "val.txt"):
        found(tmp_path, "voc")


def test_images_alone_and_two_files_of_one_id(tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg", "1.png", "2.jpg")
    result = found(tmp_path, "images")
    assert {key: value[:2] for key, value in result.items()} == {"1": (None, "train"), "2": (None, "train")}
    items = discover(str(tmp_path), IngestSettings(format="images"))
    assert [bool(item.problem) for item in items] == [False, True, False]
    assert "1.jpg" in str(items[1].problem)


@pytest.mark.parametrize(
    ("images", "masks"), [("{}/images/f{}.jpg", "{}/masks/f{}.png"), ("{}/f{}.png", "{}annot/f{}.png")]
)
def test_both_layouts_of_camvid(tmp_path: Path, images: str, masks: str) -> None:
    for split, number in (("train", 1), ("val", 2), ("test", 3)):
        touch(tmp_path, images.format(split, number), masks.format(split, number))
    touch(tmp_path, images.format("train", 4))
    assert found(tmp_path, "camvid") == {
        images.format("test", 3)[:-4]: (masks.format("test", 3), "test", None),
        images.format("train", 1)[:-4]: (masks.format("train", 1), "train", None),
        images.format("train", 4)[:-4]: (None, "train", None),
        images.format("val", 2)[:-4]: (masks.format("val", 2), "val", None),
    }
    notes: list[str] = []
    discover(str(tmp_path), IngestSettings(format="camvid"), notes)
    (note,) = notes
    assert "1 images have no mask and are unlabelled" in note and images.format("train", 4) in note
    lonely, unread = masks.format("train", 5), masks.format("train", 4)[:-4] + ".gif"
    touch(tmp_path, lonely, unread)
    discover(str(tmp_path), IngestSettings(format="camvid"), notes)
    assert any("1 masks have no image" in note and lonely in note for note in notes)
    assert "is not read: save it as PNG" in str(found(tmp_path, "camvid")[images.format("train", 4)[:-4]][2])


def voc(root: Path) -> None:
    touch(root, *(f"JPEGImages/{name}.jpg" for name in ("t1", "t2", "v1", "aug", "free")))
    touch(root, *(f"SegmentationClass/{name}.png" for name in ("t1", "t2", "v1")))
    touch(root, "ImageSets/Segmentation/train.txt", text="t1\nt2\n")
    touch(root, "ImageSets/Segmentation/val.txt", text="v1\n")
    touch(root, "ImageSets/Segmentation/trainval.txt", text="t1\nt2\nv1\n")


def test_voc(tmp_path: Path) -> None:
    voc(tmp_path)
    assert found(tmp_path, "voc") == {
        "JPEGImages/aug": (None, "train", None),
        "JPEGImages/free": (None, "train", None),
        "JPEGImages/t1": ("SegmentationClass/t1.png", "train", None),
        "JPEGImages/t2": ("SegmentationClass/t2.png", "train", None),
        "JPEGImages/v1": ("SegmentationClass/v1.png", "val", None),
    }


def test_the_lists_of_voc_name_images_with_spaces_and_dots(tmp_path: Path) -> None:
    names = ("a b", "c.v2", "d")
    touch(tmp_path, *(f"JPEGImages/{name}.jpg" for name in names), *(f"SegmentationClass/{name}.png" for name in names))
    touch(tmp_path, "ImageSets/Segmentation/train.txt", text="a b\nc.v2\n")
    touch(tmp_path, "ImageSets/Segmentation/val.txt", text="d 1\n")
    assert {mask for mask, *_ in found(tmp_path, "voc").values()} == {f"SegmentationClass/{name}.png" for name in names}


def test_augmented_voc_keeps_val_apart_and_names_what_is_absent(tmp_path: Path) -> None:
    voc(tmp_path)
    touch(tmp_path, "SegmentationClassAug/t1.png", "SegmentationClassAug/aug.png", "SegmentationClassAug/v1.png")
    lines = [f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png" for name in ("t1", "t2", "aug", "v1", "lost")]
    touch(tmp_path, "ImageSets/Segmentation/train_aug.txt", text="\n".join(lines))
    (tmp_path / "SegmentationClass/t2.png").unlink()
    assert found(tmp_path, "voc") == {
        "JPEGImages/aug": ("SegmentationClassAug/aug.png", "train", None),
        "JPEGImages/free": (None, "train", None),
        "JPEGImages/lost": (None, "train", "listed in ImageSets/Segmentation but absent [image/missing]"),
        "JPEGImages/t1": ("SegmentationClassAug/t1.png", "train", None),
        "JPEGImages/t2": (None, "train", "listed as labelled but SegmentationClassAug has no mask [image/missing]"),
        "JPEGImages/v1": ("SegmentationClass/v1.png", "val", None),
    }


def test_voc_s_lists_in_the_other_folder_and_its_test_images(tmp_path: Path) -> None:
    voc(tmp_path)
    touch(tmp_path, "SegmentationClassAug/aug.png", "SegmentationClassAug/t1.png", "JPEGImages/held.jpg")
    touch(tmp_path, "ImageSets/SegmentationAug/train_aug.txt", text="t1\naug\n")
    touch(tmp_path, "ImageSets/Segmentation/test.txt", text="held\n")
    result = found(tmp_path, "voc")
    assert result["JPEGImages/aug"] == ("SegmentationClassAug/aug.png", "train", None)
    assert result["JPEGImages/t2"] == (None, "train", None)
    assert result["JPEGImages/held"] == (None, "test", None)


def test_labelled_only(tmp_path: Path) -> None:
    voc(tmp_path)
    (tmp_path / "SegmentationClass/t2.png").unlink()
    assert found(tmp_path, "voc", labelled_only=True) == {
        "JPEGImages/t1": ("SegmentationClass/t1.png", "train", None),
        "JPEGImages/t2": (None, "train", "listed as labelled but SegmentationClass has no mask [image/missing]"),
        "JPEGImages/v1": ("SegmentationClass/v1.png", "val", None),
    }
    touch(tmp_path, "leftImg8bit/train_extra/bonn/bonn_1_leftImg8bit.png")
    with refused("data/no-masks", tmp_path, "labelled_only"):
        found(tmp_path, "cityscapes", labelled_only=True)
    with pytest.raises(ValidationError, match=r"labelled_only: .*\[data/format-option\]"):
        IngestSettings(format="images", labelled_only=True)


def test_cityscapes_without_label_ids_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "leftImg8bit/train/ulm/ulm_1_leftImg8bit.png", "gtFine/train/ulm/ulm_1_gtFine_labelTrainIds.png")
    with refused("data/no-masks", tmp_path, "1 images", "labelIds.png"):
        found(tmp_path, "cityscapes")


def test_cityscapes(tmp_path: Path) -> None:
    for split, city in (("train", "ulm"), ("val", "lindau"), ("test", "berlin")):
        touch(tmp_path, f"leftImg8bit/{split}/{city}/{city}_1_leftImg8bit.png")
        touch(tmp_path, f"gtFine/{split}/{city}/{city}_1_gtFine_labelIds.png", f"gtFine/{split}/{city}/x_color.png")
    touch(tmp_path, "leftImg8bit/train_extra/bonn/bonn_1_leftImg8bit.png")
    notes: list[str] = []
    discover(str(tmp_path), IngestSettings(format="cityscapes"), notes)
    assert notes == []
    touch(tmp_path, "gtFine/val/lindau/lindau_2_gtFine_labelIds.png")
    discover(str(tmp_path), IngestSettings(format="cityscapes"), notes)
    assert len(notes) == 1 and "1 masks have no image" in notes[0] and "lindau_2" in notes[0]
    assert found(tmp_path, "cityscapes") == {
        "leftImg8bit/test/berlin/berlin_1_leftImg8bit": (None, "test", None),
        "leftImg8bit/train/ulm/ulm_1_leftImg8bit": ("gtFine/train/ulm/ulm_1_gtFine_labelIds.png", "train", None),
        "leftImg8bit/train_extra/bonn/bonn_1_leftImg8bit": (None, "train", None),
        "leftImg8bit/val/lindau/lindau_1_leftImg8bit": ("gtFine/val/lindau/lindau_1_gtFine_labelIds.png", "val", None),
    }


@pytest.mark.parametrize(
    ("format", "expected"),
    [("images", "no image"), ("camvid", "trainannot"), ("voc", "JPEGImages"), ("cityscapes", "leftImg8bit/train")],
)
def test_a_wrong_source_is_named_with_what_is_expected(tmp_path: Path, format: str, expected: str) -> None:
    with refused("data/no-files", "nowhere", "does not exist"):
        found(tmp_path / "nowhere", format)
    (tmp_path / "empty").mkdir()
    with refused("data/no-files", "empty"):
        found(tmp_path / "empty", format)
    touch(tmp_path, "empty/readme.txt")
    with refused("data/no-images" if format == "images" else "data/layout", tmp_path, expected) as error:
        found(tmp_path / "empty", format)
    assert "\n" not in str(error.value)


def test_masks_of_folders(tmp_path: Path) -> None:
    touch(tmp_path, "x/a.jpg", "y/b.png")
    with refused("data/format-option", "--masks FOLDER"):
        found(tmp_path, "folders")
    with refused("data/no-pair", tmp_path, "a.png", "b.png"):
        found(tmp_path / "x", "folders", masks=str(tmp_path / "y"))
    with pytest.raises(ValidationError, match=r"masks=y: .*\[data/format-option\]"):
        found(tmp_path, "camvid", masks="y")


def test_an_item_without_a_mask_is_an_unlabelled_image() -> None:
    assert SourceItem("a", "a.jpg", None, "train").problem is None


# Class maps.


def test_the_shipped_maps() -> None:
    sizes = {name: len(shipped_class_map(name).classes) for name in ("camvid", "voc", "cityscapes")}
    assert sizes == {"camvid": 11, "voc": 21, "cityscapes": 19}
    lookup = Lookup(shipped_class_map("cityscapes"), "cityscapes")
    all_ids = lookup(np.arange(34)[None])
    assert isinstance(all_ids, np.ndarray)
    assert all_ids[0, [7, 33, 26, 0, 29]].tolist() == [0, 18, 13, 255, 255] and (all_ids != 255).sum() == 19


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("classes: []", "classes: "),
        ("classes: [{name: a, colour: [1, 2, 300], ids: [0]}]", "classes.0.colour.2"),
        ("classes: [{name: a, colour: [1, 2, 3], ids: [0]}]\nignore: {ids: [0]}", "id 0"),
        ("classes: [{name: a, colour: [1, 2, 3]}, {name: a, colour: [1, 2, 4]}]", "class name a"),
        ("classes: [{name: a, colour: [1, 2, 3]}]\nignored: {}", "ignored: unknown key; did you mean ignore"),
        ("classes: [{name: a, colour: [1, 2, 3], idz: 1}]", "classes.0.idz: unknown key; did you mean ids"),
        ("", "`classes:`"),
        ("classes: [road]", "classes.0='road'"),
        ("classes: [{name: a, colour: #ff0000\n}]", "classes.0.colour=None"),
        ("classes: [{name: a, color: 0xff0000}]", "classes.0.color=16711680"),
        ("classes: [{name: a, colour: [1.0, 0.0, 0.0]}]", "classes.0.colour=[1.0"),
        ("classes: [{name: a, colour: [1, 2, 3, 4]}]", "[R, G, B]"),
        ("classes: [{name: a, colour: red}]", "classes.0.colour='red'"),
        ("classes: [{name: a, colour: [1, 2, 3], color: [1, 2, 3]}]", "classes.0: "),
        ("classes: [{name: a, colour: [1, 2, 3], ids: 0-3}]", "classes.0.ids='0-3'"),
        ("classes: [{name: a, colour: [1, 2, 3], ids: [yes]}]", "classes.0.ids=[True]"),
        ("classes: [{name: a, colour: [1, 2, 3], ids:}]", "classes.0.ids=None"),
        ("classes: [{name: yes, colour: [1, 2, 3]}]", "classes.0.name: "),
    ],
)
def test_a_class_map_is_checked(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "map.yaml").write_text(text)
    with refused("data/class-map", named) as error:
        load_class_map(str(tmp_path / "map.yaml"))
    assert str(error.value).startswith(f"{tmp_path}/map.yaml: ") and "\n" not in str(error.value)
    (tmp_path / "map.yaml").write_text("classes: [")
    with refused("config/not-yaml", tmp_path / "map.yaml", "line 1"):
        load_class_map(str(tmp_path / "map.yaml"))
    with refused("data/class-map", "absent.yaml"):
        load_class_map(str(tmp_path / "absent.yaml"))


def test_spellings_that_can_mean_one_thing_only(tmp_path: Path) -> None:
    (tmp_path / "plain.yaml").write_text(
        """
classes:
  - {name: a, colour: [255, 0, 16], ids: [1]}
  - {name: b, colour: [0, 255, 0], ids: [2, 3], colours: [[1, 2, 3]]}
ignore: {ids: [255]}
"""
    )
    (tmp_path / "other.yaml").write_text(
        """
classes:
  - {name: a, color: '#FF0010', ids: 1}
  - {name: b, color: 0f0, id: [2, 3], colors: [1, 2, 3]}
ignore: 255
"""
    )
    plain, other = (load_class_map(f"{tmp_path}/{name}.yaml") for name in ("plain", "other"))
    assert other == plain and other.classes[1].colours == ((1, 2, 3),)


# Files.

MAP = ClassMap.model_validate(
    {
        "classes": [
            {"name": "a", "colour": [9, 9, 9], "ids": [1, 300]},
            {"name": "b", "colour": [8, 0, 0], "ids": [2]},
        ],
        "ignore": {"ids": [3], "colours": [[0, 0, 0]]},
    }
)


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def mask_of(data: bytes, size: tuple[int, int] = (1, 3)) -> list[list[int]]:
    return check_mask(data, Lookup(MAP, "map"), size, "m.png").tolist()


def test_palette_ids_stay_ids() -> None:
    image = Image.fromarray(np.array([[1, 2, 3]], np.uint8)).convert("P")
    image.putpalette([200, 100, 50] * 256)
    assert mask_of(encoded(image)) == [[0, 1, 255]]
    assert mask_of(encoded(image, bits=2)) == [[0, 1, 255]]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_ids_of_one_channel(dtype: type[np.generic]) -> None:
    ids = np.array([[1, 2, 3]], dtype)
    assert mask_of(encoded(Image.fromarray(ids))) == [[0, 1, 255]]


def test_ids_over_255() -> None:
    assert mask_of(encoded(Image.fromarray(np.array([[300, 2, 3]], np.uint16)))) == [[0, 1, 255]]


def test_grey_png_of_two_bits_is_not_stretched() -> None:
    import struct
    import zlib

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", 3, 1, 2, 0, 0, 0, 0)
    pixels = zlib.compress(bytes([0, 0b01101100]))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    assert mask_of(png) == [[0, 1, 255]]


def test_colours_and_opaque_alpha() -> None:
    colours = np.array([[[9, 9, 9], [8, 0, 0], [0, 0, 0]]], np.uint8)
    assert mask_of(encoded(Image.fromarray(colours))) == [[0, 1, 255]]
    assert mask_of(encoded(Image.fromarray(colours).convert("RGBA"))) == [[0, 1, 255]]


def test_bad_masks_are_named_with_value_and_place() -> None:
    ids = np.array([[1, 2, 1], [2, 37, 0]], np.uint8)
    with refused("mask/unknown-value", "m.png", "id 37 at (1, 1)", "class map map", error=BadFile):
        mask_of(encoded(Image.fromarray(ids)), (2, 3))
    several = np.array([[[7, 0, 0], [7, 0, 1]], [[7, 0, 0], [9, 9, 9]]], np.uint8)
    with pytest.raises(UnknownValues) as error:
        mask_of(encoded(Image.fromarray(several)), (2, 2))
    assert error.value.pixels == {"[7, 0, 0]": 2, "[7, 0, 1]": 1}
    colours = np.array([[[9, 9, 9], [7, 0, 0]]], np.uint8)
    with refused("mask/unknown-value", "colour [7, 0, 0] at (0, 1)", error=BadFile):
        mask_of(encoded(Image.fromarray(colours)), (1, 2))
    with refused("mask/size", "m.png", "3x2", "3x1", error=BadFile):
        mask_of(encoded(Image.fromarray(ids)), (1, 3))
    with refused("mask/lossy", "JPEG", error=BadFile):
        mask_of(encoded(Image.fromarray(ids), "JPEG"), (2, 3))


def photo(mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def test_a_good_image_keeps_its_bytes() -> None:
    for data in (encoded(photo(), "JPEG"), encoded(photo()), encoded(photo("L"), "JPEG")):
        checked = check_image(data)
        assert checked.data is data and (checked.height, checked.width) == (40, 60)


@pytest.mark.parametrize(("format", "cut"), [("JPEG", 1), ("JPEG", 100), ("JPEG", 1500), ("PNG", 20), ("PNG", 3000)])
def test_a_file_cut_short_is_refused(format: str, cut: int) -> None:
    with refused("image/undecodable", error=BadFile):
        check_image(encoded(photo(), format)[:-cut])


def test_a_png_with_a_flipped_bit_is_refused() -> None:
    data = bytearray(encoded(photo()))
    data[len(data) // 2] ^= 1
    with refused("image/undecodable", error=BadFile):
        check_image(bytes(data))


def test_exif_turns_the_image() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(photo(), "JPEG", exif=exif, quality=100, subsampling=0)
    checked = check_image(data)
    assert (checked.height, checked.width) == (60, 40)
    turned = np.rot90(np.asarray(Image.open(io.BytesIO(data))), -1)
    assert np.abs(decode_image(checked.data).astype(int) - turned).mean() < 4
    assert np.array_equal(decode_image(data), turned)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 10))
def test_an_image_is_turned_once(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photo(), format, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(decode_image(data), expected)
    checked = check_image(data)
    assert (checked.height, checked.width) == expected.shape[:2]
    assert np.abs(decode_image(checked.data).astype(int) - expected).mean() < 4


@pytest.mark.parametrize(("tag", "value"), [(0x011A, "72"), (0x0128, "2"), (0x0100, "60"), (0x0106, "2")])
def test_an_odd_entry_beside_the_turn_does_no_harm(tag: int, value: str) -> None:
    """As cameras and editors write them: Pillow cannot write these anew, and need not."""
    exif = Image.Exif()
    exif[0x0112] = 6
    plain = encoded(photo(), "JPEG", exif=exif)
    entry = struct.pack(">HHI4s", tag, 2, 2, value.encode()[:1])  # an ASCII entry with one character
    head, body = exif.tobytes(), struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
    odd = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2) + b"".join(sorted([entry, body])) + bytes(4)
    data = plain.replace(struct.pack(">H", len(head) + 2) + head, struct.pack(">H", len(odd) + 2) + odd)
    assert data != plain
    assert np.array_equal(decode_image(data), decode_image(plain))
    assert check_image(data).data == check_image(plain).data


@pytest.mark.filterwarnings("default:Corrupt EXIF data")
def test_a_tiff_whose_next_page_is_nowhere_is_one_image() -> None:
    data = encoded(photo(), "TIFF")
    [directory] = struct.unpack_from("<I", data, 4)
    [entries] = struct.unpack_from("<H", data, directory)
    place = directory + 2 + 12 * entries
    for nowhere in (8, len(data) + 5, 11):
        broken = data[:place] + struct.pack("<I", nowhere) + data[place + 4 :]
        assert check_image(broken).data == broken
        assert np.array_equal(decode_image(broken), decode_image(data))


@pytest.mark.parametrize(("dtype", "bits"), [(np.uint16, 16), (np.int32, 32), (np.float32, 32)])
def test_more_than_8_bits_are_refused_not_whitened(dtype: type, bits: int) -> None:
    data = encoded(Image.fromarray(np.arange(12, dtype=dtype).reshape(3, 4)), "TIFF")
    with refused("image/bits", f"{bits} bits", error=BadImage):
        decode_image(data)
    with refused("image/bits", f"{bits} bits", error=BadFile):
        check_image(data)


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA"])
def test_other_modes_are_converted(mode: str) -> None:
    image = photo(mode)
    checked = check_image(encoded(image))
    assert np.array_equal(decode_image(checked.data), np.asarray(image.convert("RGB")))


def test_cmyk_is_converted() -> None:
    checked = check_image(encoded(photo("CMYK"), "JPEG"))
    assert Image.open(io.BytesIO(checked.data)).mode == "RGB"


def test_what_is_not_converted_is_refused_by_name() -> None:
    sixteen = encoded(Image.fromarray(np.zeros((4, 4), np.uint16)))
    clear = photo("RGBA")
    clear.putalpha(100)
    frames = encoded(photo(), "TIFF", save_all=True, append_images=[photo("L")])
    cases = {
        b"": "image/undecodable",
        b"text": "image/undecodable",
        sixteen: "image/bits",
        encoded(clear): "image/transparent",
        frames: "image/frames",
    }
    for data, code in cases.items():
        with refused(code, error=BadFile):
            check_image(data)
