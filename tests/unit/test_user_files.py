"""Why: editors of other systems write byte order marks, Latin-1 and UTF-16; a line read wrongly loses an image's label."""

from pathlib import Path

import pytest

from tests.refusals import refused
from threestage.data.storage import read_lines
from threestage.user_files import lines_of, read_yaml, text_of


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_byte_order_mark_and_line_ends_of_all_systems(end: str) -> None:
    text = end.join(["", "é 1", "  b\u2028c ", ""])
    for encoding in ("utf-8", "utf-8-sig"):
        assert lines_of(text.encode(encoding), "list.txt") == ["é 1", "b\u2028c"]


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ("a\né".encode("latin-1"), "byte 0xe9 is not (byte 2, line 2)"),
        ("a".encode("utf-16"), "it is UTF-16 (byte 0, line 1)"),
    ],
)
def test_other_encodings_are_refused_with_the_place(content: bytes, place: str, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(content)
    for read in (
        lambda: text_of(content, "x"),
        lambda: read_yaml(content, "x"),
        lambda: read_lines(f"{tmp_path}/list.txt"),
    ):
        with refused("data/not-utf8", place):
            read()


def test_a_key_that_stands_twice_is_refused_at_every_depth() -> None:
    for text in ("a: 1\nb: 2\na: 3", "x: [{a: 1,\n b: 2,\n a: 3}]", "x: &x {a: 1}\ny: {<<: *x, b: 1,\nb: 2}"):
        with refused("config/repeated-key", "x.yaml"):
            read_yaml(text, "x.yaml")
    assert read_yaml("x: &x {a: 1}\ny: {<<: *x, a: 2}\nz: [*x, *x]", "x.yaml")["y"] == {"a": 2}
