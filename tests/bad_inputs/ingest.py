"""What people hand to `threestage ingest`: names, masks, class maps and lists that do not fit."""

import unicodedata
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from tests.bad_inputs import BadInput, Ended, refused, threestage

CLASSES = "  - {name: ground, colour: [10, 20, 30], ids: [0]}\n  - {name: thing, colour: [200, 0, 0], ids: [1]}\n"
CLASS_MAP = f"classes:\n{CLASSES}ignore: {{ids: [255]}}\n"
OTHER_FORM = unicodedata.normalize("NFD", "é")


def scenes(folder: Path, number: int = 4, image: str = "images/{}.png", mask: str = "masks/{}.png") -> None:
    """Images and masks of two classes, and the class map."""
    (folder / "classes.yaml").write_text(CLASS_MAP)
    for index in range(number):
        pixels = np.random.default_rng(index).integers(0, 255, (16, 16, 3), np.uint8)
        ids = np.array([[index % 2], [1 - index % 2]], np.uint8).repeat(16, 1).repeat(8, 0)
        for name, content in ((image, pixels), (mask, ids)):
            file = folder / name.format(f"é{index}")
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(content).save(file)


def ingest(*options: object, source: str = "images", masks: str = "masks", out: str = "data") -> Ended:
    given = ("--masks", masks, "--class-map", "classes.yaml", "--local", *options)
    return threestage("ingest", source, out, *given)


def ended(done: Ended, *words: str) -> str:
    """`refused [code]`, or "ingested" with those of the words that the command printed."""
    if done.code:
        return refused(done)
    return ", ".join(["ingested", *(word for word in words if word in done.text)])


def in_turn(folder: Path) -> str:
    scenes(folder)
    scenes(folder, mask="other/{}.png")
    for index in (0, 1):
        Image.fromarray(np.array([[0, 1] * 8] * 16, np.uint8)).save(folder / f"other/é{index}.png")
    for masks in ("masks", "other", "masks"):
        done = ingest(masks=masks)
    return ended(done, "2 labels added")


def mask_suffix(folder: Path) -> str:
    scenes(folder, mask="masks/{}_mask.png")
    first = ingest()
    return f"{refused(first)}; {ended(ingest('--mask-suffix', '_mask'), '4 labels added')}"


def other_suffixes(folder: Path) -> str:
    scenes(folder)
    scenes(folder, 2, mask="masks/{}.gif")
    for index in (0, 1):
        (folder / f"masks/é{index}.png").unlink()
    (folder / "images/photo.heic").write_bytes(b"")
    return ended(ingest("--max-bad-fraction", 1), "2 labels added", "2 left out", "2 .gif", "1 .heic")


def only(suffix: str, folder: Path) -> str:
    scenes(folder, mask=f"masks/{{}}.{suffix}")
    return ended(ingest())


def one_folder(folder: Path) -> str:
    scenes(folder, image="all/{}.jpg", mask="all/{}.png")
    return ended(ingest(source="all", masks="all"), "4 labels added")


def other_unicode_form(folder: Path) -> str:
    scenes(folder)
    for file in (folder / "masks").iterdir():
        file.rename(file.with_name(file.name.replace("é", OTHER_FORM)))
    return ended(ingest(), "4 labels added")


def same_bytes(folder: Path, split: str, other_mask: bool) -> str:
    scenes(folder)
    ingest()
    for kind in ("images", "masks"):
        (folder / f"more/{kind}").mkdir(parents=True)
        for index in (0, 1):
            (folder / f"more/{kind}/copy{index}.png").write_bytes((folder / f"{kind}/é{index}.png").read_bytes())
    if other_mask:
        (folder / "more/masks/copy0.png").write_bytes((folder / "masks/é1.png").read_bytes())
    done = ingest("--split", split, source="more/images", masks="more/masks")
    return ended(done, "2 images are in two splits", "é0 (train) and copy0 (val)")


def with_map(text: str | bytes, folder: Path) -> str:
    scenes(folder)
    (folder / "classes.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return ended(ingest(), "no labelled pixel of other")


def background_and_255(folder: Path) -> str:
    scenes(folder)
    for file in (folder / "masks").iterdir():
        Image.fromarray(np.asarray(Image.open(file)) * np.uint8(255)).save(file)
    done = ingest()
    return f"{refused(done)}{', the map offered' * ('name: thing, colour: [200, 0, 0], ids: [255]' in done.err)}"


def voc_list(content: bytes, folder: Path) -> str:
    scenes(folder, 60, "voc/JPEGImages/{}.jpg", "voc/SegmentationClass/{}.png")
    lists = folder / "voc/ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_bytes(content)
    (lists / "val.txt").write_text("é59\n")
    return ended(threestage("ingest", "voc", "data", "--format", "voc", "--local"), "60 labels added")


def deleted_since(folder: Path) -> str:
    scenes(folder)
    (folder / "images/bad.png").write_bytes(b"")
    options = ("ingest", "images", "data", "--format", "images", "--local", "--max-bad-fraction", 0.5)
    first = threestage(*options)
    (folder / "images/bad.png").unlink()
    return f"{ended(first, '1 left out')}; {ended(threestage(*options), '0 left out')}"


def row(what: str, expected: str, try_it: Callable[..., str], *given: object) -> BadInput:
    return BadInput(what, expected, partial(try_it, *given) if given else try_it)


def with_key(old: str, new: str) -> str:
    return CLASS_MAP.replace(old, new)


NAMES = [f"é{index}" for index in range(59)]
BAD_INPUTS = [
    row("masks A, then B, then A again", "ingested, 2 labels added", in_turn),
    row(
        "masks named IMAGE_mask.png",
        "refused [data/mask-suffix]; ingested, 4 labels added",
        mask_suffix,
    ),
    row(
        "two of four masks are GIF, one HEIC among the images",
        "ingested, 2 labels added, 2 left out, 2 .gif, 1 .heic",
        other_suffixes,
    ),
    row("all masks are GIF", "refused [data/mask-format]", only, "gif"),
    row("--masks is the folder of the images, JPEG beside PNG", "ingested, 4 labels added", one_folder),
    row("names of images in NFC, of masks in NFD", "ingested, 4 labels added", other_unicode_form),
    row(
        "one image in train and val",
        "ingested, 2 images are in two splits, é0 (train) and copy0 (val)",
        lambda folder: same_bytes(folder, "val", False),
    ),
    row(
        "one image twice with different masks",
        "refused [data/contradicting-masks]",
        lambda folder: same_bytes(folder, "train", True),
    ),
    row("masks of 0 and 255 with 255 ignored", "refused [data/one-class], the map offered", background_and_255),
    row(
        "a class of the map that no mask shows",
        "ingested, no labelled pixel of other",
        with_map,
        with_key("ignore:", "  - {name: other, colour: [1, 2, 3], ids: [2]}\nignore:"),
    ),
    row("a class map in Latin-1", "refused [data/not-utf8]", with_map, with_key("thing", "é").encode("latin-1")),
    row("a class map with a key twice", "refused [config/repeated-key]", with_map, CLASS_MAP + "ignore: {}\n"),
    row(
        "a class map with color, '#rrggbb' and a bare id",
        "ingested",
        with_map,
        with_key("colour: [10, 20, 30], ids: [0]", "color: '#0a141e', ids: 0"),
    ),
    row(
        "a class map with a hex colour without quotes",
        "refused [data/class-map]",
        with_map,
        with_key("colour: [10, 20, 30], ids: [0]}", "ids: [0], colour: #0a141e\n    }"),
    ),
    row(
        "a VOC list with a byte order mark",
        "ingested, 60 labels added",
        voc_list,
        "\r\n".join(NAMES).encode("utf-8-sig"),
    ),
    row("a VOC list in Latin-1", "refused [data/not-utf8]", voc_list, "\n".join(NAMES).encode("latin-1")),
    row("a bad image that was deleted since", "ingested, 1 left out; ingested, 0 left out", deleted_since),
]
