"""Why: CVAT has two exports that hold masks, and its XML comes from strangers."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.refusals import refused
from tests.unit.labels.exports import read
from threestage.labels import cvat
from threestage.labels.cvat import _pieces

LABELS = "<meta><task><labels><label><name>ground</name><color>#090909</color></label></labels></task></meta>"
SIZES = {"in/a": (6, 8)}
NAMES = ["ground", "thing"]


def xml(path: Path, *shapes: str, head: str = "", image: str = 'id="0" name="in/a.jpg" width="8" height="6"') -> Path:
    path.write_text(f"{head}<annotations>{LABELS}<image {image}>{''.join(shapes)}</image></annotations>")
    return path


def test_polygons_masks_and_ellipses_in_the_order_of_z(tmp_path: Path) -> None:
    path = xml(
        tmp_path / "annotations.xml",
        '<polygon label="thing" z_order="1" points="0.00,0.00;2,0;2,2;0,2"/>',
        '<polygon label="ground" z_order="0" points="0,0;3,0;3,1;0,1"/>',
        '<mask label="thing" rle="1, 2, 1" left="4" top="3" width="2" height="2" z_order="0"/>',
        '<ellipse label="ground" cx="7.5" cy="5.5" rx="0.6" ry="0.6"/>',
        '<box label="thing" xtl="0" ytl="0" xbr="1" ybr="1"/>',
    )
    masks, notes = read("cvat", path, SIZES, NAMES)
    thing = np.argwhere(masks["in/a"] == 1).tolist()
    assert thing == [[0, 0], [0, 1], [1, 0], [1, 1], [3, 5], [4, 4]]
    assert np.argwhere(masks["in/a"] == 0).tolist() == [[0, 2], [5, 7]]
    assert notes[-1] == f"{path}: not read: 1 shapes of kind box"


def test_an_image_without_shapes_is_labelled_where_unlabelled_pixels_are_a_class(tmp_path: Path) -> None:
    path = xml(tmp_path / "a.xml")
    assert read("cvat", path, SIZES, NAMES)[0] == {}
    masks, notes = read("cvat", path, SIZES, NAMES, unlabelled="ground")
    assert (masks["in/a"] == 0).all() and "class ground" in notes[0]


BOMB = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;">]>'
OUTSIDE = '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]>'


@pytest.mark.parametrize(
    ("head", "shape"),
    [
        (BOMB, ""),
        (OUTSIDE, ""),
        ("", "<polygon points='1,1'/>"),
        ("", "<polygon label='a' points='1,x'/>"),
        ("", "<mask label='a' rle='1' left='0' top='0' width='1'/>"),
        ("", "<polygon"),
        ("", "<track id='0'/>"),
        ("", "<a>" * 40),
        ("\0", ""),
    ],
)
def test_xml_that_cannot_be_read_is_refused(head: str, shape: str, tmp_path: Path) -> None:
    with refused("data/annotations", "a.xml"):
        read("cvat", xml(tmp_path / "a.xml", shape, head=head), SIZES, NAMES)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_bomb_is_refused_before_anything_of_it_is_parsed(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The handlers of expat end with the first error, and it parses the rest of what it was given: so it is given no more."""
    rest, read_pieces = "<annotations>&b;</annotations>" + " " * 99, list[bytes]()

    def pieces(stream: object, document: object) -> Iterator[bytes]:
        for piece in _pieces(stream, document):  # type: ignore[arg-type]
            read_pieces.append(piece)
            yield piece

    monkeypatch.setattr(cvat, "_pieces", pieces)
    (tmp_path / "a.xml").write_bytes((BOMB + rest).encode(encoding))
    with refused("data/annotations", "DOCTYPE"):
        read("cvat", tmp_path / "a.xml", SIZES, NAMES)
    assert b"".join(read_pieces) in BOMB.encode(encoding)


def test_a_part_that_is_too_large_is_refused_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cvat, "MAX_ELEMENT", 2000)
    monkeypatch.setattr(cvat, "CHUNK_BYTES", 500)
    monkeypatch.setattr(cvat, "MAX_HEAD", 100)
    shape = '<polygon label="thing" points="{}"/>'
    for shapes in ([shape.format("1,1;" * 10_000)], [shape.format("1,1;" * 50 + "1,1")] * 20):
        with refused("data/annotations", "2000 bytes"):
            read("cvat", xml(tmp_path / "a.xml", *shapes), SIZES, NAMES)
    with refused("data/annotations", "first 100 bytes"):
        read("cvat", xml(tmp_path / "a.xml", head=f"<!--{'x' * 200}-->"), SIZES, NAMES)


def test_segmentation_masks_of_any_subset(tmp_path: Path) -> None:
    (tmp_path / "SegmentationClass/in").mkdir(parents=True)
    text = "# label:color_rgb:parts:actions\nbackground:0,0,0::\nthing:200,0,0::\nground:9,9,9::\n"
    (tmp_path / "labelmap.txt").write_text(text)
    mask = np.zeros((6, 8, 3), np.uint8)
    mask[1, 1], mask[2, 2] = (200, 0, 0), (9, 9, 9)
    Image.fromarray(mask).save(tmp_path / "SegmentationClass/in/a.png")
    found = read("cvat", tmp_path, SIZES, NAMES)[0]["in/a"]
    assert found[1, 1] == 1 and found[2, 2] == 0 and (found == 255).sum() == 46, "background has no region"
    (tmp_path / "labelmap.txt").write_text("thing:200,0::\n")
    with refused("data/annotations", "labelmap.txt", "thing:200,0::"):
        read("cvat", tmp_path, SIZES, NAMES)
